"""What the layer benchmark runs: shapes, tokens, routing and passes; their weights and inputs; and their floors.

T tokens, D hidden, I dense FFN width, F width of one expert, S width of the shared part, E routed experts, K routed
experts a token, P = 2F rows of gate and up (2S, 2I in the shared part and the dense FFN).
"""

import re
import zlib
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor, nn

from moeify.benchmark.ceilings import Ceilings
from moeify.benchmark.options import LayerBenchOptions
from moeify.errors import UsageError, unknown

# The popularity of the expert of rank r is 1 / r^ZIPF_EXPONENT.
ZIPF_EXPONENT = 1.0
# A forward pass multiplies each token with matrices of D x width; a backward pass does twice that.
FLOPS_PER_WEIGHT = 2


@dataclass(frozen=True)
class Shape:
    """A dense FFN cut into equal slices.

    Args:
        name: what --cases calls it.
        hidden: D.
        width: I.
        slices: the dense FFN's width is cut into so many.
        shared: slices that run for every token, as one dense FFN.
        active: further slices that run for a token: K.
        plain: down(gelu(up(x) + b)) as in GPT-2, without a gate; else down(silu(gate(x)) * up(x)).
    """

    name: str
    hidden: int
    width: int
    slices: int
    shared: int
    active: int
    plain: bool = False

    def __post_init__(self) -> None:
        if not (self.hidden and self.width and self.slices):
            raise UsageError(
                f"{self.name}: hidden size, width and slices are 1 or more", "write a case like 64x256-8/2"
            )
        if self.width % self.slices:
            raise UsageError(
                f"{self.name}: width {self.width} does not divide into {self.slices} slices",
                "the number of slices divides the width: 64x256-8/2",
            )
        if not 0 < self.active <= self.num_experts:
            raise UsageError(
                f"{self.name}: {self.active} of {self.num_experts} routed experts cannot be active",
                "the last numbers are active of all slices, then + shared ones: 64x256-8/2+2",
            )

    @property
    def num_experts(self) -> int:
        return self.slices - self.shared

    @property
    def num_matrices(self) -> int:
        return 2 if self.plain else 3

    @property
    def expert_width(self) -> int:
        return self.width // self.slices

    @property
    def shared_width(self) -> int:
        return self.shared * self.expert_width


@dataclass(frozen=True)
class Case:
    """One thing to measure on every peer."""

    shape: Shape
    tokens: int
    routing: str
    pass_name: str

    @property
    def name(self) -> str:
        return f"{self.shape.name} T={self.tokens} {self.routing} {self.pass_name}"


# "slices/active" or "slices/shared+active" behind the sizes, of which u says that there is up alone, with biases.
_CUT = re.compile(r"(\d{1,6})x(\d{1,6})(u?)-(\d{1,6})/(?:(\d{1,6})\+)?(\d{1,6})")
_MODELS = {"gpt2-xl": "1600x6400u", "llama3-8b": "4096x14336", "qwen2.5-0.5b": "896x4864", "qwen3-8b": "4096x12288"}
# Those of the results, the most important first; each with how far behind the first it stands (see `cases`).
SHAPES = {
    "llama3-8b-8/2": 0,
    "llama3-8b-64/16": 0,
    "llama3-8b-16/4+4": 1,
    "llama3-8b-64/8+8": 1,
    "qwen3-8b-16/4": 2,
    "qwen2.5-0.5b-8/2": 3,
    "qwen2.5-0.5b-32/8": 3,
}
_TOKEN_RANKS = {1: 0, 8192: 0, 32: 1, 512: 1, 8: 2, 128: 2, 2048: 2}
_LAST_RANK = 3
_ZIPF_RANK = 2
# Training happens on many tokens.
_SMALL_TRAINING_RANK = 6
_TRAINING_TOKENS = 512


def parse_shape(name: str) -> Shape:
    """A shape by its name, or any as DxI-slices/active or DxI-slices/shared+active; DxIu has no gate, but biases.

    Raises:
        UsageError: it is neither, or the numbers do not fit.
    """
    model, separator, cut = name.rpartition("-")
    match = _CUT.fullmatch(f"{_MODELS.get(model, model)}{separator}{cut}")
    if match is None:
        raise unknown("a case", name, SHAPES, "write one like 64x256-8/2 or 64x256-8/2+2, or name one of")
    hidden, width, plain, slices, shared, active = match.groups()
    return Shape(name, int(hidden), int(width), int(slices), int(shared or 0), int(active), bool(plain))


def cases(options: LayerBenchOptions) -> list[Case]:
    """All combinations, the most important first, so that a run that is cut short has what matters.

    Raises:
        UsageError: an unknown shape.
    """
    shapes = [parse_shape(name) for name in options.cases or SHAPES]
    combinations = product(shapes, options.tokens, options.routings, options.passes)
    return sorted((Case(*parts) for parts in combinations), key=_rank)


def _rank(case: Case) -> int:
    rank = SHAPES.get(case.shape.name, 0) + _TOKEN_RANKS.get(case.tokens, _LAST_RANK)
    if case.routing == "zipf":
        rank += _ZIPF_RANK
    if case.pass_name == "training" and case.tokens < _TRAINING_TOKENS:
        rank += _SMALL_TRAINING_RANK
    return rank


@dataclass(frozen=True)
class Layer:
    """One copy of the weights: routed experts, shared part, dense FFN of the whole width; biases of plain ones."""

    up_EPD: nn.Parameter
    down_EDF: nn.Parameter
    dense_up_PD: nn.Parameter
    dense_down_DI: nn.Parameter
    shared_up_PD: nn.Parameter | None = None
    shared_down_DS: nn.Parameter | None = None
    bias_EP: nn.Parameter | None = None
    dense_bias_P: nn.Parameter | None = None
    shared_bias_P: nn.Parameter | None = None


