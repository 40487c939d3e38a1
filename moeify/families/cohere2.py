"""Command R7B: cohere with a sliding window, and rotation in the layers with a window alone."""

from moeify.families import Family

FAMILY = Family("cohere2", tiny={"sliding_window": 16, "sliding_window_pattern": 2})
