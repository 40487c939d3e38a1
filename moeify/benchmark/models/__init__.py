"""The benchmark of whole models."""
