"""`moeify finetune`: training against the dense model."""

import os
from dataclasses import replace

from moeify.cli import options as option
from moeify.command_line import command_line
from moeify.options import EvalOptions
from moeify.training.options import FinetuneOptions


def finetune_command(
    moe: option.Student,
    *,
    teacher: option.Teacher,
    options: FinetuneOptions,
    out: option.Out = None,
    overwrite: option.Overwrite = False,
    push_to_hub: option.PushToHub = None,
    private: option.Private = False,
    output: option.Output,
) -> None:
    """Train a converted or pruned model to do what the dense one does.

    Stages: layers fits routers and down_proj of each layer, router trains routers alone, lora low-rank updates,
    full everything. A run that was stopped goes on.

    Example:
        moeify finetune my-moe --teacher builtin --tokens 16384 -o my-moe-tuned
    """
    from moeify.cli.push import check_push, push
    from moeify.cli.render import renderer_for
    from moeify.cli.tables.finetune import finetune_table
    from moeify.training.finetune import finetune

    # Of several processes the first one speaks.
    first = int(os.environ.get("RANK", "0")) == 0
    renderer = renderer_for(output if first else replace(output, json=False, quiet=True))
    check_push(push_to_hub, private=private)
    folder = out or option.beside(moe, "finetuned")
    result = finetune(moe, teacher, folder, options, overwrite=overwrite, track=renderer.track)
    measure = EvalOptions(options.eval_data, device=options.device)
    step = command_line("eval", teacher, moe, str(folder), measure)
    renderer.result(result, finetune_table(result), next_step=step)
    if first:
        push(renderer, folder, push_to_hub, private=private)
