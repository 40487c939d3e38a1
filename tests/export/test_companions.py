"""A checkpoint's tokenizer is the source's, whatever class its config.json makes transformers take; nothing is lost."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import MakeDense, family_of
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoTokenizer

from moeify import targets
from moeify.convert.pipeline import split
from moeify.errors import DiskError, InputError, MoeifyWarning
from moeify.export import companions as companions_module
from moeify.export.companions import Companions, settle_companions
from moeify.export.workspace import Workspace
from moeify.models.companions import companion_names
from moeify.models.same_tokens import PIECES, token_difference
from moeify.options import SplitOptions

# Siblings of other families never get these tokenizers.
LLAMAS_AND_QWENS = [
    name for name in targets.names() if targets.find(name).is_stock and family_of(name) in ("llama", "qwen3")
]

# Digits in threes, as Llama 3 has them.
WORDS = Regex(r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
TEMPLATE = "{% for m in messages %}<s>{{ m.role }}\n{{ m.content }}</s>\n{% endfor %}"
LINES = [f"In {year} the number was {year * 7},\n\ttwice {year * 14}.\n" for year in range(100, 700)]


def config(model_type: str) -> str:
    return str(AutoConfig.for_model(model_type).to_json_string(use_diff=False))


def folder(path: Path, model_type: str, tokenizer: Tokenizer, **settings: Any) -> Path:
    path.mkdir()
    (path / "config.json").write_text(config(model_type))
    tokenizer.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>", **settings}))
    return path


@pytest.fixture(scope="module")
def threes() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(WORDS, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    letters = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=380, special_tokens=["<s>", "</s>"], initial_alphabet=letters, show_progress=False
    )
    tokenizer.train_from_iterator(LINES, trainer)
    return tokenizer


@pytest.fixture(scope="module")
def sentencepiece_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sentencepiece = pytest.importorskip("sentencepiece")
    path = tmp_path_factory.mktemp("spm")
    (path / "train.txt").write_text("".join(LINES))
    sentencepiece.SentencePieceTrainer.train(
        input=str(path / "train.txt"),
        model_prefix=str(path / "spm"),
        vocab_size=330,
        model_type="bpe",
        byte_fallback=True,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return path / "spm.model"


def written(companions: Companions, path: Path, model_type: str) -> Any:
    """The tokenizer as stock transformers loads it from the checkpoint's folder."""
    with Workspace(path, {}, overwrite=False) as workspace:
        companions.write(workspace)
        workspace.write_text("config.json", config(model_type))
        workspace.commit()
    return AutoTokenizer.from_pretrained(path)


@pytest.mark.parametrize("target", LLAMAS_AND_QWENS)
def test_copies_are_bit_identical_where_they_agree(target: str, make_dense: MakeDense, tmp_path: Path) -> None:
    dense = make_dense("llama")
    companions = settle_companions(dense, config(target))
    tokenizer = written(companions, tmp_path / "out", target)
    # transformers 4 does not know the new name of the class.
    settings = [json.loads((path / "tokenizer_config.json").read_text()) for path in (dense, tmp_path / "out")]
    assert [one.pop("tokenizer_class") for one in settings] == ["TokenizersBackend", "PreTrainedTokenizerFast"]
    assert settings[0] == settings[1]
    assert companions.rewritten.keys() == {"tokenizer_config.json"}
    assert companions.copies.keys() == {"generation_config.json", "tokenizer.json", "tokenizer_config.json"}
    copies = companions.copies.keys() - companions.rewritten.keys()
    assert all((tmp_path / "out" / name).read_bytes() == (dense / name).read_bytes() for name in copies)
    assert token_difference(tokenizer, AutoTokenizer.from_pretrained(dense)) == ""


