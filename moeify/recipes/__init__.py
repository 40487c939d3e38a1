"""Recipes: one YAML file a result."""
