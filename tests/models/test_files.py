"""Names stay inside a model's folder, shards of any content are refused, and a file that changes is noticed."""

import json
import os
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MakeDense
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from moeify.errors import InputError
from moeify.models.dense import DenseModel, open_dense
from moeify.models.files import INDEX_FILE, SINGLE_FILE, find_shards, inside

EMBEDDING = "model.embed_tokens.weight"


@pytest.fixture
def dense(make_dense: MakeDense, tmp_path: Path) -> Path:
    """A llama that a test may damage."""
    return Path(shutil.copytree(make_dense("llama"), tmp_path / "dense"))


def change(folder: Path, **tensors: torch.Tensor | None) -> None:
    """Replace tensors of the single file, by name; None removes one."""
    changed: dict[str, Any] = {**load_file(folder / SINGLE_FILE), **tensors}
    (folder / SINGLE_FILE).unlink()
    kept = {name: tensor for name, tensor in changed.items() if tensor is not None}
    save_file(kept, folder / SINGLE_FILE, metadata={"format": "pt"})


def raw(tensors: object, data: bytes = bytes(64), length: int | None = None) -> bytes:
    """A safetensors file of any header."""
    header = tensors if isinstance(tensors, bytes) else json.dumps(tensors).encode()
    return struct.pack("<Q", len(header) if length is None else length) + header + data


@pytest.mark.parametrize("name", ["a.safetensors", "a/b.json", "\u00e9 \u2028.json", "..a", "-o"])
def test_names_inside(tmp_path: Path, name: str) -> None:
    assert inside(tmp_path, name) == tmp_path / name


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", "/etc/passwd", "../x", "a/../../x", "a//b", "a\\b", "a\0b", "x" * 300, "\ud800", None, 3, ["a"]],
)
def test_names_that_lead_out(tmp_path: Path, name: Any) -> None:
    with pytest.raises(InputError, match="not the name of a file inside") as caught:
        inside(tmp_path, name)
    assert "\0" not in str(caught.value)


def test_links(tmp_path: Path) -> None:
    """Inside the folder, and from a snapshot of the hub's cache to its blobs, but nowhere else."""
    hub = tmp_path / "models--org--name"
    snapshot, blobs = hub / "snapshots" / "0123abcd", hub / "blobs"
    for folder in (snapshot, blobs, tmp_path / "snapshots" / "evil"):
        folder.mkdir(parents=True)
    (blobs / "hash").touch()
    (snapshot / "weights").symlink_to("../../blobs/hash")
    (snapshot / "again").symlink_to("weights")
    (snapshot / "up").symlink_to("../../refs")
    (snapshot / "loop").symlink_to("loop")
    (snapshot / "away").symlink_to("/etc/hostname")
    assert inside(snapshot, "weights").samefile(blobs / "hash")
    assert inside(snapshot, "again").samefile(blobs / "hash")
    # A folder that is reached through a link is the user's own choice.
    (tmp_path / "link").symlink_to(snapshot)
    assert inside(tmp_path / "link", "weights").samefile(blobs / "hash")
    for name, pattern in (("up", "outside"), ("away", "/etc/hostname"), ("loop", "nowhere|is missing|outside")):
        with pytest.raises(InputError, match=pattern):
            find_shards_of(snapshot, name)
    # Blobs that are a link themselves lead away.
    (tmp_path / "blobs").symlink_to("/etc")
    (tmp_path / "snapshots" / "evil" / "x").symlink_to("/etc/hostname")
    with pytest.raises(InputError, match="outside"):
        inside(tmp_path / "snapshots" / "evil", "x")


