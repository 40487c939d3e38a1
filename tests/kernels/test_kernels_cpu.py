"""A mixture of experts on a CPU: whichever way the sizes choose, the numbers are the reference's and eager's."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny_moe import ARCHITECTURES, assert_equal, num_moe_layers, step, text, tiny
from torch import Tensor

import moeify
import moeify.kernels
from moeify.kernels import cpu, experts
from moeify.kernels.reference import ACTIVATIONS, moe_ffn_reference

WAYS = ("_one_token", "_all_experts", "_one_by_one")
DTYPES = (torch.float64, torch.float32, torch.bfloat16)
ROUNDING = {torch.float64: 1e-13, torch.float32: 3e-6, torch.bfloat16: 4e-2}
# (T, E, K, F, D) and the way it goes, without gradients and with them, in float32.
SIZES = {
    (1, 4, 2, 8, 16): ("_one_token", "_all_experts"),
    (1, 16, 2, 8, 16): ("_one_token", "_one_by_one"),
    (5, 4, 2, 8, 16): ("_all_experts", "_all_experts"),
    (40, 4, 3, 8, 16): ("_all_experts", "_all_experts"),
    (2, 16, 2, 8, 16): ("_one_by_one", "_one_by_one"),
    # Two of sixteen, but narrow ones, and the tokens reach most of them.
    (40, 16, 2, 8, 16): ("_all_experts", "_all_experts"),
    (300, 4, 2, 64, 24): ("_one_by_one", "_one_by_one"),
    # Much work, but most of it would be copying.
    (700, 8, 5, 16, 24): ("_all_experts", "_all_experts"),
}

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the tiny models are on the CUDA device")


@pytest.fixture
def ways(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each way was taken."""
    taken: Counter[str] = Counter()

    def counted(name: str) -> Callable[..., Any]:
        original = getattr(cpu, name)

        def call(*args: Any) -> Any:
            taken[name] += 1
            return original(*args)

        return call

    for name in WAYS:
        monkeypatch.setattr(cpu, name, counted(name))
    return taken


def task(sizes: tuple[int, ...], dtype: torch.dtype, *, gated: bool = True) -> tuple[list[Tensor], Tensor, Tensor]:
    """(inputs, up, down, weights), experts with a few ids that name none, and a gradient of the output."""
    num_tokens, num_experts, num_ranks, width, dim = sizes
    generator = torch.Generator().manual_seed(0)
    shapes = [
        (num_tokens, dim),
        (num_experts, width * (2 if gated else 1), dim),
        (num_experts, dim, width),
        (num_tokens, num_ranks),
    ]
    tensors = [torch.randn(shape, generator=generator, dtype=torch.float64) / shape[-1] ** 0.5 for shape in shapes]
    experts_TK = torch.rand(num_tokens, num_experts, generator=generator).argsort(dim=1)[:, :num_ranks]
    experts_TK[torch.rand(num_tokens, num_ranks, generator=generator) < 0.1] = num_experts
    flow_TD = torch.randn(num_tokens, dim, generator=generator, dtype=torch.float64)
    return [tensor.to(dtype) for tensor in tensors], experts_TK, flow_TD.to(dtype)


def error(found: Tensor, expected: Tensor) -> float:
    found, expected = found.detach(), expected.detach()
    return float((found - expected).norm() / expected.norm().clamp(min=1e-30))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize(("activation", "biased"), [*((name, name == "gelu") for name in ACTIVATIONS)])
@pytest.mark.parametrize("sizes", SIZES)
def test_output_and_gradients_are_the_references(
    sizes: tuple[int, ...], activation: str, biased: bool, gated: bool, dtype: torch.dtype, ways: Counter[str]
) -> None:
    tensors, experts_TK, flow_TD = task(sizes, dtype, gated=gated)
    if biased:
        tensors.append(torch.randn(tensors[1].shape[:2], generator=torch.Generator().manual_seed(1)).to(dtype))
    exact = [tensor.double().requires_grad_() for tensor in tensors]
    options: dict[str, Any] = {"activation": activation, "gated": gated}

    def call(function: Callable[..., Tensor], given: list[Tensor]) -> Tensor:
        return function(*given[:3], experts_TK, given[3], bias_EP=given[4] if biased else None, **options)

    expected_TD = call(moe_ffn_reference, exact)
    expected_TD.backward(flow_TD.double())
    with torch.no_grad():
        plain_TD = call(cpu.moe_ffn_cpu, tensors)
    leaves = [tensor.requires_grad_() for tensor in tensors]
    found_TD = call(cpu.moe_ffn_cpu, leaves)
    found_TD.backward(flow_TD)
    for found in (plain_TD, found_TD):
        assert found.dtype == dtype
        assert error(found, expected_TD) < ROUNDING[dtype]
    for leaf, its in zip(leaves, exact, strict=True):
        assert leaf.grad is not None
        assert its.grad is not None
        assert leaf.grad.dtype == dtype
        assert error(leaf.grad, its.grad) < ROUNDING[dtype]
    if dtype == torch.float32:
        assert ways == Counter(SIZES[sizes])


