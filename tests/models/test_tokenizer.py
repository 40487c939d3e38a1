"""A tokenizer of no use is refused before any work; broken files that only chats and generation need are carried on."""

import base64
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from broken_files import EITHER, GENERATION, NEEDED, UNNEEDED, Companion
from conftest import MakeDense
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from moeify.check.evaluate import load
from moeify.convert.pipeline import split
from moeify.errors import InputError, MoeifyError, MoeifyWarning
from moeify.models.config import load_config
from moeify.models.dense import open_dense
from moeify.models.generation import generation_arguments, usable_generation
from moeify.models.tokenizer import load_tokenizer
from moeify.options import SplitOptions


@pytest.fixture
def dense(make_dense: MakeDense, tmp_path: Path) -> Path:
    """A copy of a model whose files may be changed."""
    return Path(shutil.copytree(make_dense("llama"), tmp_path / "dense"))


def tokenizer_of(folder: Path) -> Any:
    return load_tokenizer(folder)


def test_what_a_file_says_is_not_printed(dense: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The tokenizers library writes keys that it does not know to stdout, where one JSON object may be expected."""
    settings = json.loads((dense / "tokenizer_config.json").read_text())
    settings["added_tokens_decoder"] = {"0": {"content": "<s>", "special": True, "x\x1b]0;title\x07": True}}
    (dense / "tokenizer_config.json").write_text(json.dumps(settings))
    AutoTokenizer.from_pretrained(dense)
    assert "title" in capfd.readouterr().out
    assert tokenizer_of(dense)("a")["input_ids"]
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("change", NEEDED, ids=str)
def test_a_tokenizer_that_is_broken_is_refused(dense: Path, change: Companion) -> None:
    change.apply(dense)
    with pytest.raises(InputError, match="token") as caught:
        tokenizer_of(dense)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("change", UNNEEDED, ids=str)
@pytest.mark.filterwarnings("ignore::moeify.errors.MoeifyWarning")
def test_what_a_split_does_not_need_is_carried(dense: Path, change: Companion) -> None:
    change.apply(dense)
    assert tokenizer_of(dense)("a")["input_ids"]
    config = load_config(dense)
    arguments = generation_arguments(dense, config)
    assert bool(arguments) == ((dense / GENERATION).exists() and not usable_generation(dense))


@pytest.mark.parametrize("change", EITHER, ids=str)
@pytest.mark.filterwarnings("ignore::moeify.errors.MoeifyWarning")
def test_settings_of_any_kind_are_loaded_or_refused(dense: Path, change: Companion) -> None:
    (dense / "evil.py").write_text("raise SystemExit('a stranger ran')\n")
    change.apply(dense)
    try:
        assert tokenizer_of(dense)("a")["input_ids"]
    except MoeifyError as error:
        assert "token" in str(error)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            "chat_template.jinja: an open tag",
            "the chat template in .* is broken and kept as it is: Template",
        ),
        ("vocab.json: cut", "vocab.json is broken and kept as it is: is not JSON"),
        ("generation_config.json: cut", "generation_config.json is not JSON.* it is left out, and made from config"),
    ],
)
def test_what_is_carried_is_said_and_the_result_loads(dense: Path, tmp_path: Path, change: str, words: str) -> None:
    next(one for one in UNNEEDED if str(one) == change).apply(dense)
    options = SplitOptions(experts=4, tokens=1024, context=64, calibration=("builtin",))
    with pytest.warns(MoeifyWarning, match=words):
        split(dense, tmp_path / "out", options)
    assert load(str(tmp_path / "out")).generation_config.eos_token_id == 1
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    AutoTokenizer.from_pretrained(tmp_path / "out")


@pytest.mark.filterwarnings("ignore::moeify.errors.MoeifyWarning")
def test_a_model_with_broken_defaults_for_generation_loads(dense: Path) -> None:
    (dense / GENERATION).write_text('{"cache_implementation": "nope"}')
    assert load(str(dense)).generation_config.eos_token_id == load_config(dense).eos_token_id


def test_good_defaults_for_generation_stay(dense: Path) -> None:
    GenerationConfig(do_sample=True, temperature=0.6, top_k=20, eos_token_id=[0, 1]).save_pretrained(dense)
    assert usable_generation(dense)
    assert load(str(dense)).generation_config.temperature == 0.6
    (dense / GENERATION).unlink()
    assert not usable_generation(dense)
    assert generation_arguments(dense, load_config(dense)) == {}


def test_templates_of_transformers_are_not_called_broken(dense: Path) -> None:
    template = (
        "{%- for m in messages %}{% if m.role == 'system' %}{% continue %}{% endif %}"
        "{% generation %}{{ m.content | trim }}{% endgeneration %}{% break %}{% endfor %}"
    )
    (dense / "chat_template.jinja").write_text(template)
    assert tokenizer_of(dense).chat_template == template


def test_an_unusable_tokenizer_stops_a_split_before_its_work(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (dense / "tokenizer.json").write_text("{")
    monkeypatch.setattr("moeify.convert.pipeline.calibration_inputs", lambda *_: pytest.fail("the work began"))
    with pytest.raises(InputError, match=r"no usable tokenizer in .*: tokenizer\.json: is not JSON"):
        split(dense, tmp_path / "out", SplitOptions(experts=4))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("content", "package"),
    [(b"\x0a\x0e\x0a\x05<unk>", "sentencepiece"), (base64.b64encode(b"th") + b" 0\n", "tiktoken")],
)
def test_the_package_that_is_missing_is_named(
    dense: Path, monkeypatch: pytest.MonkeyPatch, content: bytes, package: str
) -> None:
    (dense / "tokenizer.json").unlink()
    (dense / "tokenizer.model").write_bytes(content)
    (dense / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer"}))
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(InputError, match=f"a tokenizer.model alone, which needs the package {package}") as caught:
        open_dense(dense).tokenizer()
    assert caught.value.hint.startswith(f"pip install {package}")
