"""Models on the kernels, through transformers' experts interface: every number is the one that eager gives.

In float32, where both differ by rounding alone: in triton's interpreter, or on a GPU where there is one.
"""

import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from tiny_moe import ARCHITECTURES, DEVICE, Step, assert_equal, num_moe_layers, step, text, tiny
from torch import Tensor, nn
from transformers.integrations import moe

import moeify.kernels
from moeify.convert.pipeline import split
from moeify.kernels import experts, ops
from moeify.models.builtin import BuiltinRecipe, builtin_model
from moeify.options import SplitOptions

CONVERTED = "converted"


@pytest.fixture(autouse=True)
def _interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    moeify.kernels.register()
    monkeypatch.setattr(experts, "INTERPRET", DEVICE == "cpu")


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that was trained, hence whose tokens differ in the experts they ask for, after `moeify split`."""
    folder = tmp_path_factory.mktemp("converted")
    recipe = BuiltinRecipe(
        vocab_size=384, hidden_size=32, intermediate_size=128, num_layers=2, context=64, steps=60, warmup_steps=10
    )
    split(str(builtin_model(folder, recipe=recipe)), folder / "moe", SplitOptions(tokens=4096))
    return folder / "moe"


@pytest.fixture(scope="module")
def models(converted: Path) -> Callable[[str], Any]:
    """A tiny model by its name; shared, so each test chooses the implementation it wants."""

    @cache
    def make(name: str) -> Any:
        if name == CONVERTED:
            return transformers.AutoModelForCausalLM.from_pretrained(converted).to(DEVICE)
        return tiny(name)

    return make


@pytest.fixture
def roads(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each road through the kernels was taken."""
    taken: Counter[str] = Counter()

    def counted(name: str) -> Callable[..., Any]:
        original = getattr(ops, name)

        def call(*args: Any, **named: Any) -> Any:
            taken[name] += 1
            return original(*args, **named)

        return call

    for name in ("single", "decode", "_sorted"):
        monkeypatch.setattr(ops, name, counted(name))
    return taken


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """What was said since the test began, as if nothing had ever been said before."""
    monkeypatch.setattr(experts, "_said", set())
    return lambda: [record.getMessage() for record in caplog.records if record.name == experts.__name__]


@pytest.mark.parametrize("name", [*ARCHITECTURES, CONVERTED])
def test_a_step_of_training_is_that_of_eager(
    name: str, models: Callable[[str], Any], roads: Counter[str], said: Callable[[], list[str]]
) -> None:
    model = models(name)
    expected = step(model, text(), "eager")
    assert all(expected.grads[n].any() for n, _ in model.named_parameters() if "experts" in n)
    assert_equal(step(model, text(), "moeify"), expected)
    assert roads == {"_sorted": num_moe_layers(model)}
    assert not said()


@pytest.mark.parametrize("name", [*ARCHITECTURES, CONVERTED])
def test_generate_gives_the_same_tokens_on_the_short_road(
    name: str, models: Callable[[str], Any], roads: Counter[str]
) -> None:
    model = models(name).eval()
    tokens = {}
    for implementation in ("eager", "moeify"):
        model.set_experts_implementation(implementation)
        tokens[implementation] = model.generate(text(1, 6), max_new_tokens=3, do_sample=False, eos_token_id=None)
    assert tokens["eager"].shape == (1, 9)
    assert torch.equal(tokens["moeify"], tokens["eager"])
    # The prompt, then one token after another.
    assert roads == {"decode": num_moe_layers(model), "single": 2 * num_moe_layers(model)}


def test_many_tokens_without_gradients_are_sorted(models: Callable[[str], Any], roads: Counter[str]) -> None:
    model, ids = models("Mixtral").eval(), text(2, 40)
    logits = {}
    for implementation in ("eager", "moeify"):
        model.set_experts_implementation(implementation)
        with torch.no_grad():
            logits[implementation] = model(ids).logits
    torch.testing.assert_close(logits["moeify"], logits["eager"], rtol=1e-5, atol=1e-5)
    assert roads == {"_sorted": 2}


