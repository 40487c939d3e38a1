"""`moeify export`: a checkpoint for llama.cpp."""

from moeify.cli import options as option
from moeify.command_line import command_line
from moeify.options import ExportOptions


def export_command(
    model: option.Exported,
    *,
    gguf: option.GGUF,
    options: ExportOptions,
    overwrite: option.Overwrite = False,
    push_to_hub: option.PushToHub = None,
    private: option.Private = False,
    output: option.Output,
) -> None:
    """Write a checkpoint as one GGUF file, which llama.cpp runs.

    Needs nothing of llama.cpp.

    Example:
        moeify export my-moe --gguf my-moe.gguf --type q8_0
    """
    from moeify.cli.push import check_push, push
    from moeify.cli.render import renderer_for
    from moeify.cli.tables.export import export_table
    from moeify.export.gguf import check_package

    check_package()
    from moeify.export.gguf.export import export_gguf

    renderer = renderer_for(output)
    check_push(push_to_hub, private=private)
    result = export_gguf(model, gguf, options, overwrite=overwrite, track=renderer.track)
    # The dense model may have been named from another folder.
    step = command_line("verify", str(gguf), dense=result.dense) if option.is_there(result.dense) else ""
    renderer.result(result, export_table(result), next_step=step)
    push(renderer, result.file, push_to_hub, private=private)
