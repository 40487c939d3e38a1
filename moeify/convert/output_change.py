"""How far the outputs of a changed model are from the dense model's, position by position, whatever its outputs are.

    with a head      KL(dense || changed) of the distribution that its logits give, nats
    without one      1 - cosine of the last hidden states

Shapes: [..., V] of logits or features; a classifier has one position.
"""

from collections.abc import Iterator
from typing import Any

from torch import Tensor
from torch.nn.functional import cosine_similarity, kl_div

from moeify.calibration.overflow import check_activations
from moeify.calibration.stream import HiddenStream
from moeify.models.heads import BASE, LANGUAGE_MODEL, auto_name

PERPLEXITY, KL, FEATURE_ERROR = "perplexity", "KL", "feature error"


def measure_of(config: Any) -> str:
    """What a changed model is judged by, without labels: perplexity of language models, else the change of outputs."""
    head = auto_name(config)
    return {LANGUAGE_MODEL: PERPLEXITY, BASE: FEATURE_ERROR}.get(head, KL)


def output_change(changed: Tensor, expected: Tensor, config: Any) -> Tensor:
    """One number a position, in a row: zero where nothing changed."""
    if auto_name(config) == BASE:
        return (1 - cosine_similarity(changed.float(), expected.float(), dim=-1)).reshape(-1)
    logs, goal = changed.float().log_softmax(dim=-1), expected.float().log_softmax(dim=-1)
    return kl_div(logs, goal, reduction="none", log_target=True).sum(dim=-1).reshape(-1)


def changes_of(stream: HiddenStream, dense: HiddenStream, num_blocks: int, config: Any) -> Iterator[Tensor]:
    """Of the last blocks of a stream at the end of a model, beside the dense model's with these blocks alone.

    Raises:
        InputError: they are not finite.
    """
    numbers = range(stream.num_blocks)[-num_blocks:]
    for changed, expected in zip(stream.outputs(numbers), dense.outputs(range(num_blocks)), strict=True):
        change = output_change(changed, expected, config).cpu()
        check_activations(change, "behind the last layer: the change of the outputs")
        yield change