@dataclass(frozen=True)
class Batch:
    """The inputs of one call. `experts32_TK` equals `experts_TK`, for peers that want it so."""

    inputs_TD: Tensor
    experts_TK: Tensor
    experts32_TK: Tensor
    weights_TK: Tensor
    output_gradient_TD: Tensor

    @property
    def num_experts_hit(self) -> int:
        return int(self.experts_TK.unique().numel())


def draw_layer(shape: Shape, dtype: torch.dtype, generator: torch.Generator) -> Layer:
    """Random weights that keep the size of what goes through them."""
    hidden, parts = shape.hidden, shape.num_matrices - 1

    def draw(*size: int, scale: float | None = None) -> nn.Parameter:
        values = torch.randn(*size, dtype=dtype, device=generator.device, generator=generator)
        return nn.Parameter(values.mul_(scale or size[-1] ** -0.5))

    def draw_bias(*size: int) -> nn.Parameter | None:
        return draw(*size, scale=1.0) if shape.plain else None

    return Layer(
        up_EPD=draw(shape.num_experts, parts * shape.expert_width, hidden),
        down_EDF=draw(shape.num_experts, hidden, shape.expert_width),
        dense_up_PD=draw(parts * shape.width, hidden),
        dense_down_DI=draw(hidden, shape.width),
        shared_up_PD=draw(parts * shape.shared_width, hidden) if shape.shared else None,
        shared_down_DS=draw(hidden, shape.shared_width) if shape.shared else None,
        bias_EP=draw_bias(shape.num_experts, shape.expert_width),
        dense_bias_P=draw_bias(shape.width),
        shared_bias_P=draw_bias(shape.shared_width) if shape.shared else None,
    )


def draw_batch(case: Case, dtype: torch.dtype, generator: torch.Generator, host: torch.Generator) -> Batch:
    """Random tokens and their routing.

    K different experts a token, drawn one after another by popularity: equal, or Zipf's in an order of its own for
    every batch. The weights are a softmax over the chosen, in the dtype of the model.

    Args:
        generator: on the device of the weights.
        host: on the CPU, so that every device sees the same routing.
    """
    shape, num_tokens = case.shape, case.tokens
    exponent = ZIPF_EXPONENT if case.routing == "zipf" else 0.0
    ranks_E = 1 + torch.randperm(shape.num_experts, generator=host)
    # Adding Gumbel noise to log-popularity and taking the K largest draws without replacement.
    noise_TE = -torch.rand(num_tokens, shape.num_experts, generator=host).clamp_min_(1e-30).log_().neg_().log_()
    experts_TK = (noise_TE - exponent * ranks_E.log()).topk(shape.active, dim=-1).indices.to(generator.device)
    logits_TK = torch.randn(num_tokens, shape.active, generator=host)

    def draw() -> Tensor:
        return torch.randn(num_tokens, shape.hidden, dtype=dtype, device=generator.device, generator=generator)

    return Batch(
        inputs_TD=draw(),
        experts_TK=experts_TK,
        experts32_TK=experts_TK.int(),
        weights_TK=logits_TK.softmax(dim=-1).to(generator.device, dtype),
        output_gradient_TD=draw(),
    )


@dataclass(frozen=True)
class Work:
    """The fewest bytes that one call must move through device memory, its operations, and the time they take."""

    num_bytes: float
    flops: float
    seconds: float


def work(case: Case, experts_hit: float, ceilings: Ceilings, *, element_bytes: int, dense: bool = False) -> Work:
    """The floor of a case on this machine: no version of it runs faster from a cold cache.

    Forward: every weight that is used is read once, every token is read and written once. Backward begins when forward
    has ended: those weights, the inputs and the output's gradient are read again, the inputs' gradient is written, and
    so is the gradient of every weight, zeros where nothing was routed. Each pass takes the longer of its bytes over
    copy bandwidth and its operations over the matrix product rate. Biases are left out.

    Args:
        experts_hit: routed experts that at least one token chose; a mean over batches need not be a whole number.
        dense: of the dense FFN of the whole width instead.
    """
    shape = case.shape
    routed = 0 if dense else shape.expert_width
    always = shape.width if dense else shape.shared_width
    weights_used = shape.num_matrices * shape.hidden * (experts_hit * routed + always)
    weights = shape.num_matrices * shape.hidden * (shape.num_experts * routed + always)
    weights_a_token = shape.num_matrices * shape.hidden * (shape.active * routed + always)
    tokens = case.tokens * shape.hidden
    passes = [(weights_used + 2 * tokens, FLOPS_PER_WEIGHT * case.tokens * weights_a_token)]
    if case.pass_name == "training":
        passes.append((weights_used + 3 * tokens + weights, 2 * passes[0][1]))
    seconds = sum(
        max(elements * element_bytes / ceilings.copy_bytes_per_second, flops / ceilings.matmul_flops_per_second)
        for elements, flops in passes
    )
    return Work(sum(elements for elements, _ in passes) * element_bytes, sum(flops for _, flops in passes), seconds)


def touched_bytes(case: Case, experts_hit: float, element_bytes: int) -> float:
    """Weights that one forward call reads."""
    shape = case.shape
    width = experts_hit * shape.expert_width + shape.shared_width
    return shape.num_matrices * shape.hidden * width * element_bytes


def seed_of(case: Case) -> int:
    """The same in every process, whichever other cases are run."""
    return zlib.crc32(case.name.encode())
