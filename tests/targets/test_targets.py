"""Every family with every target: refused for a stated reason, or a checkpoint that stock transformers loads."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MakeDense, family_of
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from moeify import families, targets
from moeify.calibration.stream import HiddenStream
from moeify.check.evaluate import load
from moeify.check.verify import VerifyReport, verify
from moeify.convert.exactness import check_target, choose_target
from moeify.convert.layer import ConvertedFFN
from moeify.convert.pipeline import SplitResult, split
from moeify.convert.preview import preview
from moeify.errors import InputError
from moeify.experts.mixing import Mixing
from moeify.layout import Layout
from moeify.models.config import load_config
from moeify.models.dense import open_dense
from moeify.models.heads import auto_class
from moeify.options import SplitOptions
from moeify.plan import load_plan
from moeify.routers import LinearRouter
from moeify.targets import ROUTER_LIMIT, ROUTER_SCALE

pytestmark = [
    # One of the models here has biases that llama.cpp does not take, and says so.
    pytest.mark.filterwarnings("ignore:llama.cpp cannot run this layout. its qwen3moe has no bias on o"),
    # All experts on is the case that is exact.
    pytest.mark.filterwarnings("ignore:.*which saves nothing"),
]

Convert = Callable[..., Path]

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
WINDOW = {"use_sliding_window": True, "sliding_window": 16}
PARTIAL_ROPE = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
ALL_LLAMA = {"glm4_moe", "granitemoeshared", "mixtral", "qwen2_moe"}
# What a family's own MoE sibling, or one that is near enough, represents.
SIBLINGS = {
    "cohere": {"cohere2_moe"},
    "cohere2": {"cohere2_moe"},
    "ernie4_5": ALL_LLAMA | {"ernie4_5_moe"},
    "gemma": {"granitemoeshared"},
    "glm": {"glm4_moe"},
    "granite": {"granitemoeshared"},
    "helium": ALL_LLAMA | {"ernie4_5_moe"},
    "hunyuan_v1_dense": {"hunyuan_v1_moe"},
    "lfm2": {"lfm2_moe"},
    "ministral": {"mixtral"},
    "olmo2": {"flex_olmo"},
    "qwen3_5_text": {"qwen3_5_moe_text"},
}

# name: (family, config, targets that represent it exactly). A new target shows up here as a failing test.
MODELS: dict[str, tuple[str, dict[str, Any], set[str]]] = {
    "llama": ("llama", {}, ALL_LLAMA),
    "llama-untied": ("llama", {"tie_word_embeddings": False}, ALL_LLAMA),
    "llama-bf16": ("llama", {"dtype": "bfloat16"}, ALL_LLAMA),
    "llama-rope3": ("llama", {"rope_parameters": LLAMA3_ROPE}, ALL_LLAMA),
    "llama-gelu": ("llama", {"hidden_act": "gelu"}, ALL_LLAMA - {"glm4_moe"}),
    "llama-wide-heads": ("llama", {"head_dim": 16}, {"glm4_moe", "mixtral"}),
    "llama-attention-bias": ("llama", {"attention_bias": True}, {"granitemoeshared"}),
    "llama-ffn-bias": ("llama", {"mlp_bias": True}, set()),
    "mistral": ("mistral", {}, ALL_LLAMA),
    "mistral-window": ("mistral", {"sliding_window": 16}, {"mixtral"}),
    "qwen2": ("qwen2", {}, {"glm4_moe", "qwen2_moe"}),
    "qwen2-bf16-untied": ("qwen2", {"dtype": "bfloat16", "tie_word_embeddings": False}, {"glm4_moe", "qwen2_moe"}),
    "qwen2-window": ("qwen2", {**WINDOW, "max_window_layers": 1}, set()),
    "qwen3": ("qwen3", {}, {"dots1", "glm4_moe", "qwen3_moe"}),
    "qwen3-bf16": ("qwen3", {"dtype": "bfloat16"}, {"dots1", "glm4_moe", "qwen3_moe"}),
    "qwen3-attention-bias": ("qwen3", {"attention_bias": True}, {"dots1", "qwen3_moe"}),
    "qwen3-window": ("qwen3", {**WINDOW, "max_window_layers": 0}, {"dots1", "qwen3_moe"}),
    "qwen3-mixed-window": ("qwen3", {**WINDOW, "max_window_layers": 1}, {"dots1"}),
    "seed_oss": ("seed_oss", {}, {"glm4_moe", "qwen2_moe"}),
    "phi3": ("phi3", {}, ALL_LLAMA),
    "phi3-window": ("phi3", {"sliding_window": 16}, {"mixtral"}),
    "phi3-partial-rotary": ("phi3", {"rope_parameters": PARTIAL_ROPE}, {"glm4_moe"}),
    "gemma-bf16": ("gemma", {"dtype": "bfloat16"}, {"granitemoeshared"}),
    "hyperclovax-no-post-norm": ("hyperclovax", {"use_post_norm": False}, {"granitemoeshared"}),
    **{family: (family, {}, fits) for family, fits in SIBLINGS.items()},
}
# moeify's own architecture represents every model, and some are a part of one alone: tests/modeling.
STOCK = [name for name in targets.names() if targets.find(name).is_stock and targets.find(name).architecture]
FITTING = [(model, target) for model, (_, _, fits) in MODELS.items() for target in targets.names() if target in fits]

# What stands in config.json for a llama with 8 experts; a neuron count of 64 makes slices of 8.
CONFIGS: dict[str, dict[str, Any]] = {
    "glm4_moe": {
        "architectures": ["Glm4MoeForCausalLM"],
        "model_type": "glm4_moe",
        "attention_bias": False,
        "use_qk_norm": False,
        "head_dim": 8,
        "moe_intermediate_size": 8,
        "n_shared_experts": 2,
        "n_routed_experts": 6,
        "num_experts_per_tok": 4,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 0,
        "norm_topk_prob": False,
        "routed_scaling_factor": 2.0,
        "tie_word_embeddings": False,
    },
    "granitemoeshared": {
        "architectures": ["GraniteMoeSharedForCausalLM"],
        "model_type": "granitemoeshared",
        "attention_bias": False,
        "attention_multiplier": 8**-0.5,
        "embedding_multiplier": 1.0,
        "residual_multiplier": 1.0,
        "logits_scaling": 1.0,
        "intermediate_size": 8,
        "shared_intermediate_size": 16,
        "num_local_experts": 6,
        "num_experts_per_tok": 4,
        "tie_word_embeddings": True,
    },
    "mixtral": {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "head_dim": 8,
        "sliding_window": None,
        "intermediate_size": 8,
        "num_local_experts": 8,
        "num_experts_per_tok": 6,
        "tie_word_embeddings": True,
    },
    "qwen2_moe": {
        "architectures": ["Qwen2MoeForCausalLM"],
        "model_type": "qwen2_moe",
        "qkv_bias": True,
        "use_sliding_window": False,
        "moe_intermediate_size": 8,
        "shared_expert_intermediate_size": 16,
        "num_experts": 6,
        "num_experts_per_tok": 4,
        "norm_topk_prob": False,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "tie_word_embeddings": False,
    },
    # Of a qwen3: no llama fits.
    "qwen3_moe": {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "attention_bias": False,
        "use_sliding_window": False,
        "sliding_window": None,
        "head_dim": 8,
        "moe_intermediate_size": 8,
        # transformers' own name for it in the file; `config.num_experts` reads it.
        "num_local_experts": 8,
        "num_experts_per_tok": 6,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "tie_word_embeddings": True,
    },
}


@pytest.fixture(scope="module")
def dense(make_dense: MakeDense) -> Callable[[str], Path]:
    return lambda model: make_dense(MODELS[model][0], **MODELS[model][1])


@pytest.fixture(scope="module")
def convert(dense: Callable[[str], Path], calibration_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Convert:
    """convert(model, target, **options) -> checkpoint; equal calls share one."""
    made: dict[str, Path] = {}

    def make(model: str, target: str, **options: Any) -> Path:
        key = repr((model, target, sorted(options.items())))
        if key not in made:
            out = tmp_path_factory.mktemp("moe") / f"{model}-{target}"
            values = {"tokens": 1024, "calibration": (str(calibration_file),), "target": target, **options}
            split(str(dense(model)), out, SplitOptions(**values))
            made[key] = out
        return made[key]

    return make


def stored(folder: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape and dtype of every tensor in the weight files of a folder."""
    found = {}
    for file in folder.glob("model*.safetensors"):
        with safe_open(file, framework="pt") as reader:
            for name in reader.keys():  # noqa: SIM118
                part = reader.get_slice(name)
                found[name] = (tuple(part.get_shape()), part.get_dtype())
    return found


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor in the weight files of a folder."""
    return {name: t for file in folder.glob("model*.safetensors") for name, t in load_file(file).items()}


def config_of(folder: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return values


def failed(report: VerifyReport) -> list[str]:
    return [f"{check.name}: {check.found}, expected {check.expected}" for check in report.checks if not check.passed]


def test_the_table_has_every_target() -> None:
    assert set().union(*(fits for _, _, fits in MODELS.values())) == set(STOCK)


@pytest.mark.parametrize("model", MODELS)
def test_targets_that_do_not_fit_are_refused_with_a_reason(
    model: str, dense: Callable[[str], Path], tmp_path: Path
) -> None:
    """Which fit a plain family is what README's table says, and its test asks every twin."""
    checkpoint = open_dense(str(dense(model)))
    refused = [name for name in STOCK if name not in MODELS[model][2]]
    for name in refused[:1] if model in families.names() else refused:
        reason = check_target(targets.find(name), checkpoint, targets.find(name).layout(8)).reason
        assert len(reason) > 10
        if name == refused[0]:
            with pytest.raises(InputError, match=name) as caught:
                split(str(dense(model)), tmp_path / "out", SplitOptions(target=name))
            assert reason in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("model", "target"), FITTING)
