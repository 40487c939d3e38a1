"""What routers do while they are trained: experts come and go near the boundary, and feel what they would be worth."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moeify.convert.pipeline import split
from moeify.options import SplitOptions
from moeify.plan import load_plan
from moeify.training.model import Student, check_stages
from moeify.training.options import FinetuneOptions
from moeify.training.routers import Explorer, RouterWatch, _widened, adjust_selection_biases

TOKENS, EXPERTS, CHOSEN = 4000, 6, 2


class Router(nn.Module):
    """Sigmoid weights, as glm4_moe has them, of scores that are stored scaled down."""

    def __init__(self, rows_RD: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(rows_RD / 1024)

    def forward(self, hidden_TD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits_TR = hidden_TD @ self.weight.T
        top = logits_TR.topk(CHOSEN, dim=1)
        return logits_TR, 2 * top.values.sigmoid(), top.indices


@pytest.fixture
def student(taught: Path, tmp_path: Path) -> Student:
    options = SplitOptions(experts=8, active=4, target="glm4_moe", tokens=2048, context=64)
    split(str(taught), tmp_path / "moe", options)
    return Student.open(tmp_path / "moe", load_plan(tmp_path / "moe"))


def test_the_others_run_without_a_weight_so_that_the_output_stays(student: Student) -> None:
    ids = torch.randint(3, 500, (2, 64), generator=torch.Generator().manual_seed(0))
    model = student.model.train()
    plain = model(ids).logits
    explorer = Explorer(0.0)
    RouterWatch(student, explorer)
    widths: list[int] = []
    model.model.layers[0].mlp.experts.register_forward_pre_hook(lambda _, args: widths.append(args[1].shape[1]))
    explorer.begin([1, 2])
    torch.testing.assert_close(model(ids).logits, plain, rtol=1e-4, atol=1e-4)
    model.eval()(ids)
    assert widths[0] > widths[1]


def test_the_watch_notes_what_the_router_itself_chose(student: Student) -> None:
    explorer = Explorer(0.1)
    watch = RouterWatch(student, explorer)
    explorer.begin([1, 2])
    with watch.watch():
        student.model.train()(torch.zeros(2, 64, dtype=torch.long))
    assert len(watch.routed) == len(student.routers)
    assert student.plan is not None
    assert watch.routed[0][1].shape == (128, student.plan.layout.num_routed_active)
    assert watch.first_bad_layer() is None
    student.model(torch.zeros(2, 64, dtype=torch.long))
    assert len(watch.routed) == len(student.routers)


def test_noise_is_of_a_block_and_not_of_its_neighbours() -> None:
    explorer = Explorer(0.1)
    inputs_TD = torch.randn(3 * 16, 8, generator=torch.Generator().manual_seed(0))
    explorer.begin([11, 22, 33])
    together = explorer._disturbed(0, inputs_TD)
    assert not torch.equal(together, explorer._disturbed(1, inputs_TD))
    explorer.begin([22])
    assert torch.equal(together[16:32], explorer._disturbed(0, inputs_TD[16:32]))
    assert float((together - inputs_TD).square().mean() / inputs_TD.square().mean()) == pytest.approx(0.01, rel=0.2)


def worth_of_raising(router: Router, explorer: Explorer | None, inputs_TD: Tensor, wanted_TR: Tensor) -> Tensor:
    """Minus the gradient by each router row's size, when the loss is the squared distance of weights from wanted_TR."""
    handles = explorer.attach(0, router) if explorer else []
    logits_TR, weights_TK, chosen_TK = router(inputs_TD)
    weights_TR = torch.zeros_like(logits_TR).scatter(1, chosen_TK, weights_TK)
    (weights_TR - wanted_TR).square().sum().backward()
    for handle in handles:
        handle.remove()
    assert router.weight.grad is not None
    return -(router.weight.grad * router.weight.detach()).sum(dim=1)


def test_with_exploration_an_expert_that_helps_a_little_rises_where_its_weight_alone_says_nothing() -> None:
    """Expert 0 should weigh 0.8 when it is chosen: better than nothing, though its weight's gradient says less."""
    generator = torch.Generator().manual_seed(0)
    inputs_TD = torch.randn(TOKENS, EXPERTS, generator=generator).abs()
    wanted_TR = torch.zeros(TOKENS, EXPERTS)
    wanted_TR[:, 0] = 0.8
    explorer = Explorer(0.3)
    explorer.begin([0])
    found = {
        name: worth_of_raising(Router(torch.eye(EXPERTS)).train(), how, inputs_TD, wanted_TR)
        for name, how in (("weights", None), ("explored", explorer))
    }
    assert found["weights"][0] < 0 < found["explored"][0]
    assert found["explored"][0] > found["explored"][1:].max()


def test_widening_keeps_weights_and_adds_the_best_of_the_rest() -> None:
    logits_TR = torch.tensor([[5.0, 1.0, 4.0, 2.0, 3.0, 0.0]])
    _, weights_TM, running_TM = _widened(logits_TR, torch.tensor([[0.5, 0.5]]), torch.tensor([[0, 2]]))
    assert running_TM.tolist() == [[0, 2, 4]]
    assert weights_TM.tolist() == [[0.5, 0.5, 0.0]]
    everyone = torch.tensor([[0, 1, 2, 3, 4, 5]])
    assert _widened(logits_TR, torch.ones(1, 6), everyone)[2] is everyone


def test_selection_biases_rise_for_experts_with_little_to_do(student: Student) -> None:
    load_LR = torch.full((len(student.routers), 7), 1 / 7)
    load_LR[0, 0], load_LR[0, 1] = 0.2, 1 / 7 - (0.2 - 1 / 7)
    adjust_selection_biases(student, load_LR, 0.5)
    first: Any = student.routers[0]
    assert first.e_score_correction_bias[0] == pytest.approx(-0.5 / 4096)
    assert first.e_score_correction_bias[1] == pytest.approx(0.5 / 4096)


def test_a_dense_model_has_every_stage_but_those_of_routers(taught: Path) -> None:
    check_stages(None, FinetuneOptions(stage=("lora", "full")), taught)