@pytest.mark.parametrize("wanted", range(4))
def test_only_wanted_gradients_are_there(wanted: int) -> None:
    tensors, experts_TK, flow_TD = task((300, 4, 2, 64, 24), torch.float32)
    tensors[wanted].requires_grad_()
    cpu.moe_ffn_cpu(*tensors[:3], experts_TK, tensors[3]).backward(flow_TD)
    assert [tensor.grad is not None for tensor in tensors] == [index == wanted for index in range(4)]


def test_a_small_cache_gives_the_same_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups of one expert each, and of all: the order of sums stays."""
    tensors, experts_TK, flow_TD = task((300, 4, 2, 64, 24), torch.float32)
    found = []
    for size in (1, 1 << 30):
        monkeypatch.setattr(cpu, "GROUP_BYTES", size)
        leaves = [tensor.clone().requires_grad_() for tensor in tensors]
        out_TD = cpu.moe_ffn_cpu(*leaves[:3], experts_TK, leaves[3])
        out_TD.backward(flow_TD)
        found.append([out_TD.detach(), *(leaf.grad for leaf in leaves)])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


def test_no_token_and_no_expert() -> None:
    tensors, experts_TK, _ = task((6, 4, 2, 8, 16), torch.float32)
    assert cpu.moe_ffn_cpu(tensors[0][:0], *tensors[1:3], experts_TK[:0], tensors[3][:0]).shape == (0, 16)
    for num_tokens in (1, 6):
        nobody_TK = torch.full((num_tokens, 2), 4)
        out_TD = cpu.moe_ffn_cpu(tensors[0][:num_tokens], *tensors[1:3], nobody_TK, tensors[3][:num_tokens])
        assert not out_TD.any()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_models_learn_and_write_as_with_eager(name: str, ways: Counter[str]) -> None:
    moeify.kernels.register()
    model = tiny(name)
    expected = step(model, text(), "eager")
    assert_equal(step(model, text(), "moeify"), expected)
    assert ways.total() == num_moe_layers(model)
    model.eval()
    tokens = {}
    for implementation in ("eager", "moeify"):
        model.set_experts_implementation(implementation)
        tokens[implementation] = model.generate(text(1, 6), max_new_tokens=3, do_sample=False, eos_token_id=None)
    assert torch.equal(tokens["moeify"], tokens["eager"])
    # The prompt and two tokens.
    assert ways.total() == 4 * num_moe_layers(model)
    assert ways["_one_token"] == 2 * num_moe_layers(model)


def test_autocast_rounds_no_more_than_eager() -> None:
    moeify.kernels.register()
    model = tiny("Mixtral")
    exact = step(model, text(), "eager")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        eager, ours = (step(model, text(), implementation) for implementation in ("eager", "moeify"))
    assert ours.logits.dtype == torch.bfloat16

    def rounding(found: Any) -> float:
        errors = [error(found.grads[name], grad) for name, grad in exact.grads.items()]
        return float(torch.tensor(errors).norm())

    assert 1e-3 < rounding(ours) <= 1.2 * rounding(eager)


def test_compiled_models_take_transformers_own(ways: Counter[str], monkeypatch: pytest.MonkeyPatch) -> None:
    moeify.kernels.register()
    monkeypatch.setattr(experts, "_said", set())
    model = tiny("Mixtral").eval()
    with torch.no_grad():
        expected = model(text()).logits
        model.set_experts_implementation("moeify")
        torch._dynamo.reset()
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(text()).logits, expected, rtol=1e-5, atol=1e-5)
    assert not ways
    assert any("torch.compile" in reason for reason in experts._said)


def test_loading_chooses_it(tmp_path: Any, ways: Counter[str]) -> None:
    tiny("Mixtral").save_pretrained(tmp_path)
    for implementation, expected in ((None, 2), ("eager", 0)):
        chosen = {} if implementation is None else {"experts_implementation": implementation}
        model = moeify.load(str(tmp_path), **chosen)
        ways.clear()
        with torch.no_grad():
            model(text())
        assert ways.total() == expected
