"""SGLang, which reads the written folder."""

from moeify.engines import Engine

ENGINE = Engine("SGLang", tested="from source, 2026-11-26")
