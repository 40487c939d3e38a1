"""A tokenizer in a GGUF is the folder's: read back with the gguf package, and with llama.cpp where there is one."""

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
from gguf import TokenType
from tiny_tokenizers import SPACE, TEMPLATE, byte_level, folder_of, sentencepiece
from tokenizers import AddedToken, Regex, normalizers, pre_tokenizers

from moeify.errors import InputError, MoeifyWarning, UsageError
from moeify.export.gguf.vocabulary import add_vocabulary, copy_vocabulary
from moeify.models import pretokenizers
from moeify.models.pretokenizers import (
    DIGIT,
    LLAMA3,
    PRE_TOKENIZERS,
    QWEN2,
    SEED_CODER,
    PreTokenizer,
)
from moeify.models.same_tokens import probe_texts

LLAMA_CPP = "MOEIFY_LLAMA_CPP"
APPROXIMATE = [one for one in PRE_TOKENIZERS if one.approximate]
EXACT = [one for one in PRE_TOKENIZERS if not one.approximate]
# How tiktoken writes what tokenizer.json of the same model has in another way.
CL100K = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)
IN_BOTH_CASES = "(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
MORE_TEXTS = ("<|im_start|>user\nhi<|im_end|>\n", "  two spaces first", "\n\n  x", "x</s>  y", "e\u0302\u0301 x\u0308")


def write(file: Path, add: Callable[[Any], None]) -> dict[str, Any]:
    """What a GGUF has to which something was added."""
    writer = gguf.GGUFWriter(file, "llama")
    add(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    fields = gguf.GGUFReader(file).fields
    return {k.removeprefix("tokenizer."): f.contents() for k, f in fields.items() if k.startswith("tokenizer.")}


def written(tokenizer: Any, folder: Path, *, pre: str = "", **values: Any) -> dict[str, Any]:
    """What the GGUF of a tokenizer says; folder.gguf is the file."""
    path, config = folder_of(tokenizer, folder, **values)
    return write(folder.with_suffix(".gguf"), lambda writer: add_vocabulary(writer, path, config, pre=pre))


@pytest.mark.parametrize("one", EXACT, ids=lambda one: one.name)
def test_a_byte_level_tokenizer_gets_the_name_of_its_expressions(one: PreTokenizer, tmp_path: Path) -> None:
    tokenizer = byte_level(one.stages, ignore_merges=one.ignore_merges, size=400)
    values = written(tokenizer, tmp_path / "model")
    assert values["ggml.model"] == "gpt2"
    assert values["ggml.pre"] == one.name
    described = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    assert values["ggml.merges"] == [" ".join(pair) for pair in described["merges"]]
    assert values["ggml.tokens"] == [*tokenizer.convert_ids_to_tokens(range(400)), "[PAD400]", "[PAD401]", "[PAD402]"]
    types = [TokenType.CONTROL] * 5 + [TokenType.NORMAL] * 395 + [TokenType.UNUSED] * 3
    assert values["ggml.token_type"] == types
    assert not values["ggml.add_space_prefix"]


@pytest.mark.parametrize("one", APPROXIMATE, ids=lambda one: one.name)
def test_what_llama_cpp_only_approximates_is_said(one: PreTokenizer, tmp_path: Path) -> None:
    tokenizer = byte_level(one.stages, ignore_merges=one.ignore_merges, size=400)
    with pytest.warns(MoeifyWarning, match=f"nearly as the tokenizer does .{one.name}.: it tells upper from lower"):
        assert written(tokenizer, tmp_path / "model")["ggml.pre"] == one.name


def test_every_table_entry_is_another() -> None:
    assert len({one.name for one in PRE_TOKENIZERS}) == len(PRE_TOKENIZERS)
    assert len({(one.stages, one.ignore_merges) for one in PRE_TOKENIZERS}) == len(PRE_TOKENIZERS)


@pytest.mark.parametrize(
    ("spelling", "usual"),
    [
        (CL100K, LLAMA3),
        (LLAMA3.replace("(?i:'s|'t|'re|'ve|'m|'ll|'d)", IN_BOTH_CASES), LLAMA3),
        (QWEN2.replace(r"\r\n", "\r\n"), QWEN2),
        (SEED_CODER.replace(r"|\p{N}|", r"|\p{N}{1}|"), SEED_CODER),
    ],
)  # fmt: skip
def test_spellings_of_one_expression(spelling: str, usual: str) -> None:
    sequence: Any = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(spelling), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    texts = ("I'LL  don't\r\n\n x=1234567 \u00e9\u0301 !!\n\n", "\n \n\t a\n", " 'S'M'\n'", "'''\u00e0'll")
    right: Any = pre_tokenizers.Split(Regex(usual), "isolated")
    for text in texts:
        assert pre_tokenizers.Split(Regex(spelling), "isolated").pre_tokenize_str(text) == right.pre_tokenize_str(text)
    assert pretokenizers.stages_of(json.loads(sequence.__getstate__())) == (usual,)


def test_pieces_may_be_what_is_not_removed(tmp_path: Path) -> None:
    tokenizer = byte_level((LLAMA3,), size=400)
    split = pre_tokenizers.Split(Regex(LLAMA3), "removed", invert=True)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    assert written(tokenizer, tmp_path / "model")["ggml.pre"] == "dbrx"


@pytest.mark.parametrize(
    ("stages", "part"),
    [
        ((r"\w+|\s+",), "no name for how the tokenizer cuts texts: .*w"),
        ((DIGIT, LLAMA3), "no name for how the tokenizer cuts texts"),
    ],
)
def test_unknown_expressions_are_refused_by_name(stages: tuple[str, ...], part: str, tmp_path: Path) -> None:
    tokenizer = byte_level(stages, size=300)
    with pytest.raises(InputError, match=part) as caught:
        written(tokenizer, tmp_path / "model")
    assert "--tokenizer-pre" in caught.value.hint
    # The user may know better.
    assert written(tokenizer, tmp_path / "model", pre="my-own.name")["ggml.pre"] == "my-own.name"
    with pytest.raises(UsageError, match="expected a name"):
        written(tokenizer, tmp_path / "model", pre="a\nb")


@pytest.mark.parametrize(
    "part",
    [
        pre_tokenizers.ByteLevel(add_prefix_space=True),
        pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(r"\p{N}+"), "removed"), pre_tokenizers.ByteLevel(False)]),
        pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=False), pre_tokenizers.ByteLevel(False)]),
        pre_tokenizers.Whitespace(),
    ],
    ids=["prefix", "removed", "digits", "whitespace"],
)
def test_parts_that_llama_cpp_does_not_have(part: Any, tmp_path: Path) -> None:
    tokenizer = byte_level(size=300)
    tokenizer.backend_tokenizer.pre_tokenizer = part
    with pytest.raises(InputError, match=r"llama\.cpp cuts no text by"):
        written(tokenizer, tmp_path / "model")


