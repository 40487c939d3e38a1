"""Options of `moeify bench` and `moeify bench-layer`, for the command line and recipes. Imports nothing heavy."""

from dataclasses import dataclass
from typing import Literal

from moeify.command_line import ADVANCED, Options, option
from moeify.errors import UsageError
from moeify.options import (
    CONTEXT,
    CONTEXT_AUTO,
    DATA,
    DEVICE,
    DEVICES,
    DTYPE,
    QUESTIONS,
    TASKS,
    DType,
    FileType,
)

Section = Literal["quality", "speed", "memory", "experts"]
Implementation = Literal["eager", "batched_mm", "grouped_mm", "moeify"]
Routing = Literal["uniform", "zipf"]
Pass = Literal["forward", "training"]
EngineName = Literal["transformers", "llama.cpp"]

TIMING, LLAMA_CPP = "Timing", "llama.cpp"


@dataclass(frozen=True)
class BenchOptions(Options):
    """What is measured of whole models."""

    data: tuple[str, ...] = option(("builtin-heldout",), DATA, name="TEXT")
    tokens: int = option(8192, "At most so many tokens of each text", least=1)
    tasks: tuple[str, ...] = option((), TASKS, auto="none", name="TASK")
    questions: int | None = option(None, QUESTIONS, auto="all", least=1)
    context: int | None = option(None, CONTEXT, auto=CONTEXT_AUTO, least=1, panel=ADVANCED)
    batch: tuple[int, ...] = option((1, 8), "Sequences at once", least=1)
    prompt: tuple[int, ...] = option((), "Tokens of a prompt", auto="128,512", least=1)
    implementation: tuple[Implementation, ...] = option(
        (), "Of experts, such as eager", auto="all that run", panel=TIMING
    )
    roofline: bool = option(False, "Measure the machine, compare times with it", panel=TIMING)
    skip: tuple[Section, ...] = option((), "Leave out quality, speed, memory or experts")
    seconds_per_row: float = option(2.0, "How long each number is timed", least=0, panel=TIMING)
    engine: tuple[EngineName, ...] = option(("transformers",), "transformers, llama.cpp")
    type: tuple[FileType, ...] = option(("q8_0",), "Of the GGUF files it gets of folders", panel=LLAMA_CPP)
    rounds: int = option(3, "How often each file is timed, in turn", least=3, panel=LLAMA_CPP)
    threads: tuple[int, ...] = option((), "That it uses", auto="one and all cores", least=1, panel=LLAMA_CPP)
    limit_seconds: float = option(900.0, "Stop a program that takes longer", above=0, panel=LLAMA_CPP)
    dtype: DType = option("auto", DTYPE, panel=ADVANCED)
    device: str = option("auto", DEVICE, form=DEVICES)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tasks and "transformers" not in self.engine:
            raise UsageError("--tasks are answered in transformers", "add --engine transformers")


@dataclass(frozen=True)
class LayerBenchOptions(Options):
    """What is measured of one layer."""

    cases: tuple[str, ...] = option((), "Shapes, such as 64x256-8/2+2", auto="of real models")
    tokens: tuple[int, ...] = option(
        (1, 2, 4, 8, 32, 64, 128, 512, 2048, 8192), "Tokens of a call", auto="1,2,4 ... 8192", least=1
    )
    routings: tuple[Routing, ...] = option(("uniform", "zipf"), "How tokens choose")
    passes: tuple[Pass, ...] = option(("forward", "training"), "forward, training")
    peers: tuple[str, ...] = option((), "Such as moeify,dense,eager", auto="all installed")
    seconds_per_row: float = option(0.3, "How long each number is timed", least=0)
    limit_seconds: float | None = option(None, "Begin no case after that", least=0)
    dtype: DType = option("auto", DTYPE, panel=ADVANCED)
    device: str = option("auto", DEVICE, form=DEVICES)
