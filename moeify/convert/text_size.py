"""Whether more calibration text would pay, by what each layer's refit measured on half of it.

The held-out error of a refit is that of an endless text plus what fitting the noise of a short one costs, which falls
with the number of tokens: twice as many take away half of what the last doubling took.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from moeify.errors import warn
from moeify.plan import LayerPlan

# A doubling of the text that lowers the error by more than this share is worth its time.
SHORT = 0.05


@dataclass(frozen=True)
class TextNeed:
    """Mean relative error of a layer's output on held-out calibration tokens, by tokens that down_proj is fitted to.

    Args:
        half, all, twice: as many as half of the text has, all, and, expected, twice as many.
    """

    half: float
    all: float
    twice: float

    @property
    def gain(self) -> float:
        """Share of the error that twice the tokens are expected to take away."""
        return 1 - self.twice / self.all if self.all > 0 else 0.0


def text_need(layers: Sequence[LayerPlan]) -> TextNeed | None:
    """Means over layers; None where nothing was refit."""
    names = ("error_with_half_the_tokens", "error_with_refit", "error_with_twice_the_tokens")
    rows = [[layer.diagnostics[name] for name in names] for layer in layers if names[0] in layer.diagnostics]
    return TextNeed(*(sum(column) / len(rows) for column in zip(*rows, strict=True))) if rows else None


def warn_of_few_tokens(layers: Sequence[LayerPlan], num_tokens: int) -> None:
    """Warn where a longer text is expected to lower the layers' error by much."""
    need = text_need(layers)
    if need is not None and need.gain > SHORT:
        warn(
            f"the calibration text is short: {num_tokens:,} tokens leave {need.all:.4f} of a layer's output, twice as "
            f"many about {need.twice:.4f} ({need.gain:.0%} less): --tokens {2 * num_tokens}"
        )
