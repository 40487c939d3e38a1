"""Fine-tuning scores the logits that the model's own class gives, whatever that does behind its last linear map."""

from typing import Any

import pytest
import torch
from conftest import fill
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div
from transformers import AutoConfig, AutoModelForCausalLM

from moeify import families
from moeify.errors import InputError
from moeify.models.heads import LANGUAGE_MODEL
from moeify.training.logits import Head
from moeify.training.losses import ScoringHead
from moeify.training.teacher import Teacher

IDS = torch.randint(3, 128, (2, 12), generator=torch.Generator().manual_seed(0))
# Where a tiny model's own values would do nothing.
MORE: dict[str, dict[str, Any]] = {
    "gemma2": {"final_logit_softcapping": 5.0},
    "gemma3_text": {"final_logit_softcapping": 5.0},
    "hyperclovax": {"logits_scaling": 0.25},
    "opt": {"word_embed_proj_dim": 24},
}
LANGUAGE = [name for name in families.names() if families.find(name).auto == LANGUAGE_MODEL]


def model_of(family: str, seed: int = 0, **values: Any) -> Any:
    found = families.find(family)
    config = AutoConfig.for_model(family, **{**found.tiny_values, found.width: 64, **MORE.get(family, {}), **values})
    model = AutoModelForCausalLM.from_config(config).eval()
    fill(model, seed)
    return model


def losses_of(student: Any, teacher: Any) -> tuple[Tensor, Tensor]:
    """Divergence and language modelling loss as a textbook has them."""
    student_BCV = student(input_ids=IDS, use_cache=False).logits[:, :-1].float().log_softmax(-1)
    with torch.no_grad():
        teacher_BCV = teacher(input_ids=IDS, use_cache=False).logits[:, :-1].float().log_softmax(-1)
    divergence = kl_div(student_BCV, teacher_BCV, log_target=True, reduction="none").sum(-1).mean()
    return divergence, cross_entropy(student_BCV.transpose(1, 2), IDS[:, 1:])


@pytest.mark.parametrize("family", LANGUAGE)
def test_every_family_trains_on_its_own_logits(family: str) -> None:
    student, its = model_of(family, 0), model_of(family, 1)
    divergence, language = losses_of(student, its)
    (0.7 * divergence + 0.2 * language).backward()
    expected = {name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None}
    student.zero_grad()
    teacher = Teacher(its, Head.of(its))
    scoring = ScoringHead(student, kl=0.7, lm=0.2)
    scoring.targets = (IDS, teacher.hidden({"input_ids": IDS})[0], teacher.head)
    losses_B3 = student(input_ids=IDS, use_cache=False).logits
    torch.testing.assert_close(losses_B3[:, 1].mean(), divergence, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(losses_B3[:, 2].mean(), language, rtol=1e-4, atol=1e-5)
    losses_B3[:, 0].mean().backward()
    largest = max(float(grad.abs().max()) for grad in expected.values())
    for name, parameter in student.named_parameters():
        if name in expected:
            torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-3, atol=1e-5 * largest, msg=name)
    scoring.targets = None
    scoring.remove()
    raw: list[Tensor] = []
    student.get_output_embeddings().register_forward_hook(lambda _, __, output: raw.append(output))
    plain = torch.equal(student(input_ids=IDS, use_cache=False).logits, raw[0])
    # The fast road is kept where nothing is done behind the linear map.
    assert (teacher.head.behind is None) == plain


def test_a_head_that_is_more_than_a_linear_map_is_refused() -> None:
    model = model_of("llama")
    plain = type(model).forward

    class Other(type(model)):  # type: ignore[misc]
        def forward(self, *arguments: Any, **named: Any) -> Any:
            out = plain(self, *arguments, **named)
            out.logits = out.logits + self.model(*arguments, **named).last_hidden_state.sum()
            return out

    model.__class__ = Other
    with pytest.raises(InputError, match="the logits of Other are no function of"):
        Head.of(model)
