"""StableLM 2: layer norms with biases, a rotation of a part of each head."""

from moeify.families import Family

FAMILY = Family("stablelm")
