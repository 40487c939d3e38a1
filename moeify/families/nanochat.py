"""nanochat: norms without weights, squared ReLU without a gate, capped logits."""

from moeify.families import Family, FFNFormat

FAMILY = Family(
    "nanochat",
    ffn=FFNFormat(gate=None, up="mlp.fc1", down="mlp.fc2"),
)
