"""vLLM, which reads the written folder."""

from moeify.engines import Engine

ENGINE = Engine("vLLM", tested="0.32.0, CPU, float32: same greedy tokens and perplexity for every target, 2026-11-26")
