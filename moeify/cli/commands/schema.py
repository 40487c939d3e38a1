"""`moeify schema`: what `--json` prints, as JSON Schema."""

from moeify.cli import options as option


def schema_command(name: option.SchemaName, *, output: option.Output) -> None:  # noqa: ARG001
    """Print the JSON Schema of what --json prints.

    Itself always JSON.

    Example:
        moeify schema eval
    """
    from moeify.cli.render import Renderer
    from moeify.results import json_schema

    Renderer().document(json_schema(name))
