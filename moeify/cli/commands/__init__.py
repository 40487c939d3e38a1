"""One command a file: its options, and the call that it makes. Nothing heavy is imported before it runs."""
