"""OPT: learned positions, an FFN that is two matrices of the block itself, without a gate, biases everywhere."""

from moeify.families import Family, FFNFormat

FAMILY = Family(
    "opt",
    blocks="model.decoder.layers",
    read="fc1",
    write="fc2",
    between=("activation_fn",),
    ffn=FFNFormat(gate=None, up="fc1", down="fc2"),
    activation="activation_function",
    width="ffn_dim",
    tiny={"ffn_dim": 64, "word_embed_proj_dim": 32},
)
