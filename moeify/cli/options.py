"""Arguments and options that are no part of a run's options, and how a command gets one parameter for each of those."""

import inspect
from collections.abc import Callable
from dataclasses import Field, dataclass
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, get_args, get_type_hints

import typer

from moeify.command_line import Options, choices, fields, flag, help_text, is_repeated, item_type, option, parse
from moeify.errors import UsageError
from moeify.options import SplitOptions
from moeify.version import __version__

KINDS = "families targets engines partitions routers strategies recipes words"


@dataclass(frozen=True)
class Output(Options):
    """What every command shows."""

    json: bool = option(False, "Print exactly one JSON object.")
    quiet: bool = option(False, "Print nothing but figures that were asked for, and errors.")
    verbose: bool = option(False, "Show the libraries' own warnings.")
    debug: bool = option(False, "Show the traceback of an error.")


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
            words = {field.name: values.pop(field.name) for field in chosen}
            repeated = {field.name: parse(field, words[field.name]) for field in chosen if is_repeated(field)}
            values[name] = kind(**{**words, **repeated})
        command(**values)

    call.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return call


def _parameter(field: Field[Any]) -> inspect.Parameter:
    """An option of the command line."""
    repeated, default = is_repeated(field), field.default
    # Without a name of its own a switch that is on gets one to turn it off.
    names = [] if default is True else [flag(field.name)]
    # A list is read from words, but its items are numbers or names.
    metavar = f"<{'|'.join(choices(field)) or item_type(field).__name__}>" if repeated else None
    shown = not (default is None or default is False or default == ())
    info = typer.Option(*names, help=help_text(field), show_default=shown, metavar=metavar)
    kind: Any = Annotated[list[str] if repeated else field.type, info]
    value = [str(item) for item in default] if isinstance(default, tuple) else default
    return inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=value, annotation=kind)


def beside(model: str, suffix: str) -> Path:
    """Where a result goes that is given no place: NAME-suffix in this folder, whatever the model's path looks like.

    Raises:
        UsageError: the model has no name.
    """
    name = Path(model).name
    if name in ("", ".."):
        name = Path(model).resolve().name
    if not name:
        raise UsageError(f"{model} has no name that {suffix} could be added to", "say with -o where to write")
    return Path(f"{name}-{suffix}")


def _version(show: bool) -> None:
    if show:
        typer.echo(f"moeify {__version__}")
        raise typer.Exit


Version = Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")]

# What is read.
Model = Annotated[str, typer.Argument(help="Folder, .gguf file, hub id or `builtin`.", show_default=False)]
Models = Annotated[list[str], typer.Argument(help="Checkpoints, the reference first.", show_default=False)]
Speakers = Annotated[list[str], typer.Argument(help="Models, dense or converted.", show_default=False)]
Moe = Annotated[str, typer.Argument(help="The converted checkpoint.", show_default=False)]
Benched = Annotated[list[str], typer.Argument(help="Converted checkpoints.", show_default=False)]
Exported = Annotated[str, typer.Argument(help="What `moeify split` wrote, or a dense model.", show_default=False)]
Student = Annotated[str, typer.Argument(help="What `moeify split` wrote, or a dense model.", show_default=False)]
Recipe = Annotated[str, typer.Argument(help="YAML file or name (moeify ls recipes).", show_default=False)]
Kind = Annotated[str, typer.Argument(help=f"One of: {KINDS}.", show_default=False)]
SchemaName = Annotated[
    str, typer.Argument(help="What stands between `moeify.` and `/1` in a result.", show_default=False)
]
RunDir = Annotated[Path, typer.Argument(help="Folder with the results of moeify bench.", show_default=False)]
DenseModel = Annotated[str, typer.Option(help="The model it came from.", show_default=False)]
Teacher = Annotated[str, typer.Option(help="The dense model it shall follow.", show_default=False)]
Against = Annotated[
    list[str], typer.Option(help="The dense model they came from; repeat it for further ones.", show_default=False)
]
Searched = Annotated[
    list[Path],
    typer.Option(help="Results of `moeify search -o FILE.json` as further rows; repeat it.", show_default=False),
]
Baseline = Annotated[
    Path | None, typer.Option(help="An earlier bench.json; what is worse gives exit code 4.", show_default=False)
]
Threshold = Annotated[float, typer.Option(help="How many times worse than the baseline something may be.")]
Tolerance = Annotated[float, typer.Option(help="Largest logit difference in float32, all experts on.")]
Overrides = Annotated[
    list[str], typer.Option("--set", help="Override a key: split.experts=16; repeat it.", show_default=False)
]
Prompt = Annotated[str | None, typer.Option(help="The text to continue; without it stdin is read.", show_default=False)]
InTemplate = Annotated[bool, typer.Option("--chat", help="Put the prompt into the model's chat template.")]
System = Annotated[
    str | None, typer.Option(help="What the models are told before the first message.", show_default=False)
]

# What is written.
Out = Annotated[Path | None, typer.Option("--out", "-o", help="Where to write.", show_default=False)]
SearchOut = Annotated[
    Path | None,
    typer.Option("--out", "-o", help="FILE.json; the frontier is drawn beside it as FILE.svg.", show_default=False),
]
RecipeOut = Annotated[
    Path | None, typer.Option("--out", "-o", help="FILE.yaml; NAME-recipe.yaml in this folder.", show_default=False)
]
CompareOut = Annotated[
    Path | None,
    typer.Option("--out", "-o", help="FILE.json; a run that was stopped goes on from it.", show_default=False),
]
LayerOut = Annotated[
    Path | None, typer.Option("--out", "-o", help="FILE.json; written after every case.", show_default=False)
]
ReportOut = Annotated[
    Path | None,
    typer.Option(
        "--out",
        "-o",
        help="FILE.html, or FILE.md for a pull request; RUN_DIR/report.html.",
        show_default=False,
    ),
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an earlier result once the new one is complete.")]
GGUF = Annotated[Path, typer.Option("--gguf", help="FILE.gguf to write.", show_default=False)]
AlsoGGUF = Annotated[
    Path | None, typer.Option("--gguf", help="FILE.gguf to write as well, for llama.cpp.", show_default=False)
]
Report = Annotated[bool, typer.Option("--report", help="Show what was measured in every layer.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Show plan and estimates, write nothing.")]
PushToHub = Annotated[
    str | None,
    typer.Option("--push-to-hub", metavar="REPO", help="Upload the result to USER/NAME.", show_default=False),
]
Private = Annotated[bool, typer.Option("--private", help="A new repository on the hub is private.")]

# Parts of a split's options.
InspectOptions = Annotated[SplitOptions, Only(("experts",))]
CandidateOptions = Annotated[
    SplitOptions,
    Only(("experts", "engine", "partition", "router", "calibration", "tokens", "context", "seed", "dtype", "device")),
]
TrialOptions = Annotated[
    SplitOptions, Only(("experts", "refit_to", "calibration", "tokens", "context", "seed", "device"))
]
