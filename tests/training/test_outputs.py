"""Fine-tuning towards the teacher's outputs: classifiers by their classes, models without a head by their features."""

from pathlib import Path

import pytest
import torch
from tiny_images import make_model

from moeify.check.evaluate import measure
from moeify.check.verify import verify
from moeify.convert.pipeline import split
from moeify.errors import InputError, UsageError
from moeify.models.builtin_vit import VitRecipe, builtin_vit
from moeify.options import EvalOptions, SplitOptions
from moeify.training.finetune import finetune
from moeify.training.options import FinetuneOptions
from moeify.training.outputs import _class_losses, _feature_losses

TINY = VitRecipe(hidden_size=32, intermediate_size=64, num_layers=1, patch_size=4, steps=60, warmup_steps=5)
pytestmark = pytest.mark.filterwarnings("ignore::moeify.errors.MoeifyWarning")
FEW = SplitOptions(experts=4, active=2, tokens=1024)


@pytest.mark.parametrize("part", ["kl", "feature_error"])
def test_training_comes_nearer_to_the_teacher(part: str, tmp_path: Path) -> None:
    dense = str(
        builtin_vit(tmp_path, recipe=TINY)
        if part == "kl"
        else make_model(tmp_path / "dense", "vit", "ViTModel", num_hidden_layers=1)
    )
    split(dense, tmp_path / "moe", SplitOptions(experts=4, active=1, shared=0, tokens=1024, refit=False))
    options = FinetuneOptions(stage=("full",), tokens=1024, eval_tokens=512, batch=8, every=100, learning_rate=1e-3)
    (full,) = finetune(str(tmp_path / "moe"), dense, tmp_path / "tuned", options).stages
    assert full.after[part] < full.before[part]
    if part == "feature_error":
        assert full.after["feature_cosine"] > full.before["feature_cosine"]
    assert verify(str(tmp_path / "tuned"), dense).passed
    evaluation = measure([dense, str(tmp_path / "moe"), str(tmp_path / "tuned")], EvalOptions(tokens=512))
    first, moe, tuned = (score.value for score in evaluation.scores)
    assert first == pytest.approx(1)
    assert max(moe, tuned) < 1
    assert {score.data for score in evaluation.scores} == {"digits-heldout"}
    assert {task.metric for task in evaluation.tasks} == ({"accuracy", "agreement"} if part == "kl" else set())


def test_layers_are_fitted_to_the_dense_ones(tmp_path: Path) -> None:
    dense = str(make_model(tmp_path / "dense", "dinov2", "Dinov2Model"))
    split(dense, tmp_path / "moe", SplitOptions(experts=4, active=1, shared=0, tokens=1024, refit=False))
    options = FinetuneOptions(stage=("layers",), tokens=1024, eval_tokens=512)
    (layers,) = finetune(str(tmp_path / "moe"), dense, tmp_path / "tuned", options).stages
    assert layers.after["layer_error"] < layers.before["layer_error"]


def test_losses_are_those_of_the_definitions() -> None:
    generator = torch.Generator().manual_seed(0)
    logits, goal = torch.randn(2, 3, 5, generator=generator)
    expected = torch.nn.functional.kl_div(
        logits.log_softmax(-1), goal.log_softmax(-1), log_target=True, reduction="none"
    ).sum(1)
    losses = _class_losses(logits, goal)
    torch.testing.assert_close(losses[:, 0], expected)
    assert _class_losses(goal, goal).tolist() == [[0, 1]] * 3
    hidden, its = torch.randn(2, 3, 4, 8, generator=generator)
    assert _feature_losses(its, its)[:, 0].tolist() == [0, 0, 0]
    torch.testing.assert_close(_feature_losses(2 * its, its), torch.ones(3, 2))
    assert (_feature_losses(hidden, its)[:, 0] > 0.5).all()


def test_what_only_language_models_have_is_refused(tmp_path: Path) -> None:
    dense = str(make_model(tmp_path / "dense", "vit", "ViTModel"))
    other = str(make_model(tmp_path / "other", "vit", "ViTForImageClassification"))
    split(dense, tmp_path / "moe", FEW)
    moe, out = str(tmp_path / "moe"), tmp_path / "tuned"
    with pytest.raises(UsageError, match="--cache-teacher is for language models"):
        finetune(moe, dense, out, FinetuneOptions(cache_teacher=True))
    with pytest.raises(InputError, match=r"is made by AutoModel, .* by AutoModelForImageClassification"):
        finetune(moe, other, out, FinetuneOptions())
