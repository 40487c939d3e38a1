"""The kernels against plain torch, in Triton's interpreter where there is no GPU.

The interpreter computes exactly what the kernels say, in float32, one program after the other: small tiles make several
of them out of small tensors.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from moeify.kernels import moe_ffn
from moeify.kernels.launch import DECODE_TOKENS, TABLE, Launch, launching
from moeify.kernels.reference import ACTIVATIONS, moe_ffn_reference
from moeify.kernels.routing import route

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SMALL = {key: Launch(launch.rows, 32, 32, 4, 2, group=2) for key, launch in TABLE.items()} | {
    "weight_grad/128": Launch(32, 32, 32, 4, 2, group=2)
}
Arguments = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


@pytest.fixture(params=["pointers", "bulk copies"])
def small_tiles(request: pytest.FixtureRequest) -> Iterator[None]:
    """Several tiles in each direction, with weights read in either way."""
    with launching({key: replace(launch, tma=request.param != "pointers") for key, launch in SMALL.items()}):
        yield


def draw(
    tokens: int,
    ranks: int,
    experts: int,
    dim: int,
    width: int,
    *,
    gated: bool = True,
    route_tokens: Callable[[Tensor], Tensor] = lambda ids: ids,
    dtype: torch.dtype = torch.float32,
    skew: float = 0.0,
) -> Arguments:
    """Arguments of moe_ffn; route_tokens changes the drawn expert ids."""
    torch.manual_seed(tokens * 1000 + dim)
    logits = torch.randn(tokens, experts) - skew * torch.arange(experts)
    weights, ids = logits.softmax(-1).topk(ranks, -1)
    up = torch.randn(experts, width * (2 if gated else 1), dim) / dim**0.5
    down = torch.randn(experts, dim, width) / width**0.5
    arguments = (torch.randn(tokens, dim), up, down, route_tokens(ids), weights)
    return tuple((t if t.dtype == torch.int64 else t.to(dtype)).to(DEVICE) for t in arguments)  # type: ignore[return-value]


def differentiate(
    function: Callable[..., Tensor], arguments: Arguments, dtype: torch.dtype, **options: object
) -> list[Tensor]:
    """Output and gradients, computed in dtype; of tensors among the options as well."""
    leaves = [t.detach().to(dtype).requires_grad_() if t.is_floating_point() else t for t in arguments]
    named = {name: t.detach().to(dtype).requires_grad_() for name, t in options.items() if isinstance(t, Tensor)}
    out = function(*leaves, **options | named)
    torch.manual_seed(0)
    flow = torch.randn(out.shape).to(out)
    differentiable = [leaf for leaf in (*leaves, *named.values()) if leaf.is_floating_point()]
    return [out.detach(), *torch.autograd.grad(out, differentiable, flow)]


def assert_as_reference(arguments: Arguments, **options: object) -> None:
    """Output with and without gradients, and all gradients, equal plain torch's in float64."""
    wanted = differentiate(moe_ffn_reference, arguments, torch.float64, **options)
    found = differentiate(moe_ffn, arguments, torch.float32, **options)
    with torch.no_grad():
        found.append(moe_ffn(*arguments, **options))
    for one, other in zip(found, [*wanted, wanted[0]], strict=True):
        assert one.dtype == torch.float32
        torch.testing.assert_close(one.double(), other, atol=2e-5 * float(other.abs().max() + 1), rtol=0)


def one_expert_takes_all(ids: Tensor) -> Tensor:
    return torch.full_like(ids, 2)[:, :1].expand_as(ids).clone()


def all_are_elsewhere(ids: Tensor) -> Tensor:
    return torch.full_like(ids, 5)


def some_are_elsewhere(ids: Tensor) -> Tensor:
    return torch.where(torch.rand(ids.shape) < 0.4, 5, ids)


