"""The same experts are chosen in every precision, on every target, or the target says where not.

Measured: the share of tokens whose experts are those of the router in float32 on the very same inputs and weights, so
that it is the router that is judged and not what came before it. Experts whose scores differ by less than 2^-7 of the
token's largest score, four roundings of a bfloat16 number, count as tied.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MakeDense, family_of, target_of
from torch import Tensor
from torch.nn.functional import cross_entropy

from moeify import targets
from moeify.convert.pipeline import split
from moeify.convert.preview import preview
from moeify.data.documents import read_documents
from moeify.models import stock
from moeify.models.tokenizer import load_tokenizer
from moeify.options import SplitOptions
from moeify.plan import load_plan
from moeify.training.model import Student

Convert = Callable[[str], Path]

TIE = 2.0**-7
ENOUGH = 0.99
MODES = {
    "bfloat16 weights": (torch.bfloat16, None),
    "float16 weights": (torch.float16, None),
    "bfloat16 autocast": (torch.float32, torch.bfloat16),
    "float16 autocast": (torch.float32, torch.float16),
}


@pytest.fixture(scope="module")
def convert(make_dense: MakeDense, calibration_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Convert:
    """convert(target) -> folder; equal calls give one folder."""
    made: dict[str, Path] = {}

    def make(target: str) -> Path:
        if target not in made:
            dense = make_dense(family_of(target), hidden_size=64, intermediate_size=128)
            options = SplitOptions(8, active=4, target=target, tokens=2048, calibration=(str(calibration_file),))
            made[target] = split(str(dense), tmp_path_factory.mktemp("precision") / target, options).out
        return made[target]

    return make


def ids_of(folder: Path) -> Tensor:
    ids = load_tokenizer(folder)("\n".join(read_documents("builtin-heldout"))[:4_000])["input_ids"]
    return torch.tensor(ids[: len(ids) // 64 * 64]).view(-1, 64)[:16]


@contextmanager
def watched(model: Any, target: targets.Target, num_layers: int) -> Iterator[list[dict[str, Tensor]]]:
    """What every layer's router is given, its weights, and the experts that run."""
    seen: list[dict[str, Tensor]] = [{} for _ in range(num_layers)]
    handles = []
    for layer, row in enumerate(seen):
        block = model.get_submodule(target.block(layer))

        def note_inputs(router: Any, given: Any, row: dict[str, Tensor] = row) -> None:
            weight = router.get_parameter(target.modules.router_weight)
            row["inputs"], row["weight"] = given[0].flatten(0, -2).float(), weight.float()

        def note_experts(_: Any, given: Any, row: dict[str, Tensor] = row) -> None:
            row["chosen"], row["weights"] = given[1], given[2].float()

        handles.append(block.get_submodule(target.modules.router).register_forward_pre_hook(note_inputs))
        handles.append(block.get_submodule(target.modules.experts).register_forward_pre_hook(note_experts))
    yield seen
    for handle in handles:
        handle.remove()


def same_experts(row: dict[str, Tensor]) -> float:
    """Share of tokens that keep their experts, up to ties."""
    scores_TR = row["inputs"] @ row["weight"].T
    kept_TR, right_TR = (
        torch.zeros_like(scores_TR, dtype=torch.bool).scatter_(1, chosen_TK, 1)
        for chosen_TK in (row["chosen"], scores_TR.topk(row["chosen"].shape[1]).indices)
    )
    lost_T = scores_TR.masked_fill(~(right_TR & ~kept_TR), -torch.inf).amax(1)
    won_T = scores_TR.masked_fill(~(kept_TR & ~right_TR), torch.inf).amin(1)
    return float((lost_T - won_T <= TIE * scores_TR.abs().amax(1)).float().mean())


@torch.no_grad()
def run(model: Any, target: targets.Target, folder: Path, autocast: torch.dtype | None) -> tuple[float, float, float]:
    """The smallest share of any layer, the largest distance of an expert's weight from one, and the loss."""
    plan, ids = load_plan(folder), ids_of(folder)
    with (
        watched(model.eval(), target, len(plan.layers)) as seen,
        torch.autocast("cpu", autocast) if autocast else nullcontext(),
    ):
        logits = model(ids).logits.float()
    fold = target.routed_fold(plan.layout)
    distance = max(float((row["weights"] * fold - 1).abs().max()) for row in seen)
    loss = float(cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()))
    return min(map(same_experts, seen)), distance, loss


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", targets.names())
def test_stock_routers_choose_the_same_experts(name: str, mode: str, convert: Convert) -> None:
    """Where a target says that autocast is not for it, that is still so: if not, it need not say it."""
    (dtype, autocast), target, folder = MODES[mode], target_of(name), convert(name)
    share, distance, _ = run(stock.load(folder, dtype=dtype), target, folder, autocast)
    if target.autocast if autocast else target.needs_float32:
        assert share < 0.5
    else:
        assert share >= ENOUGH
    assert distance <= 2 * targets.ROUTER_LIMIT * targets.ROUTER_SCALE


@pytest.mark.parametrize("name", targets.names())
def test_a_student_keeps_its_experts_and_its_loss_under_autocast(name: str, convert: Convert) -> None:
    target, folder = target_of(name), convert(name)
    share, _, loss = run(Student.open(folder, load_plan(folder)).model, target, folder, torch.bfloat16)
    _, _, exact = run(stock.load(folder), target, folder, None)
    assert share == pytest.approx(1.0, abs=1e-3)
    assert loss == pytest.approx(exact, rel=0.01)


def test_a_students_router_computes_in_float32_and_trains(convert: Convert) -> None:
    student = Student.open(convert("glm4_moe"), load_plan(convert("glm4_moe")))
    hidden = torch.randn(4, 64)
    with torch.autocast("cpu", torch.bfloat16):
        scores_TR, *_ = student.routers[0](hidden.bfloat16())
    scores_TR.sum().backward()
    assert scores_TR.dtype == torch.float32
    (weight, *_) = student.router_weights()
    assert weight.grad is not None
    assert torch.allclose(weight.grad, hidden.bfloat16().float().sum(0).expand_as(weight), atol=1e-6)


def test_cards_and_reasons_say_so(convert: Convert, make_dense: MakeDense) -> None:
    for name in ("glm4_moe", "mixtral"):
        card = (convert(name) / "README.md").read_text()
        assert ("Do not train or run it under autocast" in card) == (name == "glm4_moe")
    reason = preview(str(make_dense("qwen3"))).target_reason
    assert "known to transformers, vLLM, SGLang, llama.cpp; not for training under autocast" in reason
    assert preview(str(make_dense("qwen3")), SplitOptions(target="glm4_moe")).target_reason.startswith("asked for; not")
    assert "autocast" not in preview(str(make_dense("llama"))).target_reason
