"""A converted checkpoint that other software trains keeps its choice of experts if its card's advice is followed.

Measured: the share of tokens that still go to the same experts, over all layers.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MakeDense, family_of, target_of
from torch import Tensor

from moeify import freeze_routers, targets
from moeify.convert.pipeline import split
from moeify.data.documents import read_documents
from moeify.errors import InputError
from moeify.models import stock
from moeify.models.tokenizer import load_tokenizer
from moeify.options import SplitOptions
from moeify.plan import load_plan

Convert = Callable[[str], Path]

STEPS, BATCH, CONTEXT = 40, 2, 64
ENOUGH = 0.9


@pytest.fixture(scope="module")
def convert(
    taught: Path, make_dense: MakeDense, calibration_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> Convert:
    """convert(target) -> folder; equal calls give one folder."""
    made: dict[str, Path] = {}

    def make(target: str) -> Path:
        if target not in made:
            family = family_of(target)
            dense = taught if family == "llama" else make_dense(family, hidden_size=64, intermediate_size=128)
            options = SplitOptions(8, active=4, target=target, tokens=2048, calibration=(str(calibration_file),))
            made[target] = split(str(dense), tmp_path_factory.mktemp("stock") / target, options).out
        return made[target]

    return make


def blocks_of(folder: Path) -> Tensor:
    ids = load_tokenizer(folder)("\n".join(read_documents("builtin-heldout"))[:30_000])["input_ids"]
    return torch.tensor(ids[: len(ids) // CONTEXT * CONTEXT]).view(-1, CONTEXT)


@torch.no_grad()
def choices(model: Any, folder: Path) -> Tensor:
    """The experts of every token, in order, layer after layer."""
    target, chosen = target_of(load_plan(folder).target), []
    handles = [
        model.get_submodule(f"{target.block(layer)}.{target.modules.experts}").register_forward_pre_hook(
            lambda _, given: chosen.append(given[1].sort(-1).values)
        )
        for layer in range(2)
    ]
    model.eval()(blocks_of(folder)[-16:])
    for handle in handles:
        handle.remove()
    return torch.cat(chosen)


def train(model: Any, folder: Path, rate: float = 2e-5) -> None:
    """As stock trainers do: AdamW over every parameter that has a gradient."""
    blocks = blocks_of(folder)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], rate, weight_decay=0.01)
    model.train()
    for step in range(STEPS):
        batch = blocks[:-16].roll(-BATCH * step, 0)[:BATCH]
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def advice(folder: Path) -> str:
    """The Python in the card's section about training."""
    section = (folder / "README.md").read_text().split("## Training it further\n")[1]
    found = re.search(r"^```python\n(.*?)^```$", section, re.M | re.S)
    assert found
    return found[1]


def share(model: Any, folder: Path, before: Tensor) -> float:
    return float((choices(model, folder) == before).all(-1).float().mean())


def routers_of(model: Any, folder: Path) -> dict[str, Tensor]:
    ends = targets.find(load_plan(folder).target).frozen
    return {name: p.detach().clone() for name, p in model.named_parameters() if name.endswith(ends)}


@pytest.mark.parametrize("name", targets.names())
def test_the_cards_advice_keeps_the_choice_of_experts(name: str, convert: Convert) -> None:
    folder, shares = convert(name), {}
    # Without a gradient nothing needs to be frozen.
    reached = not targets.find(name).exact_weights
    for frozen in (True, False):
        model: Any = stock.load(folder)
        before, routers = choices(model, folder), routers_of(model, folder)
        if frozen:
            exec(advice(folder), {"model": model})
        train(model, folder)
        shares[frozen] = share(model, folder, before)
        same = [torch.equal(router, routers[key]) for key, router in routers_of(model, folder).items()]
        assert all(same) if frozen or not reached else not any(same)
    assert shares[True] >= ENOUGH
    # Why the advice is given.
    assert (shares[False] < shares[True] - 0.2) == reached


# peft asks transformers by an old name.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("name", targets.names())
def test_low_rank_updates_of_the_attention_leave_routers_alone(name: str, convert: Convert) -> None:
    peft = pytest.importorskip("peft")
    folder = convert(name)
    model: Any = stock.load(folder)
    before, routers = choices(model, folder), routers_of(model, folder)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj", "k_proj", "v_proj", "o_proj"]))
    untrained = next(p for n, p in wrapped.named_parameters() if "lora_B" in n).detach().clone()
    train(wrapped, folder, rate=2e-4)
    assert not torch.equal(next(p for n, p in wrapped.named_parameters() if "lora_B" in n), untrained)
    assert all(torch.equal(router, routers[key]) for key, router in routers_of(model, folder).items())
    assert share(model, folder, before) >= ENOUGH


@pytest.mark.parametrize("name", targets.names())
def test_freeze_routers_does_what_the_card_says(name: str, convert: Convert) -> None:
    by_card: Any = stock.load(convert(name))
    exec(advice(convert(name)), {"model": by_card})
    model: Any = stock.load(convert(name))
    frozen = freeze_routers(model)
    assert frozen == tuple(n for n, p in by_card.named_parameters() if not p.requires_grad)
    assert frozen == tuple(n for n, p in model.named_parameters() if not p.requires_grad)
    assert frozen == tuple(n for n, _ in model.named_parameters() if n.endswith(targets.find(name).frozen))
    assert len(frozen) >= 2


def test_freeze_routers_refuses_a_model_without_them(taught: Path) -> None:
    with pytest.raises(InputError, match="llama is not a target of moeify"):
        freeze_routers(stock.load(taught))
