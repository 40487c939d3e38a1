"""Where the numbers of a report are from: machine, versions, texts, how checkpoints were made, how to do it again."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from moeify.command_line import command_line
from moeify.options import SplitOptions
from moeify.reporting.reader import RunFolder
from moeify.words import number, size


@dataclass(frozen=True)
class Checkpoint:
    """How one checkpoint was made: facts, all its options as JSON, and the command if it can be told."""

    file: str
    facts: list[tuple[str, str]]
    options: str
    command: str


def measurement(run: RunFolder) -> list[tuple[str, str]]:
    """The circumstances of the benchmark."""
    bench = run.bench.value
    tokens = {row.data: f"{row.data} ({row.num_tokens:,} tokens)" for row in bench.quality}
    rows = [
        ("measured", bench.date),
        ("machine", _pairs(bench.machine)),
        ("versions", _pairs(bench.versions)),
        ("dtype of weights", bench.dtype),
        ("context", f"{bench.context:,} tokens a block"),
        ("texts", ", ".join(tokens.values()) or "none"),
    ]
    if bench.ceilings is not None:
        copied = f"{size(bench.ceilings.copy_bytes_per_second)}/s copied"
        rate = f"{number(bench.ceilings.matmul_flops_per_second / 1e12)} TFLOP/s"
        shape = f"{bench.ceilings.matmul_size:,} in {bench.ceilings.dtype}"
        rows.append(("reached by the machine", f"{copied}, {rate} at matrix products of {shape}"))
    rows += [(f"model {model.name}", f"{model.path} ({model.model_type})") for model in bench.models]
    return rows + [(f"result of {kind}", file) for kind, file in run.sources.items()]


def checkpoints(run: RunFolder) -> list[Checkpoint]:
    """The records of the checkpoints in the folder."""
    dense = run.bench.value.models[0].path
    return [_checkpoint(record.file, record.value.job, dense) for record in run.records]


def _checkpoint(file: str, job: Mapping[str, Any], dense: str) -> Checkpoint:
    text = job.get("calibration") or job.get("text") or {}
    facts = {
        "target": str(job.get("target", "")),
        "dtype": str(job.get("dtype", "")).removeprefix("torch."),
        "text": _pairs(text) if isinstance(text, Mapping) else json.dumps(text),
        "hash of the source model": str(job.get("model", "")),
        "hash of the teacher": str(job.get("teacher", "")),
        "versions": _pairs(job.get("versions") or {}),
    }
    options = job.get("options") or {}
    command = split_command(options, dense, file) if "experts" in options else ""
    known = [(key, value) for key, value in facts.items() if value]
    return Checkpoint(file, known, json.dumps(options, indent=1, sort_keys=True), command)


def split_command(options: Mapping[str, Any], dense: str, file: str) -> str:
    """The `moeify split` that has these options."""
    # A budget has become a layout by then.
    known = replace(SplitOptions.of(options), budget=None)
    return command_line("split", dense, known, out=file.rpartition("/")[0] or None)


def _pairs(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {_plain(value)}" for key, value in values.items())


def _plain(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(map(str, value))
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) and value > 9999 else str(value)
