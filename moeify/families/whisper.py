"""Whisper: what hears is cut, the encoder's FFNs without a gate; the decoder, which writes, is carried."""

from moeify.families import Family, FFNFormat

FAMILY = Family(
    "whisper",
    blocks="model.encoder.layers",
    read="fc1",
    write="fc2",
    between=("activation_fn",),
    auto="AutoModelForSpeechSeq2Seq",
    ffn=FFNFormat(gate=None, up="fc1", down="fc2"),
    activation="activation_function",
    width="encoder_ffn_dim",
    modality="audio",
)