def test_frozen_experts_still_let_the_others_learn(models: Callable[[str], Any], roads: Counter[str]) -> None:
    model = models("Mixtral")
    frozen = [p for n, p in model.named_parameters() if n.endswith("layers.1.mlp.experts.gate_up_proj")]
    assert len(frozen) == 1
    frozen[0].requires_grad_(False)
    try:
        expected = step(model, text(), "eager")
        assert len(expected.grads) == len(list(model.parameters())) - 1
        assert_equal(step(model, text(), "moeify"), expected)
    finally:
        frozen[0].requires_grad_(True)
    assert roads == {"_sorted": 2}


def test_checkpointed_activations_give_the_same_bits(models: Callable[[str], Any], roads: Counter[str]) -> None:
    model = models("Mixtral")
    plain = step(model, text(), "moeify")
    # transformers' new name for gradient_checkpointing_enable, which warns that it is old.
    word = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    getattr(model, f"{word}_checkpointing_enable")({"use_reentrant": False})
    try:
        checkpointed = step(model, text(), "moeify")
    finally:
        getattr(model, f"{word}_checkpointing_disable")()
    assert torch.equal(checkpointed.logits, plain.logits)
    assert all(torch.equal(checkpointed.grads[name], grad) for name, grad in plain.grads.items())
    # Once for plain, twice for checkpointed, in two layers.
    assert roads == {"_sorted": 6}


def test_autocast_runs_the_kernels_in_its_dtype(models: Callable[[str], Any], roads: Counter[str]) -> None:
    model = models("Mixtral")
    exact = step(model, text(), "eager")
    with torch.autocast(DEVICE, dtype=torch.float16):
        eager, kernels = (step(model, text(), implementation) for implementation in ("eager", "moeify"))
    assert kernels.logits.dtype == torch.float16
    assert all(grad.dtype == torch.float32 for grad in kernels.grads.values())
    assert roads == {"_sorted": 2}

    def error(found: Step) -> float:
        of_all = torch.stack([(found.grads[name] - grad).norm() / grad.norm() for name, grad in exact.grads.items()])
        return float(of_all.norm())

    # Rounded, but not more than eager.
    assert 1e-4 < error(kernels) <= 1.1 * error(eager)


@pytest.mark.skipif(DEVICE == "cuda", reason="on a CUDA device the kernels take bfloat16")
def test_autocast_to_bfloat16_is_left_to_transformers(
    models: Callable[[str], Any], roads: Counter[str], said: Callable[[], list[str]]
) -> None:
    model = models("Mixtral")
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        expected, found = (step(model, text(), implementation) for implementation in ("grouped_mm", "moeify"))
    assert torch.equal(found.logits, expected.logits)
    assert all(torch.equal(found.grads[name], grad) for name, grad in expected.grads.items())
    assert not roads
    assert len(said()) == 1
    assert "no kernel for torch.bfloat16" in said()[0]


def test_autocast_leaves_float64_alone(roads: Counter[str], said: Callable[[], list[str]]) -> None:
    module = experts_module().double()
    with torch.autocast(DEVICE, dtype=torch.float16):
        expected, found = (call(module, way, routing(), torch.float64) for way in ("eager", "moeify"))
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert found["out"].dtype == torch.float64
    assert not roads
    assert len(said()) == 1


def test_compiled_as_one_graph_for_every_length(roads: Counter[str]) -> None:
    model = tiny("Mixtral", num_hidden_layers=1)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for num_tokens in (10, 14, 17):
        ids = text(num_tokens=num_tokens)
        assert_equal(step(model, ids, "moeify", compiled), step(model, ids, "eager"))
    # The third length finds a graph of any length.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2
    assert roads == {"_sorted": 3}
    model.eval()
    with torch.no_grad():
        expected = model(text()).logits
        model.set_experts_implementation("moeify")
        torch.testing.assert_close(compiled(text()).logits, expected, rtol=1e-5, atol=1e-5)
    assert roads == {"_sorted": 3, "decode": 1}


