"""A GGUF file of a checkpoint, as llama.cpp reads it, by the gguf package alone."""
