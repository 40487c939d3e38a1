"""StarCoder 2: an FFN without a gate, biases everywhere, layer norms."""

from moeify.families import Family, FFNFormat

FAMILY = Family("starcoder2", ffn=FFNFormat(gate=None, up="mlp.c_fc", down="mlp.c_proj"), tiny={"sliding_window": None})
