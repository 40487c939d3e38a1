"""`moeify ls`: what plug-ins and recipes there are."""

from moeify.cli import options as option


def list_command(
    kind: option.Kind,
    json: option.Json = False,
    quiet: option.Quiet = False,
    verbose: option.Verbose = False,
    debug: option.Debug = False,  # noqa: ARG001
) -> None:
    """List families, targets, partitions, routers, strategies or recipes."""
    from moeify.cli.render import renderer_for
    from moeify.cli.tables.ls import list_table
    from moeify.plugin_list import listing

    renderer = renderer_for(json, quiet, verbose, loads_models=False)
    found = listing(kind)
    renderer.result("ls", found, list_table(found))
