"""What the kernels promise on a GPU: accuracy, the same bits, large models, graphs, streams, little memory.

Each test also runs in triton's interpreter on a machine without GPU, with less of everything: that shows the test
right, not the GPU. bfloat16 runs on a GPU alone, because the interpreter cannot multiply it.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tiny_moe import COMMON, assert_equal, step, text, tiny
from torch import Tensor

import moeify
import moeify.kernels
from moeify.kernels import launch, moe_ffn
from moeify.kernels.reference import moe_ffn_reference

HAS_GPU = torch.cuda.is_available()
GPU = [pytest.mark.gpu, pytest.mark.skipif(not HAS_GPU, reason="needs a CUDA device")]
INTERPRETER = [pytest.mark.skipif(HAS_GPU, reason="the interpreter stands in where there is no CUDA device")]
ACCURACY_TOKENS = 256 if HAS_GPU else 64
DIFFERENTIABLE = ("inputs", "up", "down", "weights")


def places(gpu: Sequence[tuple[Any, ...]], interpreter: Sequence[tuple[Any, ...]]) -> list[Any]:
    """The same test's parameters, behind the device, for the GPU and for the interpreter."""
    on_gpu = [pytest.param("cuda", *values, marks=GPU) for values in gpu]
    return on_gpu + [pytest.param("cpu", *values, marks=INTERPRETER) for values in interpreter]


@dataclass(frozen=True)
class Shape:
    """Sizes of one call, and how its tokens spread.

    Args:
        spread: `even`, `skewed` (one expert gets most), `empty` (half of the experts get nothing) or `absent` (a third
            of the ids name no expert).
    """

    tokens: int
    ranks: int
    experts: int
    dim: int
    width: int
    spread: str = "even"
    activation: str = "silu"
    gated: bool = True
    biased: bool = False

    def __str__(self) -> str:
        sizes = f"T{self.tokens}K{self.ranks}E{self.experts}D{self.dim}F{self.width}"
        return f"{sizes}-{self.spread}-{self.activation}{'' if self.gated else '-ungated'}{'-biased' * self.biased}"


def chosen_experts(shape: Shape, device: str, seed: int = 0) -> Tensor:
    """(T, K), without an expert twice in a row."""
    generator = torch.Generator(device).manual_seed(seed)
    preference_TE = torch.rand(shape.tokens, shape.experts, generator=generator, device=device)
    if shape.spread == "skewed":
        preference_TE[:, 1] += 0.9
    elif shape.spread == "empty":
        preference_TE[:, ::2] -= 1
    index_TK = preference_TE.topk(shape.ranks, dim=1).indices
    if shape.spread == "absent":
        away = torch.rand(index_TK.shape, generator=generator, device=device) < 1 / 3
        index_TK = index_TK.masked_fill(away, shape.experts)
    return index_TK


def problem(shape: Shape, dtype: torch.dtype, device: str, seed: int = 0) -> dict[str, Tensor]:
    """Arguments of moe_ffn and the gradient of its output; results are near one."""
    generator = torch.Generator(device).manual_seed(seed)

    def noise(*sizes: int, scale: float = 1.0) -> Tensor:
        return torch.randn(sizes, generator=generator, device=device, dtype=dtype) * scale

    rows = shape.width * (2 if shape.gated else 1)
    return {
        "inputs": noise(shape.tokens, shape.dim),
        "up": noise(shape.experts, rows, shape.dim, scale=shape.dim**-0.5),
        "down": noise(shape.experts, shape.dim, shape.width, scale=shape.width**-0.5),
        "experts": chosen_experts(shape, device, seed),
        "weights": noise(shape.tokens, shape.ranks).float().softmax(1).to(dtype),
        "flow": noise(shape.tokens, shape.dim),
        **({"bias": noise(shape.experts, rows, scale=0.5)} if shape.biased else {}),
    }


def learned(shape: Shape) -> tuple[str, ...]:
    return (*DIFFERENTIABLE, "bias") if shape.biased else DIFFERENTIABLE


def forward(function: Callable[..., Tensor], tensors: dict[str, Tensor], shape: Shape) -> Tensor:
    names = ("inputs", "up", "down", "experts", "weights")
    bias_EP = tensors.get("bias")
    return function(*(tensors[name] for name in names), bias_EP=bias_EP, activation=shape.activation, gated=shape.gated)


