"""Marian (Opus-MT): an encoder and a decoder that translate; blocks as BART's."""

from dataclasses import replace

from moeify.families.bart import FAMILY as BART

FAMILY = replace(BART, model_type="marian")
