"""`moeify schema`: what `--json` prints, as JSON Schema."""

from moeify.cli import options as option


def schema_command(
    name: option.SchemaName,
    json: option.Json = False,  # noqa: ARG001
    quiet: option.Quiet = False,  # noqa: ARG001
    verbose: option.Verbose = False,  # noqa: ARG001
    debug: option.Debug = False,  # noqa: ARG001
) -> None:
    """Print the JSON Schema of what a command prints with --json; itself always JSON."""
    from moeify.cli.render import Renderer
    from moeify.cli.schemas import json_schema

    Renderer().document(json_schema(name))
