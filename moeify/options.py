"""Options of the commands that read a model, for the command line, recipes and the Python API. Imports nothing heavy.

Those of fine-tuning and of benchmarks stand in training/options.py and benchmark/options.py.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from moeify.command_line import Options, fields, flag, option, parse
from moeify.errors import UsageError
from moeify.words import listing, parse_size

Item = TypeVar("Item")
# Wraps a long loop to show its progress: (items, what they are, how many). `untracked` shows nothing,
# `moeify.progress.shown` a bar where somebody sees it.
Track = Callable[[Iterable[Item], str, int], Iterable[Item]]
# One name or path, or several.
Names = str | Path | Sequence[str | Path]
# Takes a line that says what is being done.
Announce = Callable[[str], None]

DType = Literal["auto", "float32", "bfloat16", "float16"]
Style = Literal["hard", "softmax", "soft"]
Fusion = Literal["sum", "mean"]
RefitTo = Literal["ffn", "stream"]
# Of a GGUF's matrices: those that can be written without llama.cpp, then those of llama-quantize.
# What an export writes, and what llama.cpp has besides.
FileType = Literal["f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0"]
GGUFType = Literal[FileType, "q6_k", "q5_k", "q4_k", "q3_k", "q2_k"]

# Help of options that several commands have.
DATA = "Text, jsonl or parquet file, folder, hub data set, builtin or builtin-heldout, to measure or to train on."
TASKS = "Questions to answer as well: a .jsonl file of them, or tasks of lm-eval such as hellaswag,arc_easy"
QUESTIONS = "At most so many questions of each task; all."
CONTEXT = "Tokens in a block of text; 512, or as many as the model takes."
SEED = "Of sampling, data order, clustering and projections."
DTYPE = "Of the weights; auto keeps the checkpoint's or, where there is none, is bfloat16 on cuda and float32 on cpu."
DEVICE = "Where the arithmetic runs: cpu, cuda, cuda:1; in benchmarks also auto."
DEVICES = r"auto|cpu|cuda(:[0-9]{1,3})?"
# Every layer adds its number to a seed, and scikit-learn's generators take 32 bits.
SEEDS = 1 << 31
# Words in which `split --for` spells an option of `plan` shorter.
SHORTER = {"gpu": "gpu_bandwidth", "ram": "ram_bandwidth"}
# Logits divided by less may be infinite in float32.
COLDEST = 0.01


def untracked(items: Iterable[Any], label: str, total: int) -> Iterable[Any]:  # noqa: ARG001
    """The progress of a caller who wants none."""
    return items


@dataclass(frozen=True)
class MachineOptions(Options):
    """What a model shall run on, and in what form; what is left out is measured on this machine."""

    vram: str | None = option(None, "Memory of the GPU, such as 6GB or 5.8GiB; 0 without one.")
    # From less to more than anything has.
    gpu_bandwidth: float | None = option(None, "GB/s that the GPU reads of its memory.", least=0.001, below=1e6)
    ram: str | None = option(None, "Size of the RAM, such as 32GB.")
    ram_bandwidth: float | None = option(
        None, "GB/s that the processor reads of the RAM with the threads that run.", least=0.001, below=1e6
    )
    threads: int | None = option(None, "Threads that run; all cores where they are measured.", least=1, below=4096)
    type: GGUFType = option("q8_0", "Type of the matrices; of a mix like Q4_K_M the main one, q4_k.")
    context: int | None = option(None, "Tokens in the cache of keys and values; 4,096, or the model's limit.", least=1)
    quality: float = option(
        1.4, "Perplexity over dense that is allowed, by the table of a 135M model; larger ones lose less.", least=1
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.size("vram")
        self.size("ram")

    def size(self, name: str) -> int | None:
        """Bytes of `vram` or `ram`; None if it is open.

        Raises:
            UsageError: it is no size.
        """
        text: str | None = getattr(self, name)
        if text is None:
            return None
        try:
            return parse_size(text)
        except ValueError as error:
            raise UsageError(f"{flag(name)} {text!r:.60}: {error}", f"write {flag(name)} 6GB") from error

    @classmethod
    def of_text(cls, text: str) -> "MachineOptions":
        """From the words of `split --for`: vram=6GB,gpu=250,ram=50. A ram with a unit is its size.

        Raises:
            UsageError: a word is none of this class's options, or its value is out of range.
        """
        named = {field.name: field for field in fields(cls)}
        values: dict[str, Any] = {}
        for word in text.split(","):
            short, equals, value = (part.strip() for part in word.partition("="))
            name = short.replace("-", "_")
            if name in SHORTER and not (name in named and value[-1:].isalpha()):
                name = SHORTER[name]
            if name not in named or not equals or not value or name in values:
                known = ", ".join([*SHORTER, *(other for other in named if other not in SHORTER)])
                raise UsageError(
                    f"--for {text!r:.100}: {word!r:.60} is {'there twice' if name in values else 'unknown'}",
                    f"write --for vram=6GB,gpu=250,ram=50; it takes {known}",
                )
            (values[name],) = parse(named[name], [value]) or (None,)
        return cls(**values)


@dataclass(frozen=True)
class SplitOptions(Options):
    """How to cut a model."""

    experts: int | None = option(None, "Equal slices of each FFN that is cut; the best measured for this FFN's width.")
    shared: int | None = option(None, "Slices that are always on; a quarter of the active ones.")
    active: int | None = option(None, "Slices that run for a token, shared ones included; 3/4 of all.")
    static: bool = option(False, "Prune instead: keep the active slices alone, as a smaller dense model.")
    partition: str = option("routed", "How neurons are grouped: moeify ls partitions.")
    router: str = option("ridge", "How experts are chosen: moeify ls routers.")
    budget: float | None = option(
        None, "Share of all FFN parameters active per token; a search chooses shared, active and dense layers."
    )
    machine: str | None = option(
        None,
        "Choose experts, shared and active for a machine, as `moeify plan` does: vram=6GB,gpu=250,ram=50.",
    )
    dense_layers: tuple[int, ...] = option((), "Layers whose FFN stays whole, such as 0,1,29.")
    mixing: Style = option(
        "hard", "Weights of the chosen experts: hard (all one), softmax (of their scores), or soft (all experts)."
    )
    # Beyond these float32 knows no difference, or no scores.
    temperature: float = option(1.0, "Scores are divided by it before a softmax.", above=0.0001, below=10_000)
    fusion: Fusion = option("sum", "Weights add up to the number of chosen experts (sum) or to one (mean).")
    refit: bool = option(True, "Fit down_proj in closed form.")
    refit_to: RefitTo = option("ffn", "What the refit restores: the FFN's output or the dense model's residual stream.")
    target: str = option("auto", "MoE architecture to write: moeify ls targets.")
    engine: str | None = option(None, "Only layouts and targets that this engine runs, such as llama.cpp.")
    calibration: tuple[str, ...] = option(
        ("builtin",),
        "Text, jsonl or parquet file, folder, hub data set, builtin, or self (text the model samples); each gives an "
        "equal share of the tokens.",
    )
    tokens: int = option(16384, "Calibration tokens; a search uses 8,192 of them.")
    context: int | None = option(None, CONTEXT, least=1)
    seed: int = option(0, SEED, least=0, below=SEEDS)
    dtype: DType = option("auto", DTYPE)
    device: str = option("cpu", DEVICE, form=DEVICES)
    plan: str | None = option(None, "Use the partition and routers of a saved plan again.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.static and self.shared is not None:
            raise UsageError("--static keeps every active slice always on", "leave --shared out")
        if self.static and self.target != "auto":
            raise UsageError("--static writes the dense model's own architecture", "leave --target out")
        if self.static and self.engine is not None:
            raise UsageError("--static writes a dense model, which no engine's limits concern", "leave --engine out")
        if self.static and self.plan is not None:
            raise UsageError("--static and --plan exclude each other", "leave one of them out")
        if self.machine is not None:
            MachineOptions.of_text(self.machine)
            chosen = ("experts", "shared", "active", "budget", "plan", "dense_layers", "static", "mixing", "engine")
            default = {field.name: field.default for field in fields(type(self))}
            if given := [flag(name) for name in chosen if getattr(self, name) != default[name]]:
                raise UsageError(
                    f"{flag('machine')} chooses the layout, {listing(given)} as well", f"leave {given[0]} out"
                )


@dataclass(frozen=True)
class SearchOptions(Options):
    """What a search for layers spends, beside how its candidates are cut."""

    budget: float = option(0.75, "Share of all FFN parameters active per token.", above=0, below=1)
    strategy: str = option("greedy", "How layers are chosen: moeify ls strategies.")
    trials: int = option(32, "Whole choices that a strategy may measure.", least=0)


@dataclass(frozen=True)
class CompareOptions(Options):
    """Which methods are compared on which text, beside how they are calibrated."""

    budget: tuple[float, ...] = option((0.75,), "Share of the FFN active per token.", above=0, below=1)
    data: tuple[str, ...] = option(("builtin-heldout",), DATA)
    data_tokens: int = option(8192, "At most so many tokens of each text.", least=2)
    tasks: tuple[str, ...] = option((), TASKS, commas=True)
    questions: int | None = option(None, QUESTIONS, least=1)
    method: tuple[str, ...] = option((), "Only these rows, and static + refit.")


@dataclass(frozen=True)
class EvalOptions(Options):
    """What models are measured on."""

    data: tuple[str, ...] = option(("builtin-heldout",), DATA)
    tokens: int = option(8192, "At most so many tokens of each text.", least=2)
    tasks: tuple[str, ...] = option((), TASKS, commas=True)
    questions: int | None = option(None, QUESTIONS, least=1)
    context: int | None = option(None, CONTEXT, least=2)
    stride: int | None = option(None, "Tokens the window moves by; the context, for blocks side by side.", least=1)
    dtype: DType = option("auto", DTYPE)
    device: str = option("cpu", DEVICE, form=DEVICES)


@dataclass(frozen=True)
class ExportOptions(Options):
    """How numbers are stored in a GGUF."""

    type: str = option(
        "auto",
        "Of matrices: f32, f16, bf16, q8_0, q5_1, q5_0, q4_1 or q4_0; auto is the checkpoint's own, or f16.",
        form=r"[A-Za-z0-9_]{1,16}",
    )
    tokenizer_pre: str = option("auto", "How llama.cpp cuts text before merges: llama-bpe, qwen2; auto finds it.")


@dataclass(frozen=True)
class GenerateOptions(Options):
    """How models make text."""

    tokens: int = option(256, "At most so many new tokens.", least=1)
    temperature: float = option(
        0.0, "0 takes the most probable token, more draws: at 1 as probable as the model says.", least=0, below=100
    )
    seed: int = option(0, SEED, least=0, below=SEEDS)
    dtype: DType = option("auto", DTYPE)
    device: str = option("cpu", DEVICE, form=DEVICES)

    def __post_init__(self) -> None:
        super().__post_init__()
        if 0 < self.temperature < COLDEST:
            raise UsageError(
                f"--temperature {self.temperature} leaves one token to draw",
                f"0 takes that one, {COLDEST} and more draws",
            )


@dataclass(frozen=True)
class TuneOptions(Options):
    """Which calls of the kernels are tuned."""

    tokens: tuple[int, ...] = option(
        (1, 8, 32, 64, 128, 512, 2048, 8192), "Tokens of a call, the most important last.", least=1
    )
    device: str = option("cuda", DEVICE, form=DEVICES)
    backward: bool = option(True, "Tune the backward pass as well.")
