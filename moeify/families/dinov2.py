"""DINOv2: patches of an image, an FFN without a gate, biases everywhere, its output scaled before it is added."""

from moeify.families import Family, FFNFormat

FAMILY = Family(
    "dinov2",
    blocks="dinov2.encoder.layer",
    auto="AutoModel",
    ffn=FFNFormat(gate=None, up="mlp.fc1", down="mlp.fc2"),
    modality="image",
    tiny={"mlp_ratio": 2},
)
