"""Tables of `moeify plan`."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from rich.table import Table

from moeify.cli.tables.columns import DataTable
from moeify.cli.tables.words import key_value_table
from moeify.words import number, percent, size

if TYPE_CHECKING:
    from moeify.convert.candidates import Candidate
    from moeify.convert.machine_plan import MachinePlan


def plan_tables(plan: "MachinePlan") -> tuple[Table, ...]:
    """What the bounds rest on; dense, static pruning and the layouts that no other one beats; what runs them."""
    listed = list(shown(plan))
    facts = key_value_table(
        f"moeify plan {plan.model}",
        [
            ("machine", _machine_words(plan)),
            ("counted as", f"{plan.type}, {plan.context:,} tokens of keys and values in float16"),
            ("always on", _floor_words(plan)),
            *(("note", note) for note in plan.notes),
        ],
    )
    has_gpu = plan.machine.vram_bytes > 0
    key, words = "active of experts", ("active of experts", "options")
    sides = ("GPU / token", "RAM / token") if has_gpu else ("read / token",)
    columns = (key, "perplexity / dense", *sides, "tokens/s <=", "/ dense")
    bounds = DataTable("bounds in llama.cpp, one token at a time", columns, words=words)
    memory = ("VRAM", "RAM") if has_gpu else ("RAM",)
    commands = DataTable("memory, and the options of llama.cpp", (key, *memory, "options"), words=words)
    dense = plan.candidates[0].placement.tokens_per_second
    for one in listed:
        name, placement = _name(one) + (", best" if one is plan.choice else ""), one.placement
        read = [placement.gpu_read_bytes, placement.ram_read_bytes] if has_gpu else [placement.ram_read_bytes]
        held = [placement.vram_bytes, placement.ram_bytes] if has_gpu else [placement.ram_bytes]
        bounds.add_row(
            name,
            "" if one.ratio is None else f"{one.ratio:.2f}",
            *map(size, read),
            number(placement.tokens_per_second),
            f"{placement.tokens_per_second / dense:.2f}",
        )
        options = placement.refusal or "; ".join(filter(None, (placement.flags, one.caution)))
        commands.add_row(name, *map(size, held), options)
    return facts, bounds, commands


def shown(plan: "MachinePlan") -> Iterator["Candidate"]:
    """Dense, static pruning, the best, and of each active share the layout that is expected to lose least.

    Bounds hardly depend on the number of experts; JSON has all candidates.
    """
    groups: dict[int, Candidate] = {}
    for one in plan.candidates:
        if one.kind == "moe" and one.runs and not one.caution and one.ratio is not None:
            # Eighths, because not every number of experts divides into exact shares.
            before = groups.get(key := round(8 * one.active_share))
            if before is None or before.ratio is None or one.ratio < before.ratio:
                groups[key] = one
    listed = [id(one) for one in groups.values()]
    yield from (one for one in plan.candidates if one.kind != "moe" or one is plan.choice or id(one) in listed)


def _name(candidate: "Candidate") -> str:
    layout = candidate.layout
    if layout is None:
        return "dense"
    if layout.is_static:
        return f"static {percent(candidate.active_share)}"
    return f"{layout.num_active} of {layout.num_experts}, {layout.num_shared} shared"


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
