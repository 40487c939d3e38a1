"""Models of images through the whole road: cut, loaded by their names, verified, and exact with every expert on."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import MakeDense
from tiny_images import MODELS, make_model, noise
from transformers import AutoConfig

from moeify import families, targets
from moeify.calibration.stream import HiddenStream
from moeify.check.verify import verify
from moeify.cli.app import run_command
from moeify.convert.exactness import check_target, make_twin, twin_values
from moeify.convert.pipeline import split
from moeify.errors import InputError, MoeifyWarning, UsageError
from moeify.layout import Layout
from moeify.models.config import load_config
from moeify.models.dense import open_dense
from moeify.models.heads import auto_class
from moeify.options import SplitOptions

FEW = SplitOptions(experts=4, active=2, tokens=1024)


@pytest.mark.parametrize(("family", "class_name"), MODELS)
def test_every_model_goes_the_whole_road(family: str, class_name: str, tmp_path: Path) -> None:
    dense = make_model(tmp_path / "dense", family, class_name)
    with pytest.warns(MoeifyWarning, match="calibrated on scikit-learn's handwritten digits"):
        result = split(str(dense), tmp_path / "moe", FEW)
    assert result.plan.calibration["num_tokens"] <= 1024
    names = {path.name for path in (tmp_path / "moe").iterdir()}
    assert "preprocessor_config.json" in names
    assert "generation_config.json" not in names
    report = verify(str(tmp_path / "moe"), str(dense))
    assert report.passed, report.checks
    loaded: Any = auto_class(load_config(tmp_path / "moe")).from_pretrained(tmp_path / "moe", output_loading_info=True)
    model, info = loaded
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert type(model).__name__ == f"Moe{class_name}"
    outputs = model.eval()(pixel_values=noise(2))[0]
    assert outputs.isfinite().all()


@pytest.mark.parametrize(("family", "class_name"), [MODELS[1], MODELS[2]])
@torch.no_grad()
def test_the_stream_gives_the_stock_models_outputs(family: str, class_name: str, tmp_path: Path) -> None:
    folder = make_model(tmp_path, family, class_name)
    dense, pixels = open_dense(str(folder)), noise(3)
    stream = HiddenStream(dense, {"pixel_values": pixels})
    assert stream.block_tokens == 17
    for layer in range(dense.num_layers):
        stream.pass_through(layer, dense.ffn(layer))
    stream.check_head()
    expected = getattr(transformers, class_name).from_pretrained(folder).eval()(pixels)[0]
    torch.testing.assert_close(torch.stack(list(stream.outputs(range(3)))), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", [name for name in families.names() if families.find(name).modality == "image"])
def test_a_published_config_has_a_twin(family: str) -> None:
    """Its defaults are those of a real model, with layers listed by their numbers."""
    found = families.find(family)
    twin = make_twin(twin_values(AutoConfig.for_model(family), found))
    exactness = check_target(targets.for_model("moeify", twin), twin, Layout(8, 1, 4))
    assert exactness.exact, exactness.reason


def test_options_about_text_are_refused(tmp_path: Path) -> None:
    dense = make_model(tmp_path / "dense", "vit", "ViTModel")
    with pytest.raises(UsageError, match="--context is about text"):
        split(str(dense), tmp_path / "moe", SplitOptions(experts=4, context=16, calibration=("digits",)))
    with (
        pytest.raises(InputError, match="needs a language model"),
        pytest.warns(MoeifyWarning, match="handwritten digits"),
    ):
        split(str(dense), tmp_path / "moe", SplitOptions(experts=4, tokens=1024, partition="gradient"))
    assert not (tmp_path / "moe").exists()


def test_pruning_says_the_width_as_the_family_does(tmp_path: Path) -> None:
    """DINOv2's config has the inner width as a multiple of the hidden size."""
    dense, digits = make_model(tmp_path / "dense", "dinov2", "Dinov2Model"), ("digits",)
    options = SplitOptions(static=True, experts=4, active=2, tokens=1024, calibration=digits, refit=False)
    with pytest.warns(MoeifyWarning, match="handwritten digits"):
        split(str(dense), tmp_path / "pruned", options)
    pruned = open_dense(str(tmp_path / "pruned"))
    assert (pruned.num_neurons, pruned.config.mlp_ratio) == (32, 1)
    with pytest.raises(InputError, match="48 neurons are left of each FFN, a dinov2 has a whole multiple of 32"):
        split(str(dense), tmp_path / "no", SplitOptions(static=True, experts=4, active=3, calibration=digits))


@pytest.mark.parametrize(
    "command",
    [
        ["plan", "MODEL", "--vram", "0", "--ram-bandwidth", "50"],
        ["export", "MODEL", "--gguf", "x.gguf"],
        ["generate", "MODEL", "--prompt", "x"],
    ],
    ids=lambda command: command[0],
)
def test_what_language_models_alone_have_is_refused(
    command: list[str], make_dense: MakeDense, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_command([str(make_dense("vit")) if word == "MODEL" else word for word in command]) == 3
    assert not list(tmp_path.iterdir())
