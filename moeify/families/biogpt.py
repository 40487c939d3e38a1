"""BioGPT: learned positions, an FFN that is two matrices of the block itself, without a gate, biases everywhere."""

from moeify.families import Family, FFNFormat

FAMILY = Family(
    "biogpt",
    blocks="biogpt.layers",
    read="fc1",
    write="fc2",
    between=("activation_fn",),
    ffn=FFNFormat(gate=None, up="fc1", down="fc2"),
    tiny={"pad_token_id": 0},
)
