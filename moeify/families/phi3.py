"""Phi-3, Phi-3.5 and Phi-4-mini: llama with q, k and v in one matrix, and gate and up in another."""

from moeify.families import Family, FFNFormat, GGUFFormat

FUSED = "mlp.gate_up_proj"
FAMILY = Family("phi3", ffn=FFNFormat(gate=FUSED, up=FUSED, fused=True), gguf=GGUFFormat("phi3"))
