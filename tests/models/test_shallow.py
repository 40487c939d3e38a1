"""A model without some layers: names, config lists, and what stock transformers computes with it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MakeDense
from transformers import AutoConfig, AutoModelForCausalLM

from moeify import families
from moeify.convert import droppable
from moeify.convert.droppable import check_droppable
from moeify.errors import InputError
from moeify.models import shallow
from moeify.models.dense import open_dense
from moeify.models.shallow import cut_config, cut_model, cut_names, without_layers


def test_names_move_up_and_nothing_else_changes() -> None:
    named = {"embed": 0, "model.layers.0.a": 1, "model.layers.1.a": 2, "model.layers.10.a": 3, "model.layersnorm": 4}
    assert cut_names(named, "model.layers", [0, 10]) == {
        "embed": 0,
        "model.layers.0.a": 1,
        "model.layers.1.a": 3,
        "model.layersnorm": 4,
    }


def test_lists_of_layers_are_cut_and_others_are_not() -> None:
    config = AutoConfig.for_model(
        "qwen3",
        num_hidden_layers=3,
        layer_types=["full_attention", "sliding_attention", "full_attention"],
        sliding_window=8,
        eos_token_id=[1, 2, 3],
    )
    cut_config(config, [1, 2])
    assert (config.num_hidden_layers, config.layer_types) == (2, ["sliding_attention", "full_attention"])
    assert config.eos_token_id == [1, 2, 3]


# What a block computes depends on its number, or on how many there are.
BY_DEPTH = {"diffllama", "minicpm3", "modernbert"}


@pytest.mark.parametrize("family", families.names())
def test_every_family_is_a_shallower_one_of_itself(make_dense: MakeDense, family: str) -> None:
    dense = open_dense(make_dense(family, num_hidden_layers=3))
    if family in BY_DEPTH or dense.family.is_pair:
        with pytest.raises(InputError, match=r"no layer of a|of which no layers can be dropped"):
            check_droppable(dense)
        return
    check_droppable(dense)
    short = without_layers(dense, [1])
    assert (short.num_layers, short.dropped, dense.num_layers, dense.dropped) == (2, (1,), 3, ())
    names = list(short.shapes)
    assert set(names) == set(short.stored)
    for name, tensor in short.get(names).items():
        assert tuple(tensor.shape) == short.shapes[name]
    second = [name for name in names if name.startswith(short.block(1))]
    originals = dense.get([name.replace(short.block(1), dense.block(2), 1) for name in second])
    assert all(
        torch.equal(one, other) for one, other in zip(short.get(second).values(), originals.values(), strict=True)
    )


def test_a_cut_stock_model_is_the_shallow_one_with_a_cache(make_dense: MakeDense) -> None:
    """By another road than the tensors' names: blocks taken out in memory, also where keys and values are kept."""
    folder = make_dense("llama", num_hidden_layers=4)
    dense = open_dense(folder)
    cut: Any = AutoModelForCausalLM.from_pretrained(folder).eval()
    cut_model(cut, dense.family.blocks, [0, 2])
    short = without_layers(dense, [0, 2])
    stock: Any = AutoModelForCausalLM.from_config(short.config).eval()
    stock.load_state_dict(short.get(short.shapes), strict=False)
    ids = torch.randint(3, 300, (1, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for use_cache in (False, True):
            one, other = (model(ids, use_cache=use_cache).logits for model in (cut, stock))
            assert torch.allclose(one, other, atol=1e-5)
        assert not torch.allclose(one, AutoModelForCausalLM.from_pretrained(folder).eval()(ids).logits, atol=1e-2)


@pytest.mark.parametrize(("dropped", "match"), [([7], "no layer 7"), ([-1], "no layer -1"), ([0, 1], "all 2 layers")])
def test_layers_that_cannot_go(make_dense: MakeDense, dropped: list[int], match: str) -> None:
    with pytest.raises(InputError, match=match):
        without_layers(open_dense(make_dense("llama", num_hidden_layers=2)), dropped)


def test_another_model_is_refused(make_dense: MakeDense, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cut that takes the wrong block is found by the twin."""
    folder: Path = make_dense("llama", num_hidden_layers=2, rms_norm_eps=2e-5)
    monkeypatch.setattr(
        droppable, "cut_names", lambda named, blocks, kept: shallow.cut_names(named, blocks, [1 - kept[0]])
    )
    with pytest.raises(InputError, match="no layer of a llama can be dropped: without layer 0 a toy twin's outputs"):
        check_droppable(open_dense(folder))
