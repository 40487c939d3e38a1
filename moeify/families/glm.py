"""GLM-4-9B: llama with fused gate and up, biases on q, k and v, and a rotation of pairs in a part of each head."""

from moeify.families import Family, FFNFormat

FUSED = "mlp.gate_up_proj"
FAMILY = Family("glm", ffn=FFNFormat(gate=FUSED, up=FUSED, fused=True), rotates_pairs=True, tiny={"head_dim": 8})
