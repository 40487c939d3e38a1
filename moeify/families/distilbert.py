"""DistilBERT: BERT of half as many blocks, its FFN a module without a gate."""

from moeify.families import Family, FFNFormat

FAMILY = Family(
    "distilbert",
    blocks="distilbert.transformer.layer",
    read="ffn",
    write="ffn",
    auto="AutoModel",
    ffn=FFNFormat(gate=None, up="ffn.lin1", down="ffn.lin2"),
    activation="activation",
    width="hidden_dim",
    tiny={"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64},
)
