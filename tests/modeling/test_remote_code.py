"""Code beside the weights: moeify's own architecture loads in transformers where there is no moeify."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MakeDense
from transformers import AutoModelForCausalLM

from moeify.check.verify import verify
from moeify.convert.pipeline import split
from moeify.errors import UsageError
from moeify.modeling.modeling_moeify import CODE_FILES
from moeify.options import SplitOptions

OPTIONS = SplitOptions(experts=8, tokens=1024, calibration=("builtin",), remote_code=True)
# Loads folders where moeify cannot be imported, saves them and loads that; prints what must be the same everywhere.
LOAD = """
import sys
sys.modules["moeify"] = None
import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging
logging.set_verbosity_error()
ids = torch.arange(3, 20)[None]
for folder in sys.argv[1:]:
    for place in (folder, folder + "-again"):
        model, info = AutoModelForCausalLM.from_pretrained(place, trust_remote_code=True, output_loading_info=True)
        assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
        model.set_experts_implementation("eager")
        with torch.no_grad():
            print(type(model).__name__, model.eval()(ids).logits.double().sum().item())
        model.generate(ids, max_new_tokens=2, do_sample=False)
        if place == folder:
            model.save_pretrained(folder + "-again")
"""
# Of blocks and of FFNs, one with a static layer.
FAMILIES: dict[str, dict[str, Any]] = {"gpt2": {"active_by_layer": (5, 3), "static_layers": (1,)}, "gemma3_text": {}}


def test_folders_with_code_load_where_moeify_is_not(make_dense: MakeDense, tmp_path: Path) -> None:
    expected = []
    for family, layers in FAMILIES.items():
        dense, out = str(make_dense(family)), tmp_path / family
        with pytest.warns(UserWarning, match=r"own architecture is written: .*trust_remote_code=True"):
            split(dense, out, OPTIONS, **layers)
        assert verify(str(out), dense).passed
        assert set(CODE_FILES) <= set(json.loads((out / "moeify.json").read_text())["files"])
        assert "trust_remote_code=True" in (out / "README.md").read_text()
        model = AutoModelForCausalLM.from_pretrained(out)
        # Where moeify is imported its own code runs, not the folder's.
        assert type(model).__module__ == "moeify.modeling.modeling_moeify"
        model.set_experts_implementation("eager")
        with torch.no_grad():
            total = float(model.eval()(torch.arange(3, 20)[None]).logits.double().sum())
        expected += [(type(model).__name__, total)] * 2
    command = [sys.executable, "-c", LOAD, *(str(tmp_path / family) for family in FAMILIES)]
    variables = {**os.environ, "HF_HOME": str(tmp_path / "hf")}
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path, env=variables)
    assert done.returncode == 0, done.stderr
    for line, (name, total) in zip(done.stdout.splitlines(), expected, strict=True):
        assert line.split()[0] == name
        assert float(line.split()[1]) == pytest.approx(total, rel=1e-6)


def test_without_the_option_there_is_no_code(make_dense: MakeDense, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.warns(UserWarning, match=r"own architecture is written: .*--remote-code"):
        split(str(make_dense("gpt2")), out, OPTIONS, remote_code=False)
    assert not list(out.glob("*.py"))
    assert "auto_map" not in json.loads((out / "config.json").read_text())
    card = (out / "README.md").read_text()
    assert "import moeify" in card
    assert "no custom code" not in card


def test_a_stock_architecture_needs_no_code(make_dense: MakeDense, tmp_path: Path) -> None:
    dense = str(make_dense("llama"))
    with pytest.raises(UsageError, match="granitemoeshared is an architecture of transformers itself"):
        split(dense, tmp_path / "out", OPTIONS)
    with pytest.raises(UsageError, match="needs no code"):
        SplitOptions(static=True, remote_code=True)
    assert not (tmp_path / "out").exists()
