"""Models that read text in a part of their own: that part is cut, the others are carried bit for bit."""

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MakeDense
from safetensors.torch import load_file

from moeify import evaluate, families
from moeify.check.verify import verify
from moeify.convert.pipeline import split
from moeify.models import stock
from moeify.models.dense import open_dense
from moeify.options import SplitOptions

WRAPPERS = [name for name in families.names() if families.find(name).towers]
# What they become: a stock model where transformers has one with the same towers.
TARGETS = {
    "llava": ("granitemoeshared", "llava"),
    "qwen3_5": ("qwen3_5_moe_text", "qwen3_5_moe"),
    "qwen3_vl": ("qwen3_vl_moe_text", "qwen3_vl_moe"),
}


def stored(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("family", WRAPPERS)
def test_the_text_part_is_cut_and_all_else_is_carried(
    family: str, make_dense: MakeDense, calibration_file: Path, tmp_path: Path
) -> None:
    dense, out = make_dense(family), tmp_path / "out"
    text = {"calibration": (str(calibration_file),), "tokens": 1024, "context": 64}
    result = split(str(dense), out, SplitOptions(experts=8, **text))
    target, model_type = TARGETS.get(family, ("moeify", "moeify"))
    report = verify(str(out), str(dense))
    assert report.passed, report.checks
    loaded: Any = stock.load(out)
    assert (result.target, loaded.config.model_type) == (target, model_type)
    opened, written = open_dense(str(dense)), stored(out)
    ffns = {name for layer in range(opened.num_layers) for name in opened.ffn_names(layer)}
    carried = [name for name in opened.shapes if name not in ffns]
    assert any(name.startswith(("model.visual.", "model.vision_tower.")) for name in carried)
    for name, tensor in opened.get(carried).items():
        assert torch.equal(written[name], tensor), name
    rows = evaluate([str(dense), str(out)], str(calibration_file), tokens=256)
    assert all(row.perplexity > 1 for row in rows)
