"""Text sources and the token blocks drawn from them."""

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from pyarrow import parquet
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from moeify.data import documents, lines, text
from moeify.data.documents import read_documents
from moeify.data.text import calibration_blocks, evaluation_tokens, split_document
from moeify.errors import InputError, MoeifyWarning, UsageError


def word_tokenizer(*, eos: bool) -> PreTrainedTokenizerFast:
    """One token a word: `w17` is id 17, so that a test sees from the ids where they come from."""
    words = {f"w{number}": number for number in range(20_000)} | {"<eos>": 20_000, "<unk>": 20_001}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"eos_token": "<eos>"} if eos else {}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", model_max_length=16, **special)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return word_tokenizer(eos=True)


def words(start: int, stop: int) -> str:
    return " ".join(f"w{number}" for number in range(start, stop))


def write_lines(path: Path, *records: object) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def write_parquet(path: Path, **columns: list[Any]) -> str:
    parquet.write_table(pa.table(columns), path)
    return str(path)


CHAT = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]}


# Reading


def test_text_file_is_one_document_a_page(tmp_path: Path) -> None:
    path = tmp_path / "book.rst"
    path.write_bytes(b"\xef\xbb\xbfone\n\nstill one\ftwo \xc3\xa9\f \n")
    assert list(read_documents(str(path))) == ["one\n\nstill one", "two \u00e9"]


def test_json_lines_with_texts_chats_and_blanks(tmp_path: Path) -> None:
    parts = {"messages": [{"content": [{"type": "text", "text": "see"}, {"type": "image"}]}, {"content": None}]}
    path = tmp_path / "data.jsonl"
    source = write_lines(path, {"text": "one"}, CHAT, {"text": None}, {"text": " "}, parts)
    path.write_text("\n" + path.read_text())
    assert [document.strip() for document in read_documents(source)] == ["one", "hi\n\nhello", "see"]


def test_json_array_and_json_with_one_object_a_line(tmp_path: Path) -> None:
    (tmp_path / "array.json").write_text(json.dumps([{"text": "one"}, CHAT]))
    lines = write_lines(tmp_path / "lines.json", {"text": "one"}, CHAT)
    assert list(read_documents(str(tmp_path / "array.json"))) == ["one", "hi\n\nhello"]
    assert list(read_documents(lines)) == ["one", "hi\n\nhello"]


def test_parquet_with_text_or_messages(tmp_path: Path) -> None:
    numbers = list(range(600))
    source = write_parquet(tmp_path / "a.parquet", text=[f"w{number}" for number in numbers], other=numbers)
    assert list(read_documents(source)) == [f"w{number}" for number in numbers]
    source = write_parquet(tmp_path / "b.parquet", messages=[CHAT["messages"], None])
    assert list(read_documents(source)) == ["hi\n\nhello"]


def test_folder_is_read_in_sorted_order_without_hidden_and_foreign_files(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / ".git").mkdir()
    (tmp_path / "b.txt").write_text("b")
    (tmp_path / "a.md").write_text("a")
    (tmp_path / "sub" / "c.txt").write_text("c")
    (tmp_path / ".git" / "d.txt").write_text("d")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\0")
    assert list(read_documents(str(tmp_path))) == ["a", "b", "c"]


