"""Features: what a model without a head is for. How near they stay to those of the first model, the dense one.

Legend: N examples, B in a batch, C positions, D features.
"""

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from moeify.check.scores import Score
from moeify.data.examples import EXAMPLES, batches
from moeify.errors import InputError
from moeify.models.config import load_config
from moeify.models.heads import modality_of
from moeify.models.inputs import Inputs
from moeify.options import EvalOptions, Track

COSINE = "feature cosine"


def mean_position(hidden_BCD: Tensor) -> Tensor:
    return hidden_BCD.mean(dim=1)


def first_position(hidden_BCD: Tensor) -> Tensor:
    return hidden_BCD[:, 0]


# Name of a model's main input -> its features from its last hidden states.
POOLS: dict[str, Callable[[Tensor], Tensor]] = {"input_ids": mean_position, "pixel_values": first_position}


@torch.no_grad()
def features(model: Any, examples: Iterable[Inputs]) -> Tensor:
    """features_ND, float32, of a model below its head, in the order of the examples."""
    base, pool = model.base_model, POOLS.get(model.main_input_name, mean_position)
    numbers: list[int] = []
    parts: list[Tensor] = []
    for some, inputs in batches(examples):
        outputs = base(**on_device(inputs, model))
        parts.append(pool(outputs.last_hidden_state).float().cpu())
        numbers += some
    return torch.cat(parts)[torch.tensor(numbers).argsort()]


def on_device(inputs: Inputs, model: Any) -> dict[str, Tensor]:
    """Inputs where a model is, numbers in its type."""
    return {
        name: tensor.to(model.device, model.dtype if tensor.is_floating_point() else None)
        for name, tensor in inputs.items()
    }


@dataclass(frozen=True)
class FeatureCosine:
    """The measure of models without a head: mean cosine of an example's features and those of the first model.

    Args:
        examples: of every model and source, and their hash.
        first: features of the first model that was measured, by source.
    """

    examples: Mapping[tuple[str, str], tuple[list[Inputs], str]]
    first: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def open(cls, paths: Mapping[str, Path], options: EvalOptions) -> Self:
        """Read the examples.

        Raises:
            InputError: they cannot be read, or two models see other examples.
        """
        examples = {
            (name, source): EXAMPLES[modality_of(load_config(path))](path, source, options.tokens, options.context)
            for name, path in paths.items()
            for source in options.data
        }
        first = next(iter(paths))
        for (name, source), (_, sha256) in examples.items():
            if sha256 != examples[first, source][1]:
                raise InputError(
                    f"{first} and {name} cut {source} into different tokens", "their features do not compare"
                )
        return cls(examples)

    def __call__(self, model: Any, name: str, source: str, track: Track[Any]) -> Score:
        """Compare the features of all examples of a source."""
        examples, sha256 = self.examples[name, source]
        began = time.perf_counter()
        features_ND = features(model, track(examples, f"features of {name} on {source}", len(examples)))
        elapsed = time.perf_counter() - began
        cosine = mean_cosine(features_ND, self.first.setdefault(source, features_ND))
        return Score(name, source, COSINE, cosine, len(examples), len(examples) / elapsed, sha256)


def mean_cosine(features_ND: Tensor, first_ND: Tensor) -> float:
    return float(cosines(features_ND, first_ND).mean())


def cosines(features_ND: Tensor, first_ND: Tensor) -> Tensor:
    """cosines_N, float64.

    Raises:
        InputError: the models have other numbers of features.
    """
    if features_ND.shape != first_ND.shape:
        raise InputError(
            f"the models have {features_ND.shape[1]:,} and {first_ND.shape[1]:,} features", "they do not compare"
        )
    return cosine_similarity(features_ND.double(), first_ND.double(), dim=1)