SHAPES = {
    "one token": dict(tokens=1, ranks=2, experts=4, dim=64, width=32),
    "one token, all experts": dict(tokens=1, ranks=4, experts=4, dim=40, width=24),
    "few tokens": dict(tokens=5, ranks=3, experts=8, dim=64, width=48),
    "odd sizes": dict(tokens=33, ranks=2, experts=5, dim=72, width=33),
    "every expert for every token": dict(tokens=9, ranks=3, experts=3, dim=64, width=32),
    "last decode": dict(tokens=DECODE_TOKENS, ranks=2, experts=4, dim=32, width=16),
    "first sort": dict(tokens=DECODE_TOKENS + 1, ranks=2, experts=4, dim=32, width=16),
    "empty experts": dict(tokens=70, ranks=2, experts=9, dim=32, width=16, skew=6.0),
    "a single expert": dict(tokens=70, ranks=1, experts=1, dim=32, width=16),
    "one expert takes all": dict(tokens=70, ranks=1, experts=5, dim=32, width=16, route_tokens=one_expert_takes_all),
    "some experts elsewhere": dict(tokens=70, ranks=3, experts=5, dim=32, width=16, route_tokens=some_are_elsewhere),
    "one token, some elsewhere": dict(tokens=1, ranks=5, experts=5, dim=32, width=16, route_tokens=some_are_elsewhere),
    "few tokens, some elsewhere": dict(tokens=4, ranks=3, experts=5, dim=32, width=16, route_tokens=some_are_elsewhere),
    "all elsewhere": dict(tokens=70, ranks=2, experts=5, dim=32, width=16, route_tokens=all_are_elsewhere),
    "few tokens, all elsewhere": dict(tokens=3, ranks=2, experts=5, dim=32, width=16, route_tokens=all_are_elsewhere),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_outputs_and_gradients_are_those_of_plain_torch(shape: str, small_tiles: None) -> None:
    assert_as_reference(draw(**SHAPES[shape]))


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("tokens", [4, 66])
def test_every_activation(activation: str, gated: bool, tokens: int) -> None:
    assert_as_reference(draw(tokens, 1, 2, 24, 40, gated=gated), activation=activation, gated=gated)


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("tokens", [1, 4, 70])
def test_biases_are_added_before_the_activation(tokens: int, gated: bool, small_tiles: None) -> None:
    """Of tokens whose experts are elsewhere and of experts without tokens, they add nothing."""
    arguments = draw(tokens, 3, 5, 24, 41, gated=gated, route_tokens=some_are_elsewhere)
    assert_as_reference(arguments, bias_EP=torch.randn(arguments[1].shape[:2]).to(DEVICE), gated=gated)


def test_a_bias_alone_may_learn() -> None:
    inputs, up, down, ids, weights = draw(66, 2, 4, 32, 16)
    bias = torch.randn(up.shape[:2]).to(DEVICE).requires_grad_()
    (found,) = torch.autograd.grad(moe_ffn(inputs, up, down, ids, weights, bias_EP=bias).square().sum(), bias)
    expected_TD = moe_ffn_reference(inputs, up, down, ids, weights, bias_EP=bias)
    torch.testing.assert_close(found, *torch.autograd.grad(expected_TD.square().sum(), bias), atol=1e-4, rtol=1e-4)


def test_the_checked_in_tiles() -> None:
    for tokens in (3, 66, 150):
        assert_as_reference(draw(tokens, 2, 2, 40, 72))


def test_a_wide_hidden_size_and_a_narrow_one_split_the_inner_dimension_of_decode() -> None:
    """Few columns leave multiprocessors idle, so that the neurons of all experts are shared out instead."""
    with launching(SMALL):
        assert_as_reference(draw(2, 3, 6, 16, 70))
        assert_as_reference(draw(2, 3, 6, 200, 20))


def test_float16_is_as_close_to_float64_as_plain_torch_in_float16() -> None:
    arguments = draw(70, 2, 4, 64, 48, dtype=torch.float16)
    exact = differentiate(moe_ffn_reference, arguments, torch.float64)
    plain = differentiate(moe_ffn_reference, arguments, torch.float16)
    found = differentiate(moe_ffn, arguments, torch.float16)
    for one, other, wanted in zip(found, plain, exact, strict=True):
        assert one.dtype == torch.float16
        assert (one.double() - wanted).norm() <= 1.1 * (other.double() - wanted).norm()


def test_weights_of_the_router_may_have_another_dtype() -> None:
    inputs, up, down, ids, weights = draw(66, 2, 4, 32, 16, dtype=torch.float16)
    wider = weights.float().requires_grad_()
    out = moe_ffn(inputs, up, down, ids, wider)
    out.float().sum().backward()
    assert wider.grad is not None
    assert wider.grad.dtype == torch.float32
    torch.testing.assert_close(out, moe_ffn(inputs, up, down, ids, weights), atol=0, rtol=0)


@pytest.mark.parametrize("tokens", [3, 66])
def test_the_same_bits_every_time(tokens: int) -> None:
    arguments = draw(tokens, 3, 5, 32, 24)
    first = differentiate(moe_ffn, arguments, torch.float32)
    for again in (differentiate(moe_ffn, arguments, torch.float32) for _ in range(2)):
        assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))