def test_importing_and_registering_costs_no_triton() -> None:
    """In a process of its own, because this one has used the kernels."""
    code = """
import sys
ALLOWED = ("experts", "cpu", "reference")
import moeify, moeify.kernels
assert "triton" not in sys.modules and "torch" not in sys.modules, "import"
from transformers.integrations import moe
assert "moeify" not in moe.ALL_EXPERTS_FUNCTIONS
moeify.kernels.register()
assert "moeify.kernels.experts" in sys.modules
assert not any(name.startswith("moeify.kernels.") and name.split(".")[2] not in ALLOWED for name in sys.modules)
first = moe.ALL_EXPERTS_FUNCTIONS["moeify"]
moeify.kernels.register()
assert moe.ALL_EXPERTS_FUNCTIONS["moeify"] is first
assert [*moe.ALL_EXPERTS_FUNCTIONS.valid_keys()].count("moeify") == 1
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_name_that_nobody_registered_is_refused() -> None:
    with pytest.raises(ValueError, match="moeify-typo"):
        tiny("Mixtral").set_experts_implementation("moeify-typo")


class Experts(nn.Module):
    """Experts as transformers has them, stored in whatever way the flags say."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.num_experts, width, dim = config.num_experts, config.width, config.dim
        first = (self.num_experts, width * (2 if config.gated else 1), dim)
        generator = torch.Generator().manual_seed(0)
        weights = [torch.randn(shape, generator=generator) / 4 for shape in (first, (self.num_experts, dim, width))]
        if config.transposed:
            weights = [weight.transpose(1, 2).contiguous() for weight in weights]
        first_name = "gate_up_proj" if config.gated else "up_proj"
        self.register_parameter(first_name, nn.Parameter(weights[0].to(DEVICE)))
        self.down_proj = nn.Parameter(weights[1].to(DEVICE))
        if config.biased:
            # Interleaved or in halves, of each row; of the output, none by expert.
            self.register_parameter(f"{first_name}_bias", nn.Parameter(torch.randn(first[:2], generator=generator)))
            self.down_proj_bias, self.has_down_bias = torch.zeros(self.num_experts, dim), config.down_bias
        self.act_fn = config.act_fn

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        out_TD = torch.zeros_like(hidden_states)
        for expert in range(self.num_experts):
            token, rank = torch.where(top_k_index == expert)
            up, down = (weights[expert] for weights in (experts.first_projection(self), self.down_proj))
            if self.is_transposed:
                up, down = up.T, down.T
            bias = experts.first_bias(self)
            hidden = nn.functional.linear(hidden_states[token], up, None if bias is None else bias[expert])
            hidden = self._apply_gate(hidden) if self.has_gate else self.act_fn(hidden)
            out_TD = out_TD.index_add(0, token, hidden @ down.T * top_k_weights[token, rank, None].to(hidden.dtype))
        return out_TD


class Interleaved(Experts):
    def _apply_gate(self, gate_up: Tensor) -> Tensor:
        return self.act_fn(gate_up[..., ::2]) * gate_up[..., 1::2]