def test_merges_that_are_ignored_by_one_of_both(tmp_path: Path) -> None:
    # As trained, merges make every token: then it is the same.
    assert written(byte_level((QWEN2,), ignore_merges=True, size=400), tmp_path / "a")["ggml.pre"] == "qwen2"
    tokenizer = byte_level((QWEN2,), ignore_merges=True, size=400)
    described = json.loads(tokenizer.backend_tokenizer.to_str())
    described["model"]["merges"].pop()
    tokenizer._tokenizer = type(tokenizer._tokenizer).from_str(json.dumps(described))
    with pytest.raises(InputError, match="ignore_merges is True in the tokenizer and False in"):
        written(tokenizer, tmp_path / "b")


def test_normalizers(tmp_path: Path) -> None:
    tokenizer = byte_level((QWEN2,), size=400)
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    with pytest.warns(MoeifyWarning, match="NFC"):
        assert written(tokenizer, tmp_path / "a")["ggml.pre"] == "qwen2"
    tokenizer.backend_tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    with pytest.raises(InputError, match="changes texts before it cuts them: NFC and Lowercase"):
        written(tokenizer, tmp_path / "b")


def test_sentencepiece_gets_scores(tmp_path: Path) -> None:
    tokenizer = sentencepiece()
    values = written(tokenizer, tmp_path / "model")
    assert (values["ggml.model"], values["ggml.pre"]) == ("llama", "default")
    assert "ggml.merges" not in values
    assert values["ggml.add_space_prefix"]
    assert values["ggml.token_type"][:4] == [TokenType.UNKNOWN, TokenType.CONTROL, TokenType.CONTROL, TokenType.BYTE]
    tokens, scores = values["ggml.tokens"], values["ggml.scores"]
    # The order of scores is that of merges.
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    made = list(dict.fromkeys(left + right for left, right in merges))
    assert sorted(made, key=lambda token: -scores[tokens.index(token)]) == made
    assert scores[1] < min(scores[tokens.index(token)] for token in made)
    assert not written(sentencepiece(prefix=False), tmp_path / "plain")["ggml.add_space_prefix"]


def test_sentencepiece_that_llama_cpp_would_cut_otherwise(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"the tokenizer does not merge .*, llama\.cpp would"):
        written(sentencepiece(complete=False), tmp_path / "a")
    tokenizer = sentencepiece()
    tokenizer.backend_tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(" ", SPACE)])
    with pytest.raises(InputError, match=r"spaces as the tokenizer does: .*NFKC"):
        written(tokenizer, tmp_path / "b")
    tokenizer.backend_tokenizer.normalizer = None
    with pytest.raises(InputError, match=r"llama\.cpp does nothing with spaces"):
        written(tokenizer, tmp_path / "c")
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    with pytest.warns(MoeifyWarning, match="a text that begins with a space or follows a special token"):
        assert written(tokenizer, tmp_path / "d")["ggml.add_space_prefix"]
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
    assert not written(tokenizer, tmp_path / "e")["ggml.add_space_prefix"]


