"""The version, in a file of its own so that neither the build nor `moeify --version` imports torch."""

__version__ = "0.1.0"