class Clamped(Experts):
    def _apply_gate(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return self.act_fn(gate).clamp(max=0.1) * up


def experts_module(
    kind: type[Experts] = Experts, act_fn: Any = None, *, width: int = 24, down_bias: bool = False, **flags: bool
) -> Any:
    """A module with weights of its own class, because decorating changes the class."""
    decorated = moe.use_experts_implementation(type(kind.__name__, (kind,), {}), **flags)
    config = SimpleNamespace(num_experts=3, dim=16, width=width, act_fn=act_fn or nn.SiLU())
    config.biased, config.down_bias = flags.get("has_bias", False), down_bias
    config.gated, config.transposed = flags.get("has_gate", True), flags.get("is_transposed", False)
    config._experts_implementation = "eager"
    return decorated(config)


def call(module: Any, implementation: str, index_TK: Tensor, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Output, and gradients of inputs, router weights and experts."""
    generator, dim = torch.Generator().manual_seed(1), module.down_proj.shape[-1 if module.is_transposed else 1]
    inputs_TD, flow_TD = (torch.randn(len(index_TK), dim, generator=generator, dtype=dtype).to(DEVICE) for _ in "xg")
    weights_TK = torch.rand(index_TK.shape, generator=generator, dtype=dtype).to(DEVICE)
    module.config._experts_implementation = implementation
    module.zero_grad()
    inputs_TD.requires_grad_()
    weights_TK.requires_grad_()
    out_TD = module(inputs_TD, index_TK, weights_TK)
    out_TD.backward(flow_TD)
    with torch.no_grad():
        found = {"short": module(inputs_TD, index_TK, weights_TK)}
    found |= {"out": out_TD.detach(), "inputs": inputs_TD.grad, "weights": weights_TK.grad}
    return found | {name: parameter.grad.clone() for name, parameter in module.named_parameters()}


def routing(num_tokens: int = 9, num_experts: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.rand(num_tokens, num_experts, generator=generator).argsort(1)[:, :2].to(DEVICE)


@pytest.mark.parametrize(
    "activation", ["silu", "gelu", "gelu_pytorch_tanh", "gelu_new", "gelu_fast", "quick_gelu", "relu", "relu2"]
)
@pytest.mark.parametrize("has_gate", [True, False])
def test_experts_with_any_activation_run_on_the_kernels(activation: str, has_gate: bool, roads: Counter[str]) -> None:
    module = experts_module(act_fn=transformers.activations.ACT2FN[activation], has_gate=has_gate, has_bias=True)
    expected, found = (call(module, implementation, routing()) for implementation in ("eager", "moeify"))
    assert roads == {"_sorted": 1, "decode": 1}
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.parametrize(
    ("gone", "num_tokens"), [("one rank", 9), ("one token", 9), ("all", 9), ("one rank", 1), ("all", 1)]
)
def test_experts_of_another_device_add_nothing(gone: str, num_tokens: int, roads: Counter[str]) -> None:
    """Expert parallelism marks them with the id num_experts, whatever their weight; a single token is a case apart."""
    module, index_TK = experts_module(), routing(num_tokens)
    away = {"one rank": (slice(0, 6), 0), "one token": (4,), "all": (slice(None),)}[gone]
    index_TK[away] = module.num_experts
    expected, found = (call(module, implementation, index_TK) for implementation in ("eager", "moeify"))
    assert roads == {"_sorted": 1, "single" if num_tokens == 1 else "decode": 1}
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-5, msg=name)
    assert not found["weights"][away].any()
    assert any(value.any() for value in found.values()) == (gone != "all")


FALLBACKS: Mapping[str, tuple[Callable[[], Any], str]] = {
    "transposed": (lambda: experts_module(is_transposed=True), "its weights are stored transposed"),
    "interleaved": (lambda: experts_module(Interleaved, is_concatenated=False), "gate and up rows are interleaved"),
    "clamped": (lambda: experts_module(Clamped), "it has a gating function of its own"),
    "activation": (lambda: experts_module(act_fn=nn.Tanh()), "no kernel for the activation Tanh"),
    "output bias": (lambda: experts_module(has_bias=True, down_bias=True), "the outputs of its experts have biases"),
    "float64": (lambda: experts_module().double(), "no kernel for torch.float64"),
}


@pytest.mark.parametrize("case", FALLBACKS)
def test_what_the_kernels_do_not_support_runs_without_them(
    case: str, roads: Counter[str], said: Callable[[], list[str]]
) -> None:
    make, reason = FALLBACKS[case]
    module = make()
    dtype = module.down_proj.dtype
    expected, found = (call(module, implementation, routing(), dtype) for implementation in ("eager", "moeify"))
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-5, msg=name)
    assert not roads
    # `call` ran it twice.
    assert len(said()) == 1
    assert f"{type(module).__name__}: {reason};" in said()[0]
    call(module, "moeify", routing(), dtype)
    assert len(said()) == 1


@pytest.mark.skipif(DEVICE == "cuda", reason="on a CUDA device the kernels take bfloat16")
def test_rows_that_grouped_mm_refuses_go_through_the_modules_own_loop(said: Callable[[], list[str]]) -> None:
    module = experts_module(width=9).bfloat16()
    expected, found = (call(module, way, routing(), torch.bfloat16) for way in ("eager", "moeify"))
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert "no kernel for torch.bfloat16" in said()[0]
    with pytest.raises(RuntimeError, match="multiple of 16 bytes"):
        call(module, "grouped_mm", routing(), torch.bfloat16)


def test_transposed_experts_run_without_the_kernels_also_compiled(
    roads: Counter[str], said: Callable[[], list[str]]
) -> None:
    model = tiny("GptOss", num_local_experts=4, num_experts_per_tok=2)
    expected = step(model, text(), "eager")
    model.set_experts_implementation("moeify")
    torch._dynamo.reset()
    # Forwards alone: transformers 5.17 cannot compile its own way back.
    with torch.no_grad():
        logits = torch.compile(model, fullgraph=True, backend="aot_eager")(text()).logits
    torch.testing.assert_close(logits, expected.logits, rtol=1e-5, atol=1e-5)
    assert_equal(step(model, text(), "moeify"), expected)
    assert not roads
    assert len(said()) == 1
    assert "GptOssExperts: its weights are stored transposed" in said()[0]


@pytest.mark.parametrize(
    ("dim", "width", "dtype", "is_refused"),
    [
        (16, 24, torch.bfloat16, False),
        (20, 18, torch.bfloat16, False),
        (16, 9, torch.bfloat16, True),
        (15, 16, torch.float16, True),
        (15, 9, torch.float32, False),
    ],
)
@pytest.mark.parametrize("has_gate", [True, False])
def test_odd_rows_of_2_byte_numbers_are_refused(
    dim: int, width: int, dtype: torch.dtype, is_refused: bool, has_gate: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Asked, not run: with tensors that only claim to be on a GPU."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    monkeypatch.setattr(experts, "INTERPRET", False)
    module = experts_module(has_gate=has_gate)
    with FakeTensorMode():
        for name, shape in {"gate_up_proj": (3, 2 * width, dim), "up_proj": (3, width, dim)}.items():
            if name in module._parameters:
                module._parameters[name] = torch.empty(shape, dtype=dtype, device="cuda")
        module._parameters["down_proj"] = torch.empty(3, dim, width, dtype=dtype, device="cuda")
        reason = experts.unsupported(module, torch.empty(5, dim, dtype=dtype, device="cuda"))
    expected = f"a hidden size of {dim} and a width of {width} are not both even"
    assert reason == (expected if is_refused else None)


def test_distributed_weights_and_other_inputs_are_refused() -> None:
    from torch import distributed
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import distribute_tensor

    module, inputs_TD = experts_module(), torch.zeros(4, 16, device=DEVICE)
    assert experts.unsupported(module, inputs_TD) is None
    reason = experts.unsupported(module, inputs_TD.half())
    assert reason == "inputs are torch.float16, weights torch.float32"
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh(DEVICE, (1,))
        module.gate_up_proj = nn.Parameter(distribute_tensor(module.gate_up_proj.detach(), mesh))
        assert experts.unsupported(module, inputs_TD) == "its weights are distributed tensors"
    finally:
        distributed.destroy_process_group()


def share(rank: int, folder: str) -> None:
    """What each of two processes does: half of the texts, under DDP and under FSDP2; rank 0 keeps the results."""
    from torch import distributed
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    torch.set_num_threads(1)
    experts.INTERPRET = True
    moeify.kernels.register()
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    ids = text()[rank : rank + 1]
    results = {}
    for way in ("ddp", "fsdp"):
        model = tiny("Mixtral")
        model.set_experts_implementation("moeify")
        if way == "ddp":
            wrapped = DistributedDataParallel(model)
        else:
            for layer in model.model.layers:
                fully_shard(layer)
            wrapped = fully_shard(model)
        loss = wrapped(input_ids=ids, labels=ids).loss
        loss.backward()
        grads = {name: parameter.grad for name, parameter in model.named_parameters()}
        if way == "fsdp":
            grads = {name: grad.full_tensor() for name, grad in grads.items()}
        mean_loss = loss.detach().clone()
        distributed.all_reduce(mean_loss)
        results[way] = {"loss": mean_loss / 2, "grads": grads}
    from moeify.kernels.experts import _said

    results["said"] = sorted(_said)
    if rank == 0:
        torch.save(results, Path(folder) / "results.pt")
    distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.skipif(DEVICE == "cuda", reason="two processes that share the CPU")
def test_two_processes_learn_what_one_does(tmp_path: Path, models: Callable[[str], Any], forking: Any) -> None:
    torch.multiprocessing.start_processes(share, (str(tmp_path),), nprocs=2, start_method=forking.get_start_method())
    results = torch.load(tmp_path / "results.pt")
    model = models("Mixtral")
    expected = step(model, text(), "eager")
    loss = model(input_ids=text(), labels=text()).loss
    assert results["said"] == []
    for way in ("ddp", "fsdp"):
        torch.testing.assert_close(results[way]["loss"], loss.detach(), rtol=1e-5, atol=0)
        assert_equal(Step(expected.logits, results[way]["grads"]), expected)
