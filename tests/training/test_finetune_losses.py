"""Losses in chunks are the plain losses, gradients included; routers owe what their papers say."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div
from transformers.modeling_outputs import CausalLMOutput

from moeify.training import losses as finetune_losses
from moeify.training.logits import Head
from moeify.training.losses import ScoringHead, hidden_error, load_figures, router_losses

BLOCKS, CONTEXT, HIDDEN, VOCABULARY = 3, 9, 8, 40


def noise(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def parts() -> dict[str, Any]:
    head = nn.Linear(HIDDEN, VOCABULARY, bias=False)
    with torch.no_grad():
        head.weight.copy_(noise(VOCABULARY, HIDDEN, seed=0))
    return {
        "head": head,
        "hidden": noise(BLOCKS, CONTEXT, HIDDEN, seed=1).requires_grad_(),
        "ids": torch.randint(VOCABULARY, (BLOCKS, CONTEXT), generator=torch.Generator().manual_seed(2)),
        "its": noise(BLOCKS, CONTEXT, HIDDEN + 2, seed=3),
        "teacher": Head(noise(VOCABULARY, HIDDEN + 2, seed=4), None, halved),
    }


def halved(raw: Tensor) -> Tensor:
    return raw * 0.5


class Tiny(nn.Module):
    """As much of a language model as scoring needs."""

    base_model_prefix = "base"

    def __init__(self, head: nn.Linear) -> None:
        super().__init__()
        self.base, self.head = nn.Identity(), head

    def get_output_embeddings(self) -> nn.Linear:
        return self.head

    def forward(self, input_ids: Tensor, **_: Any) -> Any:
        found = self.base(input_ids)
        hidden = found if isinstance(found, Tensor) else found.last_hidden_state
        return CausalLMOutput(logits=self.head(hidden))  # type: ignore[arg-type]


def scoring_of(parts: dict[str, Any], *, kl: float, lm: float) -> tuple[Tiny, ScoringHead]:
    """A model with this head, and what scores it."""
    model = Tiny(parts["head"])
    return model, ScoringHead(model, kl=kl, lm=lm)


def plain(parts: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """kl_B and lm_B as a textbook has them."""
    logits = parts["head"].weight @ parts["hidden"][:, :-1, :, None]
    student = logits.squeeze(-1).log_softmax(-1)
    teacher = (parts["its"][:, :-1] @ parts["teacher"].weight_VD.T * 0.5).log_softmax(-1)
    divergence = kl_div(student, teacher, log_target=True, reduction="none").sum(-1).mean(1)
    language = cross_entropy(student.transpose(1, 2), parts["ids"][:, 1:], reduction="none").mean(1)
    return divergence, language


@pytest.mark.parametrize("chunk", [VOCABULARY, 5 * VOCABULARY, 1 << 20])
def test_chunks_give_the_plain_losses_and_gradients(
    parts: dict[str, Any], chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(finetune_losses, "CHUNK_BYTES", (4 * chunk,) * 2)
    monkeypatch.setattr(finetune_losses, "CACHED_LOGITS", (chunk // 2,) * 2)
    divergence_B, language_B = plain(parts)
    wanted = 0.7 * divergence_B.mean() + 0.2 * language_B.mean()
    expected = torch.autograd.grad(3 * wanted, [parts["hidden"], parts["head"].weight])
    model, scoring = scoring_of(parts, kl=0.7, lm=0.2)
    scoring.targets = (parts["ids"], parts["its"], parts["teacher"])
    losses_B3 = model(parts["hidden"]).logits
    found = torch.autograd.grad(3 * losses_B3[:, 0].mean(), [parts["hidden"], parts["head"].weight])
    torch.testing.assert_close(losses_B3[:, 0], wanted.expand(BLOCKS))
    torch.testing.assert_close(losses_B3[:, 1], divergence_B)
    torch.testing.assert_close(losses_B3[:, 2], language_B)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_logits_exist_a_few_tokens_at_a_time(parts: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finetune_losses, "CHUNK_BYTES", (4 * 5 * VOCABULARY,) * 2)
    seen: list[tuple[int, ...]] = []
    plain_losses = finetune_losses._token_losses

    def note(logits_TV: Tensor, *others: Any) -> Tensor:
        seen.append(tuple(logits_TV.shape))
        return plain_losses(logits_TV, *others)

    monkeypatch.setattr(finetune_losses, "_token_losses", note)
    model, scoring = scoring_of(parts, kl=1, lm=0)
    scoring.targets = (parts["ids"], parts["its"], parts["teacher"])
    model(parts["hidden"])
    assert sum(rows for rows, _ in seen) == BLOCKS * (CONTEXT - 1)
    assert max(rows for rows, _ in seen) <= 5
    assert len(seen) == -(-BLOCKS * (CONTEXT - 1) // 5)


@pytest.mark.parametrize("rows", [VOCABULARY - 3, VOCABULARY + 3])
def test_vocabularies_padded_to_different_sizes(parts: dict[str, Any], rows: int) -> None:
    teacher = Head(noise(rows, HIDDEN + 2, seed=4), None, halved)
    parts["ids"].clamp_(max=VOCABULARY - 4)
    logits = (parts["hidden"][:, :-1] @ parts["head"].weight.T).log_softmax(-1)[..., :rows]
    its = (parts["its"][:, :-1] @ teacher.weight_VD.T * 0.5).log_softmax(-1)[..., :VOCABULARY]
    expected = torch.autograd.grad((its.exp() * (its - logits)).sum(-1).mean(), parts["hidden"])
    model, scoring = scoring_of(parts, kl=1, lm=0)
    scoring.targets = (parts["ids"], parts["its"], teacher)
    found = torch.autograd.grad(model(parts["hidden"]).logits[:, 0].mean(), parts["hidden"])
    torch.testing.assert_close(found, expected)


def test_a_head_without_targets_gives_logits_again(parts: dict[str, Any]) -> None:
    expected = parts["hidden"] @ parts["head"].weight.T
    model, scoring = scoring_of(parts, kl=1, lm=0)
    torch.testing.assert_close(model(parts["hidden"]).logits, expected)
    scoring.remove()
    assert "forward" not in vars(parts["head"])


def test_a_frozen_head_gets_no_gradient_and_evaluation_none_at_all(parts: dict[str, Any]) -> None:
    parts["head"].requires_grad_(requires_grad=False)
    model, scoring = scoring_of(parts, kl=1, lm=1)
    scoring.targets = (parts["ids"], parts["its"], parts["teacher"])
    model(parts["hidden"]).logits[:, 0].mean().backward()
    assert parts["head"].weight.grad is None
    assert parts["hidden"].grad.abs().sum() > 0
    assert parts["hidden"].grad[:, -1].abs().sum() == 0
    with torch.no_grad():
        assert not model(parts["hidden"]).logits.requires_grad


def test_a_student_like_its_teacher_has_no_divergence(parts: dict[str, Any]) -> None:
    model, scoring = scoring_of(parts, kl=1, lm=0)
    scoring.targets = (parts["ids"], parts["hidden"].detach(), Head(parts["head"].weight.detach()))
    assert model(parts["hidden"]).logits[:, 1].abs().max() < 1e-6


def test_hidden_errors_are_relative_for_each_token() -> None:
    its = noise(2, 4, 8, seed=0)
    its[0, 0] *= 1000
    assert float(hidden_error((its, its, 1.1 * its), (its, its, its))) == pytest.approx(0.005, rel=1e-4)


def test_an_even_load_has_balance_one_and_full_entropy() -> None:
    logits_TR = torch.zeros(8, 4)
    chosen_TK = torch.arange(16).view(8, 2) % 4
    owed = router_losses([(logits_TR, chosen_TK)], 0.001, lambda load: load)
    assert float(owed.balance) == pytest.approx(1.0)
    assert float(owed.z) == pytest.approx(math.log(4) ** 2)
    assert load_figures(owed.load_LR) == pytest.approx({"load_entropy": 1.0, "dead_experts": 0.0})


def test_a_crowded_expert_costs_and_its_scores_are_pushed_down() -> None:
    logits_TR = torch.zeros(8, 4)
    logits_TR[:, 0] = 0.002
    logits_TR.requires_grad_()
    owed = router_losses([(logits_TR, torch.tensor([[0, 1]] * 8))], 0.001, lambda load: load)
    owed.balance.backward()
    assert float(owed.balance.detach()) > 1.2
    assert logits_TR.grad is not None
    assert (logits_TR.grad[:, 0] > 0).all()
    assert (logits_TR.grad[:, 2] < 0).all()
    assert load_figures(owed.load_LR)["dead_experts"] == 2


def test_the_scale_of_stored_scores_does_not_change_what_routers_owe() -> None:
    scores_TR = noise(16, 6, seed=5)
    chosen_TK = scores_TR.topk(2, dim=1).indices
    plain_owed, scaled = (
        router_losses([(scores_TR * scale, chosen_TK)], scale, lambda load: load) for scale in (1.0, 2.0**-10)
    )
    torch.testing.assert_close(plain_owed.balance, scaled.balance)
    torch.testing.assert_close(plain_owed.z, scaled.z)
