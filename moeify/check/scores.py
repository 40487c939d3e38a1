"""A measure that is no perplexity, of one model."""

from dataclasses import dataclass

from moeify.readable import Readable


@dataclass(frozen=True, repr=False)
class Score(Readable):
    """One model on one set of examples, by a measure that is no perplexity.

    Args:
        model, data: what was measured on what.
        measure: its name, such as `feature cosine`.
        value: the mean over examples.
        num_examples: that were measured.
        examples_per_second: that went through the model.
        sha256: of the examples.
        calibrated_on: what the model was calibrated or trained on by moeify; none if it was not.
    """

    model: str
    data: str
    measure: str
    value: float
    num_examples: int
    examples_per_second: float
    sha256: str
    calibrated_on: tuple[str, ...] = ()
