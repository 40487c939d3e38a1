"""BART: an encoder and a decoder of text; FFNs without a gate, with biases."""

from moeify.families import TINY_PAIR, Family, FFNFormat

FAMILY = Family(
    "bart",
    blocks=("model.encoder.layers", "model.decoder.layers"),
    read="fc1",
    write="fc2",
    between=("activation_fn",),
    auto="AutoModelForSeq2SeqLM",
    ffn=FFNFormat(gate=None, up="fc1", down="fc2"),
    activation="activation_function",
    width="encoder_ffn_dim",
    narrowed=lambda _, neurons: dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), neurons),
    tiny=TINY_PAIR,
)
