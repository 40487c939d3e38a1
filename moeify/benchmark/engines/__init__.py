"""Times converted models in engines that people run, beside transformers: llama.cpp, by its own programs."""
