"""GLM-4-0414: glm with norms behind attention and FFN as well."""

from moeify.families import Family, FFNFormat

FUSED = "mlp.gate_up_proj"
FAMILY = Family("glm4", ffn=FFNFormat(gate=FUSED, up=FUSED, fused=True), tiny={"head_dim": 8})