def test_builtin_sources_are_two_different_texts() -> None:
    training, heldout = set(read_documents("builtin")), set(read_documents("builtin-heldout"))
    assert sum(map(len, training)) > sum(map(len, heldout)) > 40_000
    assert not training & heldout


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"abc\0def", "is not text: byte 3 is NUL"),
        (b"a" * 1500 + b"\xff\xfe", "is not UTF-8 text: byte 1,500 is 0xff"),
    ],
)
@pytest.mark.parametrize("name", ["x.txt", "x.bin"])
def test_binary_files_name_the_byte(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(InputError, match=re.escape(f"{path} {message}")):
        list(read_documents(str(path)))


def test_json_lines_errors_name_line_and_byte(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    source = write_lines(path, {"text": "one"}, {"content": "two", "id": 2})
    with pytest.raises(InputError, match=r"x.jsonl, line 2 has no \"text\" .* keys content, id"):
        list(read_documents(source))
    path.write_text('{"text": "one"}\n\n{"text": \n')
    with pytest.raises(InputError, match=r"x.jsonl, line 3 is not JSON: .*column 9"):
        list(read_documents(source))
    path.write_bytes(b'{"text": "one"}\n{"text": "\xe9"}\n')
    with pytest.raises(InputError, match="byte 26 is 0xe9"):
        list(read_documents(source))
    write_lines(path, "bare string")
    with pytest.raises(InputError, match=r"line 1 .* but str"):
        list(read_documents(source))
    write_lines(path, {"messages": [{"content": 7}]})
    with pytest.raises(InputError, match="line 1 has a message whose content is int"):
        list(read_documents(source))


def test_json_array_error_names_the_item(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text(json.dumps([{"text": "one"}, {}]))
    with pytest.raises(InputError, match=r"item 2 .* but keys none"):
        list(read_documents(str(path)))


def test_parquet_errors(tmp_path: Path) -> None:
    source = write_parquet(tmp_path / "x.parquet", body=["one"], id=[1])
    with pytest.raises(InputError, match="no column text or messages, only body, id"):
        list(read_documents(source))
    good = Path(write_parquet(tmp_path / "y.parquet", text=["one"] * 1000)).read_bytes()
    for broken in (b"not parquet", good[:-20], good[: len(good) // 2]):
        (tmp_path / "y.parquet").write_bytes(broken)
        with pytest.raises(InputError, match=r"y.parquet is not a readable parquet file"):
            list(read_documents(str(tmp_path / "y.parquet")))


def test_what_is_neither_file_nor_folder_is_no_text() -> None:
    with pytest.raises(InputError, match="/dev/null is neither a file nor a folder"):
        read_documents("/dev/null")


def test_missing_file_names_the_closest_and_the_kinds(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text("{}")
    with pytest.raises(InputError, match=r"no text source .*trian.jsonl") as caught:
        read_documents(str(tmp_path / "trian.jsonl"))
    assert f"did you mean {tmp_path / 'train.jsonl'}?" in caught.value.hint
    assert "parquet" in caught.value.hint
    with pytest.raises(InputError) as caught:
        read_documents("bultin")
    assert "did you mean builtin?" in caught.value.hint


def test_a_path_in_an_existing_folder_is_not_looked_up_on_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(documents, "_read_hub", pytest.fail)
    (tmp_path / "data").mkdir()
    for source in ("data/train", "nowhere/train.txt"):
        with pytest.raises(InputError, match=f"no text source {source}"):
            read_documents(source)


def test_empty_folder_and_self(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no text file") as caught:
        read_documents(str(tmp_path))
    assert ".parquet" in caught.value.hint
    with pytest.raises(UsageError, match="self can only calibrate"):
        read_documents("self")


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("org/name", ("org/name", None, "train")),
        ("org/name:small", ("org/name", "small", "train")),
        ("org/name:small:test", ("org/name", "small", "test")),
        ("org/na.me::validation", ("org/na.me", None, "validation")),
    ],
)
def test_hub_source_streams_the_named_config_and_split(
    monkeypatch: pytest.MonkeyPatch, source: str, expected: tuple[str, str | None, str]
) -> None:
    calls = []

    def load_dataset(name: str, config: str | None, *, split: str, streaming: bool) -> Iterator[dict[str, Any]]:
        calls.append((name, config, split))
        assert streaming
        yield {"text": "one"}
        yield CHAT
        raise AssertionError("read further than asked")

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    documents = read_documents(source)
    assert [next(documents), next(documents)] == ["one", "hi\n\nhello"]
    assert calls == [expected]


@pytest.mark.parametrize(
    "error", [ConnectionError("no route\nsecond line"), ValueError("no route"), KeyError("no route")]
)
def test_unreachable_hub_is_an_input_error(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def load_dataset(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    with pytest.raises(InputError, match=r"cannot load org/name from the hub: '?no route'?$") as caught:
        list(read_documents("org/name"))
    assert "builtin" in caught.value.hint


def test_hub_record_without_text_keeps_its_own_message(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: [{"question": "one"}])
    with pytest.raises(InputError, match=r"org/name, row 1 .* keys question"):
        list(read_documents("org/name"))


# Pieces


def test_pieces_lose_nothing_and_break_before_white_space() -> None:
    document = words(0, 20_000)
    pieces = list(split_document(document))
    assert "".join(pieces) == document
    assert max(map(len, pieces)) <= 20_000
    assert all(piece.startswith(" ") for piece in pieces[1:])
    assert list(split_document("")) == [""]


def test_pieces_of_a_text_without_white_space() -> None:
    assert [len(piece) for piece in split_document("x" * 45_000)] == [20_000, 20_000, 5_000]


# Calibration blocks


@pytest.fixture(scope="module")
def line_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word, and one a line break."""
    words = {f"w{number}": number for number in range(20_000)} | {"<unk>": 20_000, "\n": 20_001}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    breaks = [pre_tokenizers.Split(" ", "removed"), pre_tokenizers.Split("\n", "isolated")]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(breaks)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


def drawn_in_order(path: Path, tokenizer: PreTrainedTokenizerFast, num_tokens: int) -> list[int]:
    """A text of one piece, as one block."""
    blocks = calibration_blocks([str(path)], tokenizer, num_tokens=num_tokens, context=num_tokens, seed=0)
    return list(blocks.ids_BC[0].tolist())


@pytest.mark.parametrize("between", ["\n", "\n\n"])
def test_a_sixth_of_the_text_has_its_long_lines_broken(
    tmp_path: Path, line_tokenizer: PreTrainedTokenizerFast, between: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lines, "STRETCH_CHARACTERS", 840)
    paragraphs = [words(first, first + 140) for first in range(1000, 3800, 140)]
    broken = list(paragraphs)
    # A paragraph has 839 characters, so that one begins in each last stretch. 72 and 76 characters are 12 words.
    for number, line_words in ((5, 12), (11, 11), (17, 12)):
        first, stop = 1000 + 140 * number, 1140 + 140 * number
        parts = [words(start, min(start + line_words, stop)) for start in range(first, stop, line_words)]
        # Where paragraphs follow each other at once, a blank line goes behind one of several lines.
        broken[number] = "\n".join(parts) + ("\n" if between == "\n" else "")
    (tmp_path / "a.txt").write_text(between.join(paragraphs))
    expected = line_tokenizer(between.join(broken))["input_ids"]
    assert expected.count(20_001) == 19 * len(between) + 11 + 12 + 11 + (3 if between == "\n" else 0)
    assert drawn_in_order(tmp_path / "a.txt", line_tokenizer, len(expected)) == expected


def test_a_short_draw_and_the_first_stretches_stay(tmp_path: Path, line_tokenizer: PreTrainedTokenizerFast) -> None:
    joined = "\n".join(words(first, first + 140) for first in range(1000, 3800, 140))
    (tmp_path / "a.txt").write_text(joined)
    expected = line_tokenizer(joined)["input_ids"]
    assert drawn_in_order(tmp_path / "a.txt", line_tokenizer, len(expected)) == expected


def test_code_tables_short_and_endless_lines_stay(
    tmp_path: Path, line_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lines, "STRETCHES", 1)
    numbers = [f"w{number}" for number in range(1000, 1030)]
    kinds = [
        "  " + " ".join(numbers),
        "\t".join(numbers),
        "".join(numbers),
        " ".join(numbers[:15]),
        "",
        words(1000, 1700),
    ]
    joined = "\n".join([words(1000, 1015)] * 50 + kinds * 2)
    (tmp_path / "a.txt").write_text(joined)
    expected = line_tokenizer(joined)["input_ids"]
    assert drawn_in_order(tmp_path / "a.txt", line_tokenizer, len(expected)) == expected


def test_exact_block_count_and_provenance(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    source = write_lines(tmp_path / "a.jsonl", *({"text": words(10 * n, 10 * n + 10)} for n in range(100)))
    blocks = calibration_blocks([source], tokenizer, num_tokens=170, context=16, seed=3)
    assert blocks.ids_BC.shape == (10, 16)
    assert blocks.ids_BC.dtype == torch.int64
    digest = hashlib.sha256(blocks.ids_BC.numpy().tobytes()).hexdigest()
    # 160 tokens are 14.5 documents of ten words and an end.
    assert asdict(blocks.provenance) == {
        "source": source,
        "sha256": digest,
        "num_tokens": 160,
        "num_documents": 15,
        "context": 16,
        "seed": 3,
    }


def test_same_seed_same_ids_and_another_seed_others(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    documents = [{"text": words(10 * n, 10 * n + 10)} for n in range(200)]
    source = write_lines(tmp_path / "a.jsonl", *documents)
    copy = write_lines(tmp_path / "b.jsonl", *documents)

    def draw(source: str, seed: int) -> text.TokenBlocks:
        return calibration_blocks([source], tokenizer, num_tokens=320, context=32, seed=seed)

    first, again, other = draw(source, 0), draw(copy, 0), draw(source, 1)
    assert torch.equal(first.ids_BC, again.ids_BC)
    assert first.provenance.sha256 == again.provenance.sha256
    assert not torch.equal(first.ids_BC, other.ids_BC)
    assert first.provenance.sha256 != other.provenance.sha256
    # Not the first documents of the file, and not only its end either.
    assert first.ids_BC[first.ids_BC < 20_000].float().mean().item() == pytest.approx(1000, abs=300)


def test_documents_are_joined_by_eos_if_there_is_one(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    source = write_lines(tmp_path / "a.jsonl", *({"text": words(10 * n, 10 * n + 10)} for n in range(20)))
    drawn = calibration_blocks([source], tokenizer, num_tokens=220, context=11, seed=0).ids_BC
    assert drawn[:, -1].tolist() == [20_000] * 20
    assert (drawn[:, :-1] < 20_000).all()
    drawn = calibration_blocks([source], word_tokenizer(eos=False), num_tokens=200, context=10, seed=0).ids_BC
    assert sorted(drawn.flatten().tolist()) == list(range(200))


def test_sources_give_equal_shares_and_are_mixed(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    low = tmp_path / "low.txt"
    low.write_text(words(0, 500))
    high = tmp_path / "high.txt"
    high.write_text(words(10_000, 10_500))
    drawn = calibration_blocks([str(low), str(high)], tokenizer, num_tokens=8 * 9, context=8, seed=0)
    from_high = (drawn.ids_BC[:, 0] >= 10_000).tolist()
    assert sum(from_high) == 4
    assert len(from_high) == 9
    assert from_high != sorted(from_high)
    assert drawn.provenance.source == f"{low} + {high}"
    assert drawn.provenance.num_documents == 2


def test_one_long_document_gives_blocks_from_all_over(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """A book of 20,000 words is six pieces; 80 blocks of 8 must not be one stretch of it."""
    book = tmp_path / "book.txt"
    book.write_text(words(0, 20_000))
    drawn = calibration_blocks([str(book)], tokenizer, num_tokens=640, context=8, seed=0).ids_BC
    ids = sorted(token for token in drawn.flatten().tolist() if token < 20_000)
    stretches, length = [], 1
    for before, after in pairwise(ids):
        if after == before + 1:
            length += 1
        else:
            stretches.append(length)
            length = 1
    stretches.append(length)
    assert len(stretches) == 5
    assert max(stretches) == 16 * 8
    assert drawn.shape == (80, 8)


def test_long_document_is_used_up_when_there_is_nothing_else(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    book = tmp_path / "book.txt"
    book.write_text(words(0, 3000))
    # 3,000 words are 24 runs of at most 128, each with an end.
    drawn = calibration_blocks([str(book)], tokenizer, num_tokens=3024, context=8, seed=0)
    assert sorted(token for token in drawn.ids_BC.flatten().tolist() if token < 20_000) == list(range(3000))
    assert drawn.provenance.num_documents == 1
    with pytest.raises(InputError, match="gives 3,024 tokens, 3,032 were asked for") as caught:
        calibration_blocks([str(book)], tokenizer, num_tokens=3032, context=8, seed=0)
    assert caught.value.hint == "--tokens 3024"


def test_a_short_source_gives_all_it_has_and_the_others_more(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    sources = []
    for name, first, num_words in (("a", 0, 5000), ("b", 6000, 1233), ("c", 8000, 1500)):
        (tmp_path / f"{name}.txt").write_text(words(first, first + num_words))
        sources.append(str(tmp_path / f"{name}.txt"))

    def draw(num_tokens: int) -> text.TokenBlocks:
        return calibration_blocks(sources, tokenizer, num_tokens=num_tokens, context=100, seed=0)

    even = draw(3600)
    assert even.ids_BC.shape == (36, 100)
    with pytest.warns(
        MoeifyWarning, match=r"b\.txt \(1,2\d\d\), .*c\.txt \(1,5\d\d\) gives all its tokens, and the other"
    ):
        uneven = draw(5000)
    assert uneven.ids_BC.shape == (50, 100)
    of_b = ((uneven.ids_BC >= 6000) & (uneven.ids_BC < 8000)).sum()
    assert 1150 < of_b < 1250
    with pytest.raises(InputError, match="7,800 were asked for") as caught:
        draw(7800)
    works = int(caught.value.hint.removeprefix("--tokens "))
    with pytest.warns(MoeifyWarning):
        assert draw(works).ids_BC.numel() == works
    assert text.longest_text(sources, tokenizer, num_tokens=9000, context=100, seed=0) == works
    assert text.longest_text(sources, tokenizer, num_tokens=3600, context=100, seed=0) == 3600


def test_shorter_than_one_block(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    (tmp_path / "a.txt").write_text(words(0, 20))
    with pytest.raises(InputError, match="gives 21 tokens, one block has 32") as caught:
        calibration_blocks([str(tmp_path / "a.txt")], tokenizer, num_tokens=64, context=32, seed=0)
    assert "give a longer text" in caught.value.hint
    assert "--tokens" not in caught.value.hint


def test_contradicting_requests(tokenizer: PreTrainedTokenizerFast) -> None:
    def draw(*sources: str, num_tokens: int = 64) -> None:
        calibration_blocks(sources, tokenizer, num_tokens=num_tokens, context=32, seed=0)

    with pytest.raises(UsageError, match="no text source"):
        draw()
    with pytest.raises(UsageError, match="builtin is named 2 times"):
        draw("builtin", "builtin")
    with pytest.raises(UsageError, match="40 tokens make 1 blocks of 32, 2 sources need one each") as caught:
        draw("builtin", "builtin-heldout", num_tokens=40)
    assert caught.value.hint == "--tokens 64"
    with pytest.raises(UsageError, match="self needs a model"):
        draw("self")


def test_lazy_source_is_not_read_to_its_end(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text, "SHUFFLE_PIECES", 50)
    read = []

    def load_dataset(*_: object, **__: object) -> Iterator[dict[str, str]]:
        for number in range(2000):
            read.append(number)
            yield {"text": words(number, number + 9)}

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    drawn = calibration_blocks(["org/name"], tokenizer, num_tokens=1000, context=10, seed=0)
    assert drawn.provenance.num_documents == 100
    assert len(read) == 150


def test_self_source_asks_the_model(tokenizer: PreTrainedTokenizerFast) -> None:
    calls = []

    def sample(num_tokens: int, context: int, seed: int) -> Tensor:
        calls.append((num_tokens, context, seed))
        return torch.full((num_tokens // context, context), 7)

    drawn = calibration_blocks(["self", "builtin"], tokenizer, num_tokens=96, context=32, seed=5, sample=sample)
    assert calls == [(64, 32, 5)]
    assert drawn.ids_BC.shape == (3, 32)
    assert (drawn.ids_BC == 7).all(dim=1).sum() == 2


# Evaluation


def test_evaluation_reads_in_order(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    source = write_lines(tmp_path / "a.jsonl", {"text": words(0, 5)}, {"text": words(5, 8)}, {"text": words(8, 9)})
    stream = evaluation_tokens(source, tokenizer)
    assert stream.ids_T.tolist() == [0, 1, 2, 3, 4, 20_000, 5, 6, 7, 20_000, 8]
    assert (stream.provenance.num_tokens, stream.provenance.num_documents) == (11, 3)
    assert evaluation_tokens(source, word_tokenizer(eos=False)).ids_T.tolist() == list(range(9))
    short = evaluation_tokens(source, tokenizer, num_tokens=7)
    assert short.ids_T.tolist() == stream.ids_T[:7].tolist()
    assert short.provenance.num_documents == 2
    assert short.provenance.sha256 == hashlib.sha256(stream.ids_T[:7].numpy().tobytes()).hexdigest()
    assert len(evaluation_tokens(source, tokenizer, num_tokens=99).ids_T) == 11


def test_evaluation_of_a_long_document_loses_nothing(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    (tmp_path / "a.txt").write_text(words(0, 20_000))
    assert evaluation_tokens(str(tmp_path / "a.txt"), tokenizer).ids_T.tolist() == list(range(20_000))


def test_evaluation_of_nothing_is_an_error(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    (tmp_path / "a.txt").write_text("w1")
    with pytest.raises(InputError, match="gives 1 tokens, at least 2"):
        evaluation_tokens(str(tmp_path / "a.txt"), tokenizer)


def test_sample_of_a_wrong_shape_is_a_bug_and_no_user_error(tokenizer: PreTrainedTokenizerFast) -> None:
    def sample(*_: int) -> Tensor:
        return torch.zeros(1, 32)

    with pytest.raises(AssertionError):
        calibration_blocks(["self"], tokenizer, num_tokens=64, context=32, seed=0, sample=sample)
