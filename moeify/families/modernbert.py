"""ModernBERT: an encoder with rotary positions, norms in front, and a gated FFN of one fused matrix."""

from moeify.families import Family, FFNFormat

FAMILY = Family(
    "modernbert",
    auto="AutoModel",
    ffn=FFNFormat(gate="mlp.Wi", up="mlp.Wi", down="mlp.Wo", fused=True),
    activation="hidden_activation",
)