def inference(function: Callable[..., Tensor], tensors: dict[str, Tensor], shape: Shape) -> Tensor:
    with torch.no_grad():
        return forward(function, tensors, shape)


def training(function: Callable[..., Tensor], tensors: dict[str, Tensor], shape: Shape) -> dict[str, Tensor]:
    """Output and gradients."""
    leaves = {name: tensors[name].detach().requires_grad_() for name in learned(shape)}
    out_TD = forward(function, tensors | leaves, shape)
    grads = torch.autograd.grad(out_TD, list(leaves.values()), tensors["flow"])
    return {"out": out_TD.detach(), **dict(zip(leaves, grads, strict=True))}


def in_float64(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}


def error_of(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


def errors(function: Callable[..., Tensor], shape: Shape, dtype: torch.dtype, device: str) -> dict[str, float]:
    """Relative errors against float64, over so many problems that one rounding does not decide."""
    squares: dict[str, Tensor] = {}
    for seed in range(-(-ACCURACY_TOKENS // shape.tokens)):
        tensors = problem(shape, dtype, device, seed)
        truth = training(moe_ffn_reference, in_float64(tensors), shape)
        values = training(function, tensors, shape)
        values["inference"], truth["inference"] = inference(function, tensors, shape), truth["out"]
        for name, value in values.items():
            both = torch.stack([(value.double() - truth[name]).square().sum(), truth[name].square().sum()])
            squares[name] = squares.get(name, 0) + both
    return {name: float((error / exact).sqrt()) for name, (error, exact) in squares.items()}


LARGE = [
    Shape(200, 2, 8, 512, 448),
    Shape(513, 4, 16, 1000, 136, "skewed"),
    Shape(300, 3, 12, 257, 67, "empty"),
    Shape(4096, 8, 64, 1024, 224, "absent"),
    Shape(1500, 2, 8, 384, 120, activation="gelu_tanh"),
    Shape(700, 6, 6, 192, 320, activation="relu2", gated=False),
    Shape(513, 4, 16, 1000, 136, "absent", biased=True),
    Shape(700, 3, 12, 768, 256, "skewed", "gelu", gated=False, biased=True),
]
SMALL = [
    Shape(70, 2, 4, 40, 24),
    Shape(70, 3, 6, 33, 19, "empty"),
    Shape(90, 2, 4, 24, 40, "absent", "relu2", False, True),
]
FEW = [
    Shape(1, 2, 8, 1024, 448),
    Shape(1, 4, 16, 257, 67, "absent"),
    Shape(7, 3, 12, 1000, 136, "skewed"),
    Shape(33, 4, 64, 512, 224, "empty", "gelu"),
    Shape(64, 2, 8, 384, 120, activation="relu2", gated=False),
    Shape(7, 3, 12, 257, 67, "absent", biased=True),
    Shape(1, 16, 32, 768, 96, "absent", "gelu", gated=False, biased=True),
]
SMALL_FEW = [
    Shape(1, 2, 4, 40, 24),
    Shape(5, 3, 6, 33, 19, "absent"),
    Shape(32, 2, 4, 24, 40, "skewed", "relu2", False),
]
# Just enough to be sorted, and just enough for the short road.
TINY, TINY_FEW = Shape(66, 2, 3, 16, 16), Shape(3, 2, 3, 16, 16, "absent")
HALVES = (torch.bfloat16, torch.float16)


@pytest.mark.parametrize(
    ("device", "dtype", "shape"),
    places(
        [(dtype, shape) for dtype in HALVES for shape in LARGE + FEW],
        [(torch.float16, shape) for shape in [*SMALL, SMALL_FEW[2]]],
    ),
    ids=str,
)
def test_everything_is_rounded_no_more_than_by_eager(device: str, dtype: torch.dtype, shape: Shape) -> None:
    """Output and gradients of training, and inference: many tokens are sorted, few take the short road."""
    eager, found = (errors(way, shape, dtype, device) for way in (moe_ffn_reference, moe_ffn))
    assert found.keys() == {"out", "inference", *learned(shape)}
    for name, error in found.items():
        assert 0 < error <= 1.1 * eager[name], name


@pytest.mark.parametrize(
    ("device", "dtype", "shape"),
    places([(torch.bfloat16, LARGE[2]), (torch.bfloat16, LARGE[3])], [(torch.float32, shape) for shape in SMALL[1:]]),
    ids=str,
)
def test_who_was_not_asked_learns_nothing(device: str, dtype: torch.dtype, shape: Shape) -> None:
    """Whatever was left in memory there."""
    tensors = problem(shape, dtype, device)
    spoil_memory(device)
    found = training(moe_ffn, tensors, shape)
    asked = torch.zeros(shape.experts + 1, dtype=torch.bool, device=device)
    asked[tensors["experts"].flatten()] = True
    assert asked[-1] if shape.spread == "absent" else not asked[:-1].all()
    assert not found["up"][~asked[:-1]].any()
    assert not found["down"][~asked[:-1]].any()
    assert not found["weights"][tensors["experts"] == shape.experts].any()


@pytest.mark.parametrize(("device", "shape"), places([(LARGE[0],), (LARGE[2],), (FEW[2],)], [(SMALL[1],)]), ids=str)
def test_float32_is_exact_unless_tensorfloat_is_allowed(device: str, shape: Shape) -> None:
    tensors = problem(shape, torch.float32, device)
    exact = training(moe_ffn_reference, in_float64(tensors), shape)
    found = training(moe_ffn, tensors, shape)
    found["inference"], exact["inference"] = inference(moe_ffn, tensors, shape), exact["out"]
    for name, truth in exact.items():
        assert (found[name] - truth).abs().max() <= 1e-5 * truth.abs().max(), name
    before, torch.backends.cuda.matmul.fp32_precision = torch.backends.cuda.matmul.fp32_precision, "tf32"
    try:
        assert launch.precision(torch.float32) == "tf32"
        assert launch.precision(torch.bfloat16) == "ieee"
        shorter = error_of(inference(moe_ffn, tensors, shape), exact["out"])
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    # The interpreter has no TensorFloat-32.
    assert (1e-5 < shorter < 1e-2) == (device == "cuda")


def spoil_memory(device: str) -> None:
    """NaN in what the next allocations get: what is read without being written shows."""
    blocks = [torch.full((size,), float("nan"), device=device) for size in (2**12, 2**16, 2**20) for _ in range(8)]
    del blocks


@pytest.mark.parametrize(
    ("device", "dtype", "shape", "runs"),
    places(
        [(torch.bfloat16, shape, 20) for shape in (LARGE[1], LARGE[3], LARGE[5], FEW[0], FEW[3])],
        [(torch.float16, TINY, 2), (torch.float32, TINY_FEW, 2)],
    ),
    ids=str,
)
def test_same_bits_every_time(device: str, dtype: torch.dtype, shape: Shape, runs: int) -> None:
    tensors = problem(shape, dtype, device)
    first = training(moe_ffn, tensors, shape) | {"inference": inference(moe_ffn, tensors, shape)}
    assert all(value.isfinite().all() for value in first.values())
    for _ in range(runs - 1):
        spoil_memory(device)
        again = training(moe_ffn, tensors, shape) | {"inference": inference(moe_ffn, tensors, shape)}
        for name, value in first.items():
            assert torch.equal(again[name], value), name


# Each has one tensor of more than 2 ** 31 elements: inputs, the experts' weights, the pre-activations.
HUGE = {
    "inputs": Shape(2**19 + 64, 1, 8, 4096, 64),
    "weights": Shape(256, 2, 40, 4096, 8192),
    "weights, few tokens": Shape(4, 2, 40, 4096, 8192),
    "pre-activations": Shape(2**15 + 8, 8, 16, 64, 4160),
}
PAST = 2**31


@pytest.mark.parametrize(
    ("device", "dtype", "shape"),
    places(
        [(torch.bfloat16, shape) for shape in HUGE.values()],
        [(torch.float32, Shape(70, 1, 4, 32, 16)), (torch.float32, Shape(4, 2, 5, 32, 16))],
    ),
    ids=str,
)
def test_offsets_past_31_bits(device: str, dtype: torch.dtype, shape: Shape) -> None:
    """Only the first, a middle and the last token are compared, and only they send a gradient back."""
    tensors = problem(shape, dtype, device)
    pre_activations = shape.tokens * shape.ranks * 2 * shape.width
    assert (max(tensors["inputs"].numel(), tensors["up"].numel(), pre_activations) > PAST) == (device == "cuda")
    tokens = torch.tensor([0, shape.tokens // 2, shape.tokens - 1], device=device)
    # The last token is the last of the last expert, so everything of it lies at the end of its tensor.
    tensors["experts"][-1] = torch.arange(shape.experts - 1, shape.experts - 1 - shape.ranks, -1, device=device)
    kept = torch.zeros(shape.tokens, 1, dtype=torch.bool, device=device).index_fill_(0, tokens, True)
    tensors["flow"].masked_fill_(~kept, 0)

    used = tensors["experts"][tokens].unique()
    few = {name: tensors[name][tokens].double() for name in ("inputs", "weights", "flow")}
    few |= {name: tensors[name][used].double() for name in ("up", "down")}
    few["experts"] = torch.searchsorted(used, tensors["experts"][tokens].contiguous())
    expected = training(moe_ffn_reference, few, shape)

    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    assert error_of(inference(moe_ffn, tensors, shape)[tokens], expected["out"]) <= tolerance
    found = training(moe_ffn, tensors, shape)
    for name in ("out", "inputs", "weights"):
        assert error_of(found[name][tokens], expected[name]) <= tolerance, name
    for name in ("up", "down"):
        assert error_of(found[name][used], expected[name]) <= tolerance, name
        # Nobody else's gradient was written to.
        others = [expert for expert in range(shape.experts) if expert not in used]
        assert not any(found[name][expert].any() for expert in others), name
    assert not found["inputs"][~kept[:, 0]].any()


class Replay:
    """A function that is captured once as a CUDA graph; without a GPU it runs anew."""

    def __init__(self, function: Callable[[], list[Tensor]], device: str) -> None:
        self._function, self._graph = function, None
        if device == "cuda":
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                # Compiles, and lets autograd set itself up.
                for _ in range(2):
                    function()
            torch.cuda.current_stream().wait_stream(side)
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph):
                self._results = function()

    def __call__(self) -> list[Tensor]:
        if self._graph is None:
            return self._function()
        self._graph.replay()
        return self._results


@pytest.mark.parametrize("road", ["inference", "training"])
@pytest.mark.parametrize(
    ("device", "dtype", "shape"),
    places(
        [(torch.bfloat16, shape) for shape in (FEW[0], FEW[2], LARGE[0], LARGE[3])],
        [(torch.float32, TINY_FEW), (torch.float32, TINY)],
    ),
    ids=str,
)
def test_a_replayed_graph_follows_new_routing(device: str, dtype: torch.dtype, shape: Shape, road: str) -> None:
    tensors = problem(shape, dtype, device)

    def run() -> list[Tensor]:
        if road == "inference":
            return [inference(moe_ffn, tensors, shape)]
        return list(training(moe_ffn, tensors, shape).values())

    replay = Replay(run, device)
    before = None
    for seed, spread in enumerate(("even", "skewed", "empty")):
        new = problem(replace(shape, spread=spread), dtype, device, seed)
        for name in ("inputs", "experts", "weights", "flow"):
            tensors[name].copy_(new[name])
        found = [value.clone() for value in replay()]
        assert all(torch.equal(value, launched) for value, launched in zip(found, run(), strict=True))
        assert before is None or not torch.equal(found[0], before)
        before = found[0]


# What the compiler warns of on a device is no concern of the kernels.
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(("device", "backend"), places([("inductor",)], [("eager",)]))
def test_a_compiled_model_learns_the_same(device: str, backend: str) -> None:
    moeify.kernels.register()
    model, ids = tiny("Mixtral", num_hidden_layers=1), text(2, 5)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    assert_equal(step(model, ids, "moeify", compiled), step(model, ids, "eager"), tolerance=1e-4)


@pytest.mark.parametrize(("device", "dtype", "margin"), places([(torch.bfloat16, 0.2)], [(torch.float32, 1e-3)]))
def test_generate_gives_the_tokens_of_grouped_mm(device: str, dtype: torch.dtype, margin: float) -> None:
    """Where the second-best token is well behind; every expert is chosen, so that routing is no matter of rounding."""
    moeify.kernels.register()
    model = tiny("GraniteMoeShared", num_experts_per_tok=4, hidden_size=64, head_dim=16).to(dtype).eval()
    options = {"max_new_tokens": 4 if device == "cuda" else 2, "do_sample": False, "eos_token_id": None}
    prompts = text(32 if device == "cuda" else 4, 5)
    tokens, clear = {}, torch.ones(len(prompts), dtype=torch.bool, device=device)
    for implementation in ("grouped_mm", "moeify"):
        model.set_experts_implementation(implementation)
        found = model.generate(prompts, output_logits=True, return_dict_in_generate=True, **options)
        tokens[implementation] = found.sequences
        for logits in found.logits:
            best = logits.float().topk(2, dim=-1).values
            clear &= best[:, 0] - best[:, 1] > margin
    assert clear.sum() >= 3
    assert torch.equal(tokens["moeify"][clear], tokens["grouped_mm"][clear])


@contextmanager
def late_stream(device: str) -> Iterator[None]:
    """A stream that is busy for a while; whoever works on another one is too early."""
    if device == "cpu":
        yield
        return
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)
        yield
    stream.synchronize()


@pytest.mark.parametrize(
    ("device", "dtype", "shape"),
    places([(torch.bfloat16, LARGE[0]), (torch.bfloat16, FEW[2])], [(torch.float32, TINY_FEW)]),
    ids=str,
)
def test_kernels_run_on_the_current_stream(device: str, dtype: torch.dtype, shape: Shape) -> None:
    tensors = problem(shape, dtype, device)
    expected = training(moe_ffn, tensors, shape) | {"inference": inference(moe_ffn, tensors, shape)}
    later = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    with late_stream(device):
        for name, tensor in tensors.items():
            later[name].copy_(tensor)
        found = training(moe_ffn, later, shape) | {"inference": inference(moe_ffn, later, shape)}
    assert expected["out"].any()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.parametrize(
    ("device", "dtype", "shape"),
    places(
        [(torch.bfloat16, LARGE[3]), (torch.bfloat16, LARGE[5])], [(torch.float32, TINY), (torch.float16, SMALL[2])]
    ),
    ids=str,
)
def test_backward_keeps_inputs_and_pre_activations_alone(device: str, dtype: torch.dtype, shape: Shape) -> None:
    tensors = problem(shape, dtype, device)
    leaves = {name: tensors[name].requires_grad_() for name in DIFFERENTIABLE}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    allocated = torch.cuda.memory_allocated() if device == "cuda" else 0
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out_TD = forward(moe_ffn, tensors | leaves, shape)
    for weights in ("up", "down", *(["bias"] if shape.biased else [])):
        kept.pop(tensors[weights].data_ptr())
    slots, rows = shape.tokens * shape.ranks, shape.width * (2 if shape.gated else 1)
    pre_activations = slots * rows * dtype.itemsize
    inputs = shape.tokens * shape.dim * dtype.itemsize + slots * (8 + dtype.itemsize)
    assert sum(kept.values()) == inputs + pre_activations
    if device == "cuda":
        # Inputs were there before; blocks of memory are rounded up to 2 MiB.
        grown = torch.cuda.memory_allocated() - allocated
        assert grown <= pre_activations + out_TD.numel() * dtype.itemsize + 2**22
    assert out_TD.requires_grad


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=GPU), "cpu"])
def test_load_takes_the_kernels_unless_told_otherwise(device: str, tmp_path: Path) -> None:
    tiny("Mixtral").save_pretrained(tmp_path)
    assert moeify.load(str(tmp_path), device=device).get_experts_implementation()[""] == "moeify"
    told = moeify.load(str(tmp_path), device=device, experts_implementation="eager")
    assert told.get_experts_implementation()[""] == "eager"


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=GPU), "cpu"])
def test_load_leaves_dense_models_alone(device: str, tmp_path: Path) -> None:
    config = transformers.LlamaConfig(**{**COMMON, "num_hidden_layers": 1})
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    assert moeify.load(str(tmp_path), device=device)(text().to(device)).logits.isfinite().all()
