"""Nemotron and Minitron: squared ReLU without a gate, layer norms that scale by one plus their weight."""

from moeify.families import Family, FFNFormat

FAMILY = Family("nemotron", ffn=FFNFormat(gate=None))
