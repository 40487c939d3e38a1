"""Every field of a config is checked before anything is made of it, whatever stands there; good configs pass."""

import json
import os
import re
import shutil
import time
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from broken_files import ACCEPTED, HUGE, REFUSED, TEXTS, change_config, changes
from conftest import MakeDense
from transformers import AutoConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from moeify import families, targets
from moeify.convert.exactness import check_target
from moeify.errors import InputError, MoeifyWarning
from moeify.layout import Layout
from moeify.models.config import load_config
from moeify.models.dense import open_dense

CODE = "raise SystemExit('a stranger ran')\n"


@pytest.fixture(scope="module")
def base(make_dense: MakeDense) -> Path:
    """The llama that the tables of changes are for."""
    return make_dense(
        "llama",
        vocab_size=1024,
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
    )


@pytest.fixture
def model(base: Path, tmp_path: Path) -> Path:
    """A copy whose config may be changed."""
    (tmp_path / "model").mkdir()
    shutil.copy(base / "config.json", tmp_path / "model")
    os.link(base / "model.safetensors", tmp_path / "model" / "model.safetensors")
    return tmp_path / "model"


def said(model: Path, name: str, value: Any) -> str:
    change_config(model, name, value)
    with pytest.raises(InputError) as caught:
        open_dense(model)
    return str(caught.value)


@pytest.mark.parametrize(("name", "value"), changes(REFUSED))
def test_a_field_that_is_wrong_is_refused(model: Path, name: str, value: Any) -> None:
    message = said(model, name, value)
    assert re.search(r"config\.json|is quantised|are missing|is not supported", message)
    assert "\n" not in message


@pytest.mark.parametrize(("name", "value"), changes(ACCEPTED))
@pytest.mark.filterwarnings("ignore::moeify.errors.MoeifyWarning")
def test_a_field_that_transformers_lives_with_is_accepted(model: Path, name: str, value: Any) -> None:
    (model / "evil.py").write_text(CODE)
    change_config(model, name, value)
    assert open_dense(model).num_layers == 4


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("hidden_size", "128", 'hidden_size is "128", expected a whole number'),
        ("hidden_size", 0, "hidden_size is 0, expected a whole number from 1 to 2,147,483,647"),
        ("num_attention_heads", 0, "num_attention_heads is 0, expected a whole number from 1 to 65,536"),
        ("num_hidden_layers", -1, "num_hidden_layers is -1, expected a whole number from 1 to 4,096"),
        ("num_hidden_layers", 4000, "config.json says 4,000 layers, the weights have 4"),
        ("vocab_size", HUGE, "vocab_size is 1000000000000, expected a whole number from 1 to 2,147,483,647"),
        ("vocab_size", 2**31 - 1, "vocab_size is 2,147,483,647 and hidden_size 128, the weights have 4"),
        ("use_cache", "no", 'use_cache is "no", expected true or false'),
        ("eos_token_id", "x", 'eos_token_id is "x", expected a whole number or a list or null'),
        ("pad_token_id", 99_999, "pad_token_id is 99999, expected null or a token of the vocabulary, 0 to 1,023"),
        ("rms_norm_eps", float("nan"), "rms_norm_eps is NaN, expected a number above 0 and below 1"),
        ("attention_dropout", 1.5, "attention_dropout is 1.5, expected a number from 0 to 1"),
        ("hidden_act", "nope", 'hidden_act is "nope", expected one of '),
        ("dtype", "nope", 'dtype is "nope", expected a floating-point type of torch, such as "bfloat16"'),
        ("rope_parameters", {"rope_type": "nope"}, 'rope_parameters.rope_type is "nope", expected one of default, '),
        ("rope_parameters", {"rope_theta": 0}, "rope_parameters.rope_theta is 0, expected a finite number above 0"),
        ("num_key_value_heads", 3, "num_attention_heads is 4, which is not a multiple of num_key_value_heads, 3"),
        ("layer_types", ["full_attention"], "expected one for each of 4 layers, not 1"),
        ("attribute_map", {"hidden_size": "vocab_size"}, '"attribute_map" is not a field of a config'),
        ("to_dict", 1, '"to_dict" is not a field of a config'),
        ("quantization_config", "x", 'quantization_config is "x", expected a mapping or null'),
        ("id2label", {"a": "b"}, "transformers cannot read"),
        ("per_layer_config", {"0": {"intermediate_size": 64}}, "expected layers of one size"),
    ],
)
def test_a_refusal_names_field_value_and_what_is_expected(model: Path, name: str, value: Any, words: str) -> None:
    assert words in said(model, name, value)


