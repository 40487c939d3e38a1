"""Where the numbers of a report are from: machine, versions, texts, how checkpoints were made, how to do it again."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from moeify.command_line import command_line
from moeify.options import SplitOptions
from moeify.reporting.reader import RunFolder

RECIPE = "recipe.yaml"


def measurement(run: RunFolder) -> list[tuple[str, str]]:
    """The circumstances of the benchmark."""
    bench = run.bench.value
    texts = {row.data: f"{row.data} ({row.num_tokens:,} tokens)" for row in bench.quality}
    texts |= {row.data: f"{row.data} ({row.num_examples:,} examples)" for row in bench.scores}
    rows = [
        ("measured", bench.date),
        ("machine", _pairs(bench.machine)),
        ("versions", _pairs(bench.versions)),
        ("dtype of weights", bench.dtype),
        ("texts", f"{', '.join(texts.values()) or 'none'}, in blocks of {bench.context:,} tokens"),
    ]
    rows += [(f"model {model.name}", f"{model.path} ({model.model_type})") for model in bench.models]
    return rows + [(f"result of {kind}", file) for kind, file in run.sources.items()]


def again(run: RunFolder) -> Iterator[str]:
    """The commands that make and measure everything once more."""
    if run.ran is not None and (run.path / RECIPE).is_file():
        yield command_line("run", str(run.path / RECIPE), out=f"{run.path}-again")
        return
    dense = run.bench.value.models[0].path
    for record in run.records:
        options, folder = record.value.job.get("options") or {}, (run.path / record.file).parent
        if "experts" in options:
            yield split_command(options, dense, folder)
        else:
            yield f"# {folder}: its README.md says how it was made"
    yield run.bench.value.command


def split_command(options: Mapping[str, Any], dense: str, out: Path) -> str:
    """The `moeify split` that has these options."""
    # A budget has become a layout by then.
    return command_line("split", dense, replace(SplitOptions.of(options), budget=None), out=out)


def _pairs(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {_plain(value)}" for key, value in values.items())


def _plain(value: Any) -> str:
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(map(str, value))
    return "none" if value is None else str(value)
