"""MPT: attention with a slope in place of positions; the FFN's module adds the residual itself."""

from moeify.families import Family, FFNFormat

FAMILY = Family(
    "mpt",
    blocks="transformer.blocks",
    read="ffn.up_proj",
    write="ffn.down_proj",
    between=("ffn.act",),
    ffn=FFNFormat(gate=None, up="ffn.up_proj", down="ffn.down_proj"),
    activation="gelu",
)
