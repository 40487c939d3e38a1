"""A model benchmark against an earlier one: what is worse past a threshold and past the noise. A check for CI.

Speed is compared as time over the dense model's in the same run, so that two machines differ less; perplexity as its
ratio to dense. A row is worse if it grew past the threshold and its interval lies above the old one's; sizes have no
noise.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from moeify.benchmark.models.results import Change, ModelBench, Regressions
from moeify.errors import InputError, UsageError


@dataclass(frozen=True)
class _Value:
    """A number with its interval; smaller is better."""

    value: float
    low: float
    high: float


_Key = tuple[str, str]


def compare(new: ModelBench, old: ModelBench, name: str, threshold: float) -> Regressions:
    """All rows that both have.

    Args:
        new, old: results.
        name: of the old one, as it was asked for.
        threshold: new over old that is still allowed.

    Raises:
        InputError: they have no row in common.
    """
    before, after = _values(old), _values(new)
    common = [key for key in after if key in before]
    if not common:
        raise InputError(
            f"{name} has no row in common with this run: it holds {_names(old)}, this run {_names(new)}",
            "measure the same folders on the same --data, --tokens, --batch and --prompt",
        )
    changes = tuple(_change(key, before[key], after[key], threshold) for key in common)
    missing = tuple(f"{row}, {what}" for row, what in before if (row, what) not in after)
    return Regressions(name, threshold, changes, missing)


def check_threshold(threshold: float) -> None:
    """Raise UsageError unless equal results would pass."""
    if not threshold >= 1:
        raise UsageError(f"threshold {threshold:g} is less than one", "--threshold 1.05 allows 5 % more than before")


def _change(key: _Key, old: _Value, new: _Value, threshold: float) -> Change:
    ratio = new.value / old.value
    return Change(*key, old.value, new.value, ratio, worse=ratio > threshold and new.low > old.high)


def _values(bench: ModelBench) -> Mapping[_Key, _Value]:
    """(row, what) -> value; what two runs did not measure in the same way has two names."""
    return dict(_sizes(bench)) | dict(_qualities(bench)) | dict(_speeds(bench))


def _sizes(bench: ModelBench) -> Iterator[tuple[_Key, _Value]]:
    # What is compared with is the same model in both.
    for model in bench.models[1:]:
        for what, size in {
            "parameters": sum(part.parameters for part in model.parts.values()),
            "active parameters": sum(part.active_parameters for part in model.parts.values()),
            "bytes on disk": model.bytes_on_disk,
        }.items():
            yield (model.name, what), _Value(size, size, size)


def _qualities(bench: ModelBench) -> Iterator[tuple[_Key, _Value]]:
    # The dense model's ratio is one by definition.
    dense = bench.models[0].name if bench.models else ""
    for row in bench.quality:
        # NaN in a result that was read is a perplexity that was not finite.
        if row.model != dense and not any(map(math.isnan, (row.ratio, row.ratio_low, row.ratio_high))):
            text = f"{row.model} on {row.num_tokens:,} tokens of {Path(row.data).name} in blocks of {bench.context}"
            yield (text, "perplexity over dense"), _Value(row.ratio, row.ratio_low, row.ratio_high)


def _speeds(bench: ModelBench) -> Iterator[tuple[_Key, _Value]]:
    for row in bench.speed:
        ratio, low, high = row.time_over_dense, row.time_over_dense_low, row.time_over_dense_high
        if ratio is not None and low is not None and high is not None:
            regime = f"{row.phase} {row.batch} x {row.prompt_tokens}"
            yield (
                (f"{row.model}, {row.implementation}, {regime}, {bench.dtype}", "time over dense"),
                _Value(ratio, low, high),
            )


def _names(bench: ModelBench) -> str:
    return ", ".join(model.name for model in bench.models[1:]) or "nothing"
