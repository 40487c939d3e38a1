"""The help of a command: its options in panels, one line each at 80 columns, with their defaults; an example last."""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

from typer.core import TyperCommand, TyperGroup

from moeify.command_line import ADVANCED, FIRST, OUTPUT, fields, flag
from moeify.errors import unknown
from moeify.options import MachineOptions

DEFAULTS = "Defaults stand in [brackets]."
LISTS = " A list is one word with commas, or the option again."
EXAMPLE = "\nExample:\n"
# Wider than any option, so that none is put on a line of its own.
WIDEST = 40

# Words of `split --for`, which are options of `plan`.
MACHINE = [flag(field.name) for field in fields(MachineOptions)]


class Description(NamedTuple):
    """What a command's docstring says: all before the example, its first line, the example."""

    text: str
    line: str
    example: str

    @classmethod
    def of(cls, command: Callable[..., None]) -> "Description":
        text, _, example = (inspect.getdoc(command) or "").partition(EXAMPLE)
        return cls(text.strip(), text.split("\n")[0].rstrip("."), example.strip())


class Command(TyperCommand):
    """A command whose help has panels; without boxes, so that it can be piped, copied and read aloud."""

    def collect_usage_pieces(self, ctx: Any) -> list[str]:  # noqa: ARG002
        """What must be given, in the order of the first line: arguments, then options that have no default."""
        needed = [one for one in self.params if one.required or one.param_type_name == "argument"]
        return ["[OPTIONS]", *map(_term, sorted(needed, key=lambda one: one.param_type_name))]

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write a section for each panel, with one column of names for all."""
        panels: dict[str, list[tuple[str, str]]] = {"Arguments": [], FIRST: []}
        for parameter in self.get_params(ctx):
            if getattr(parameter, "hidden", False):
                continue
            is_argument = parameter.param_type_name == "argument"
            panel = "Arguments" if is_argument else getattr(parameter, "rich_help_panel", None) or ADVANCED
            panels.setdefault(panel, []).append((_term(parameter), _text(parameter)))
        last = {name: panels.pop(name) for name in (OUTPUT, ADVANCED) if name in panels}
        panels = {name: rows for name, rows in {**panels, **last}.items() if rows}
        width = max(len(term) for rows in panels.values() for term, _ in rows)
        for name, rows in panels.items():
            with formatter.section(name):
                formatter.write_dl([(term.ljust(width), text) for term, text in rows], col_max=WIDEST)

    def format_epilog(self, ctx: Any, formatter: Any) -> None:  # noqa: ARG002
        """Write how lists are given, if the command has any, and the example as it stands."""
        has_lists = any(",..." in (parameter.metavar or "") for parameter in self.params)
        formatter.write_paragraph()
        formatter.write_text(DEFAULTS + (LISTS if has_lists else ""))
        if self.epilog:
            with formatter.section("Example"):
                for line in self.epilog.splitlines():
                    formatter.write(f"  {line.strip()}\n")


class Group(TyperGroup):
    """The program; asks what was meant by a command that it does not have."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args and not args[0].startswith("-") and args[0] not in self.commands and not ctx.resilient_parsing:
            raise unknown("a command of moeify", args[0], self.commands)
        return super().resolve_command(ctx, args)


def _term(parameter: Any) -> str:
    """The names of an option and what stands for its value."""
    if parameter.param_type_name == "argument":
        return str(parameter.metavar)
    names = sorted(parameter.opts, key=len)
    if parameter.secondary_opts:
        names = [f"--[no-]{names[0].removeprefix('--')}"]
    return ", ".join(names) + ("" if parameter.is_flag or not parameter.metavar else f" {parameter.metavar}")


def _text(parameter: Any) -> str:
    default = getattr(parameter, "show_default", None)
    text = (parameter.help or "").removesuffix(".")
    return f"{text} [{default}]" if isinstance(default, str) and default else text


def usage_error(error: Any) -> tuple[str, str]:
    """What the option parser says about a command line, as message and hint.

    Args:
        error: of the parser, with its context if it got as far as that.
    """
    context = getattr(error, "ctx", None)
    path = context.command_path if context else "moeify"
    hint = f"`{path} --help` lists its options"
    option = getattr(error, "option_name", None) if hasattr(error, "possibilities") else None
    if option and context:
        names = [name for one in context.command.get_params(context) for name in (*one.opts, *one.secondary_opts)]
        told = unknown(f"an option of {path}", option, [name for name in names if name.startswith("--")])
        similar = told.hint.partition("? ")[0] if "? " in told.hint else ""
        if path.endswith(" split") and option in MACHINE:
            similar = f"did you mean --for {option.removeprefix('--')}=..."
        return str(told), f"{similar}? {hint}" if similar else hint
    parameter = getattr(error, "param", None)
    if parameter is not None and type(error).__name__ == "MissingParameter":
        example = (context.command.epilog or "").splitlines()[:1] if context else []
        return f"{path} needs {_term(parameter)}", f"such as: {example[0]}" if example else hint
    message: str = error.format_message().rstrip(".")
    if "unexpected extra argument" in message:
        # The words stand at the end, in brackets.
        words = message.rpartition("(")[2].rstrip(")")
        message = f"{path} takes no further argument: {words}"
    return message, hint