def test_a_tokenizer_of_another_class_is_written_anew(threes: Tokenizer, tmp_path: Path) -> None:
    """A qwen2 is read with Qwen's own cutting whatever tokenizer.json says, a qwen2_moe is not."""
    dense = folder(
        tmp_path / "dense", "qwen2", threes, tokenizer_class="PreTrainedTokenizerFast", chat_template=TEMPLATE
    )
    expected = AutoTokenizer.from_pretrained(dense)
    copied = shutil.copytree(dense, tmp_path / "copied")
    (copied / "config.json").write_text(config("qwen2_moe"))
    assert "'123" not in str(expected.tokenize("1234"))
    assert "it cuts '7 12 345" in token_difference(AutoTokenizer.from_pretrained(copied), expected)
    with pytest.warns(MoeifyWarning, match="written anew as tokenizer.json: beside a config.json of qwen2_moe.*'7 12"):
        companions = settle_companions(dense, config("qwen2_moe"))
    found = written(companions, tmp_path / "out", "qwen2_moe")
    assert token_difference(found, expected) == ""
    assert found.chat_template == TEMPLATE
    settings = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"


@pytest.mark.parametrize("target", LLAMAS_AND_QWENS)
def test_a_sentencepiece_model_alone_keeps_its_newlines(target: str, sentencepiece_model: Path, tmp_path: Path) -> None:
    dense = tmp_path / "dense"
    dense.mkdir()
    shutil.copyfile(sentencepiece_model, dense / "tokenizer.model")
    settings = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (dense / "tokenizer_config.json").write_text(json.dumps({**settings, "add_bos_token": True}))
    (dense / "config.json").write_text(config("llama"))
    expected = AutoTokenizer.from_pretrained(dense)
    if target in ("dots1", "qwen2_moe", "qwen3_moe"):
        # There the class is the one that the files name.
        companions = settle_companions(dense, config(target))
    else:
        with pytest.warns(MoeifyWarning, match="written anew"):
            companions = settle_companions(dense, config(target))
    found = written(companions, tmp_path / "out", target)
    text = "Line 12\nsays that\n\n  twice\n"
    ids = found(text)["input_ids"]
    assert ids == expected(text)["input_ids"]
    assert ids[0] == found.bos_token_id
    assert found.decode(ids, skip_special_tokens=True) == text
    assert (tmp_path / "out" / "tokenizer.model").read_bytes() == sentencepiece_model.read_bytes()


