"""Arguments and options that are no part of a run's options, and how a command gets one parameter for each of those."""

import inspect
import re
from collections.abc import Callable
from dataclasses import Field, dataclass
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, get_args, get_type_hints

import typer

from moeify.command_line import (
    ADVANCED,
    FIRST,
    OUTPUT,
    Options,
    choices,
    default_text,
    fields,
    flag,
    is_repeated,
    item_type,
    option,
    parse,
    value_name,
)
from moeify.errors import UsageError
from moeify.options import EMBEDDED, SplitOptions
from moeify.plugins import names_in
from moeify.version import __version__

KINDS = "families targets engines partitions routers strategies recipes words"


@dataclass(frozen=True)
class Output(Options):
    """What every command shows."""

    json: bool = option(False, "Print exactly one JSON object", panel=OUTPUT)
    quiet: bool = option(False, "Print nothing but figures and errors", short="-q", panel=OUTPUT)
    verbose: bool = option(False, "Show the libraries' own warnings", short="-v", panel=ADVANCED)
    debug: bool = option(False, "Show the traceback of an error", panel=ADVANCED)


@dataclass(frozen=True)
class Exactness(Options):
    """What `moeify verify` allows."""

    tolerance: float = option(1e-4, "Largest difference of a logit", least=0)


@dataclass(frozen=True)
class Worse(Options):
    """What `moeify bench` allows beside an earlier result."""

    threshold: float = option(1.05, "How many times worse than it is allowed", above=0, panel=OUTPUT)


@dataclass(frozen=True)
class Only:
    """Beside a class of options: those that a command has; the others keep their defaults."""

    names: tuple[str, ...]


def expanded(command: Callable[..., None]) -> Callable[..., None]:
    """A command with one parameter for each field of the options that it takes, as typer wants it."""
    hints = get_type_hints(command, include_extras=True)
    parameters: list[inspect.Parameter] = []
    taken: dict[str, tuple[type[Options], list[Field[Any]]]] = {}
    for parameter in inspect.signature(command).parameters.values():
        kind, *further = get_args(hints[parameter.name]) or (hints[parameter.name],)
        if isinstance(kind, type) and issubclass(kind, Options):
            names = [name for only in further for name in only.names] or [field.name for field in fields(kind)]
            taken[parameter.name] = kind, [field for field in fields(kind) if field.name in names]
            parameters += map(_parameter, taken[parameter.name][1])
        else:
            parameters.append(parameter.replace(kind=parameter.KEYWORD_ONLY, annotation=hints[parameter.name]))

    @wraps(command)
    def call(**values: Any) -> None:
        for name, (kind, chosen) in taken.items():
            words = {field: values.pop(field.name) for field in chosen}
            given = {field: word for field, word in words.items() if word is not None and word != []}
            values[name] = kind(**{field.name: _value(field, word) for field, word in given.items()})
        command(**values)

    call.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return call


def _value(field: Field[Any], words: Any) -> Any:
    """The value of an option from what stands on the command line."""
    if isinstance(words, bool):
        return words
    return parse(field, words) if is_repeated(field) else parse(field, [words])[0]


def _parameter(field: Field[Any]) -> inspect.Parameter:
    """An option of the command line; its words are read by `parse`, and what is left out keeps its default."""
    names = [flag(field.name), *([field.metadata["short"]] if field.metadata["short"] else [])]
    folder = field.metadata["plugin"]
    known = choices(field) or (names_in(folder) if folder else ())

    def complete(incomplete: str) -> list[str]:
        return [name for name in known if name.startswith(incomplete)]

    kind: Any = bool if item_type(field) is bool else list[str] if is_repeated(field) else str | None
    if kind is bool and field.default is True:
        names = [f"{flag(field.name)}/{flag(f'no_{field.name}')}"]
    info = typer.Option(
        *names,
        help=field.metadata["text"],
        show_default=default_text(field) or False,
        metavar=value_name(field) or None,
        rich_help_panel=field.metadata["panel"],
        autocompletion=complete if known else None,
    )
    default = field.default if kind is bool else [] if is_repeated(field) else None
    return inspect.Parameter(
        field.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, info]
    )


def beside(model: str, suffix: str) -> Path:
    """Where a result goes that is given no place: NAME-suffix in this folder, whatever the model's path looks like.

    Raises:
        UsageError: the model has no name.
    """
    path = Path(model)
    name = path.parent.name if path.suffix in (".safetensors", ".json") else path.name
    if name in ("", ".."):
        name = Path(model).resolve().name
    if not name:
        raise UsageError(f"{model} has no name that {suffix} could be added to", "say with -o where to write")
    return Path(f"{name}-{suffix}")


def is_there(model: str) -> bool:
    """Whether a model that was named before can be named again from this folder."""
    on_the_hub = re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", model)
    return model in EMBEDDED or bool(on_the_hub) or (model != "" and Path(model).expanduser().exists())


