"""Which measure tells how well a model does its own job.

    a language model               perplexity                      perplexity.py
    one that guesses masked words  pseudo-perplexity               pseudo_perplexity.py
    one that writes what it hears  word error rate                 word_errors.py
    one that reads and writes      target perplexity               target_perplexity.py
    any other                      cosine of its features          features.py

Labelled sets and questions are tasks (tasks.py, labels.py), and say more of classifiers and of features.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from moeify.check.features import FeatureCosine
from moeify.check.perplexity import EvalResult, Perplexity
from moeify.check.pseudo_perplexity import PseudoPerplexity
from moeify.check.scores import Score
from moeify.check.target_perplexity import TargetPerplexity
from moeify.check.word_errors import WordErrors
from moeify.errors import InputError
from moeify.models.config import load_config
from moeify.models.heads import LANGUAGE_MODELS, MASKED_MODEL, PAIR_MODEL, SPEECH_MODEL, auto_name
from moeify.options import EvalOptions, Track


class Measure(Protocol):
    """One measure, opened on the same data for all models; the first that is measured is the dense one."""

    def __call__(self, model: Any, name: str, source: str, track: Track[Any]) -> EvalResult | Score: ...


Open = Callable[[Mapping[str, Path], EvalOptions], Measure]
# Auto class of a model -> opens its measure for the folders of models, by name.
MEASURES: dict[str, Open] = {
    **dict.fromkeys(LANGUAGE_MODELS, Perplexity.open),
    MASKED_MODEL: PseudoPerplexity.open,
    SPEECH_MODEL: WordErrors.open,
    PAIR_MODEL: TargetPerplexity.open,
}


def open_measure(paths: Mapping[str, Path], options: EvalOptions) -> Measure:
    """The measure that fits all models.

    Raises:
        InputError: they have other jobs, or their data cannot be read.
    """
    kinds = {name: auto_name(load_config(path)) for name, path in paths.items()}
    first, *others = kinds
    for name in others:
        if kinds[name] != kinds[first]:
            raise InputError(
                f"{first} is an {kinds[first]}, {name} an {kinds[name]}", "measure models of one kind at a time"
            )
    return MEASURES.get(kinds[first], FeatureCosine.open)(paths, options)
