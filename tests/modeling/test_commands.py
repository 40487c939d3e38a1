"""Commands work on models that only moeify's own architecture holds, one test for each shape of FFN and block."""

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import MakeDense

from moeify.cli.app import run_command

# A gate or none, biases or none, a module of its own or not, blocks that give several values, two norms, bent logits.
KINDS = ["gpt2", "gemma2", "phi", "mpt"]
TUNE = ["--context", "32", "--tokens", "512", "--eval-tokens", "256", "--batch", "4", "--precision", "float32"]


@pytest.mark.parametrize("family", KINDS)
def test_commands_take_it(
    family: str, make_dense: MakeDense, calibration_file: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    dense, moe, text = str(make_dense(family)), str(tmp_path / "moe"), str(calibration_file)
    few = ["--calibration", text, "--tokens", "1024", "--context", "32"]

    def call(*arguments: str) -> Any:
        code = run_command([*arguments, "--json"])
        out, errors = capfd.readouterr()
        assert code == 0, f"{arguments}: {errors}"
        return json.loads(out)

    assert call("split", dense, "--experts", "8", *few, "-o", moe)["target"] == "moeify"
    said = call("generate", dense, moe, "--prompt", "The", "--tokens", "4")["generations"]
    assert [one["num_tokens"] for one in said] == [4, 4]
    rows = call("eval", dense, moe, "--data", text, "--tokens", "256", "--context", "32")["results"]
    assert len(rows) == 2
    tuned = call("finetune", moe, "--teacher", dense, "--data", text, *TUNE, "--stage", "layers,full",
                 "--eval-data", text, "-o", str(tmp_path / "tuned"))  # fmt: skip
    assert [stage["stage"] for stage in tuned["stages"]] == ["layers", "full"]
    # The loss that is logged is the one that the stock model's logits have.
    (row,) = call("eval", str(tmp_path / "tuned"), "--data", text, "--tokens", "256", "--context", "32")["results"]
    assert tuned["stages"][-1]["after"]["perplexity"] == pytest.approx(row["perplexity"], rel=0.01)
    if family != KINDS[0]:
        return
    assert call("inspect", dense)["family"] == family
    assert call("plan", dense, "--vram", "0", "--ram", "8GB", "--ram-bandwidth", "50", "--threads", "1")
