"""SigLIP's tower of images: patches, an FFN without a gate, biases everywhere, a head that pools by attention."""

from moeify.families import Family, FFNFormat

FAMILY = Family(
    "siglip_vision_model",
    blocks="vision_model.encoder.layers",
    auto="AutoModel",
    ffn=FFNFormat(gate=None, up="mlp.fc1", down="mlp.fc2"),
    modality="image",
)