def test_special_tokens_and_what_is_put_around_a_text(tmp_path: Path) -> None:
    tokenizer = sentencepiece(pad_token="</s>", chat_template=TEMPLATE)
    values = written(tokenizer, tmp_path / "model", eos_token_id=[2, 7])
    numbers = {key.removeprefix("ggml."): value for key, value in values.items() if key.endswith("_token_id")}
    assert numbers == {
        "bos_token_id": 1,
        "eos_token_id": 2,
        "eot_token_id": 7,
        "unknown_token_id": 0,
        "padding_token_id": 2,
    }
    assert values["ggml.add_bos_token"]
    assert not values["ggml.add_eos_token"]
    assert values["chat_template"] == TEMPLATE
    plain = written(byte_level(size=300), tmp_path / "plain", pad_token_id=None)
    assert not plain["ggml.add_bos_token"]
    assert "chat_template" not in plain


def test_several_chat_templates(tmp_path: Path) -> None:
    tokenizer = byte_level(size=300)
    tokenizer.chat_template = {"default": TEMPLATE, "tool_use": TEMPLATE + "x"}
    values = written(tokenizer, tmp_path / "model")
    assert values["chat_template"] == TEMPLATE
    assert values["chat_template.tool_use"] == TEMPLATE + "x"


def test_added_tokens(tmp_path: Path) -> None:
    tokenizer = byte_level(size=300)
    tokenizer.add_tokens([AddedToken("<tool>"), AddedToken("<|x|>", rstrip=True), AddedToken("<gone>")])
    with pytest.warns(MoeifyWarning) as caught:
        values = written(tokenizer, tmp_path / "model", padding=-1)
    said = " ".join(str(one.message) for one in caught)
    assert "left out of the GGUF: '<gone>', which the model with 302 tokens has no embedding for" in said
    assert "keeps spaces beside '<|x|>'" in said
    assert values["ggml.tokens"][-2:] == ["<tool>", "<|x|>"]
    assert values["ggml.token_type"][-2:] == [TokenType.USER_DEFINED] * 2
    tokenizer = sentencepiece()
    tokenizer.add_tokens(["<tool>"])
    with pytest.warns(MoeifyWarning, match="finds '<tool>' anywhere in a text"):
        written(tokenizer, tmp_path / "pieces")


def test_a_vocabulary_is_copied_as_it_is(tmp_path: Path) -> None:
    values = written(sentencepiece(chat_template=TEMPLATE), tmp_path / "model")
    assert write(tmp_path / "copy.gguf", lambda writer: copy_vocabulary(writer, tmp_path / "model.gguf")) == values

    def strange(writer: Any) -> None:
        writer.add_token_list([b"\xff\xfe", "b"])
        writer.add_array("tokenizer.ggml.some", [1, 2])
        writer.add_bool("tokenizer.ggml.flag", True)

    write_bytes = gguf.GGUFWriter(tmp_path / "strange.gguf", "llama")
    strange(write_bytes)
    write_bytes.write_header_to_file()
    write_bytes.write_kv_data_to_file()
    write_bytes.close()
    copy = gguf.GGUFWriter(tmp_path / "second.gguf", "llama")
    copy_vocabulary(copy, tmp_path / "strange.gguf")
    copy.write_header_to_file()
    copy.write_kv_data_to_file()
    copy.close()
    assert (tmp_path / "second.gguf").read_bytes() == (tmp_path / "strange.gguf").read_bytes()


def test_files_without_a_vocabulary(tmp_path: Path) -> None:
    write(tmp_path / "empty.gguf", lambda _: None)
    with pytest.raises(InputError, match="has no tokenizer"):
        copy_vocabulary(gguf.GGUFWriter(None, "llama"), tmp_path / "empty.gguf")
    (tmp_path / "cut.gguf").write_bytes((tmp_path / "empty.gguf").read_bytes()[:20])
    with pytest.raises(InputError, match="truncated or no GGUF"):
        copy_vocabulary(gguf.GGUFWriter(None, "llama"), tmp_path / "cut.gguf")


def tokenize(file: Path, text: str) -> list[int]:
    """Ids that llama.cpp makes of a text."""
    program = Path(os.environ[LLAMA_CPP]) / "llama-tokenize"
    command = [str(program), "-m", str(file), "--stdin", "--ids", "--log-disable"]
    done = subprocess.run(command, input=text.encode(), capture_output=True, check=True)
    return [int(token) for token in json.loads(done.stdout)]


def make(name: str) -> Any:
    if name == "llama-2":
        return sentencepiece(size=1200, chat_template=TEMPLATE)
    one = next(one for one in EXACT if one.name == name)
    return byte_level(one.stages, ignore_merges=one.ignore_merges, size=1500)


@pytest.mark.skipif(LLAMA_CPP not in os.environ, reason=f"{LLAMA_CPP} names no folder with llama.cpp's llama-tokenize")
@pytest.mark.parametrize("name", ["llama-2", *(one.name for one in EXACT)])
def test_llama_cpp_makes_the_same_tokens(name: str, tmp_path: Path) -> None:
    tokenizer = make(name)
    written(tokenizer, tmp_path / "model")
    for text in (*probe_texts(tokenizer), *MORE_TEXTS):
        if text:
            assert tokenize(tmp_path / "model.gguf", text) == tokenizer(text)["input_ids"], text
