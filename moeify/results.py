"""Results as JSON: one writer, one reader and one JSON Schema for each dataclass that a command returns.

A result is its fields under their names, beside `"schema": "moeify.NAME/1"`. Tensors are left out; a float that is not
finite is null, for which JSON has a word, and is read as NaN. Writing needs the standard library alone; reading and
schemas need pydantic.
"""

import dataclasses
import importlib
import json
import math
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, cast, get_type_hints

from moeify.cache import check_place, disk_errors, intact, replacing
from moeify.errors import InputError, unknown

Result = TypeVar("Result")

DIALECT = "https://json-schema.org/draft/2020-12/schema"
# Of a page or drawing: its first words say that moeify wrote it.
BEGINNING_BYTES = 4096
HINT = "measure it again, or move the file away"
# The schema's name without `moeify.` and version -> the dataclass that has it.
KINDS: Mapping[str, str] = {
    "inspect": "moeify.convert.inspection.Inspection",
    "family-draft": "moeify.convert.draft.FamilyDraft",
    "machine-plan": "moeify.convert.machine_plan.MachinePlan",
    "preview": "moeify.convert.preview.Preview",
    "split": "moeify.convert.pipeline.SplitResult",
    "timed-split": "moeify.training.within.TimedSplit",
    "search": "moeify.convert.search.SearchResult",
    "compare": "moeify.check.compare.Comparison",
    "finetune": "moeify.training.finetune.FinetuneResult",
    "finetune-history": "moeify.training.finetune.FinetuneHistory",
    "export": "moeify.export.gguf.result.ExportResult",
    "verify": "moeify.check.verify.VerifyReport",
    "eval": "moeify.check.evaluate.Evaluation",
    "generate": "moeify.check.generate.GenerateResult",
    "chat": "moeify.check.generate.ChatResult",
    "tune": "moeify.kernels.tune_model.TuneResult",
    "bench": "moeify.benchmark.models.results.ModelBench",
    "layer-bench": "moeify.benchmark.layers.results.LayerBench",
    "report": "moeify.reporting.report.ReportResult",
    "record": "moeify.reporting.reader.Record",
    "init": "moeify.recipes.init.InitResult",
    "run": "moeify.recipes.run.RunResult",
    "run-preview": "moeify.recipes.preview.RunPreview",
    "ls": "moeify.plugin_list.Listing",
}
# Properties that stand in the JSON beside the fields.
PROPERTIES: Mapping[str, tuple[str, ...]] = {
    "search": ("options",),
    "verify": ("passed",),
    "run": ("passed",),
    "run-preview": ("duration_s", "disk_bytes"),
}


def find_kind(name: str) -> type[Any]:
    """The dataclass of a schema's name.

    Raises:
        UsageError: there is no such schema.
    """
    if name not in KINDS:
        raise unknown("a schema", name, KINDS)
    module, _, attribute = KINDS[name].rpartition(".")
    kind: type[Any] = getattr(importlib.import_module(module), attribute)
    return kind


def schema_name(kind: type[Any]) -> str:
    """The inverse of `find_kind`."""
    return next(name for name, path in KINDS.items() if path == f"{kind.__module__}.{kind.__qualname__}")


def properties_of(kind: type[Any]) -> tuple[str, ...]:
    """The properties of a result that stand beside its fields."""
    path = f"{kind.__module__}.{kind.__qualname__}"
    return next((PROPERTIES.get(name, ()) for name, other in KINDS.items() if other == path), ())


def to_json(value: Any) -> dict[str, Any]:
    """A result as a JSON object with its schema."""
    name = schema_name(type(value))
    properties = {key: _plain(getattr(value, key)) for key in PROPERTIES.get(name, ())}
    return {"schema": f"moeify.{name}/1", **properties, **_plain(value)}


def write(value: Any, file: Path) -> None:
    """Replace a JSON file by a result, so that it is whole at any moment; makes its folder.

    Raises:
        InputError: it cannot be written, or holds something else, see `check_writable`.
    """
    text = json.dumps(to_json(value), indent=1, allow_nan=False) + "\n"
    write_text(text, file, type(value))


def write_text(text: str, file: Path, kind: "type[Any] | str") -> None:
    """Replace a file of a kind, see `check_writable`, by another."""
    check_replaceable(file, kind)
    with replacing(file.resolve()) as temporary:
        # Names come from files: half a code point cannot be encoded.
        temporary.write_bytes(text.encode("utf-8", "replace"))


def check_writable(file: Path, kind: "type[Any] | str") -> None:
    """Refuse, before the work, a file that could not be written after it.

    Args:
        file: it need not exist.
        kind: of a file that may be replaced: the dataclass of its result, or words that stand near its beginning.

    Raises:
        InputError: it cannot be written, or is of another kind.
    """
    check_replaceable(file, kind)
    check_place(file.resolve())


def check_new(file: Path, *, overwrite: bool) -> None:
    """Raise InputError for a file that exists and may not be overwritten."""
    with disk_errors(file):
        if file.exists() and not overwrite:
            raise InputError(f"{file} exists", "--overwrite replaces it")


