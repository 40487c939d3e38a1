"""MT5: T5 of many languages, with a gate and a bias of positions; named as t5."""

from dataclasses import replace

from moeify.families.t5 import FAMILY as T5

FAMILY = replace(T5, model_type="mt5")
