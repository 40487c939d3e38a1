"""A recipe to begin with, for one model and one machine: what `inspect` and `plan` find, as YAML with comments."""

import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from moeify.convert.inspection import Inspection, inspect
from moeify.convert.machine_plan import MachinePlan, plan_for_machine
from moeify.convert.texts import default_texts
from moeify.errors import InputError
from moeify.layout import Layout
from moeify.models.dense import open_dense
from moeify.models.heads import LANGUAGE_MODELS, auto_name
from moeify.options import EvalOptions, MachineOptions, SplitOptions, Track, untracked
from moeify.readable import Readable
from moeify.results import check_new, check_writable, write_text
from moeify.words import duration, listing, on_one_line, percent, size

# First line of the file; a recipe that someone wrote does not have it.
HEADER = "# A recipe that `moeify init` began. Change what you like, but not this line if init may replace the file."
WIDTH = 100
# Of a first try at training.
TRAINING_TOKENS = 2_000_000


@dataclass(frozen=True, repr=False)
class InitResult(Readable):
    """A recipe to begin with.

    Args:
        model: the dense one.
        file: the recipe, written.
        target: of the split; "" where the model can only be pruned.
        layout: of the split.
        device: where the stages run.
        reason: why this layout.
    """

    model: str
    file: Path
    target: str
    layout: Layout
    device: str
    reason: str


@dataclass(frozen=True)
class _Kind:
    """Words about a kind of models: what is measured on what, and what a better calibration is.

    Args:
        measured: the measure.
        better: than the calibration that is there.
        heldout: data of the evaluation.
        training: data of a fine-tuning.
        tasks: an example.
    """

    measured: str
    better: str
    heldout: tuple[str, ...]
    training: str
    tasks: str


_TEXT = "text like yours, a .txt, .jsonl or .parquet file or folder"
_LABELS = "[labels.csv]  # classes as well: a head's, or those of linear probes"
_KINDS: Mapping[str, _Kind] = {
    "text": _Kind(
        "Perplexity of all models on text",
        _TEXT,
        EvalOptions.data,
        "builtin",
        "[questions.jsonl, hellaswag]  # questions as well; names need pip install 'moeify[tasks]'",
    ),
    "example": _Kind("Features or masked words of all models on text", _TEXT, EvalOptions.data, "builtin", _LABELS),
    "image": _Kind(
        "Features of all models on images",
        "images like yours, a folder, .parquet or .npz file",
        ("digits-heldout",),
        "digits",
        _LABELS,
    ),
}


@dataclass(frozen=True)
class _Choice:
    """How the recipe cuts, and why."""

    target: str
    layout: Layout
    reason: str


def init(
    model: str,
    out: Path,
    machine: MachineOptions | None = None,
    *,
    overwrite: bool = False,
    track: Track[Any] = untracked,
) -> InitResult:
    """Write a recipe for a model.

    Args:
        model: a folder, a .gguf file, a hub id or `builtin`; headers are read, no weights.
        out: the .yaml file.
        machine: where the result shall run; what is left open is measured here.
        overwrite: replace a file that init wrote.
        track: shows the progress of making the embedded model.

    Raises:
        InputError: the model cannot be read or cut, or the file cannot be written.
        UsageError: the machine's options contradict each other.
    """
    if out.suffix not in (".yaml", ".yml"):
        raise InputError(f"{out} is no .yaml file", f"-o {out}.yaml")
    check_new(out, overwrite=overwrite)
    check_writable(out, HEADER)
    dense = open_dense(model, track)
    inspection = inspect(dense)
    # Which layout is fastest is known of models that decode in llama.cpp.
    decodes = auto_name(dense.config) in LANGUAGE_MODELS
    choice = _choice(inspection, plan_for_machine(dense, machine) if decodes else None)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    folder = Path("runs") / (out.stem.removesuffix("-recipe") or out.stem)
    texts = default_texts(dense, SplitOptions())
    if not texts:
        raise InputError(f"{dense.name} hears, and nothing here is a recording", "write the recipe by hand")
    kind = _KINDS["text" if decodes else "example" if dense.family.modality == "text" else "image"]
    lines = _lines(model, folder, inspection, choice, device=device, texts=texts, kind=kind)
    write_text("\n".join([HEADER, *lines]) + "\n", out, HEADER)
    return InitResult(model, out, choice.target, choice.layout, device, choice.reason)


def _choice(inspection: Inspection, plan: MachinePlan | None) -> _Choice:
    """The best layout for the machine; else what a split takes by itself; else pruning."""
    exact = [fit.target for fit in inspection.targets if fit.fits]
    if not exact:
        return _Choice("", inspection.layout, "no target represents this model exactly, so that it can only be pruned")
    if plan is None:
        reason = "the one that `moeify split` takes by itself; `moeify plan` is about language models"
        return _Choice(exact[0], inspection.layout, reason)
    if plan.choice is not None and plan.choice.layout is not None:
        share = plan.choice.placement.tokens_per_second / plan.candidates[0].placement.tokens_per_second
        reason = (
            f"the fastest that `moeify plan` expects within {plan.quality:g} times the dense perplexity: at most "
            f"{share:.2f} times the dense tokens/s in llama.cpp on the machine"
        )
        return _Choice(plan.target, plan.choice.layout, reason)
    reason = "the one that `moeify split` takes by itself; `moeify plan` finds no better one for the machine"
    return _Choice(exact[0], inspection.layout, reason)


