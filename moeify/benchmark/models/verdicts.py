"""Where each model stands at each regime, and why, in a sentence made of the numbers beside it."""

from collections.abc import Sequence

from moeify.benchmark.models.results import Model, Outcome, Speed, Verdict

# Nearly all experts.
MOST = 0.9
# A pass that takes so much longer than both its bytes and its operations say has something else to pay for.
UNEXPLAINED = 1.1


def verdicts(models: Sequence[Model], speed: Sequence[Speed]) -> list[Verdict]:
    """One of each model but the dense one and each regime that both ran, on the model's fastest implementation.

    Args:
        models: the dense one first.
        speed: rows.
    """
    dense = models[0]
    found = []
    for model in models[1:]:
        regimes = dict.fromkeys((row.phase, row.batch, row.prompt_tokens) for row in speed)
        for regime in regimes:
            rows = [row for row in speed if (row.phase, row.batch, row.prompt_tokens) == regime]
            its = next((row for row in rows if row.model == dense.name and row.ms_p50 is not None), None)
            mine = [row for row in rows if row.model == model.name and row.time_over_dense is not None]
            if its is None or not mine:
                continue
            # Ratios have the machine's drift taken out.
            fastest = min(mine, key=lambda row: row.time_over_dense or 0.0)
            found.append(_verdict(model, dense, fastest, its))
    return found


def _verdict(model: Model, dense: Model, row: Speed, its: Speed) -> Verdict:
    assert row.time_over_dense is not None
    return Verdict(
        model=row.model,
        implementation=row.implementation,
        phase=row.phase,
        batch=row.batch,
        prompt_tokens=row.prompt_tokens,
        outcome=outcome(row),
        time_over_dense=row.time_over_dense,
        why=why(model, dense, row, its),
    )


def outcome(row: Speed) -> Outcome:
    """`same` if the interval of the ratio holds one."""
    assert row.time_over_dense_low is not None
    assert row.time_over_dense_high is not None
    if row.time_over_dense_high < 1:
        return "faster"
    return "slower" if row.time_over_dense_low > 1 else "same"


def why(model: Model, dense: Model, row: Speed, its: Speed) -> str:
    """What a pass reads and computes relative to the dense model's, and what follows from that."""
    assert row.bytes_read is not None
    assert row.flops is not None
    assert its.bytes_read is not None
    assert its.flops is not None
    assert row.time_over_dense_low is not None
    num_bytes, flops = row.bytes_read / its.bytes_read, row.flops / its.flops
    work = f"it reads {num_bytes:.2f} of the dense model's bytes and computes {flops:.2f} of its operations"
    sentences = [_hit(row, num_bytes), work] if row.experts_hit is not None else [work]
    if row.time_over_dense_low > UNEXPLAINED * max(num_bytes, flops):
        sentences.append(
            "what is left is the price of sorting tokens by expert and of many small matrix products"
            if row.experts_hit is not None
            else "smaller matrix products run at a lower rate, and what is not the FFN takes as long as before"
        )
    elif outcome(row) == "faster":
        sentences.append(_bound(model, dense, row))
    elif outcome(row) == "same":
        sentences.append("the difference is within the noise of this run")
    return "; ".join(sentences)


def _hit(row: Speed, num_bytes: float) -> str:
    assert row.experts_hit is not None
    tokens = row.batch * (row.prompt_tokens if row.phase == "prefill" else 1)
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


def percent(share: float) -> str:
    return f"{100 * share:.0f} %"
