"""Command R: attention and FFN beside each other, layer norms, scaled logits."""

from moeify.families import Family

FAMILY = Family("cohere")
