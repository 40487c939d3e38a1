"""Where each model stands at each regime, and why, in a sentence made of the numbers beside it."""

import math
from collections.abc import Iterable, Sequence

from moeify.benchmark.engines.results import EngineSpeed
from moeify.benchmark.models.results import SAME_WITHIN, Model, Outcome, Speed, Verdict
from moeify.words import factor, percent

# Nearly all experts.
MOST = 0.9
# A pass that takes so much longer than both its bytes and its operations say has something else to pay for.
UNEXPLAINED = 1.1


def fastest(rows: Iterable[Speed], model: str) -> Speed | None:
    """The row of a model's fastest implementation among rows of one regime; None if it has no time.

    Ratios to the dense model decide where there are any: the machine's drift is taken out of them.
    """
    timed = [row for row in rows if row.model == model and row.ms_p50 is not None]
    return min(timed, key=lambda row: (row.time_over_dense or math.inf, row.ms_p50), default=None)


def verdicts(models: Sequence[Model], speed: Sequence[Speed]) -> list[Verdict]:
    """One of each model but the dense one and each regime that both ran, on the model's fastest implementation.

    Args:
        models: the dense one first.
        speed: rows.
    """
    dense = models[0]
    regimes: dict[tuple[str, int, int], list[Speed]] = {}
    for row in speed:
        regimes.setdefault((row.phase, row.batch, row.prompt_tokens), []).append(row)
    return [
        _verdict(model, dense, row, dense_row)
        for model in models[1:]
        for rows in regimes.values()
        for row, dense_row in [(fastest(rows, model.name), fastest(rows, dense.name))]
        if row and dense_row and row.time_over_dense is not None
    ]


def engine_verdicts(rows: Iterable[EngineSpeed]) -> list[Verdict]:
    """One a row of another engine that has a ratio to the dense model; its implementation is the engine and file."""
    return [
        Verdict(
            model=row.model,
            implementation=f"{row.engine} {row.type}, {row.threads} thread{'s' * (row.threads > 1)}",
            phase="decode" if row.phase == "decode" else "prefill",
            batch=1,
            prompt_tokens=row.num_tokens,
            outcome=outcome(row),
            time_over_dense=row.time_over_dense,
            why=f"its interval is of all {row.num_rounds} rounds",
            time_over_dense_low=row.time_over_dense_low,
            time_over_dense_high=row.time_over_dense_high,
        )
        for row in rows
        if row.time_over_dense is not None
    ]


def _verdict(model: Model, dense: Model, row: Speed, dense_row: Speed) -> Verdict:
    assert row.time_over_dense is not None
    return Verdict(
        model=row.model,
        implementation=row.implementation,
        phase=row.phase,
        batch=row.batch,
        prompt_tokens=row.prompt_tokens,
        outcome=outcome(row),
        time_over_dense=row.time_over_dense,
        why=why(model, dense, row, dense_row),
        time_over_dense_low=row.time_over_dense_low,
        time_over_dense_high=row.time_over_dense_high,
    )


def outcome(row: Speed | EngineSpeed) -> Outcome:
    """By the interval of the ratio (of another engine: all its rounds), see Verdict; the row has one."""
    low, high = row.time_over_dense_low, row.time_over_dense_high
    assert low is not None
    assert high is not None
    if high < 1:
        return "faster"
    if low > 1:
        return "slower"
    return "same" if low >= 1 - SAME_WITHIN and high <= 1 + SAME_WITHIN else "cannot tell"


def why(model: Model, dense: Model, row: Speed, dense_row: Speed) -> str:
    """Bytes and operations of a pass relative to the dense model's, and what follows from them."""
    assert row.bytes_read is not None
    assert row.flops is not None
    assert dense_row.bytes_read is not None
    assert dense_row.flops is not None
    assert row.time_over_dense_low is not None
    assert row.time_over_dense_high is not None
    num_bytes, flops = row.bytes_read / dense_row.bytes_read, row.flops / dense_row.flops
    work = f"it reads {num_bytes:.2f} of the dense model's bytes and computes {flops:.2f} of its operations"
    sentences = [_hit(row, num_bytes), work] if row.experts_hit is not None else [work]
    result = outcome(row)
    if result == "cannot tell":
        ends = f"{factor(row.time_over_dense_low)} to {factor(row.time_over_dense_high)}"
        sentences.append(f"the noise of this run is too large to tell: the 95 % interval is {ends}")
    elif row.time_over_dense_low > UNEXPLAINED * max(num_bytes, flops):
        sentences.append(
            "what is left is the price of sorting tokens by expert and of many small matrix products"
            if row.experts_hit is not None
            else "smaller matrix products run at a lower rate, and what is not the FFN takes as long as before"
        )
    elif result == "faster":
        sentences.append(_bound(model, dense, row))
    elif result == "same":
        sentences.append("the difference is within the noise of this run")
    return "; ".join(sentences)


def _hit(row: Speed, num_bytes: float) -> str:
    assert row.experts_hit is not None
    tokens = row.batch * (1 if row.phase == "decode" else row.prompt_tokens)
    what = f"{tokens:,} token{'' if tokens == 1 else 's'} hit{'s' if tokens == 1 else ''} {percent(row.experts_hit)}"
    end = "so nearly all weights are read" if row.experts_hit >= MOST and num_bytes >= MOST else ""
    return f"{what} of the experts" + (f", {end}" if end else "")


def _bound(model: Model, dense: Model, row: Speed) -> str:
    """No more can be gained than the FFN's share."""
    what = "bytes" if row.phase == "decode" else "operations"
    costs = {
        name: part.bytes_per_decoded_token if row.phase == "decode" else part.flops_per_token
        for name, part in dense.parts.items()
    }
    share = costs["ffn"] / sum(costs.values())
    left = f"{percent(model.active_share)} of the FFN is {'active' if model.num_experts else 'left'}"
    return f"{left}, and the FFN is {percent(share)} of the {what} of a dense token"