def find_shards_of(folder: Path, name: str) -> None:
    (folder / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": {"a": name}}))
    find_shards(folder)


@pytest.mark.parametrize(
    "name",
    ["../outside.safetensors", "/etc/shadow", "", ".", "sub/x.safetensors", "a\\b", 5, None, ["a"], {}, "\x1b[2J"],
)
def test_index_that_names_anything(dense: Path, tmp_path: Path, name: Any) -> None:
    (dense / SINGLE_FILE).rename(tmp_path / "outside.safetensors")
    with pytest.raises(InputError) as caught:
        find_shards_of(dense, name)
    assert caught.value.hint
    assert "\x1b" not in str(caught.value)


@pytest.mark.parametrize(
    "content", ["{}", '{"metadata": {}, "weight_map": {}}', "[" * 100_000, "\ud800", "null", '"x"']
)
def test_index_of_any_content(dense: Path, content: str) -> None:
    (dense / SINGLE_FILE).unlink()
    (dense / INDEX_FILE).write_bytes(content.encode(errors="surrogatepass"))
    with pytest.raises(InputError, match="index"):
        find_shards(dense)


@pytest.mark.parametrize(
    "content",
    [
        raw({}, b"", length=2**63),
        raw({}, b"", length=99_000_000),
        raw(b"\xff\xfe"),
        raw(b"[" * 100_000),
        raw({"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 8]}}),
        raw({"a": {"dtype": "F32", "shape": [2**62, 8], "data_offsets": [0, 64]}}),
        raw({"a": {"dtype": "F32", "shape": [-4], "data_offsets": [0, 16]}}),
        raw({"a": {"dtype": "F99", "shape": [16], "data_offsets": [0, 64]}}),
        raw({"a": {"dtype": "F32", "shape": [16], "data_offsets": [64, 0]}}),
        raw({n: {"dtype": "F32", "shape": [16], "data_offsets": [0, 64]} for n in "ab"}),
        raw({"a": {"dtype": "F32", "shape": [8], "data_offsets": [0, 32]}}),
        raw({"a": 3}),
        raw({"__metadata__": 3}),
    ],
)
def test_shard_of_any_content(dense: Path, content: bytes) -> None:
    (dense / SINGLE_FILE).write_bytes(content)
    with pytest.raises(InputError, match=SINGLE_FILE):
        open_dense(str(dense))


@pytest.mark.parametrize(
    ("tensor", "pattern"),
    [
        (torch.tensor(1.0), r"has shape \[\]"),
        (torch.zeros(0), r"has shape \[0\]"),
        (torch.zeros(0, 32), r"has shape \[0, 32\]"),
        (torch.zeros(384, 32, dtype=torch.float64), "stored as F64"),
        (torch.zeros(384, 32, dtype=torch.int8), "stored as I8"),
        (torch.zeros(384, 32, dtype=torch.bool), "stored as BOOL"),
        (None, "1 tensors of llama are missing"),
    ],
)
def test_tensors_that_do_not_fit(dense: Path, tensor: torch.Tensor | None, pattern: str) -> None:
    change(dense, **{EMBEDDING: tensor})
    with pytest.raises(InputError, match=pattern):
        open_dense(str(dense))


def test_tensor_in_two_shards(dense: Path) -> None:
    shutil.copy(dense / SINGLE_FILE, dense / "b.safetensors")
    (dense / SINGLE_FILE).rename(dense / "a.safetensors")
    (dense / INDEX_FILE).write_text(
        json.dumps({"metadata": {}, "weight_map": {"x": "a.safetensors", "y": "b.safetensors"}})
    )
    with pytest.raises(InputError, match=r"is in a\.safetensors and in b\.safetensors"):
        find_shards(dense)


def test_a_single_file_wins_over_an_index_as_in_transformers(make_dense: MakeDense, dense: Path) -> None:
    shutil.copy(make_dense("llama", seed=5) / SINGLE_FILE, dense / "model-00001-of-00001.safetensors")
    weight_map = dict.fromkeys(load_file(dense / SINGLE_FILE), "model-00001-of-00001.safetensors")
    (dense / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    stock = AutoModelForCausalLM.from_pretrained(dense).get_input_embeddings().weight
    assert torch.equal(open_dense(str(dense)).get([EMBEDDING])[EMBEDDING], stock)
    (dense / "model-00001-of-00001.safetensors").unlink()
    assert open_dense(str(dense)).stored[EMBEDDING].file == dense / SINGLE_FILE


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_adapters_are_refused(dense: Path, name: str) -> None:
    (dense / name).write_text("{}")
    with pytest.raises(InputError, match=f"holds an adapter .{name}") as caught:
        find_shards(dense)
    assert "merge_and_unload" in caught.value.hint


def test_parts_of_a_distributed_training_are_refused(dense: Path) -> None:
    (dense / "shard-00001-model-00001-of-00002.safetensors").touch()
    with pytest.raises(InputError, match="distributed training"):
        find_shards(dense)


def test_only_an_index_of_pickles(dense: Path) -> None:
    (dense / SINGLE_FILE).unlink()
    (dense / "pytorch_model.bin.index.json").write_text("{}")
    with pytest.raises(InputError, match=r"only pytorch_model\.bin\.index\.json, which is a pickle"):
        find_shards(dense)


def rewrite(file: Path, at: int) -> None:
    """Change a byte; size and times stay."""
    stat = file.stat()
    content = bytearray(file.read_bytes())
    content[at] ^= 1
    file.write_bytes(content)
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def last_tensor(model: DenseModel) -> int:
    """Where the last tensor of the single file begins."""
    content = (model.path / SINGLE_FILE).read_bytes()
    (length,) = struct.unpack_from("<Q", content)
    tensors = json.loads(content[8 : 8 + length])
    return int(8 + length + max(tensor["data_offsets"][0] for name, tensor in tensors.items() if name[0] != "_"))


def test_a_model_that_does_not_change(dense: Path, tmp_path: Path) -> None:
    """Touched by readers, linked, copied with its times: the same model."""
    model = open_dense(str(dense))
    model.get([EMBEDDING])
    os.link(dense / SINGLE_FILE, tmp_path / "backup")
    (dense / "README.md").write_text("new")
    model.check_unchanged()
    copy = shutil.copytree(dense, tmp_path / "copy", copy_function=shutil.copy2)
    assert open_dense(str(copy)).fingerprint() == model.fingerprint()


CHANGED = [
    "header of the same size and time",
    "tensor of the same size and time",
    "config.json",
    "tokenizer.json",
    "gone",
]


@pytest.mark.parametrize("name", [SINGLE_FILE, *CHANGED])
def test_a_model_that_changes_while_it_is_read(dense: Path, name: str) -> None:
    model = open_dense(str(dense))
    before = model.fingerprint()
    if name == "gone":
        (dense / SINGLE_FILE).unlink()
    elif "header" in name:
        rewrite(dense / SINGLE_FILE, 20)
    elif "tensor" in name:
        rewrite(dense / SINGLE_FILE, last_tensor(model))
    else:
        with (dense / name).open("ab") as file:
            file.write(b" ")
    with pytest.raises(InputError, match=name if "." in name else SINGLE_FILE) as caught:
        model.check_unchanged()
    assert "again" in caught.value.hint
    # What was opened stays what results are named by.
    assert model.fingerprint() == before
