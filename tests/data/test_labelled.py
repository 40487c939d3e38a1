"""Labelled sets: tables and folders, divided as they say or by a seed."""

from pathlib import Path

import pytest

from moeify.data.labelled import is_labelled, open_labelled
from moeify.errors import InputError


def test_a_table_is_divided_by_a_seed(tmp_path: Path) -> None:
    file = tmp_path / "set.csv"
    file.write_text(
        "text,label\n" + "".join(f'"row {i}, with a comma",{"yes" if i % 2 else "no"}\n' for i in range(20))
    )
    first, again, other = open_labelled(str(file)), open_labelled(str(file)), open_labelled(str(file), seed=1)
    assert first.classes == ("no", "yes")
    assert first.labels_N.tolist() == [0, 1] * 10
    assert first.items[3] == "row 3, with a comma"
    assert len(first.test) == 4
    assert sorted([*first.test, *first.train]) == list(range(20))
    assert first.test == again.test != other.test
    assert first.sha256 == again.sha256 == other.sha256


def test_a_table_says_itself_what_is_for_the_test(tmp_path: Path) -> None:
    file = tmp_path / "set.csv"
    file.write_text("label,split,text\na,train,x\nb,train,y\na,test,z\n")
    assert (open_labelled(str(file)).train, open_labelled(str(file)).test) == ([0, 1], [2])


def test_folders_of_classes_divided_or_not(tmp_path: Path) -> None:
    for split in ("train", "test"):
        for label in ("cold", "warm"):
            folder = tmp_path / split / label
            folder.mkdir(parents=True)
            (folder / "one.txt").write_text(f"{split} {label}")
    (tmp_path / "train" / "cold" / ".hidden").write_text("no example")
    whole = open_labelled(str(tmp_path))
    assert whole.classes == ("cold", "warm")
    assert [whole.items[number].read_text() for number in whole.test] == ["test cold", "test warm"]
    part = open_labelled(str(tmp_path / "train"))
    assert (part.classes, part.modality, len(part.items)) == (("cold", "warm"), "text", 2)


def test_a_table_of_paths_is_relative_to_itself(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("A")
    file = tmp_path / "set.csv"
    file.write_text("path,label\na.txt,x\na.txt,y\n")
    assert open_labelled(str(file)).items[0].read_text() == "A"
    file.write_text("path,label\nb.txt,x\n")
    with pytest.raises(InputError, match=r"line 2: there is no file .*b\.txt"):
        open_labelled(str(file))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"words,label\na,b\n", "expected text or path, and label"),
        (b"text,label\na,b\n", "1 classes"),
        (b"text,label\na,\n", "line 2: there is no label"),
        (b"text,label,split\na,x,train\nb,y,dev\n", "a split 'dev'"),
        (b"text,label,split\na,x,train\nb,y,\n", "of others not"),
        (b"text,label,split\na,x,train\nb,y,train\n", "no examples for the test"),
        (b"text,label\na,\xff\n", "no UTF-8 table"),
        (b"text,label\na,b\0\nc,d\n", ""),
        (b"", "has the columns none"),
    ],
)
def test_what_is_no_set_is_refused(content: bytes, message: str, tmp_path: Path) -> None:
    file = tmp_path / "set.csv"
    file.write_bytes(content)
    if message:
        with pytest.raises(InputError, match=message):
            open_labelled(str(file))
    else:
        assert len(open_labelled(str(file)).items) == 2


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    assert is_labelled(str(tmp_path / "nothing.csv"))
    assert not is_labelled("arc_easy")
    with pytest.raises(InputError, match=r"nothing\.csv"):
        open_labelled(str(tmp_path / "nothing.csv"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="0 classes"):
        open_labelled(str(tmp_path / "empty"))
