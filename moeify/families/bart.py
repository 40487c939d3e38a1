"""BART: an encoder and a decoder of text; blocks as Whisper's."""

from dataclasses import replace

from moeify.families import TINY_PAIR
from moeify.families.whisper import FAMILY as WHISPER

FAMILY = replace(WHISPER, model_type="bart", auto="AutoModelForSeq2SeqLM", modality="text", tiny=TINY_PAIR)
