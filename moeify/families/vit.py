"""ViT, also DeiT-like classifiers of that class: patches of an image, an FFN without a gate, biases everywhere."""

from moeify.families import Family, FFNFormat

FAMILY = Family(
    "vit",
    blocks="vit.layers",
    auto="AutoModel",
    ffn=FFNFormat(gate=None, up="mlp.fc1", down="mlp.fc2"),
    modality="image",
)
