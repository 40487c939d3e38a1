"""`python -m moeify` is the command line."""

from moeify.cli import main

main()
