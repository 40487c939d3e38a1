"""Where experts come from, and how the chosen ones are weighted."""
