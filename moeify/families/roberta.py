"""RoBERTa: BERT with other tokens, and positions that begin behind the padding token."""

from moeify.families import Family, FFNFormat

FAMILY = Family(
    "roberta",
    blocks="roberta.encoder.layer",
    read="intermediate",
    write="output.dense",
    auto="AutoModel",
    ffn=FFNFormat(gate=None, up="intermediate.dense", down="output.dense"),
    reserved=lambda config: int(config.pad_token_id) + 1,
    tiny={"pad_token_id": 0, "max_position_embeddings": 66},
)
