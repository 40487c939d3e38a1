"""Options of `moeify finetune`, for the command line, recipes and the Python API. Imports nothing heavy."""

from dataclasses import dataclass
from typing import Literal

from moeify.errors import UsageError

Stage = Literal["layers", "router", "lora", "full"]
Schedule = Literal["cosine", "linear", "constant"]
Precision = Literal["auto", "float32", "bfloat16"]

# Of 8 steps of 512 tokens on SmolLM2-135M, 32 experts, half of them active; divergence from the teacher before and
# after. `full`, ours: 0.963 to 0.867 with 1e-4, 0.864 with 3e-4; static pruning: 1.268 to 1.124 with 1e-4, 1.231 with
# 3e-4. `lora`: 0.963 to 0.858 with 1e-3. Stage `router` trains nothing else (2 cores of an Intel Xeon, 2026-11-22).
LEARNING_RATES = {"router": 1e-4, "lora": 1e-3, "full": 1e-4}


@dataclass(frozen=True)
class FinetuneOptions:
    """What to train, on what, and how.

    Args:
        stage: stages in order. `layers` fits every layer's router and down_proj to the dense FFN's output, one layer
            at a time; `router` trains the routers alone; `lora` trains low-rank updates of attention and experts, and
            the routers; `full` trains everything.
        data: text sources; each gives an equal share of the tokens.
        tokens: training tokens; every stage sees the same ones.
        epochs: how often `router`, `lora` and `full` see them.
        layer_tokens: at most so many of them go through `layers`, which holds their hidden states in memory.
        context: tokens of a block; None means 512 or as many as the models take.
        batch: blocks that go through the model at once, on each process.
        accumulate: batches whose gradients make one step.
        learning_rate: of everything but routers, at its highest; None is LEARNING_RATES of the stage.
        router_rate: of routers, relative to the root mean square of each router's own weights, because they are
            stored scaled down (see targets/__init__.py): 0.01 moves a weight by about one percent of it a step; more
            pays over hundreds of steps only.
        explore: noise on what routers see, relative to its size, by which they find out what other choices are worth;
            zero leaves them the gradient of the chosen experts' weights alone.
        schedule: how the rates fall after the warmup.
        warmup: share of the steps in which they rise.
        weight_decay: of everything but routers and vectors.
        kl, lm: weights of the divergence from the teacher's distribution and of the language modelling loss.
        hidden: weight of the relative squared error of every layer's output against the teacher's.
        balance: weight of the switch loss, or, in glm4_moe, the step by which selection biases move instead, in units
            of router scores.
        z_loss: weight of the squared log-sum-exp of router scores.
        lora_rank: rank of `lora` updates.
        precision: arithmetic; auto is bfloat16 where the device has it, and float32 on a CPU. Weights stay float32.
        checkpointing: recompute activations in the backward pass instead of keeping them.
        cache_teacher: keep the teacher's final hidden states on disk, for further epochs and runs on the same text.
        eval_data, eval_tokens: held-out text that is measured during training, and how much of each.
        every: steps between two evaluations, each with a checkpoint; None is a tenth of all steps.
        patience: evaluations without improvement before training stops; None trains to the end.
        seed: of data order, text sampling and LoRA.
        device: cpu or cuda; torchrun and accelerate launch choose among several.
    """

    stage: tuple[Stage, ...] = ("layers", "full")
    data: tuple[str, ...] = ("builtin",)
    tokens: int = 262_144
    epochs: int = 1
    layer_tokens: int = 65_536
    context: int | None = None
    batch: int = 4
    accumulate: int = 1
    learning_rate: float | None = None
    router_rate: float = 0.01
    explore: float = 0.1
    schedule: Schedule = "cosine"
    warmup: float = 0.05
    weight_decay: float = 0.0
    kl: float = 1.0
    lm: float = 0.1
    hidden: float = 0.0
    balance: float = 1e-4
    z_loss: float = 1e-3
    lora_rank: int = 16
    precision: Precision = "auto"
    checkpointing: bool = False
    cache_teacher: bool = False
    eval_data: tuple[str, ...] = ("builtin-heldout",)
    eval_tokens: int = 8192
    every: int | None = None
    patience: int | None = None
    seed: int = 0
    device: str = "cpu"

    # For pydantic, which validates this class inside a recipe.
    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012

    def __post_init__(self) -> None:
        for name in ("tokens", "epochs", "layer_tokens", "batch", "accumulate", "lora_rank", "eval_tokens"):
            _check(name, getattr(self, name) >= 1, getattr(self, name), "1 or more")
        for name in ("every", "patience"):
            _check(name, getattr(self, name) is None or getattr(self, name) >= 1, getattr(self, name), "1 or more")
        for name in ("kl", "lm", "hidden", "balance", "z_loss", "weight_decay", "router_rate", "explore"):
            _check(name, 0 <= getattr(self, name) < float("inf"), getattr(self, name), "zero or more")
        rate = self.learning_rate
        _check("learning_rate", rate is None or 0 < rate < float("inf"), rate, "more than zero")
        _check("warmup", 0 <= self.warmup < 1, self.warmup, "0 to less than 1")
        _check("seed", 0 <= self.seed < 1 << 31, self.seed, "0 to 2,147,483,647")
        _check("device", self.device in ("cpu", "cuda"), self.device, "cpu or cuda")
        if not self.stage:
            raise UsageError("no stage was given", "--stage layers --stage full")
        if "layers" in self.stage[1:]:
            raise UsageError("layers must be the first stage", "it fits FFNs that are still the dense model's, cut")
        if self.kl == self.lm == self.hidden == 0 and self.stage != ("layers",):
            raise UsageError("--kl, --lm and --hidden are all zero", "one of them must say what is to be learned")
        if self.hidden and self.cache_teacher:
            raise UsageError("--hidden needs the teacher's layers, the cache holds only what the last one gives")

    def rate(self, stage: Stage) -> float:
        """The learning rate of a stage."""
        return LEARNING_RATES[stage] if self.learning_rate is None else self.learning_rate


def _check(name: str, holds: bool, found: object, takes: str) -> None:
    if not holds:
        option = f"--{name.replace('_', '-')}"
        raise UsageError(f"{option} {found} is out of range", f"{option} takes {takes}")
