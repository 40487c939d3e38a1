"""StarCoder 2: an FFN without a gate, biases everywhere, layer norms."""

from moeify.families import Family, FFNFormat, GGUFFormat

FAMILY = Family(
    "starcoder2",
    ffn=FFNFormat(gate=None, up="mlp.c_fc", down="mlp.c_proj"),
    gguf=GGUFFormat(
        "starcoder2",
        activation="gelu_pytorch_tanh",
        refuse=lambda config: "" if config.use_bias else "it adds biases everywhere, this model has none",
    ),
    tiny={"sliding_window": None},
)
