"""Tables of `moeify plan`."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from rich.table import Table

from moeify.cli.tables.words import key_value_table
from moeify.words import number, percent, size

if TYPE_CHECKING:
    from moeify.convert.candidates import Candidate
    from moeify.convert.machine_plan import MachinePlan


def plan_tables(plan: "MachinePlan") -> tuple[Table, Table]:
    """What the bounds rest on, then dense, static pruning and the layouts that no other one beats."""
    facts = key_value_table(
        f"moeify plan {plan.model}",
        [
            ("machine", _machine_words(plan)),
            ("counted as", f"{plan.type}, {plan.context:,} tokens of keys and values in float16"),
            ("always on", _floor_words(plan)),
            *(("note", note) for note in plan.notes),
        ],
    )
    rows = Table(title="bounds in llama.cpp, one token at a time", title_justify="left")
    rows.add_column("model", overflow="fold")
    has_gpu = plan.machine.vram_bytes > 0
    sides = ("GPU/token", "RAM/token", "VRAM", "RAM") if has_gpu else ("RAM/token", "RAM")
    for column in ("width", "perplexity/dense", *sides, "tokens/s at most", "/dense"):
        rows.add_column(column, justify="right", overflow="fold")
    rows.add_column("llama.cpp", overflow="fold")
    for candidate in shown(plan):
        rows.add_row(*_cells(candidate, plan))
    return facts, rows


def shown(plan: "MachinePlan") -> Iterator["Candidate"]:
    """Dense, static pruning, the best, and of each active and shared share the layout that is expected to lose least.

    Bounds hardly depend on the number of experts; JSON has all candidates.
    """
    groups: dict[tuple[int, int], Candidate] = {}
    for one in plan.candidates:
        if one.kind == "moe" and one.runs and not one.caution and one.ratio is not None:
            # Eighths and thirds, because not every number of experts divides into exact shares.
            key = round(8 * one.active_share), round(3 * one.shared_share / one.active_share)
            before = groups.get(key)
            if before is None or before.ratio is None or one.ratio < before.ratio:
                groups[key] = one
    listed = [id(one) for one in groups.values()]
    yield from (one for one in plan.candidates if one.kind != "moe" or one is plan.choice or id(one) in listed)


def _cells(candidate: "Candidate", plan: "MachinePlan") -> Iterator[str]:
    placement = candidate.placement
    speed, dense = placement.tokens_per_second, plan.candidates[0].placement.tokens_per_second
    yield _name(candidate) + (" <- best" if candidate is plan.choice else "")
    yield f"{candidate.expert_width:,}"
    yield "" if candidate.ratio is None else f"{candidate.ratio:.2f}"
    gpu = (placement.gpu_read_bytes, placement.vram_bytes) if plan.machine.vram_bytes else (None, None)
    pairs = zip(gpu, (placement.ram_read_bytes, placement.ram_bytes), strict=True)
    yield from (size(value) for pair in pairs for value in pair if value is not None)
    yield number(speed)
    yield f"{speed / dense:.2f}"
    yield placement.refusal or "; ".join(filter(None, (placement.flags, candidate.caution)))


def _name(candidate: "Candidate") -> str:
    layout = candidate.layout
    if layout is None:
        return "dense"
    if layout.is_static:
        return f"static pruning to {percent(candidate.active_share)}"
    return (
        f"{layout.num_active} of {layout.num_experts} experts, {layout.num_shared} shared: "
        f"{percent(candidate.active_share)} active, {percent(candidate.shared_share)} shared"
    )


def _floor_words(plan: "MachinePlan") -> str:
    dense, speed = plan.candidates[0], number(plan.floor_tokens_per_second)
    bytes_words = f"{size(plan.floor_bytes)} of the dense model's {size(dense.read_bytes)} a token are not in FFNs"
    return f"{bytes_words}: {speed} tokens/s at most, however few experts run"


def _machine_words(plan: "MachinePlan") -> str:
    machine = plan.machine
    gpu = f"{size(machine.vram_bytes)} of VRAM at {number(machine.gpu_bytes_per_second / 1e9)} GB/s"
    ram = "RAM" if machine.ram_bytes is None else f"{size(machine.ram_bytes)} of RAM"
    words = [gpu if machine.vram_bytes else "no GPU", f"{ram} at {number(machine.ram_bytes_per_second / 1e9)} GB/s"]
    return ", ".join(words) + (f" (measured: {machine.measured})" if machine.measured else "")
