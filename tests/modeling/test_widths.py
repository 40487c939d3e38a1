"""Numbers of experts that do not divide an FFN: neurons of zeros are added, the function stays what it is."""

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MakeDense
from transformers import AutoModelForCausalLM

from moeify import partition
from moeify.check.verify import verify
from moeify.convert.pipeline import split
from moeify.errors import InputError
from moeify.models.dense import open_dense
from moeify.models.ffn import padded
from moeify.options import SplitOptions

OPTIONS = SplitOptions(experts=5, tokens=1024, calibration=("builtin",))
ADDED = "ignore:.* of zeros are added"


@pytest.mark.parametrize("family", ["gpt2", "gemma3_text", "llama"])
def test_neurons_of_zeros_change_nothing(family: str, make_dense: MakeDense) -> None:
    ffn = open_dense(str(make_dense(family))).ffn(0)
    inputs_TD = torch.randn(9, ffn.hidden_size, generator=torch.Generator().manual_seed(0))
    wide = padded(ffn, 16)
    assert wide.num_neurons == ffn.num_neurons + 16
    torch.testing.assert_close(wide(inputs_TD), ffn(inputs_TD))


@pytest.mark.parametrize(("family", "dense_layers"), [("gpt2", ()), ("gemma3_text", (1,)), ("opt", ())])
def test_a_model_is_cut_into_experts_that_do_not_divide_it(
    family: str, dense_layers: tuple[int, ...], make_dense: MakeDense, tmp_path: Path
) -> None:
    dense, out = str(make_dense(family)), tmp_path / "out"
    with pytest.warns(UserWarning, match=r"64 neurons do not divide into 5 experts that run: 16 of zeros .* 20.0%"):
        result = split(dense, out, OPTIONS, dense_layers=dense_layers)
    assert result.expert_width == 16
    assert verify(str(out), dense).passed
    loaded: Any = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    model, info = loaded
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    # What is reported is what is stored, zeros among it.
    assert result.num_parameters == sum(parameter.numel() for parameter in model.parameters())
    routed = result.layout.num_routed - result.layout.num_routed_active
    experts: Any = next(part for name, part in model.named_modules() if name.endswith("experts"))
    idle = sum(parameter[0].numel() for parameter in experts.parameters()) * routed * (2 - len(dense_layers))
    lookup = 0 if model.config.tie_word_embeddings else model.get_input_embeddings().weight.numel()
    assert result.num_active_parameters == result.num_parameters - idle - lookup


@pytest.mark.filterwarnings(ADDED)
@pytest.mark.parametrize("method", partition.names())
def test_every_partition_takes_neurons_of_zeros(method: str, make_dense: MakeDense, tmp_path: Path) -> None:
    dense, out = str(make_dense("gpt2")), tmp_path / "out"
    split(dense, out, OPTIONS, partition=method)
    assert verify(str(out), dense).passed


@pytest.mark.filterwarnings(ADDED)
def test_a_plan_with_added_neurons_is_taken_again(make_dense: MakeDense, tmp_path: Path) -> None:
    dense = str(make_dense("gpt2"))
    split(dense, tmp_path / "one", OPTIONS)
    split(dense, tmp_path / "two", plan=str(tmp_path / "one"), tokens=1024, calibration=("builtin",))
    one, two = ((tmp_path / name / "model-00001-of-00001.safetensors").read_bytes() for name in ("one", "two"))
    assert one == two


def test_a_stock_architecture_takes_no_neurons_of_zeros(make_dense: MakeDense, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="64 neurons do not divide into 5 experts") as caught:
        split(str(make_dense("llama")), tmp_path / "out", OPTIONS)
    assert caught.value.hint.endswith("--target moeify takes every number")
    with pytest.raises(InputError, match="64 neurons do not divide into 5 experts"):
        split(str(make_dense("gpt2")), tmp_path / "out", OPTIONS, static=True, active=3)
    assert not (tmp_path / "out").exists()
