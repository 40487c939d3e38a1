"""From a plan to a checkpoint on disk."""
