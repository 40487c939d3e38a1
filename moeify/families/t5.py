"""T5 and Flan-T5: an encoder and a decoder of text, positions told by biases; 1.1 and later with a gate."""

from dataclasses import replace
from typing import Any

from moeify.families import Family, FFNFormat

GATED = FFNFormat(gate="DenseReluDense.wi_0", up="DenseReluDense.wi_1", down="DenseReluDense.wo")


def variant(config: Any) -> dict[str, Any]:
    """The first T5 has no gate."""
    return {} if config.is_gated_act else {"ffn": replace(GATED, gate=None, up="DenseReluDense.wi")}


FAMILY = Family(
    "t5",
    blocks=("encoder.block.*.layer.1", "decoder.block.*.layer.2"),
    read="DenseReluDense",
    write="DenseReluDense",
    auto="AutoModelForSeq2SeqLM",
    activation="dense_act_fn",
    width="d_ff",
    ffn=GATED,
    variant=variant,
    tiny={"d_kv": 8, "num_decoder_layers": 2, "feed_forward_proj": "gated-gelu", "pad_token_id": 0},
)
