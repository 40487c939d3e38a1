"""Options of `moeify finetune`, for the command line, recipes and the Python API. Imports nothing heavy."""

from dataclasses import dataclass
from typing import Literal

from moeify.command_line import ADVANCED, METHOD, Options, option
from moeify.errors import UsageError
from moeify.options import CONTEXT, CONTEXT_AUTO, DATA, SEED, SEEDS

Stage = Literal["layers", "router", "lora", "full"]
Schedule = Literal["cosine", "linear", "constant"]
Precision = Literal["auto", "float32", "bfloat16"]
Device = Literal["auto", "cpu", "cuda"]

EVALUATION = "Evaluation during training"

# `full`: SmolLM2-135M, 4 of 8 experts, 24,576 tokens in steps of 2,048, perplexity on three unseen texts 116.0 before,
# 93.6 with 1e-4, 88.0 with 3e-4; on 524,288 tokens 1e-3 is worse. `lora`: of 8 steps of 512 tokens, 16 of 32 experts,
# divergence 0.963 to 0.858 with 1e-3. Stage `router` trains nothing else (2 cores of an Intel Xeon, 2026-11-26).
LEARNING_RATES = {"router": 1e-4, "lora": 1e-3, "full": 3e-4}
# Of these for what hears: whisper-tiny.en, 4 of 8 experts, `full`, divergence on 8 held-out recordings 0.096 before,
# after 40 recordings 0.238 with 1e-4, 0.108 with 3e-5, after 80 0.665 with 3e-4 (batch 2; 2026-11-26).
HEARING_SHARE = 0.1


# Where experts are trained beside them, routers that stay as they were fitted lose less: SmolLM2-135M, 18 of 24
# experts, 524,288 tokens, perplexity over dense on five unseen texts, geometric mean: frozen 1.164, explored 1.228,
# with a straight-through gradient of all experts 1.177 and 1.223 (H200, 2026-11-26, `tests/benchmark_recovery.py`).
ROUTER_RATE = 0.01


@dataclass(frozen=True)
class TimeOptions(Options):
    """What a split may take in all."""

    minutes: float | None = option(None, "Time for search, split, training", auto="no training", above=0)


@dataclass(frozen=True)
class FinetuneOptions(Options):
    """What to train, on what, and how."""

    stage: tuple[Stage, ...] = option(("layers", "full"), "In order; router, lora as well")
    data: tuple[str, ...] = option(("builtin",), DATA, name="TEXT")
    tokens: int = option(262_144, "Training tokens; every stage sees the same", least=1)
    minutes: float | None = option(None, "In place of --tokens: time in all", above=0)
    epochs: int = option(1, "How often each stage but layers sees them", least=1)
    # The stage holds their hidden states in memory.
    layer_tokens: int = option(65_536, "At most so many tokens for stage layers", least=1, panel=ADVANCED)
    context: int | None = option(None, CONTEXT, auto=CONTEXT_AUTO, least=1, panel=ADVANCED)
    batch: int = option(4, "Blocks at once, on each process", least=1)
    accumulate: int = option(1, "Batches that make one step", least=1, panel=ADVANCED)
    learning_rate: float | None = option(None, "At its highest", auto="full 3e-4, lora 1e-3; sound 1/10", above=0)
    # Routers are stored scaled down (see targets/__init__.py), so their rate is relative to the root mean square of
    # each router's own weights: 0.01 moves a weight by about one percent of it a step; more pays over hundreds of
    # steps only.
    router_rate: float | None = option(
        None, "Relative to routers' weights", auto="0, stage router 0.01", least=0, panel=METHOD
    )
    # By which routers find out what other choices are worth.
    explore: float = option(0.1, "Noise on the inputs of routers", least=0, panel=METHOD)
    schedule: Schedule = option("cosine", "Of rates: cosine, linear, constant", panel=METHOD)
    warmup: float = option(0.05, "Share of the steps in which rates rise", least=0, below=1, panel=METHOD)
    weight_decay: float = option(0.0, "Of matrices that are not routers", least=0, panel=METHOD)
    kl: float = option(1.0, "Weight of the divergence from the teacher", least=0, panel=METHOD)
    lm: float = option(0.1, "Weight of the language modelling loss", least=0, panel=METHOD)
    hidden: float = option(0.0, "Weight of the error of layers' outputs", least=0, panel=METHOD)
    # In glm4_moe the step by which selection biases move instead.
    balance: float = option(1e-4, "Weight of an even load", least=0, panel=METHOD)
    z_loss: float = option(1e-3, "Weight of small router scores", least=0, panel=METHOD)
    lora_rank: int = option(16, "Rank of the updates of stage lora", least=1, panel=METHOD)
    precision: Precision = option("auto", "Of arithmetic: float32, bfloat16", panel=ADVANCED)
    checkpointing: bool = option(False, "Less memory, a third more time", panel=ADVANCED)
    cache_teacher: bool = option(False, "Keep the teacher's states on disk", panel=ADVANCED)
    eval_data: tuple[str, ...] = option(("builtin-heldout",), "Held-out text", name="TEXT", panel=EVALUATION)
    eval_tokens: int = option(8192, "At most so many tokens of each", least=1, panel=EVALUATION)
    # Each with a checkpoint.
    every: int | None = option(None, "Steps between", auto="a tenth of all", least=1, panel=EVALUATION)
    patience: int | None = option(None, "Stop after so many without progress", least=1, panel=EVALUATION)
    seed: int = option(0, SEED, least=0, below=SEEDS, panel=ADVANCED)
    # torchrun and accelerate launch choose among several.
    device: Device = option("cpu", "Where it runs: auto, cpu, cuda")

    def __post_init__(self) -> None:
        super().__post_init__()
        if "layers" in self.stage[1:]:
            raise UsageError("layers must be the first stage", "it fits FFNs that are still the dense model's, cut")
        if self.minutes is not None and "layers" in self.stage:
            raise UsageError(
                "--minutes counts steps of training, and the stage layers has none", "--stage full --minutes 60"
            )
        if self.kl == self.lm == self.hidden == 0 and self.stage != ("layers",):
            raise UsageError("--kl, --lm and --hidden are all zero", "one of them must say what is to be learned")
        if self.hidden and self.cache_teacher:
            raise UsageError(
                "--hidden needs the teacher's layers, the cache holds only what the last one gives",
                "leave --hidden or --cache-teacher out",
            )

    def rate(self, stage: Stage, *, hears: bool = False) -> float:
        """The learning rate of a stage; unless it is chosen, what hears has a tenth of the others'."""
        if self.learning_rate is not None:
            return self.learning_rate
        return LEARNING_RATES[stage] * (HEARING_SHARE if hears else 1)

    def rate_of_routers(self, stage: Stage) -> float:
        """The rate of routers in a stage; at zero they stay as they are."""
        if self.router_rate is not None:
            return self.router_rate
        return ROUTER_RATE if stage in {"layers", "router"} else 0.0