@pytest.mark.parametrize("index", [0, 1, 2, 4])
def test_what_needs_no_gradient_gets_none(index: int) -> None:
    """Frozen experts cost no weight gradients; a trained router alone is enough for a backward pass."""
    arguments = list(draw(66, 2, 4, 32, 16))
    wanted = differentiate(moe_ffn_reference, tuple(arguments), torch.float32)  # type: ignore[arg-type]
    arguments[index].requires_grad_()
    out = moe_ffn(*arguments)
    torch.manual_seed(0)
    out.backward(torch.randn(out.shape).to(out))
    assert [position for position, tensor in enumerate(arguments) if tensor.grad is not None] == [index]
    found = arguments[index].grad
    torch.testing.assert_close(found, wanted[1 + (index if index < 3 else 3)], atol=1e-4, rtol=1e-4)


def test_only_inputs_and_pre_activations_are_kept_for_the_way_back() -> None:
    inputs, up, down, ids, weights = draw(66, 2, 4, 32, 16)
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        moe_ffn(inputs.requires_grad_(), up.requires_grad_(), down.requires_grad_(), ids, weights)
    own = {tensor.data_ptr() for tensor in (up, down, ids, weights)}
    assert sorted(size for pointer, size in kept.items() if pointer not in own) == sorted([66 * 32, 66 * 2 * 2 * 16])


def test_the_operators_keep_what_torch_asks_of_custom_ones() -> None:
    """Schema, fake tensors and autograd registration: what torch.compile relies on."""
    arguments = draw(5, 2, 4, 32, 16)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    for bias in (None, torch.randn(arguments[1].shape[:2]).to(DEVICE)):
        torch.library.opcheck(torch.ops.moeify.moe_ffn.default, (*arguments, bias, "silu", True))
        given = (t if t is None else t.clone() for t in (*arguments, bias))
        given = [t if t is None or t.dtype == torch.int64 else t.requires_grad_() for t in given]
        torch.library.opcheck(torch.ops.moeify.moe_ffn_keeping.default, (*given, "silu", True), test_utils=checks)


def test_no_tokens() -> None:
    arguments = draw(3, 2, 4, 32, 16)
    nothing = (arguments[0][:0], *arguments[1:3], arguments[3][:0], arguments[4][:0])
    assert moe_ffn(*nothing).shape == (0, 32)
    out, *grads = differentiate(moe_ffn, nothing, torch.float32)
    assert out.shape == (0, 32)
    assert [bool(grad.any()) for grad in grads] == [False] * 4


