"""The benchmark of one layer."""
