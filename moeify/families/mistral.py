"""Mistral: llama with an optional sliding window over all layers."""

from moeify.families import Family, Traits

FAMILY = Family(
    model_type="mistral",
    traits=lambda config: Traits(
        sliding_window=config.sliding_window,
        sliding_layers=(config.sliding_window is not None,) * config.num_hidden_layers,
    ),
)