def test_a_pair_that_fits_is_exact_with_all_experts_on(
    model: str, target: str, dense: Callable[[str], Path], convert: Convert
) -> None:
    report = verify(str(convert(model, target)), str(dense(model)))
    assert report.passed, failed(report)
    assert report.max_logit_difference <= 1e-4
    # A weight that deviates by nothing would belong to a router that is not there.
    assert 0 < report.max_gate_deviation <= 2 * ROUTER_LIMIT * ROUTER_SCALE


@pytest.mark.parametrize(("model", "target"), FITTING)
def test_the_checkpoint_is_what_stock_transformers_writes(
    model: str, target: str, convert: Convert, tmp_path: Path
) -> None:
    out = convert(model, target)
    loaded: Any = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    stock, info = loaded
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert type(stock).__name__ == targets.find(target).architecture == config_of(out)["architectures"][0]
    assert stock.dtype == (torch.bfloat16 if "bf16" in model else torch.float32)
    config = AutoConfig.from_pretrained(out)
    AutoModelForCausalLM.from_config(config, dtype=stock.dtype).save_pretrained(tmp_path)
    expected, found = stored(tmp_path), stored(out)
    assert set(found) == set(expected)
    assert {name: shape for name, (shape, _) in found.items()} == {n: shape for n, (shape, _) in expected.items()}
    # A router's correction bias is kept in fp32 whatever the rest is in, and so is a norm that had one added.
    wider = {name for name in found if found[name][1] != expected[name][1]}
    allowed = "norm" if families.find(MODELS[model][0]).norm_offset else "e_score_correction_bias"
    assert all(allowed in name and found[name][1] == "F32" for name in wider)


