"""Is it exact, and how good is it: verify, evaluate, compare."""
