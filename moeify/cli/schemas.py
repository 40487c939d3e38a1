"""What commands print with `--json`: a JSON Schema for each, made from the dataclasses that they return."""

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic import ConfigDict, TypeAdapter
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue
from pydantic_core import PydanticOmit, core_schema

from moeify.errors import UsageError

DIALECT = "https://json-schema.org/draft/2020-12/schema"


@dataclass(frozen=True)
class Printed:
    """What a command prints.

    Args:
        module, name: of the dataclass that it returns.
        further: properties beside its fields.
        under: the key of a list of them, if there are several.
    """

    module: str
    name: str
    further: Mapping[str, JsonSchemaValue] = field(default_factory=dict)
    under: str = ""


PASSED = {"passed": {"type": "boolean"}}
# The schema's name without `moeify.` and version -> what has it.
PRINTED: Mapping[str, Printed] = {
    "inspect": Printed("moeify.convert.inspection", "Inspection"),
    "preview": Printed("moeify.convert.prepare", "Preview"),
    "split": Printed("moeify.convert.pipeline", "SplitResult"),
    "search": Printed("moeify.convert.search", "SearchResult", {"options": {"type": "object"}}),
    "compare": Printed("moeify.check.compare", "Comparison"),
    "finetune": Printed("moeify.training.finetune", "FinetuneResult"),
    "verify": Printed("moeify.check.verify", "VerifyReport", PASSED),
    "eval": Printed("moeify.check.evaluate", "EvalResult", under="results"),
    "tune": Printed("moeify.kernels.tune_model", "TuneResult"),
    "bench": Printed("moeify.benchmark.models.results", "ModelBench"),
    "layer-bench": Printed("moeify.benchmark.layers.results", "LayerBench"),
    "report": Printed("moeify.reporting.report", "ReportResult"),
    "run": Printed("moeify.recipes.run", "RunResult", PASSED),
    "run-preview": Printed("moeify.recipes.run", "RunPreview"),
    "ls": Printed("moeify.plugin_list", "Listing"),
}


def json_schema(name: str) -> dict[str, Any]:
    """The JSON Schema of what has the schema `moeify.NAME/1`.

    Raises:
        UsageError: there is no such schema.
    """
    if name not in PRINTED:
        raise UsageError(f"no schema named {name!r}", f"one of: {', '.join(PRINTED)}")
    printed = PRINTED[name]
    kind: Any = getattr(importlib.import_module(printed.module), printed.name)
    # In a tuple, because dataclasses take no configuration from outside, but those inside of something else do.
    adapter: TypeAdapter[Any] = TypeAdapter(tuple[kind], config=ConfigDict(arbitrary_types_allowed=True))
    found = adapter.json_schema(mode="serialization", schema_generator=_Generator)
    parts = found.get("$defs", {})
    whole = parts.pop(printed.name) if printed.name in parts else found["prefixItems"][0]
    if printed.under:
        rows = {printed.under: {"type": "array", "items": whole}}
        whole = {"type": "object", "properties": rows, "required": [printed.under], "additionalProperties": False}
    whole["properties"] = {"schema": {"const": f"moeify.{name}/1"}, **whole["properties"], **printed.further}
    whole["required"] = ["schema", *whole.get("required", []), *printed.further]
    return {"$schema": DIALECT, "$id": f"moeify.{name}/1", **whole, **({"$defs": parts} if parts else {})}


class _Generator(GenerateJsonSchema):
    """Tensors are left out, as they are from what is printed; numbers that are not finite are printed as null."""

    def handle_invalid_for_json_schema(self, schema: Any, error_info: str) -> JsonSchemaValue:  # noqa: ARG002
        raise PydanticOmit

    def float_schema(self, schema: core_schema.FloatSchema) -> JsonSchemaValue:
        return {**super().float_schema(schema), "type": ["number", "null"]}

    def dataclass_schema(self, schema: core_schema.DataclassSchema) -> JsonSchemaValue:
        return {**super().dataclass_schema(schema), "additionalProperties": False}