@pytest.mark.parametrize(("model", "target"), FITTING)
def test_the_head_is_written_where_an_engine_needs_it(model: str, target: str, convert: Convert) -> None:
    out = convert(model, target)
    untied = targets.find(target).untie or not MODELS[model][1].get("tie_word_embeddings", True)
    assert config_of(out)["tie_word_embeddings"] is not untied
    assert ("lm_head.weight" in stored(out)) == untied


@pytest.mark.parametrize(("model", "target"), FITTING)
def test_a_checkpoint_generates(model: str, target: str, convert: Convert, tokenizer: Any) -> None:
    loaded = load(str(convert(model, target)))
    prompt = tokenizer("The import statement", return_tensors="pt")
    ids = loaded.generate(**prompt, max_new_tokens=5, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert ids.shape[1] == prompt["input_ids"].shape[1] + 5
    if loaded.dtype == torch.float32:
        # One pass without a cache agrees with five steps with one.
        assert torch.equal(loaded(ids[:, :-1], use_cache=False).logits[0, -5:].argmax(-1), ids[0, -5:])


@pytest.mark.parametrize("target", CONFIGS)
def test_config_values(target: str, convert: Convert) -> None:
    found = config_of(convert(family_of(target), target))
    assert {key: found.get(key) for key in CONFIGS[target]} == CONFIGS[target]
    assert found["dtype"] == "float32"


def test_glm4_rotates_whole_heads_and_keeps_the_other_rope_values(convert: Convert) -> None:
    rope = config_of(convert("llama-rope3", "glm4_moe"))["rope_parameters"]
    assert rope == {**LLAMA3_ROPE, "partial_rotary_factor": 1.0}


@pytest.mark.parametrize(
    ("model", "target", "expected"),
    [
        ("qwen2", "glm4_moe", {"attention_bias": True, "use_qk_norm": False}),
        ("qwen3", "glm4_moe", {"attention_bias": False, "use_qk_norm": True}),
        ("llama-wide-heads", "glm4_moe", {"head_dim": 16}),
        ("llama-attention-bias", "granitemoeshared", {"attention_bias": True}),
        ("mistral-window", "mixtral", {"sliding_window": 16}),
        ("qwen3-window", "qwen3_moe", {"use_sliding_window": True, "sliding_window": 16}),
        ("llama-gelu", "mixtral", {"hidden_act": "gelu"}),
    ],
)
def test_config_values_that_follow_from_the_model(
    model: str, target: str, expected: dict[str, Any], convert: Convert
) -> None:
    found = config_of(convert(model, target))
    assert {key: found.get(key) for key in expected} == expected


# Of 96 neurons, (experts, shared, active): folds of 3, 5 and 7 are no powers of two; one routed expert; all of them on.
LAYOUTS = [(6, 1, 4), (6, 0, 3), (12, 3, 8), (12, 0, 7), (3, 2, 3), (12, 4, 12), (12, 0, 12), (2, 0, 1)]


@pytest.mark.parametrize("target", CONFIGS)
@pytest.mark.parametrize("cut", LAYOUTS, ids=str)
def test_other_layouts(
    target: str, cut: tuple[int, int, int], make_dense: MakeDense, calibration_file: Path, tmp_path: Path
) -> None:
    layout = Layout(*cut)
    dense = make_dense(family_of(target), intermediate_size=96)
    experts, shared, active = cut
    options = SplitOptions(experts, shared, active, target=target, tokens=1024, calibration=(str(calibration_file),))
    without, alone = not shared and target in ("glm4_moe", "qwen2_moe"), target == "glm4_moe" and layout.num_routed < 2
    if without or alone or (shared and target in ("mixtral", "qwen3_moe")):
        with pytest.raises(InputError, match=r"shared|group"):
            split(str(dense), tmp_path / "out", options)
        return
    split(str(dense), tmp_path / "out", options)
    report = verify(str(tmp_path / "out"), str(dense))
    assert report.passed, failed(report)
    assert config_of(tmp_path / "out")["num_experts_per_tok"] == active - shared
    assert bool(shared) == any("shared" in name for name in stored(tmp_path / "out"))


@pytest.mark.parametrize("target", ["granitemoeshared", "qwen2_moe"])
def test_one_routed_expert_gives_text(
    target: str, make_dense: MakeDense, calibration_file: Path, tmp_path: Path
) -> None:
    options = SplitOptions(2, 1, 2, target=target, tokens=1024, calibration=(str(calibration_file),))
    split(str(make_dense("llama")), tmp_path / "out", options)
    with torch.no_grad():
        assert load(str(tmp_path / "out"))(torch.arange(8)[None]).logits.isfinite().all()


def test_a_checkpoint_runs_in_its_own_dtype_or_is_refused(
    make_dense: MakeDense, calibration_file: Path, tmp_path: Path
) -> None:
    dense = make_dense("llama", dtype="bfloat16", intermediate_size=96)
    options = SplitOptions(8, tokens=1024, calibration=(str(calibration_file),))
    with pytest.raises(InputError, match="experts of 12 neurons cannot run in bfloat16"):
        split(str(dense), tmp_path / "out", options)
    split(str(dense), tmp_path / "out", replace(options, experts=6))
    with torch.no_grad():
        assert load(str(tmp_path / "out"))(torch.arange(8)[None]).logits.isfinite().all()


def walk(out: Path, dense: Path, ids_BC: torch.Tensor) -> tuple[HiddenStream, torch.Tensor]:
    """moeify's own arithmetic, layer by layer in dense order; the stream at its end and what the last FFN saw."""
    plan, source = load_plan(out), open_dense(str(dense))
    stream = HiddenStream(source, {"input_ids": ids_BC})
    inputs_TD = torch.empty(0)
    for layer in plan.layers:
        inputs_TD = stream.attend(layer.layer)
        ffn = source.ffn(layer.layer).map(torch.Tensor.float)
        router = None if layer.router_RD is None else LinearRouter(layer.router_RD)
        stream.advance(ConvertedFFN(ffn, layer, plan.layout, Mixing.of(plan.options), router)(inputs_TD))
    return stream, inputs_TD


@torch.no_grad()
def logits(folder: Path, ids_BC: torch.Tensor) -> torch.Tensor:
    found: torch.Tensor = load(str(folder))(ids_BC).logits
    return found


def some_ids(dense: Path) -> torch.Tensor:
    return torch.arange(2 * 48).view(2, 48) * 7 % open_dense(str(dense)).config.vocab_size


@pytest.mark.parametrize(("model", "target"), [(m, t) for m, t in FITTING if m in ("llama", "mistral-window", "qwen3")])
def test_the_routed_model_computes_what_the_plan_decided(
    model: str, target: str, dense: Callable[[str], Path], convert: Convert
) -> None:
    """moeify's own arithmetic against the stock model with its real routers."""
    out, ids_BC = convert(model, target, refit=False), some_ids(dense(model))
    _, inputs_TD = walk(out, dense(model), ids_BC)
    seen: list[torch.Tensor] = []
    stock, plain = load(str(out)), load(str(dense(model)))
    for network in (stock, plain):
        with torch.no_grad():
            network.model.layers[-1].post_attention_layernorm.register_forward_hook(
                lambda _, __, output: seen.append(output.flatten(0, 1))
            )
            network(ids_BC)
    # Experts' weights are within 2^-8 of one, the arithmetic is not the same: nearly equal, and far from the dense one.
    scale = seen[0].abs().mean()
    assert (seen[0] - inputs_TD).abs().mean() < 0.01 * scale
    assert (seen[1] - inputs_TD).abs().mean() > 0.05 * scale


MIXINGS: list[dict[str, Any]] = [
    {"mixing": "hard", "fusion": "mean"},
    {"mixing": "softmax"},
    {"mixing": "softmax", "temperature": 0.5, "fusion": "mean"},
    {"mixing": "soft", "temperature": 2.0},
    {"mixing": "soft", "fusion": "mean"},
]


def mixed() -> list[tuple[str, str, dict[str, Any]]]:
    """Every mixing with a target's plainest model; with its other models each mixing in turn."""
    cases = []
    for target in STOCK:
        held = [mixing for mixing in MIXINGS if mixing["mixing"] in targets.find(target).mixings]
        plain, *others = [
            m for m, t in sorted(FITTING, key=lambda p: p[0] != family_of(target)) if t == target and "bf16" not in m
        ]
        cases += [(plain, target, mixing) for mixing in held]
        cases += [(model, target, held[number % len(held)]) for number, model in enumerate(others)]
    return cases


MIXED = mixed()


@pytest.mark.parametrize(("model", "target", "mixing"), MIXED)
def test_the_stock_model_gives_the_logits_of_the_mixing(
    model: str, target: str, mixing: dict[str, Any], dense: Callable[[str], Path], convert: Convert
) -> None:
    """Folds and router rows included; what a refit adds is in no plan."""
    out, ids_BC = convert(model, target, refit=False, **mixing), some_ids(dense(model))
    stream, _ = walk(out, dense(model), ids_BC)
    expected = torch.stack(list(stream.outputs(range(2))))
    found = logits(out, ids_BC)
    if mixing["mixing"] == "hard":
        # Stock weights are within 2^-8 of one.
        assert (found - expected).abs().mean() < 0.01 * expected.abs().mean()
    else:
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert (found - logits(dense(model), ids_BC)).abs().mean() > 1e-3


@pytest.mark.parametrize(("model", "target", "mixing"), [case for case in MIXED if case[0] in ("llama", "qwen3")])
def test_verify_passes_whatever_the_mixing(
    model: str, target: str, mixing: dict[str, Any], dense: Callable[[str], Path], convert: Convert
) -> None:
    report = verify(str(convert(model, target, **mixing)), str(dense(model)))
    # With a mean the weights are not one, and the fold is not that of the architecture.
    assert report.passed, failed(report)


@pytest.mark.parametrize("model", ["llama", "qwen2", "qwen3"])
def test_a_gate_that_a_target_does_not_hold_is_refused(
    model: str, dense: Callable[[str], Path], tmp_path: Path
) -> None:
    fitting = [targets.find(target) for m, target in FITTING if m == model]
    refused = [
        (t.model_type, mixing) for t in fitting for mixing in ("hard", "softmax", "soft") if mixing not in t.mixings
    ]
    assert ("glm4_moe", "softmax") in refused
    for target, mixing in refused:
        with pytest.raises(InputError, match=f"{target} does not represent.*weights cannot be {mixing}"):
            split(str(dense(model)), tmp_path / "out", SplitOptions(target=target, mixing=mixing))
    assert not list(tmp_path.iterdir())


def test_auto_takes_a_target_that_holds_the_gate(dense: Callable[[str], Path]) -> None:
    assert preview(str(dense("qwen3"))).target == "glm4_moe"
    found = preview(str(dense("qwen3")), SplitOptions(mixing="softmax"))
    assert found.target == "qwen3_moe"
    assert "glm4_moe: its experts' weights cannot be softmax" in found.target_reason
    found = preview(str(dense("qwen2")), SplitOptions(mixing="softmax"))
    assert found.target == "moeify"
    assert "qwen2_moe: its experts' weights cannot be softmax" in found.target_reason


def test_a_soft_gate_has_every_expert_active(dense: Callable[[str], Path]) -> None:
    found = preview(str(dense("llama")), SplitOptions(mixing="soft"))
    assert (found.layout.num_active, found.options.active) == (8, 8)
    assert found.num_active_parameters == found.num_parameters


HOLDING_DENSE = [("llama", "qwen2_moe"), ("qwen2", "qwen2_moe"), ("qwen3", "qwen3_moe")]
FOUR_LAYERS = {"num_hidden_layers": 4}


def dense_layers_split(
    dense: Path, out: Path, calibration_file: Path, target: str, layers: tuple[int, ...], **options: Any
) -> SplitResult:
    text = {"tokens": 1024, "calibration": (str(calibration_file),)}
    return split(str(dense), out, SplitOptions(target=target, dense_layers=layers, **text, **options))


@pytest.mark.parametrize(
    ("model", "target", "layers"),
    [
        *((model, target, (0, 2)) for model, target in HOLDING_DENSE),
        ("qwen2", "qwen2_moe", (3,)),
        ("qwen3", "glm4_moe", (0,)),
        ("llama", "glm4_moe", (0, 1)),
    ],
)
def test_dense_layers_stay_as_they_are(
    model: str, target: str, layers: tuple[int, ...], make_dense: MakeDense, calibration_file: Path, tmp_path: Path
) -> None:
    dense, out = make_dense(model, **FOUR_LAYERS), tmp_path / "out"
    result = dense_layers_split(dense, out, calibration_file, target, layers)
    plain = tmp_path / "plain"
    dense_layers_split(dense, plain, calibration_file, target, layers, refit=False)
    assert load_plan(out).layout.dense_layers == layers
    written, before = tensors_of(out), tensors_of(dense)
    for layer in range(4):
        names = open_dense(str(dense)).ffn_names(layer)
        same = [name in written and torch.equal(written[name], before[name]) for name in names]
        assert same == [layer in layers] * 3
    loaded: Any = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(loaded[1][kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    report = verify(str(out), str(dense))
    assert report.passed, failed(report)
    # Stock transformers has experts where they were written and nowhere else.
    assert [hasattr(block.mlp, "experts") for block in loaded[0].model.layers] == [i not in layers for i in range(4)]
    routed = sum(t.numel() for name, t in written.items() if ".experts." in name)
    layout = result.layout
    embedding = 0 if loaded[0].config.tie_word_embeddings else written["model.embed_tokens.weight"].numel()
    total = sum(t.numel() for t in written.values())
    assert result.num_parameters == total
    idle = routed * (layout.num_routed - layout.num_routed_active) // layout.num_routed
    assert result.num_active_parameters == total - idle - embedding
    # And it computes what was decided.
    ids_BC = some_ids(dense)
    expected = torch.stack(list(walk(plain, dense, ids_BC)[0].outputs(range(2))))
    assert (logits(plain, ids_BC) - expected).abs().mean() < 0.01 * expected.abs().mean()


@pytest.mark.parametrize(
    ("target", "layers", "reason"),
    [
        ("granitemoeshared", (0,), "has no dense layers"),
        ("mixtral", (0,), "has no dense layers"),
        ("glm4_moe", (1,), "its dense layers can only be the first ones"),
        ("glm4_moe", (0, 2), "its dense layers can only be the first ones"),
        ("qwen2_moe", (0, 4), "there is no layer 4 to leave dense"),
        ("qwen2_moe", (-1,), "there is no layer -1 to leave dense"),
        ("qwen2_moe", (0, 1, 2, 3), "every layer is to stay dense"),
    ],
)
def test_dense_layers_that_are_not_held_are_refused(
    target: str, layers: tuple[int, ...], reason: str, make_dense: MakeDense, calibration_file: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=reason):
        dense_layers_split(make_dense("llama", **FOUR_LAYERS), tmp_path / "out", calibration_file, target, layers)
    assert not list(tmp_path.iterdir())


def test_auto_takes_a_target_with_dense_layers_and_names_its_engines(make_dense: MakeDense) -> None:
    found = preview(str(make_dense("llama", **FOUR_LAYERS)), SplitOptions(dense_layers=(2, 0, 2)))
    assert found.target == "qwen2_moe"
    assert found.layout.dense_layers == found.options.dense_layers == (0, 2)
    assert "known to transformers, vLLM, SGLang (granitemoeshared: has no dense layers" in found.target_reason


@pytest.mark.parametrize("refit", [True, False])
def test_a_plan_with_dense_layers_is_used_again(
    refit: bool, make_dense: MakeDense, calibration_file: Path, tmp_path: Path
) -> None:
    dense = make_dense("qwen2", **FOUR_LAYERS)
    dense_layers_split(dense, tmp_path / "first", calibration_file, "qwen2_moe", (0, 2), refit=refit)
    again = {"plan": str(tmp_path / "first"), "refit": refit}
    dense_layers_split(dense, tmp_path / "again", calibration_file, "qwen2_moe", (), **again)
    assert load_plan(tmp_path / "again").layout.dense_layers == (0, 2)
    first, second = tensors_of(tmp_path / "first"), tensors_of(tmp_path / "again")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_plan_of_another_model_is_seen_though_its_first_layer_is_dense(
    make_dense: MakeDense, calibration_file: Path, tmp_path: Path
) -> None:
    dense_layers_split(make_dense("qwen2"), tmp_path / "first", calibration_file, "qwen2_moe", (0,))
    wider = make_dense("qwen2", hidden_size=48)
    with pytest.raises(InputError, match="the plan is of another model: hidden size 32"):
        dense_layers_split(wider, tmp_path / "out", calibration_file, "qwen2_moe", (), plan=str(tmp_path / "first"))


def settle(dense: Path, shared: int | None = None) -> tuple[str, str]:
    checkpoint = open_dense(str(dense))
    target, _, why = choose_target(
        checkpoint,
        lambda target: target.layout(8, shared),
    )
    return target.model_type, why


@pytest.mark.parametrize(
    ("model", "shared", "expected", "why"),
    [
        ("llama", None, "granitemoeshared", "with shared experts; .*vLLM, SGLang, llama.cpp"),
        ("llama", 0, "granitemoeshared", "without shared experts"),
        ("llama-wide-heads", None, "glm4_moe", "granitemoeshared: its head size is always hidden size / heads"),
        ("mistral", None, "granitemoeshared", "represents the model exactly"),
        ("mistral-window", None, "mixtral", "without shared experts.*glm4_moe: it has no sliding window"),
        ("qwen2", None, "qwen2_moe", "with shared experts.*granitemoeshared: its attention has biases"),
        ("qwen3", None, "glm4_moe", "with shared experts.*qwen2_moe: its attention has no q/k norm"),
        ("qwen3", 0, "qwen3_moe", "without shared experts.*glm4_moe: vLLM and llama.cpp need at least one"),
    ],
)
def test_choose_takes_the_best_target_and_says_why(
    model: str, shared: int | None, expected: str, why: str, dense: Callable[[str], Path]
) -> None:
    target, reason = settle(dense(model), shared)
    assert target == expected
    assert re.search(why, reason), reason


def test_moeifys_own_is_taken_where_no_stock_one_fits_and_every_reason_is_given(dense: Callable[[str], Path]) -> None:
    for model, shared in (("mistral-window", 2), ("llama-ffn-bias", None)):
        target, why = settle(dense(model), shared)
        assert target == "moeify"
        assert "loads in transformers where moeify is imported" in why
        assert all(f"{name}: " in why for name in STOCK)
    assert "a gate and no biases" in why


@pytest.mark.parametrize("target", STOCK)
def test_a_target_is_named_like_its_file_and_its_config(target: str) -> None:
    found = targets.find(target)
    assert found.model_type == target
    assert type(AutoConfig.for_model(target)).model_type == target
    assert found.holds_shared == bool(found.modules.shared)


# Of the others tests/convert has those of images; two say nowhere how wide their FFNs are.
PRUNED = [name for name in families.names() if families.find(name).modality == "text"]


@pytest.mark.parametrize("family", [name for name in PRUNED if name not in ("gpt_neox_japanese", "mpt")])
def test_static_pruning_keeps_the_dense_architecture(
    family: str, dense_models: dict[str, Path], calibration_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "static"
    options = SplitOptions(static=True, active=6, tokens=1024, calibration=(str(calibration_file),), refit=False)
    split(str(dense_models[family]), out, options)
    before, after = config_of(dense_models[family]), config_of(out)
    assert after["architectures"] == before["architectures"]
    before, after = before.get("text_config", before), after.get("text_config", after)
    width = families.find(family).width
    assert (before[width], after[width]) == (64, 48)
    loaded: Any = auto_class(load_config(out)).from_pretrained(out, output_loading_info=True)
    assert not any(loaded[1][kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    pruned, whole = open_dense(out), open_dense(dense_models[family])
    for layer in load_plan(out).layers:
        kept, expected = pruned.ffn(layer.layer).tensors(), whole.ffn(layer.layer).neurons(layer.neurons(-1)).tensors()
        assert kept.keys() == expected.keys()
        assert all(torch.equal(kept[name], expected[name]) for name in kept)
    with pytest.raises(InputError, match="statically pruned"):
        verify(str(out), str(dense_models[family]))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_shared_gate_of_qwen2_moe_is_one_and_never_of_zero(
    dtype: str, make_dense: MakeDense, calibration_file: Path, tmp_path: Path
) -> None:
    """llama.cpp divides by what comes out of it."""
    dense = make_dense("llama", dtype=dtype, hidden_size=64, intermediate_size=128)
    text = {"tokens": 1024, "calibration": (str(calibration_file),)}
    split(str(dense), tmp_path / "out", SplitOptions(target="qwen2_moe", **text))
    rows = [tensor for name, tensor in tensors_of(tmp_path / "out").items() if "shared_expert_gate" in name]
    assert len(rows) == 2
    assert all((row != 0).all() and str(row.dtype) == f"torch.{dtype}" for row in rows)
    stock, seen = load(str(tmp_path / "out"), dtype="float32"), []
    for block in stock.model.layers:
        block.mlp.shared_expert_gate.register_forward_hook(lambda _, __, output: seen.append(output))
    with torch.no_grad():
        stock(some_ids(dense))
    gates = torch.cat(seen).double()
    assert (gates != 0).all()
    assert (2 * gates.sigmoid() - 1).abs().max() <= 1e-6


@pytest.mark.parametrize("target", ["mixtral", "granitemoeshared", "qwen2_moe"])
def test_the_router_of_one_normalised_expert_is_written_at_full_size(
    target: str, make_dense: MakeDense, calibration_file: Path, tmp_path: Path
) -> None:
    """Its weight is one whatever it scores."""
    dense, shared = make_dense("llama"), targets.find(target).holds_shared
    options = SplitOptions(4, int(shared), 1 + shared, target=target, tokens=1024, calibration=(str(calibration_file),))
    split(str(dense), tmp_path / "out", options)
    report, plan = verify(str(tmp_path / "out"), str(dense)), load_plan(tmp_path / "out")
    assert report.passed, failed(report)
    full = targets.find(target).normalised
    assert plan.router_scale == (1 if full else ROUTER_SCALE)
    assert (report.max_gate_deviation == 0) == full
    rows_RD = plan.layers[0].router_RD
    assert rows_RD is not None
    stored = [tensor for tensor in tensors_of(tmp_path / "out").values() if tensor.shape == rows_RD.shape]
    assert any(torch.equal(tensor, rows_RD * plan.router_scale) for tensor in stored)
