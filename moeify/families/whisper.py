"""Whisper: an encoder that hears and a decoder that writes; FFNs without a gate, with biases."""

from moeify.families import Family, FFNFormat

FAMILY = Family(
    "whisper",
    blocks=("model.encoder.layers", "model.decoder.layers"),
    read="fc1",
    write="fc2",
    between=("activation_fn",),
    auto="AutoModelForSpeechSeq2Seq",
    ffn=FFNFormat(gate=None, up="fc1", down="fc2"),
    activation="activation_function",
    width="encoder_ffn_dim",
    narrowed=lambda _, neurons: dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), neurons),
    modality="audio",
)
