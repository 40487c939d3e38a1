"""llama.cpp, which reads GGUF."""

from moeify.engines import Engine

ENGINE = Engine("llama.cpp", tested="from source, 2026-11-25")