def _lines(
    model: str, folder: Path, facts: Inspection, choice: _Choice, *, device: str, texts: tuple[str, ...], kind: _Kind
) -> Iterator[str]:
    """The recipe, section by section."""
    estimate = facts.estimate
    yield from _comment(
        f"{facts.family} of {facts.num_parameters:,} parameters, {percent(facts.ffn_share)} of them in FFNs of "
        f"{facts.num_neurons:,} neurons in {facts.num_layers} layers. A split takes about "
        f"{duration(estimate.duration_s)} and {size(estimate.peak_memory_bytes)} of memory here, each checkpoint "
        f"{size(estimate.checkpoint_bytes)}. `moeify run FILE --dry-run` says what all of it takes."
    )
    yield from _section({"version": 1, "model": model, "out": str(folder)})
    layout, on = choice.layout, {} if device == "cpu" else {"device": device}
    yield ""
    yield from _comment(f"How it is cut: {choice.reason}.")
    yield "split:"
    counts = ", ".join(map(str, facts.expert_counts))
    yield from _keys({"experts": layout.num_experts}, f"equal slices of each FFN: {counts}")
    if choice.target:
        yield from _keys({"active": layout.num_active}, f"run for a token, {percent(layout.active_share)} of the FFN")
        yield from _keys({"shared": layout.num_shared}, "of these are always on")
        others = [fit.target for fit in facts.targets if fit.fits and fit.target != choice.target]
        also = f"; so {'do' if len(others) > 1 else 'does'} {listing(others)}" if others else ""
        yield from _keys({"target": choice.target}, f"represents the model exactly{also}")
    else:
        yield from _keys({"static": True}, "prune: a smaller dense model")
        yield from _keys({"active": layout.num_active}, f"slices are kept, {percent(layout.active_share)} of the FFN")
    yield from _keys({"calibration": list(texts)}, f"better: {kind.better}")
    yield from _keys({"tokens": SplitOptions.tokens, **on}, "of it; 16,384 or more")
    if choice.target:
        yield ""
        yield from _comment("What the split must beat: plain pruning to the same active size.")
        yield from _section({"controls": {"static": {"static": True}}})
    else:
        yield ""
        yield from _comment("A pruned model has no experts that could be switched on.")
        yield from _section({"verify": False})
    yield from _training(device, kind.training)
    yield ""
    yield from _comment(f"{kind.measured} that they were not calibrated on.")
    yield "eval:"
    yield from _keys({"data": list(kind.heldout)}, f"better: {kind.better.split(',')[0]}")
    yield from _keys({"tokens": EvalOptions.tokens, **on})
    yield f"  # tasks: {kind.tasks}"
    if choice.target:
        yield ""
        yield from _comment("Speed, memory and quality beside the dense model: what `moeify report` makes a page of.")
        yield "bench:"
        yield from _keys({"batch": [1], **on}, "sequences at once")
        yield from _keys({"tokens": EvalOptions.tokens})
        yield ""
        yield from _comment("What must hold, so that `moeify run` ends with 0 and not with 4.")
        yield from _section({"limits": {"beats": ["static"]}})


def _training(device: str, data: str) -> Iterator[str]:
    """Fine-tuning as a comment: it is what costs most, and what brings back most."""
    yield ""
    yield from _comment(
        "Training against the dense model brings back most of what the cut costs, at about four forward passes a token."
    )
    for line in _section({"finetune": {"data": [data], "tokens": TRAINING_TOKENS, "device": device}}):
        yield f"# {line}"


def _section(values: Mapping[str, Any]) -> list[str]:
    """A line a key; a section inside of another is indented, a list stands on one line."""
    lines = []
    for key, value in values.items():
        if isinstance(value, Mapping):
            lines += [f"{key}:", *(f"  {line}" for line in _section(value))]
        else:
            # Whatever stands in a name, it is quoted, on one line, and the name again when it is read.
            style = '"' if isinstance(value, str) and not value.isprintable() else None
            text = yaml.safe_dump(value, width=1 << 20, default_flow_style=True, default_style=style)
            lines.append(f"{key}: {text.splitlines()[0]}")
    return lines


def _keys(values: Mapping[str, Any], comment: str = "") -> Iterator[str]:
    """Lines inside a section; the first has the comment."""
    first, *others = (f"  {line}" for line in _section(values))
    yield f"{first}  # {on_one_line(comment)}" if comment else first
    yield from others


def _comment(text: str) -> list[str]:
    """A paragraph as lines of comment."""
    return textwrap.wrap(on_one_line(text), WIDTH, initial_indent="# ", subsequent_indent="# ")