def check_replaceable(file: Path, kind: "type[Any] | str") -> None:
    """Raise InputError for a file that moeify did not write as one of this kind; an empty one is nobody's."""
    with disk_errors(file):
        if not file.exists() or (file.is_file() and not file.stat().st_size):
            return
        if not file.is_file():
            raise InputError(f"{file} is not a file", "choose another name")
        if isinstance(kind, str):
            with file.open("rb") as opened:
                is_of_kind = kind.encode() in opened.read(BEGINNING_BYTES)
            words = f"{file.suffix.removeprefix('.')} file"
        else:
            name = schema_name(kind)
            words = f"{name} result"
            values = intact(file, lambda path: json.loads(path.read_bytes()))
            is_of_kind = isinstance(values, dict) and str(values.get("schema")).startswith(f"moeify.{name}/")
    if not is_of_kind:
        raise InputError(f"{file} is no {words} that moeify wrote, so it is not replaced", "choose another name")


def load_json(file: Path, hint: str = HINT) -> Any:
    """The value in a JSON file; NaN and Infinity, which other writers put there, count as null.

    Raises:
        InputError: it cannot be read, or is not JSON.
    """
    try:
        return json.loads(file.read_bytes(), parse_constant=lambda _: None)
    except OSError as error:
        raise InputError(f"cannot read {file}: {error.strerror}", hint) from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file} is not JSON: {error}", hint) from error


def read(file: Path, kind: type[Result], hint: str = HINT) -> Result:
    """Read what `write` wrote.

    Args:
        file: a JSON file.
        kind: the dataclass of the result.
        hint: of an error.

    Raises:
        InputError: no such file, not JSON, another schema, or a field that is missing or of another type.
    """
    return parse(load_json(file, hint), kind, file, hint)


def parse(values: Any, kind: type[Result], file: Path, hint: str = HINT, *, finite: bool = False) -> Result:
    """A result from the JSON value that a file holds; keys that the result does not have are left alone.

    Args:
        values, kind, file, hint: see `read`.
        finite: a null in the place of a number is an error.

    Raises:
        InputError: see `read`.
    """
    from pydantic import ValidationError

    expected = f"moeify.{schema_name(kind)}/1"
    schema = values.get("schema") if isinstance(values, dict) else None
    if schema != expected:
        raise InputError(f"{file} has schema {schema}, expected {expected}", hint)
    try:
        return _validate(kind, values, finite=finite)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "the whole"
        raise InputError(f"{file}: {place}: {first['msg']}, found {first['input']!r:.60}", hint) from error


def _validate(kind: type[Result], values: dict[str, Any], *, finite: bool) -> Result:
    """The result, with NaN for every null that stands where a float is expected."""
    from pydantic import ValidationError

    result: Result
    adapter = _adapter(cast(Any, kind))
    try:
        result = adapter.validate_python(values)
    except ValidationError as error:
        nulls = [one["loc"] for one in error.errors() if one["type"] == "float_type" and one["input"] is None]
        if finite or not nulls:
            raise
        values = json.loads(json.dumps(values))
        for *path, last in nulls:
            owner: Any = values
            for key in path:
                owner = owner[key]
            owner[last] = math.nan
        result = adapter.validate_python(values)
    return result


def json_schema(name: str) -> dict[str, Any]:
    """The JSON Schema of what has the schema `moeify.NAME/1`.

    Raises:
        UsageError: there is no such schema.
    """
    from pydantic import ConfigDict, TypeAdapter

    kind: Any = find_kind(name)
    # In a tuple, because dataclasses take no configuration from outside, but those inside of something else do.
    adapter: TypeAdapter[Any] = TypeAdapter(tuple[kind], config=ConfigDict(arbitrary_types_allowed=True))
    document = adapter.json_schema(mode="serialization", schema_generator=_generator())
    parts = document.get("$defs", {})
    whole = parts.pop(kind.__name__) if kind.__name__ in parts else document["prefixItems"][0]
    further = {key: _property_schema(kind, key) for key in PROPERTIES.get(name, ())}
    whole["properties"] = {"schema": {"const": f"moeify.{name}/1"}, **further, **whole["properties"]}
    whole["required"] = ["schema", *further, *whole.get("required", [])]
    return {"$schema": DIALECT, "$id": f"moeify.{name}/1", **whole, **({"$defs": parts} if parts else {})}


def _property_schema(kind: Any, key: str) -> dict[str, Any]:
    from pydantic import TypeAdapter

    adapter: TypeAdapter[Any] = TypeAdapter(get_type_hints(getattr(kind, key).fget)["return"])
    return adapter.json_schema()


def _plain(value: Any) -> Any:
    """JSON-able copy; fields that hold tensors are left out."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = [field for field in dataclasses.fields(value) if "Tensor" not in str(field.type)]
        return {field.name: _plain(getattr(value, field.name)) for field in fields}
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    return None if isinstance(value, float) and not math.isfinite(value) else value


@cache
def _adapter(kind: type[Any]) -> Any:
    from pydantic import TypeAdapter

    return TypeAdapter(kind)


@cache
def _generator() -> Any:
    """How schemas are made: without tensors, and with null for numbers that are not finite."""
    from pydantic.json_schema import GenerateJsonSchema
    from pydantic_core import PydanticOmit

    class Generator(GenerateJsonSchema):
        def handle_invalid_for_json_schema(self, schema: Any, error_info: str) -> Any:  # noqa: ARG002
            raise PydanticOmit

        def float_schema(self, schema: Any) -> Any:
            return {**super().float_schema(schema), "type": ["number", "null"]}

        def dataclass_schema(self, schema: Any) -> Any:
            return {**super().dataclass_schema(schema), "additionalProperties": False}

    return Generator
