"""Options of `moeify finetune`, for the command line, recipes and the Python API. Imports nothing heavy."""

from dataclasses import dataclass
from typing import Literal

from moeify.command_line import Options, option
from moeify.errors import UsageError
from moeify.options import CONTEXT, DATA, DEVICE, SEED, SEEDS

Stage = Literal["layers", "router", "lora", "full"]
Schedule = Literal["cosine", "linear", "constant"]
Precision = Literal["auto", "float32", "bfloat16"]
Device = Literal["cpu", "cuda"]

# Of 8 steps of 512 tokens on SmolLM2-135M, 32 experts, half of them active; divergence from the teacher before and
# after. `full`, ours: 0.963 to 0.867 with 1e-4, 0.864 with 3e-4; static pruning: 1.268 to 1.124 with 1e-4, 1.231 with
# 3e-4. `lora`: 0.963 to 0.858 with 1e-3. Stage `router` trains nothing else (2 cores of an Intel Xeon, 2026-11-22).
LEARNING_RATES = {"router": 1e-4, "lora": 1e-3, "full": 1e-4}


@dataclass(frozen=True)
class FinetuneOptions(Options):
    """What to train, on what, and how."""

    stage: tuple[Stage, ...] = option(
        ("layers", "full"),
        "In order: layers (every layer's router and down_proj, fitted one after another to the dense FFN's output), "
        "router (routers alone), lora (low-rank updates of attention and experts, and routers), full (everything).",
    )
    data: tuple[str, ...] = option(("builtin",), DATA)
    tokens: int = option(262_144, "Training tokens; every stage sees the same.", least=1)
    epochs: int = option(1, "How often router, lora and full see the text.", least=1)
    layer_tokens: int = option(
        65_536, "At most so many of the tokens for layers, which holds their hidden states in memory.", least=1
    )
    context: int | None = option(None, CONTEXT, least=1)
    batch: int = option(4, "Blocks at once, on each process.", least=1)
    accumulate: int = option(1, "Batches that make one step.", least=1)
    learning_rate: float | None = option(
        None, "Of all but routers, at its highest; 1e-4 for full, 1e-3 for lora.", above=0
    )
    # Routers are stored scaled down (see targets/__init__.py), so their rate is relative to the root mean square of
    # each router's own weights: 0.01 moves a weight by about one percent of it a step; more pays over hundreds of
    # steps only.
    router_rate: float = option(0.01, "Of routers, relative to the size of their weights.", least=0)
    explore: float = option(
        0.1, "Noise on what routers see, by which they find out what other choices are worth.", least=0
    )
    schedule: Schedule = option("cosine", "How rates fall.")
    warmup: float = option(0.05, "Share of the steps in which rates rise.", least=0, below=1)
    weight_decay: float = option(0.0, "Of matrices that are not routers.", least=0)
    kl: float = option(1.0, "Weight of the divergence from the teacher.", least=0)
    lm: float = option(0.1, "Weight of the language modelling loss.", least=0)
    hidden: float = option(0.0, "Weight of the relative squared error of every layer's output.", least=0)
    balance: float = option(
        1e-4, "Weight of an even load; in glm4_moe the step by which selection biases move instead.", least=0
    )
    z_loss: float = option(1e-3, "Weight of small router scores.", least=0)
    lora_rank: int = option(16, "Rank of the updates of lora.", least=1)
    precision: Precision = option(
        "auto", "Of the arithmetic; auto is bfloat16 on cuda and float32 on cpu. Weights stay float32."
    )
    checkpointing: bool = option(False, "Recompute activations: less memory, a third more time.")
    cache_teacher: bool = option(False, "Keep the teacher's hidden states on disk, for further epochs and runs.")
    eval_data: tuple[str, ...] = option(("builtin-heldout",), "Held-out text, measured during training.")
    eval_tokens: int = option(8192, "At most so many tokens of each.", least=1)
    every: int | None = option(None, "Steps between evaluations, each with a checkpoint; a tenth of all.", least=1)
    patience: int | None = option(None, "Stop after so many evaluations without progress, and take the best.", least=1)
    seed: int = option(0, SEED, least=0, below=SEEDS)
    # torchrun and accelerate launch choose among several.
    device: Device = option("cpu", DEVICE)

    def __post_init__(self) -> None:
        super().__post_init__()
        if "layers" in self.stage[1:]:
            raise UsageError("layers must be the first stage", "it fits FFNs that are still the dense model's, cut")
        if self.kl == self.lm == self.hidden == 0 and self.stage != ("layers",):
            raise UsageError("--kl, --lm and --hidden are all zero", "one of them must say what is to be learned")
        if self.hidden and self.cache_teacher:
            raise UsageError("--hidden needs the teacher's layers, the cache holds only what the last one gives")

    def rate(self, stage: Stage) -> float:
        """The learning rate of a stage."""
        return LEARNING_RATES[stage] if self.learning_rate is None else self.learning_rate
