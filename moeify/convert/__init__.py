"""From a dense model to a plan: preparation, one layer after another, search, the pipeline."""
