"""`moeify ls`: what plug-ins and recipes there are."""

from moeify.cli import options as option


def list_command(kind: option.Kind, *, output: option.Output) -> None:
    """List families, targets, methods, engines or recipes.

    Example:
        moeify ls partitions
    """
    from moeify.cli.render import renderer_for
    from moeify.cli.tables.ls import list_table
    from moeify.plugin_list import listing

    entries = listing(kind)
    renderer_for(output, loads_models=False).result(entries, list_table(entries))
