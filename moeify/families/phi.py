"""Phi-1, Phi-1.5 and Phi-2: attention and FFN beside each other, no gate, biases everywhere."""

from moeify.families import Family, FFNFormat

FAMILY = Family(
    "phi",
    ffn=FFNFormat(gate=None, up="mlp.fc1", down="mlp.fc2"),
    tiny={"tie_word_embeddings": False},
)
