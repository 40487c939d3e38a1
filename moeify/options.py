"""Options of the commands that read a model, for the command line, recipes and the Python API. Imports nothing heavy.

Those of fine-tuning and of benchmarks stand in training/options.py and benchmark/options.py.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from moeify.command_line import ADVANCED, METHOD, OUTPUT, Options, fields, flag, option, parse
from moeify.errors import UsageError, nearest
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
Place = Literal["auto", "memory", "disk"]
# Of a GGUF's matrices: those that can be written without llama.cpp, then those of llama-quantize.
# What an export writes, and what llama.cpp has besides.
FileType = Literal["f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0"]
GGUFType = Literal[FileType, "q6_k", "q5_k", "q4_k", "q3_k", "q2_k"]

# Models that moeify trains itself, once: of text, and of images.
EMBEDDED = ("builtin", "builtin-vit")
# Help of options that several commands have.
DATA = "Files, folders, hub data sets"
TASKS = "Questions: FILE.jsonl, lm-eval names"
QUESTIONS = "At most so many of each task"
CONTEXT, CONTEXT_AUTO = "Tokens in a block of text", "512, or its limit"
SEED = "Of sampling, order and clustering"
DTYPE = "Of weights: float32, bfloat16, float16"
DEVICE = "Where it runs: auto, cpu, cuda, cuda:1"
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

    vram: str | None = option(None, "Memory of the GPU; 0 without one", name="6GB", auto="measured")
    # From less to more than anything has.
    gpu_bandwidth: float | None = option(
        None, "GB/s the GPU reads of its memory", auto="measured", least=0.001, below=1e6
    )
    ram: str | None = option(None, "Size of the RAM", name="32GB", auto="measured")
    ram_bandwidth: float | None = option(
        None, "GB/s all threads read of the RAM", auto="measured", least=0.001, below=1e6
    )
    threads: int | None = option(None, "Threads that run", auto="all cores", least=1, below=4096)
    type: GGUFType = option("q8_0", "Of matrices; of Q4_K_M it is q4_k")
    context: int | None = option(None, "Tokens in the cache of keys, values", auto="4,096, or limit", least=1)
    quality: float = option(1.4, "Perplexity over dense that is allowed", least=1)

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
                known = [*SHORTER, *(other for other in named if other not in SHORTER)]
                similar = "" if name in named else nearest(short, known)
                raise UsageError(
                    f"--for {text!r:.100}: {word!r:.60} is {'there twice' if name in values else 'unknown'}",
                    (f"did you mean {similar}? " if similar else "")
                    + f"write --for vram=6GB,gpu=250,ram=50; it takes {', '.join(known)}",
                )
            (values[name],) = parse(named[name], [value]) or (None,)
        return cls(**values)


@dataclass(frozen=True)
class SplitOptions(Options):
    """How to cut a model."""

    experts: int | None = option(None, "Slices that each FFN is cut into", auto="best for width", least=2)
    shared: int | None = option(None, "Slices that are always on", auto="1/4 of active", least=0)
    active: int | None = option(None, "Slices run per token, shared too", auto="3/4 of all", least=1)
    min_active: int | None = option(None, "moeify's own model: at least", auto="1 routed", least=1, panel=METHOD)
    max_active: int | None = option(None, "and at most; --active is the mean", auto="all", least=1, panel=METHOD)
    active_by_layer: tuple[int, ...] = option((), "The same for each layer; 0: no FFN", least=0, panel=METHOD)
    experts_by_layer: tuple[int, ...] = option((), "moeify's own model: slices of each layer", least=2, panel=METHOD)
    static_layers: tuple[int, ...] = option((), "moeify's own model: pruned, with no router", panel=METHOD)
    static: bool = option(False, "Prune instead: a smaller dense model")
    partition: str = option("routed", "Neurons to experts: moeify ls partitions", plugin="partition", panel=METHOD)
    router: str = option("ridge", "Tokens to experts: moeify ls routers", plugin="routers", panel=METHOD)
    budget: float | None = option(None, "Share of all FFNs per token; starts a search", above=0, below=1)
    machine: str | None = option(None, "Fit a machine instead, as moeify plan does", name="vram=6GB,ram=50")
    dense_layers: tuple[int, ...] = option((), "Layers whose FFN stays whole, such as 0,1,29", panel=METHOD)
    drop_layers: tuple[int, ...] = option((), "Whole layers that go, such as 11,12", panel=METHOD)
    mixing: Style = option("hard", "Weights of experts: hard, softmax, soft", panel=METHOD)
    # Beyond these float32 knows no difference, or no scores.
    temperature: float = option(1.0, "Of softmax and soft mixing", above=0.0001, below=10_000, panel=METHOD)
    fusion: Fusion = option("sum", "Weights add up to active (sum), 1 (mean)", panel=METHOD)
    refit: bool = option(True, "Re-solve down_proj so that less is lost", panel=METHOD)
    refit_to: RefitTo = option("ffn", "Restores: ffn (its output), stream", panel=METHOD)
    target: str = option("auto", "MoE architecture: moeify ls targets", plugin="targets")
    engine: str | None = option(None, "Only what llama.cpp, vLLM or SGLang runs", panel=METHOD)
    # What a model's size decides: convert/texts.py.
    calibration: tuple[str, ...] = option((), f"{DATA}, self", auto="self,builtin", name="TEXT")
    tokens: int = option(16384, "Calibration tokens; a search: 8,192")
    context: int | None = option(None, CONTEXT, auto=CONTEXT_AUTO, least=1, panel=ADVANCED)
    seed: int = option(0, SEED, least=0, below=SEEDS, panel=ADVANCED)
    dtype: DType = option("auto", DTYPE, panel=ADVANCED)
    device: str = option("cpu", DEVICE, form=DEVICES)
    hidden_states: Place = option("auto", "Held in: auto, memory, disk (bfloat16)", panel=ADVANCED)
    plan: str | None = option(None, "Partition and routers of a saved plan", name="PATH", panel=METHOD)
    remote_code: bool = option(False, "moeify's own model: its code beside it", panel=OUTPUT)

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
        plain = not self.static and self.mixing == "hard" and self.fusion == "sum"
        if (self.min_active is not None or self.max_active is not None) and not plain:
            raise UsageError(
                "--min-active and --max-active choose experts of weight one by their scores",
                "leave --static, --mixing and --fusion out",
            )
        self._check_layers()
        if self.static and self.remote_code:
            raise UsageError("--static writes a dense model, which needs no code", "leave --remote-code out")
        if self.machine is not None:
            MachineOptions.of_text(self.machine)
            chosen = (
                *("experts", "shared", "active", "budget", "plan", "dense_layers", "drop_layers"),
                *("static", "mixing", "engine", "active_by_layer", "experts_by_layer", "static_layers"),
            )
            default = {field.name: field.default for field in fields(type(self))}
            if given := [flag(name) for name in chosen if getattr(self, name) != default[name]]:
                raise UsageError(
                    f"{flag('machine')} chooses the layout, {listing(given)} as well", f"leave {given[0]} out"
                )

    def _check_layers(self) -> None:
        """Raise UsageError for options of single layers that contradict others."""
        numbers = [name for name in ("active_by_layer", "experts_by_layer") if getattr(self, name)]
        if numbers and self.active is not None:
            raise UsageError(
                f"{flag(numbers[0])} says how many experts are active, --active as well", "--active-by-layer has both"
            )
        if self.experts_by_layer and self.experts not in (None, max(self.experts_by_layer)):
            raise UsageError(
                f"--experts-by-layer has up to {max(self.experts_by_layer)} experts, --experts {self.experts}",
                "leave --experts out",
            )
        for name in (*numbers, *(["static_layers"] if self.static_layers else [])):
            if self.mixing == "soft":
                raise UsageError(f"{flag(name)} is about experts that are chosen", "--mixing takes hard or softmax")
            if self.static and name != "active_by_layer":
                raise UsageError(f"--static prunes every layer alike, {flag(name)} single ones", "leave --static out")


@dataclass(frozen=True)
class SearchOptions(Options):
    """What a search for layers spends, beside how its candidates are cut."""

    budget: float = option(0.75, "Share of all FFNs per token", above=0, below=1)
    strategy: str = option("greedy", "Which layers: moeify ls strategies", plugin="strategies")
    trials: int = option(32, "Whole choices that may be measured", least=0)
    depth: bool = option(True, "Whole layers may go, too")


@dataclass(frozen=True)
class CompareOptions(Options):
    """Which methods are compared on which text, beside how they are calibrated."""

    budget: tuple[float, ...] = option((0.75,), "Shares of the FFN per token", above=0, below=1)
    data: tuple[str, ...] = option(("builtin-heldout",), DATA, name="TEXT")
    data_tokens: int = option(8192, "At most so many tokens of each text", least=2)
    tasks: tuple[str, ...] = option((), TASKS, auto="none", name="TASK")
    questions: int | None = option(None, QUESTIONS, auto="all", least=1)
    method: tuple[str, ...] = option((), "Only these rows, and static + refit", auto="all")


@dataclass(frozen=True)
class EvalOptions(Options):
    """What models are measured on."""

    data: tuple[str, ...] = option(("builtin-heldout",), DATA, name="TEXT")
    tokens: int = option(8192, "At most so many tokens of each text", least=2)
    tasks: tuple[str, ...] = option((), TASKS, auto="none", name="TASK")
    questions: int | None = option(None, QUESTIONS, auto="all", least=1)
    # There are 32: check/loops.py.
    answers: int = option(16, "Of chat models, looked at for loops", least=0, below=33)
    context: int | None = option(None, CONTEXT, auto=CONTEXT_AUTO, least=2, panel=ADVANCED)
    stride: int | None = option(None, "Tokens the window moves by", auto="the context", least=1, panel=ADVANCED)
    dtype: DType = option("auto", DTYPE, panel=ADVANCED)
    device: str = option("cpu", DEVICE, form=DEVICES)


@dataclass(frozen=True)
class ExportOptions(Options):
    """How numbers are stored in a GGUF."""

    type: str = option("auto", "Of the GGUF, such as f16, q8_0 or q4_0", form=r"[A-Za-z0-9_]{1,16}", panel=OUTPUT)
    tokenizer_pre: str = option("auto", "Of the GGUF: how text is cut, as qwen2", panel=OUTPUT)


@dataclass(frozen=True)
class GenerateOptions(Options):
    """How models make text."""

    tokens: int | None = option(None, "At most so many new tokens", auto="256, or what fits", least=1)
    temperature: float = option(0.0, "0: the likeliest token; more draws", least=0, below=100)
    seed: int = option(0, SEED, least=0, below=SEEDS, panel=ADVANCED)
    dtype: DType = option("auto", DTYPE, panel=ADVANCED)
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

    tokens: tuple[int, ...] = option((1, 8, 32, 64, 128, 512, 2048, 8192), "Tokens of a call", least=1)
    device: str = option("cuda", DEVICE, form=DEVICES)
    backward: bool = option(True, "Tune the backward pass as well", panel=ADVANCED)