@pytest.mark.parametrize("name", ["num_hidden_layers", "vocab_size", "num_labels", "head_dim", "num_attention_heads"])
def test_a_huge_number_takes_no_time_and_no_memory(model: Path, name: str) -> None:
    change_config(model, name, 10**9)
    tracemalloc.start()
    began = time.perf_counter()
    try:
        load_config(model)
    except InputError:
        pass
    else:
        assert name == "vocab_size"
    assert time.perf_counter() - began < 1
    assert tracemalloc.get_traced_memory()[1] < 10_000_000
    tracemalloc.stop()


@pytest.mark.parametrize("kind", TEXTS)
def test_a_file_that_is_no_config_is_refused(model: Path, kind: str) -> None:
    (model / "config.json").write_bytes(TEXTS[kind])
    with pytest.raises(InputError, match=r"config\.json"):
        load_config(model)


def test_a_byte_order_mark_and_a_key_that_is_there_twice_are_refused(model: Path) -> None:
    file, text = model / "config.json", (model / "config.json").read_text()
    file.write_text("\ufeff" + text)
    with pytest.raises(InputError, match="not JSON: Unexpected UTF-8 BOM"):
        load_config(model)
    file.write_text(text.rstrip()[:-1] + ', "num_hidden_layers": 2}')
    with pytest.raises(InputError, match='the key "num_hidden_layers" is there twice'):
        load_config(model)


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("folder", "is a folder"),
        ("pipe", "is not a file"),
        ("link", "is not there"),
        ("loop", "config.json"),
    ],
)
def test_what_is_no_file_is_refused_and_not_waited_for(model: Path, kind: str, words: str) -> None:
    file = model / "config.json"
    file.unlink()
    {
        "folder": file.mkdir,
        "pipe": lambda: os.mkfifo(file),
        "link": lambda: file.symlink_to("nowhere"),
        "loop": lambda: file.symlink_to(file),
    }[kind]()
    with pytest.raises(InputError, match=words):
        load_config(model)


@pytest.mark.parametrize("name", ["attn_implementation", "experts_implementation"])
def test_how_a_model_is_computed_is_not_taken_from_its_config(model: Path, name: str) -> None:
    change_config(model, name, "kernels-community/flash-attn")
    assert getattr(load_config(model), f"_{name}") is None


def test_tokens_outside_the_vocabulary_are_said(model: Path) -> None:
    change_config(model, "eos_token_id", [0, 5000])
    with pytest.warns(MoeifyWarning, match="eos_token_id 5,000 is outside the vocabulary of 1,024 tokens"):
        load_config(model)


@pytest.mark.parametrize(
    ("model_type", "values", "words"),
    [
        (
            "mixtral",
            {"num_local_experts": 4, "num_experts_per_tok": 8},
            "num_experts_per_tok is 8, expected at most",
        ),
        ("qwen3_moe", {"num_experts": -1}, "num_experts is -1, expected a whole number from 0"),
        ("glm4_moe", {"n_routed_experts": "x"}, 'n_routed_experts is "x"'),
        ("qwen2_moe", {"moe_intermediate_size": 0}, "moe_intermediate_size is 0"),
        ("qwen2_moe", {"decoder_sparse_step": 0}, "decoder_sparse_step is 0"),
        ("granitemoeshared", {"logits_scaling": float("inf")}, "logits_scaling is Infinity, expected a finite number"),
        ("gpt2", {"n_layer": HUGE}, "n_layer is 1000000000000"),
        ("gpt2", {"num_hidden_layers": -1}, "num_hidden_layers is -1"),
        ("gpt2", {"layer_norm_epsilon": 0.0}, "layer_norm_epsilon is 0.0"),
        ("gpt2", {"resid_pdrop": 2}, "resid_pdrop is 2"),
        ("cohere", {"logit_scale": float("nan")}, "logit_scale is NaN"),
    ],
)
def test_configs_of_other_architectures(tmp_path: Path, model_type: str, values: dict[str, Any], words: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type, **values}))
    with pytest.raises(InputError, match="expected") as caught:
        load_config(tmp_path)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    "model_type", [*families.names(), *(name for name in targets.names() if targets.find(name).is_stock)]
)
@pytest.mark.filterwarnings("ignore::moeify.errors.MoeifyWarning")
def test_the_defaults_of_an_architecture_pass(tmp_path: Path, model_type: str) -> None:
    CONFIG_MAPPING[model_type]().save_pretrained(tmp_path)
    assert load_config(tmp_path).to_dict() == AutoConfig.from_pretrained(tmp_path).to_dict()


def test_a_value_that_no_target_takes_is_a_reason_not_to_take_it(model: Path) -> None:
    """The dense architecture allows null where the others need a number."""
    change_config(model, "attention_dropout", None)
    exactness = check_target(targets.find("qwen2_moe"), open_dense(model), Layout(4, 1, 2))
    assert not exactness.exact
    assert "attention_dropout" in exactness.reason
