"""vLLM, which reads the written folder."""

from moeify.engines import Engine

ENGINE = Engine("vLLM", tested="from source, 2026-11-25")