def test_rows_that_are_not_contiguous() -> None:
    inputs, up, down, ids, weights = draw(66, 2, 4, 32, 16)
    wide = torch.cat([inputs, inputs], dim=1)
    out = moe_ffn(wide[:, :32], up.transpose(1, 2).contiguous().transpose(1, 2), down, ids, weights)
    assert torch.equal(out, moe_ffn(inputs, up, down, ids, weights))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({0: torch.zeros(3, 33)}, r"up_EPD has shape \(4, 32, 32\), expected \(4, 32, 33\)"),
        ({1: torch.zeros(4, 31, 32)}, r"up_EPD has shape \(4, 31, 32\), expected \(4, 32, 32\)"),
        ({2: torch.zeros(4, 31, 16)}, r"down_EDF has shape \(4, 31, 16\), expected \(4, 32, 16\)"),
        ({3: torch.zeros(2, 2, dtype=torch.int64)}, r"experts_TK has shape \(2, 2\), expected \(3, 2\)"),
        ({4: torch.zeros(3, 1)}, r"weights_TK has shape \(3, 1\), expected \(3, 2\)"),
        ({3: torch.zeros(3, 2, dtype=torch.int32)}, "experts_TK is torch.int32, expected int64"),
        ({0: torch.zeros(3, 32, dtype=torch.float16)}, "torch.float16 inputs, torch.float32 and torch.float32 weights"),
        ({0: torch.zeros(3, 32).double()}, "torch.float64 inputs"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[int, Tensor], message: str) -> None:
    arguments = list(draw(3, 2, 4, 32, 16))
    for index, tensor in change.items():
        arguments[index] = tensor.to(DEVICE)
    with pytest.raises(ValueError, match=message):
        moe_ffn(*arguments)


def test_a_bias_that_does_not_fit_is_refused() -> None:
    arguments = draw(3, 2, 4, 32, 16)
    with pytest.raises(ValueError, match=r"bias_EP has shape \(4, 16\), expected \(4, 32\)"):
        moe_ffn(*arguments, bias_EP=torch.zeros(4, 16, device=DEVICE))
    with pytest.raises(ValueError, match=r"bias_EP is torch\.float16, expected torch\.float32"):
        moe_ffn(*arguments, bias_EP=torch.zeros(4, 32, device=DEVICE).half())


def test_an_unknown_activation_is_refused() -> None:
    with pytest.raises(ValueError, match="activation tanh is none of silu, gelu, gelu_tanh, gelu_quick, relu, relu2"):
        moe_ffn(*draw(3, 2, 4, 32, 16), activation="tanh")


@pytest.mark.parametrize("rows", [16, 64])
@pytest.mark.parametrize(
    ("tokens", "ranks", "experts"), [(7, 2, 6), (100, 4, 12), (70, 1, 1), (300, 2, 70), (1024, 3, 5), (5500, 3, 4)]
)
def test_routing_is_a_stable_sort_with_tiles_of_one_expert(tokens: int, ranks: int, experts: int, rows: int) -> None:
    torch.manual_seed(0)
    ids = torch.randint(0, experts + 1, (tokens, ranks), device=DEVICE)
    routing = route(ids, experts, rows)
    flat = ids.flatten()
    routed = int((flat < experts).sum())
    assert torch.equal(routing.order_S[:routed].long(), torch.sort(flat, stable=True).indices[:routed])
    counts = torch.bincount(flat, minlength=experts + 1)[:experts]
    assert torch.equal(routing.offsets.long(), torch.cat([counts.new_zeros(1), counts.cumsum(0)]))
    wanted = [
        (expert, first)
        for expert in range(experts)
        for first in range(int(routing.offsets[expert]), int(routing.offsets[expert + 1]), rows)
    ]
    tiles = int(routing.num_tiles)
    assert list(zip(routing.tile_expert[:tiles].tolist(), routing.tile_row[:tiles].tolist(), strict=True)) == wanted
    assert tiles <= routing.max_tiles
