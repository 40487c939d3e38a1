"""The toy twin finds what a wrong conversion would change, and nothing else."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MakeDense
from transformers import AutoConfig
from transformers.utils import logging

from moeify import families, targets
from moeify.convert import exactness
from moeify.convert.exactness import TOLERANCE, Twin, check_target, twin_values
from moeify.convert.pipeline import split
from moeify.errors import InputError
from moeify.layout import Layout
from moeify.models.dense import DenseModel, open_dense
from moeify.models.fingerprint import Fingerprint
from moeify.options import SplitOptions
from moeify.targets import Target

LAYOUT = Layout(8, 2, 6)
LARGE = {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "vocab_size": 128_256}


def dense_of(family: str, **values: Any) -> DenseModel:
    """A model that exists as a config only."""
    config = AutoConfig.for_model(family, **{**families.find(family).tiny_values, **values})
    return Twin("model", Path(), config, families.find(family), {}, Fingerprint(Path(), {}, {}), {})


def with_config(target: Target, **changes: Any) -> Target:
    """The target with a fault in its config."""
    return replace(target, config=lambda *arguments: {**target.config(*arguments), **changes})


@pytest.mark.parametrize(
    "fault",
    [
        {"rms_norm_eps": 1e-5},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 20000.0}},
        {"hidden_act": "gelu"},
        {"embedding_multiplier": 1.01},
        {"residual_multiplier": 1.01},
        {"logits_scaling": 1.01},
        {"attention_multiplier": 0.3},
        {"num_key_value_heads": 4},
        {"attention_bias": True},
    ],
    ids=lambda fault: next(iter(fault)),
)
def test_a_fault_in_the_config_is_found(fault: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    target = targets.find("granitemoeshared")
    dense = dense_of("llama", rms_norm_eps=1e-6)
    assert check_target(target, dense, LAYOUT).exact
    exactness._compare.cache_clear()
    monkeypatch.setattr(targets, "find", lambda *_: with_config(target, **fault))
    found = check_target(target, dense, LAYOUT)
    exactness._compare.cache_clear()
    assert not found.exact
    assert found.difference is None or found.difference > TOLERANCE
    assert found.reason


@pytest.mark.parametrize("fold", ["routed_fold", "shared_fold"])
def test_a_wrong_fold_is_found(fold: str, monkeypatch: pytest.MonkeyPatch) -> None:
    target = targets.find("granitemoeshared")
    faulty = replace(target, **{fold: (lambda _: 1.0) if fold == "routed_fold" else 1.01})
    exactness._compare.cache_clear()
    monkeypatch.setattr(targets, "find", lambda *_: faulty)
    found = check_target(faulty, dense_of("llama"), LAYOUT)
    exactness._compare.cache_clear()
    assert not found.exact
    assert found.difference is not None


@pytest.mark.parametrize(
    ("family", "target", "reason"),
    [
        ("gemma", "mixtral", "outputs differ by"),
        ("olmo2", "glm4_moe", "has no place for model.layers.0.post_feedforward_layernorm.weight"),
        ("cohere", "mixtral", "also needs model.layers.0.post_attention_layernorm.weight"),
        ("olmo", "granitemoeshared", "also needs model.layers.0.input_layernorm.weight"),
        ("qwen3", "granitemoeshared", "its attention has no q/k norm .has no place for"),
        ("gpt2", "mixtral", "a gate and no biases"),
        ("granite", "mixtral", "outputs differ by"),
    ],
)
def test_a_refusal_says_what_is_in_the_way(
    family: str, target: str, reason: str, make_dense: MakeDense, tmp_path: Path
) -> None:
    options = SplitOptions(target=target, shared=0 if target == "mixtral" else None)
    with pytest.raises(InputError, match=f"{target} does not represent this model exactly: .*{reason}"):
        split(make_dense(family), tmp_path / "out", options)
    assert not list(tmp_path.iterdir())


def test_a_large_model_has_a_small_twin_of_its_own_kind() -> None:
    config = AutoConfig.for_model(
        "qwen2",
        **LARGE,
        num_hidden_layers=28,
        num_key_value_heads=8,
        use_sliding_window=True,
        sliding_window=4096,
        max_window_layers=14,
    )
    assert {"full_attention", "sliding_attention"} == set(config.layer_types)
    values = twin_values(config, families.find("qwen2"))
    assert values["hidden_size"] == 32
    assert values["layer_types"] == ["full_attention", "sliding_attention"]
    assert values["num_hidden_layers"] == 2
    assert (values["num_attention_heads"], values["num_key_value_heads"]) == (4, 2)
    assert values["sliding_window"] < exactness.CONTEXT
    assert values["rms_norm_eps"] == config.rms_norm_eps
    json.dumps(values, default=str)


@pytest.mark.parametrize(("heads", "keys", "twins"), [(32, 32, 4), (32, 8, 2), (32, 1, 1)])
def test_heads_keep_their_relation(heads: int, keys: int, twins: int) -> None:
    config = AutoConfig.for_model("llama", **{**LARGE, "num_attention_heads": heads, "num_key_value_heads": keys})
    assert twin_values(config, families.find("llama"))["num_key_value_heads"] == twins


@pytest.mark.parametrize(("head_dim", "twins"), [(128, 8), (256, 16)])
def test_a_head_size_of_its_own_stays_one(head_dim: int, twins: int) -> None:
    config = AutoConfig.for_model("llama", **LARGE, head_dim=head_dim)
    assert twin_values(config, families.find("llama"))["head_dim"] == twins
    fits = check_target(targets.find("granitemoeshared"), dense_of("llama", **LARGE, head_dim=head_dim), LAYOUT)
    assert fits.exact is (head_dim == 128)


def test_long_context_factors_shrink_with_the_heads() -> None:
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0 + i / 48 for i in range(48)],
        "long_factor": [2.0 + i for i in range(48)],
        "original_max_position_embeddings": 128,
    }
    dense = dense_of("phi3", hidden_size=384, num_attention_heads=4, rope_parameters=rope, max_position_embeddings=512)
    values = twin_values(dense.config, dense.family)
    assert len(values["rope_parameters"]["long_factor"]) == 4
    assert len(dense.config.rope_parameters["long_factor"]) == 48
    assert check_target(targets.find("mixtral"), dense, Layout(8, 0, 6)).exact


def test_neither_the_random_state_nor_the_libraries_words_change(capfd: pytest.CaptureFixture[str]) -> None:
    exactness._compare.cache_clear()
    verbosity = logging.get_verbosity()
    before = torch.get_rng_state()
    check_target(targets.find("qwen2_moe"), dense_of("olmo2"), LAYOUT)
    assert torch.equal(torch.get_rng_state(), before)
    assert logging.get_verbosity() == verbosity
    assert "Loading weights" not in capfd.readouterr().err


def test_a_model_is_opened_once(make_dense: MakeDense, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dense = open_dense(str(make_dense("llama")))
    assert open_dense(dense) is dense
    monkeypatch.setattr("moeify.models.dense.locate", lambda *_: pytest.fail("opened again"))
    split(dense, tmp_path / "out", SplitOptions(tokens=1024))
    assert (tmp_path / "out" / "config.json").is_file()


def test_a_config_whose_twin_cannot_be_made_is_a_refusal() -> None:
    """Factors for half of each head, where the target rotates all of it."""
    factors = [1.0] * 2
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
    rope |= {"short_factor": factors, "long_factor": factors, "original_max_position_embeddings": 64}
    found = check_target(targets.find("mixtral"), dense_of("phi3", rope_parameters=rope), Layout(8, 0, 6))
    assert not found.exact
    assert found.reason.startswith("a toy twin cannot be converted: RuntimeError: ")


@pytest.mark.parametrize(("window", "exact"), [(4096, False), (262_144, True)])
def test_a_window_beyond_the_longest_text_does_nothing(window: int, exact: bool) -> None:
    """As Phi-4-mini has it."""
    dense = dense_of("phi3", sliding_window=window, max_position_embeddings=131_072)
    assert check_target(targets.find("glm4_moe"), dense, LAYOUT).exact is exact
    assert check_target(targets.find("mixtral"), dense, Layout(8, 0, 6)).exact


def test_a_tensor_of_another_shape_is_named() -> None:
    found = check_target(targets.find("granitemoeshared"), dense_of("llama", head_dim=16), LAYOUT)
    assert "has another shape of model.layers.0.self_attn." in found.reason
