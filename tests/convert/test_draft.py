"""A drafted family file is what somebody wrote by hand for every family that there is."""

from pathlib import Path
from typing import Any

import pytest
import transformers
from transformers import AutoConfig

from moeify import families
from moeify.cli.app import run_command
from moeify.convert.draft import draft
from moeify.errors import InputError
from moeify.families import Family


def folder_of(family: str, tmp_path: Path, **values: Any) -> Path:
    found = families.find(family)
    config = AutoConfig.for_model(family, **{**found.tiny_values, **values})
    config.architectures = [getattr(transformers, found.auto)._model_mapping[type(config)].__name__]
    config.save_pretrained(tmp_path)
    return tmp_path


def family_in(text: str) -> Family:
    found: dict[str, Any] = {}
    exec(text, found)
    family = found["FAMILY"]
    assert isinstance(family, Family)
    return family


# Of a model that is one: wrappers, and those with an encoder and a decoder, are written by hand.
DRAFTED = [n for n in families.names() if not families.find(n).towers and not families.find(n).is_pair]


@pytest.mark.parametrize("name", DRAFTED)
def test_a_draft_is_what_was_written_by_hand(name: str, tmp_path: Path) -> None:
    drafted = draft(folder_of(name, tmp_path, **{families.find(name).width: 72}))
    assert (drafted.model_type, drafted.file) == (name, f"moeify/families/{name}.py")
    found, written = family_in(drafted.text), families.find(name)
    assert "# The FFN" not in drafted.text
    parts = ("model_type", "blocks", "read", "write", "between", "ffn", "activation", "width", "auto", "modality")
    assert {part: getattr(found, part) for part in parts} == {part: getattr(written, part) for part in parts}


def test_an_unknown_family_gets_its_file_and_a_refusal_says_how(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = folder_of("llama", tmp_path / "model")
    config = AutoConfig.for_model("apertus", **families.find("llama").tiny_values, hidden_act="relu2")
    config.architectures = ["ApertusForCausalLM"]
    config.save_pretrained(folder)
    assert run_command(["inspect", str(folder)]) == 3
    assert "--draft-family" in capfd.readouterr().err
    assert run_command(["inspect", str(folder), "--draft-family"]) == 0
    family = family_in(capfd.readouterr().out)
    assert (family.ffn.gate, family.ffn.up, family.ffn.down) == (None, "mlp.up_proj", "mlp.down_proj")


def test_an_ffn_that_has_parameters_of_its_own_is_not_proven(tmp_path: Path) -> None:
    config = AutoConfig.for_model("apertus", **families.find("llama").tiny_values)
    config.architectures = ["ApertusForCausalLM"]
    config.save_pretrained(tmp_path)
    assert "# The FFN of a tiny model gives something else" in draft(tmp_path).text


def test_what_has_no_ffn_is_said(tmp_path: Path) -> None:
    config = AutoConfig.for_model("mamba", vocab_size=64, hidden_size=32, num_hidden_layers=2)
    config.architectures = ["MambaForCausalLM"]
    config.save_pretrained(tmp_path)
    with pytest.raises(InputError, match="mamba"):
        draft(tmp_path)
