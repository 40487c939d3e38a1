"""`moeify split`: dense in, mixture of experts out."""

from dataclasses import replace
from typing import Any

from moeify.cli import options as option
from moeify.command_line import command_line
from moeify.errors import UsageError
from moeify.options import EvalOptions, ExportOptions, SplitOptions
from moeify.training.options import TimeOptions


def split_command(
    model: option.Model,
    *,
    options: SplitOptions,
    within: TimeOptions,
    out: option.Out = None,
    gguf: option.AlsoGGUF = None,
    export: ExportOptions,
    overwrite: option.Overwrite = False,
    report: option.Report = False,
    dry_run: option.DryRun = False,
    push_to_hub: option.PushToHub = None,
    private: option.Private = False,
    output: option.Output,
) -> None:
    """Cut every FFN into experts and write an MoE checkpoint.

    With --minutes a search chooses layers first, and the time that the split leaves is spent on training. A run that
    was stopped goes on.

    Example:
        moeify split builtin --experts 8 --active 4 -o my-moe
    """
    from moeify.calibration.share import joined
    from moeify.cli.push import check_push, push
    from moeify.cli.render import renderer_for
    from moeify.cli.tables.export import export_table
    from moeify.cli.tables.finetune import finetune_table
    from moeify.cli.tables.split import layers_table, preview_table, split_table, timed_table
    from moeify.convert.pipeline import SplitResult, split
    from moeify.convert.preview import preview
    from moeify.plan import load_plan
    from moeify.training.within import TimedSplit, split_within

    if gguf is None and export != ExportOptions():
        raise UsageError("--type and --tokenizer-pre are of a GGUF, and none is written", "name one with --gguf")
    # Of several processes the first one speaks.
    share = joined()
    renderer = renderer_for(output if share.is_first else replace(output, json=False, quiet=True))
    check_push(push_to_hub, private=private, dry_run=dry_run)
    if within.minutes is not None and share.size > 1:
        raise UsageError(
            "--minutes runs in one process", "without it torchrun shares the calibration; finetune takes --minutes too"
        )
    if dry_run:
        plan = preview(model, options, track=renderer.track)
        step = command_line(
            "split", model, options, within, export, out=out, gguf=gguf, overwrite=overwrite, report=report
        )
        renderer.result(plan, preview_table(plan), next_step=step)
        return
    folder = out or option.beside(model, "static" if options.static else "moe")
    common: dict[str, Any] = {"gguf": gguf, "export": export, "overwrite": overwrite, "track": renderer.track}
    result: SplitResult | TimedSplit
    if within.minutes is None:
        result = split(model, folder, options, announce=renderer.note, share=share, **common)
        if not share.is_first:
            return
        tables = [split_table(result)]
    else:
        result = split_within(model, folder, options, minutes=within.minutes, announce=renderer.note, **common)
        tables = [timed_table(result), *([finetune_table(result.finetune)] if result.finetune else [])]
    if report:
        tables.append(layers_table(load_plan(folder)))
    if result.gguf is not None:
        tables.append(export_table(result.gguf))
    evaluate = command_line("eval", model, str(folder), EvalOptions(device=options.device))
    verify = command_line("verify", str(folder), dense=model)
    renderer.result(result, *tables, next_step=evaluate if options.static or within.minutes is not None else verify)
    for written in (folder, gguf):
        if written is not None:
            push(renderer, written, push_to_hub, private=private)
