"""Options of `moeify bench` and `moeify bench-layer`, for the command line and recipes. Imports nothing heavy."""

from dataclasses import dataclass
from typing import Literal

from moeify.command_line import Options, option
from moeify.errors import UsageError
from moeify.options import CONTEXT, DATA, DEVICE, DEVICES, DTYPE, QUESTIONS, TASKS, DType, FileType

Section = Literal["quality", "speed", "memory", "experts"]
Implementation = Literal["eager", "batched_mm", "grouped_mm", "moeify"]
Routing = Literal["uniform", "zipf"]
Pass = Literal["forward", "training"]
EngineName = Literal["transformers", "llama.cpp"]


@dataclass(frozen=True)
class BenchOptions(Options):
    """What is measured of whole models."""

    data: tuple[str, ...] = option(("builtin-heldout",), DATA)
    tokens: int = option(8192, "At most so many tokens of each text, in whole blocks.", least=1)
    context: int | None = option(None, CONTEXT, least=1)
    tasks: tuple[str, ...] = option((), TASKS, commas=True)
    questions: int | None = option(None, QUESTIONS, least=1)
    batch: tuple[int, ...] = option((1, 8), "Sequences at once, such as 1,8.", least=1)
    prompt: tuple[int, ...] = option((), "Tokens of a prompt; 128,512 where all models take them.", least=1)
    implementation: tuple[Implementation, ...] = option((), "Of experts, such as eager,grouped_mm; all that run.")
    roofline: bool = option(False, "Measure the machine and compare times with it.")
    skip: tuple[Section, ...] = option((), "Leave a section out.")
    seconds_per_row: float = option(
        2.0, "How long one model on one implementation is timed on one phase of one regime.", least=0
    )
    engine: tuple[EngineName, ...] = option(("transformers",), "What runs the models: transformers, llama.cpp or both.")
    type: tuple[FileType, ...] = option(("q8_0",), "Of the GGUF files that llama.cpp gets of folders.")
    rounds: int = option(3, "How often llama.cpp times each file, in turn with the others.", least=3)
    threads: tuple[int, ...] = option((), "Of llama.cpp, such as 1,8; one and all cores.", least=1)
    limit_seconds: float = option(900.0, "Stop a program of llama.cpp that takes longer.", above=0)
    dtype: DType = option("auto", DTYPE)
    device: str = option("auto", DEVICE, form=DEVICES)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tasks and "transformers" not in self.engine:
            raise UsageError("--tasks are answered in transformers", "add --engine transformers")


@dataclass(frozen=True)
class LayerBenchOptions(Options):
    """What is measured of one layer."""

    cases: tuple[str, ...] = option(
        (), "Shapes, such as llama3-8b-8/2 or 64x256-8/2+2; without any, those of real models.", commas=True
    )
    tokens: tuple[int, ...] = option((1, 2, 4, 8, 32, 64, 128, 512, 2048, 8192), "Tokens of a call.", least=1)
    routings: tuple[Routing, ...] = option(("uniform", "zipf"), "How tokens choose experts.")
    passes: tuple[Pass, ...] = option(("forward", "training"), "forward, or training (forward and backward).")
    peers: tuple[str, ...] = option(
        (), "Implementations, such as moeify,dense,grouped_mm; all that are installed.", commas=True
    )
    seconds_per_row: float = option(0.3, "How long an implementation is timed on a case.", least=0)
    limit_seconds: float | None = option(None, "Begin no case after that; the most important ones come first.", least=0)
    dtype: DType = option("auto", DTYPE)
    device: str = option("auto", DEVICE, form=DEVICES)
