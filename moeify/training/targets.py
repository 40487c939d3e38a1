"""What a student is trained towards: a teacher, with what is trained on and what is held out."""

from typing import Any

from accelerate import PartialState

from moeify.options import Track
from moeify.training.inputs import Inputs
from moeify.training.options import FinetuneOptions
from moeify.training.outputs import InputBlocks, OutputTeacher
from moeify.training.teacher import Blocks, Teacher, open_teacher

Targets = tuple[Teacher, list[Blocks]] | tuple[OutputTeacher, list[InputBlocks]]


def open_targets(inputs: Inputs, options: FinetuneOptions, processes: PartialState, track: Track[Any]) -> Targets:
    """Load the teacher.

    Raises:
        InputError: the cache of its hidden states cannot be written, or does not hold them.
    """
    half, device = options.precision == "bfloat16", str(processes.device)
    if not inputs.of_language:
        blocks = [InputBlocks(part, inputs.context) for part in (inputs.train, inputs.held_out)]
        return OutputTeacher.open(inputs.teacher, device, half=half), blocks
    return open_teacher(
        inputs.teacher,
        [inputs.ids_BC, inputs.eval_BC],
        device=device,
        half=half,
        cached=options.cache_teacher,
        first=processes.is_main_process,
        wait=processes.wait_for_everyone,
        track=track,
    )