def _version(show: bool) -> None:
    if show:
        typer.echo(f"moeify {__version__}")
        raise typer.Exit


def _argument(name: str, text: str) -> Any:
    return typer.Argument(help=text, metavar=name, show_default=False)


def _option(*names: str, text: str, name: str | None = None, panel: str = FIRST, default: str = "") -> Any:
    """An option that is no field of a dataclass; the arguments are those of `moeify.command_line.option`."""
    return typer.Option(*names, help=text, metavar=name, rich_help_panel=panel, show_default=default or False)


Version = Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version")]

# What is read.
MODEL = "A folder, .gguf file, hub id or `builtin`"
Model = Annotated[str, _argument("MODEL", MODEL)]
Models = Annotated[list[str], _argument("MODELS...", "Checkpoints, the reference first")]
Speakers = Annotated[list[str], _argument("MODELS...", "Dense or converted")]
Moe = Annotated[str, _argument("MOE", "The converted checkpoint")]
Benched = Annotated[list[str], _argument("MODELS...", "Converted checkpoints")]
Exported = Annotated[str, _argument("MODEL", "What moeify split wrote, or a dense model")]
Student = Exported
Recipe = Annotated[str, _argument("RECIPE", "YAML file, or a name: moeify ls recipes")]
Kind = Annotated[str, _argument("KIND", "families, targets, engines, partitions, ...")]
SchemaName = Annotated[str, _argument("NAME", "Of a result's schema, without moeify. and /1")]
RunDir = Annotated[Path, _argument("RUN_DIR", "Folder with the results of moeify bench")]
DenseModel = Annotated[str, _option(text="The model it came from", name="MODEL")]
Teacher = Annotated[str, _option(text="The dense model it shall follow", name="MODEL")]
Against = Annotated[list[str], _option(text="The dense model, then further ones", name="MODEL,...")]
Searched = Annotated[list[str], _option(text="Results of moeify search as further rows", name="FILE,...")]
Baseline = Annotated[Path | None, _option(text="A bench.json; what is worse exits with 4", name="FILE", panel=OUTPUT)]
Overrides = Annotated[list[str], _option("--set", text="Such as split.experts=16; again for more", name="KEY=VALUE")]
Prompt = Annotated[str | None, _option(text="The text to continue", name="TEXT", default="stdin")]
InTemplate = Annotated[bool, _option("--chat", text="Put the prompt into the chat template")]
System = Annotated[str | None, _option(text="What models are told first", name="TEXT")]

# What is written.
OUT = ("--out", "-o")
Out = Annotated[Path | None, _option(*OUT, text="Where to write", name="PATH", panel=OUTPUT)]
SearchOut = Annotated[
    Path | None, _option(*OUT, text="FILE.json; FILE.svg is drawn beside it", name="FILE", panel=OUTPUT)
]
RecipeOut = Annotated[
    Path | None, _option(*OUT, text="FILE.yaml to write", name="FILE", panel=OUTPUT, default="MODEL-recipe.yaml")
]
CompareOut = Annotated[
    Path | None, _option(*OUT, text="FILE.json; a stopped run goes on from it", name="FILE", panel=OUTPUT)
]
LayerOut = Annotated[Path | None, _option(*OUT, text="FILE.json; written after every case", name="FILE", panel=OUTPUT)]
ReportOut = Annotated[
    Path | None,
    _option(*OUT, text="FILE.html; FILE.md for pull requests", name="FILE", panel=OUTPUT, default="in RUN_DIR"),
]
Overwrite = Annotated[bool, _option("--overwrite", text="Replace an earlier result, at the end", panel=OUTPUT)]
GGUF = Annotated[Path, _option("--gguf", text="FILE.gguf to write", name="FILE", panel=OUTPUT)]
AlsoGGUF = Annotated[
    Path | None, _option("--gguf", text="FILE.gguf to write too, for llama.cpp", name="FILE", panel=OUTPUT)
]
Report = Annotated[bool, _option("--report", text="Show what was measured in every layer", panel=OUTPUT)]
DryRun = Annotated[bool, _option("--dry-run", text="Show plan and estimates, write nothing", panel=OUTPUT)]
DraftFamily = Annotated[bool, _option("--draft-family", text="Print a family file for it", panel=OUTPUT)]
PushToHub = Annotated[
    str | None, _option("--push-to-hub", text="Upload the result to the hub", name="USER/NAME", panel=OUTPUT)
]
Private = Annotated[bool, _option("--private", text="A new repository is private", panel=OUTPUT)]

# Parts of a split's options.
InspectOptions = Annotated[SplitOptions, Only(("experts",))]
CandidateOptions = Annotated[
    SplitOptions,
    Only(
        (
            *("experts", "min_active", "max_active", "target", "engine", "partition", "router"),
            *("calibration", "tokens", "context", "seed", "dtype", "device"),
        )
    ),
]
TrialOptions = Annotated[
    SplitOptions, Only(("experts", "refit_to", "calibration", "tokens", "context", "seed", "device"))
]
