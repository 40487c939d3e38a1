"""GPT-J: attention and FFN beside each other, pairs of rows rotate, no gate, biases in FFN and head."""

from moeify.families import Family, FFNFormat

FAMILY = Family(
    "gptj",
    blocks="transformer.h",
    ffn=FFNFormat(gate=None, up="mlp.fc_in", down="mlp.fc_out"),
    activation="activation_function",
    width="n_inner",
    tiny={"n_inner": 64, "rotary_dim": 4, "tie_word_embeddings": False},
)