def test_a_tokenizer_that_cannot_be_kept_is_refused(
    threes: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense = folder(tmp_path / "dense", "qwen2", threes, tokenizer_class="PreTrainedTokenizerFast")
    files = {name: (dense / name).read_bytes() for name in ("tokenizer.json", "tokenizer_config.json")}
    monkeypatch.setattr(companions_module, "_rewritten", lambda _: files)
    with pytest.raises(
        InputError, match=r"beside a config.json of qwen2_moe.* it cuts '7 12 345.* at token 2"
    ) as caught:
        settle_companions(dense, config("qwen2_moe"))
    assert "save_pretrained" in caught.value.hint


def test_a_split_refuses_before_any_work(
    make_dense: MakeDense, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense = Path(shutil.copytree(make_dense("llama"), tmp_path / "dense"))
    monkeypatch.setattr("moeify.convert.pipeline.calibration_inputs", lambda _: pytest.fail("text was read"))
    monkeypatch.setattr(companions_module, "token_difference", lambda *_: "it cuts 'a' into ['b']")
    with pytest.raises(InputError, match="it cuts 'a'"):
        split(str(dense), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]


CARRIED = {
    "LICENSE": "MIT",
    "LICENSE.txt": "Apache",
    "NOTICE": "by us",
    "USE_POLICY.md": "be kind",
    "additional_chat_templates/tools.jinja": TEMPLATE,
    "chat_template.jinja": TEMPLATE,
    "preprocessor_config.json": "{}",
    "cl100k.tiktoken": "YQ== 0",
    "tekken.json": "{}",
}
LEFT = {
    "README.md": "# the dense model",
    "moeify.json": "{}",
    "split_plan.safetensors": "x",
    "modeling_x.py": "raise SystemExit",
    "LICENSE.py": "raise SystemExit",
    "NOTICE.bin": "x",
    "tokenizer.model.safetensors": "x",
    "eval_results.json": "{}",
    "training_args.bin": "x",
}


def test_every_file_of_the_model_is_carried_and_no_other(
    make_dense: MakeDense, calibration_file: Path, tmp_path: Path
) -> None:
    dense = Path(shutil.copytree(make_dense("llama"), tmp_path / "dense"))
    for name, text in {**CARRIED, **LEFT}.items():
        (dense / name).parent.mkdir(exist_ok=True)
        (dense / name).write_text(text)
    out = split(str(dense), tmp_path / "out", SplitOptions(tokens=1024, calibration=(str(calibration_file),))).out
    assert {name: (out / name).read_text() for name in CARRIED} == CARRIED
    names = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    assert names & LEFT.keys() == {"README.md", "moeify.json", "split_plan.safetensors"}
    assert not any((out / name).read_text(errors="replace") == LEFT[name] for name in names & LEFT.keys())


def test_a_link_out_of_the_folder_is_refused(make_dense: MakeDense, tmp_path: Path) -> None:
    dense = Path(shutil.copytree(make_dense("llama"), tmp_path / "dense"))
    (tmp_path / "secret").write_text("a key")
    (dense / "LICENSE").symlink_to(tmp_path / "secret")
    assert "LICENSE" in companion_names(dense)
    with pytest.raises(InputError, match="outside of the model's folder"):
        settle_companions(dense, config("mixtral"))


def test_a_folder_without_a_tokenizer_is_carried_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "NOTICE").write_text("by us")
    (tmp_path / "config.json").write_text('{"model_type": "llama", "eos_token_id": 7}')
    companions = settle_companions(tmp_path, "{}")
    assert companions.copies == {"NOTICE": tmp_path / "NOTICE"}
    assert json.loads(companions.rewritten["generation_config.json"])["eos_token_id"] == 7


def test_a_full_disk_of_temporary_files_is_said(make_dense: MakeDense, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(companions_module.shutil, "copyfile", full)
    with pytest.raises(DiskError, match=r"the disk of .* is full"):
        settle_companions(make_dense("llama"), config("mixtral"))


Damage = Callable[[dict[str, Any], dict[str, Any]], None]
DIFFERENCES: dict[str, tuple[Damage, str]] = {
    "normalizer": (lambda t, _: t.update(normalizer={"type": "NFC"}), "it cuts .*na\u00efve.* at token 3"),
    "digits": (
        lambda t, _: t.update(pre_tokenizer={"type": "Digits", "individual_digits": True}),
        "it cuts 'The quick",
    ),
    "decoder": (lambda t, _: t.update(decoder=None), "it reads the tokens of 'The quick"),
    "special": (lambda _, c: c.update(eos_token="<s>"), "its eos_token_id is 0 instead of 1|it cuts"),
    "template": (lambda _, c: c.update(chat_template="{{ 1 }}"), "its chat template is another"),
    "unused token": (
        lambda t, _: t["added_tokens"].append({**t["added_tokens"][0], "id": 390, "content": "<unused>"}),
        "its all_special_ids|it has 381 tokens, expected 380",
    ),
}


@pytest.mark.parametrize("kind", DIFFERENCES)
def test_every_kind_of_difference_is_named(kind: str, threes: Tokenizer, tmp_path: Path) -> None:
    change, message = DIFFERENCES[kind]
    expected = AutoTokenizer.from_pretrained(folder(tmp_path / "one", "mixtral", threes, chat_template=TEMPLATE))
    other = folder(tmp_path / "two", "mixtral", threes, chat_template=TEMPLATE)
    names = ("tokenizer.json", "tokenizer_config.json")
    tokenizer, settings = (json.loads((other / name).read_text()) for name in names)
    change(tokenizer, settings)
    for name, content in zip(names, (tokenizer, settings), strict=True):
        (other / name).write_text(json.dumps(content))
    assert re.search(message, token_difference(AutoTokenizer.from_pretrained(other), expected))


def test_the_pieces_hold_what_tells_tokenizers_apart() -> None:
    text = "\n".join(PIECES)
    assert all(part in text for part in ("\n\n\n", "  ", "\t", "\r\n", "12345", "e\u0301", "\u4e2d", "\U0001f600"))
    assert any(piece.startswith(" ") for piece in PIECES)
    assert any(piece.endswith(" ") for piece in PIECES)
