"""`python -m moeify` is the command line."""

from moeify.cli.app import main

main()
