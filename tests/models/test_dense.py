"""What is wrong with a checkpoint is said before any work, with a hint; nothing is written and no code in it runs."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MakeDense
from safetensors.torch import load_file, save_file
from torch import Tensor

from moeify.convert.pipeline import split
from moeify.errors import InputError
from moeify.models.dense import DenseModel, open_dense
from moeify.models.files import locate
from moeify.options import SplitOptions

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
UP, DOWN = "model.layers.1.mlp.up_proj.weight", "model.layers.1.mlp.down_proj.weight"
EMBEDDING = "model.embed_tokens.weight"

Refused = Callable[..., InputError]
Change = Callable[[dict[str, Tensor]], None]


def tree(folder: Path) -> dict[str, str]:
    """sha256 of every file below a folder, by name."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def change_config(folder: Path, **values: Any) -> None:
    """Set keys of config.json; None removes one."""
    config = json.loads((folder / "config.json").read_text()) | values
    config = {key: value for key, value in config.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(config))


def change_weights(folder: Path, change: Change) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    (folder / WEIGHTS).unlink()
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def shard(folder: Path, count: int = 3) -> list[Path]:
    """Cut a one-file checkpoint into several, with an index."""
    tensors = load_file(folder / WEIGHTS)
    weight_map = {name: f"model-{i % count + 1:05d}-of-{count:05d}.safetensors" for i, name in enumerate(tensors)}
    for file in set(weight_map.values()):
        part = {name: tensor for name, tensor in tensors.items() if weight_map[name] == file}
        save_file(part, folder / file, metadata={"format": "pt"})
    (folder / WEIGHTS).unlink()
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return sorted(folder.glob("model-*.safetensors"))


@pytest.fixture
def dense(make_dense: MakeDense, tmp_path: Path) -> Path:
    """A llama that a test may damage."""
    return Path(shutil.copytree(make_dense("llama", intermediate_size=128), tmp_path / "dense"))


@pytest.fixture
def options(calibration_file: Path) -> SplitOptions:
    return SplitOptions(calibration=(str(calibration_file),), tokens=1024)


@pytest.fixture
def refused(tmp_path: Path, options: SplitOptions) -> Refused:
    """refused(model, pattern): `split` says so with a hint, and the disk is as it was; `late`: found while reading."""

    def check(model: Path | str, pattern: str, *, late: bool = False, **changed: Any) -> InputError:
        before = tree(tmp_path)
        with pytest.raises(InputError, match=pattern) as caught:
            split(str(model), tmp_path / "out", SplitOptions(**{**vars(options), **changed}))
        assert caught.value.exit_code == 3
        assert caught.value.hint
        assert not (tmp_path / "out").exists()
        # What is found while reading may leave an unfinished split behind, which the same command would go on with.
        after = tree(tmp_path)
        assert {name: digest for name, digest in after.items() if not (late and "out.partial" in name)} == before
        return caught.value

    return check


def test_a_whole_checkpoint_is_opened_without_reading_a_weight(dense: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DenseModel, "get", lambda *_: pytest.fail("a weight was read"))
    checkpoint = open_dense(str(dense))
    assert (checkpoint.family.model_type, checkpoint.num_layers, checkpoint.dtype) == ("llama", 2, torch.float32)
    assert checkpoint.num_parameters == sum(tensor.numel() for tensor in load_file(dense / WEIGHTS).values())


def test_get_returns_what_is_on_the_disk(dense: Path) -> None:
    expected = load_file(dense / WEIGHTS)
    found = open_dense(str(dense)).get(expected)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("kept", [0, 7, 100, -1])
def test_truncated_file(dense: Path, refused: Refused, kept: int) -> None:
    """Nothing left, half of the length field, half of the header, one byte short."""
    content = (dense / WEIGHTS).read_bytes()
    (dense / WEIGHTS).write_bytes(content[:kept])
    refused(dense, rf"{WEIGHTS} \({len(content[:kept]):,} bytes\) is truncated")


def test_truncated_shard(dense: Path, refused: Refused) -> None:
    file = shard(dense)[1]
    file.write_bytes(file.read_bytes()[:-100])
    refused(dense, rf"{file.name} .* is truncated")


def test_shard_that_is_missing(dense: Path, refused: Refused) -> None:
    file = shard(dense)[2]
    file.unlink()
    refused(dense, rf"{file.name} is missing")


@pytest.mark.parametrize("content", ["{", "[]", '{"metadata": {}}', '{"weight_map": 3}'])
def test_index_that_is_none(dense: Path, refused: Refused, content: str) -> None:
    shard(dense)
    (dense / INDEX).write_text(content)
    refused(dense, "index")


def test_tensor_that_is_missing(dense: Path, refused: Refused) -> None:
    change_weights(dense, lambda tensors: [tensors.pop(name) for name in (UP, DOWN)] and None)
    refused(dense, f"2 tensors of llama are missing, the first is {DOWN}")


def test_tensor_of_the_wrong_shape(dense: Path, refused: Refused) -> None:
    change_weights(dense, lambda tensors: tensors.update({UP: tensors[UP][:48].contiguous()}))
    refused(dense, rf"{UP} has shape \[48, 32\], config.json says \[128, 32\]")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", [DOWN, EMBEDDING, "model.norm.weight"])
def test_weights_that_are_not_finite(dense: Path, refused: Refused, name: str, value: float) -> None:
    change_weights(dense, lambda tensors: tensors[name].view(-1)[5].fill_(value) and None)
    total = load_file(dense / WEIGHTS)[name].numel()
    refused(dense, rf"{name} holds 1 NaN or infinite values of {total:,}", late=True)


@pytest.mark.parametrize("layout", ["one file", "shards"])
def test_pickles_are_never_loaded(dense: Path, refused: Refused, tmp_path: Path, layout: str) -> None:
    (dense / WEIGHTS).unlink()
    torch.save(Bomb(tmp_path / "exploded"), dense / "pytorch_model.bin")
    if layout == "shards":
        (dense / "pytorch_model.bin.index.json").write_text('{"weight_map": {"a": "pytorch_model.bin"}}')
    error = refused(dense, "only pytorch_model.bin, which is a pickle")
    assert "safetensors" in error.hint
    assert not (tmp_path / "exploded").exists()


class Bomb:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.write_text, (self.path, "")


def test_folder_without_weights(dense: Path, refused: Refused) -> None:
    (dense / WEIGHTS).unlink()
    refused(dense, f"no {WEIGHTS}")


def test_folder_without_a_config(dense: Path, refused: Refused) -> None:
    (dense / "config.json").unlink()
    refused(dense, "no config.json")


@pytest.mark.parametrize("content", ["", "{", "not json", b"\xff\xfe\x00", "5", "[]", "null", "{}"])
def test_config_that_is_none(dense: Path, refused: Refused, content: str | bytes) -> None:
    (dense / "config.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    refused(dense, "config.json")


def test_config_without_model_type(dense: Path, refused: Refused) -> None:
    change_config(dense, model_type=None)
    refused(dense, "has no model_type")


@pytest.mark.parametrize("model_type", ["bloom", "mixtral", "albert", "_layout"])
def test_family_that_is_not_supported(dense: Path, refused: Refused, model_type: str) -> None:
    change_config(dense, model_type=model_type)
    error = refused(dense, model_type)
    if model_type != "_layout":
        assert "llama" in error.hint


def test_quantised_config(dense: Path, refused: Refused) -> None:
    change_config(dense, quantization_config={"quant_method": "gptq", "bits": 4})
    refused(dense, "quantised .gptq.")


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8, torch.int64])
@pytest.mark.parametrize("name", ["model.layers.0.mlp.up_proj.weight", DOWN, EMBEDDING, "all of them"])
@pytest.mark.parametrize("asked", ["auto", "bfloat16"])
def test_weights_that_are_not_floating_point_numbers(
    dense: Path, refused: Refused, dtype: torch.dtype, name: str, asked: str
) -> None:
    """Whichever tensor it is, and whatever type the result shall have."""

    def convert(tensors: dict[str, Tensor]) -> None:
        for key, tensor in tensors.items():
            if name in (key, "all of them"):
                tensors[key] = tensor.to(dtype)

    change_weights(dense, convert)
    refused(dense, "is stored as (F8|I8|I64)", dtype=asked)


@pytest.mark.parametrize(
    "model", ["/no/such/folder", "./no-such-folder", "no-such-folder", "a/b/c", "~/no-such-folder", "x" * 300]
)
def test_path_where_nothing_is(refused: Refused, model: str) -> None:
    refused(model, f"no model at {model}")


def test_file_that_is_no_model(dense: Path, refused: Refused) -> None:
    refused(dense / "tokenizer.json", "tokenizer.json is not a model")
    (dense / "other.safetensors").write_bytes((dense / "model.safetensors").read_bytes())
    refused(dense / "other.safetensors", "other.safetensors is not one of the files of the model in")
    refused("no/model.safetensors", "no model at no/model.safetensors")


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_file_of_a_model_stands_for_its_folder(dense: Path, name: str) -> None:
    assert locate(str(dense / name)) == dense
    assert open_dense(dense / name).fingerprint() == open_dense(dense).fingerprint()


def test_hub_ids_without_a_network(tmp_path: Path) -> None:
    """In a process of its own: the hub client decides when it is imported whether it may use the network."""
    models = ["no-such-org/no-such-model", "bad..name/model--x", "org/.."]
    program = (
        "import sys; from moeify.cli.app import run_command; print([run_command(['inspect', m]) for m in sys.argv[1:]])"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    command = [sys.executable, "-c", program, *models]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stdout == "[3, 3, 3]\n", done.stderr
    for model in models:
        assert f"error: {model} is neither a local folder nor a hub model that can be reached" in done.stderr
    assert done.stderr.count("hint: check the name and the network") == len(models)


def plant_code(folder: Path, proof: Path) -> None:
    """Custom code of every kind, which leaves a proof if it runs."""
    body = f"import pathlib\npathlib.Path({str(proof)!r}).write_text('')\n"
    classes = "class Config: pass\nclass Model: pass\nclass Tokenizer: pass\n"
    (folder / "custom.py").write_text(body + classes)
    (folder / "__init__.py").write_text(body)


AUTO_MAP = {
    "AutoConfig": "custom.Config",
    "AutoModelForCausalLM": "custom.Model",
    "AutoTokenizer": ["custom.Tokenizer", None],
}


def test_code_beside_a_known_family_is_never_run(dense: Path, tmp_path: Path, options: SplitOptions) -> None:
    plant_code(dense, tmp_path / "ran")
    change_config(dense, auto_map=AUTO_MAP)
    split(str(dense), tmp_path / "out", options)
    assert not (tmp_path / "ran").exists()
    assert not list((tmp_path / "out").glob("*.py"))
    assert "auto_map" not in json.loads((tmp_path / "out" / "config.json").read_text())


def test_code_of_an_unknown_family_is_never_run(dense: Path, tmp_path: Path, refused: Refused) -> None:
    plant_code(dense, tmp_path / "ran")
    change_config(dense, auto_map=AUTO_MAP, model_type="custom")
    refused(dense, "custom")
    assert not (tmp_path / "ran").exists()


def test_code_of_a_tokenizer_is_never_run_nor_offered(
    dense: Path, tmp_path: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even asked for: an answer from a terminal or a pipe must not run what a stranger wrote."""
    plant_code(dense, tmp_path / "ran")
    (dense / "tokenizer.json").unlink()
    settings = {"tokenizer_class": "Tokenizer", "auto_map": {"AutoTokenizer": ["custom.Tokenizer", None]}}
    (dense / "tokenizer_config.json").write_text(json.dumps(settings))
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    monkeypatch.setattr("builtins.print", lambda *_, **__: pytest.fail("something was printed"))
    refused(dense, "no usable tokenizer")
    assert not (tmp_path / "ran").exists()


def test_folder_without_a_tokenizer(dense: Path, refused: Refused) -> None:
    (dense / "tokenizer.json").unlink()
    (dense / "tokenizer_config.json").unlink()
    refused(dense, "no usable tokenizer")


def test_tokenizer_of_another_model(make_dense: MakeDense, dense: Path, tmp_path: Path, refused: Refused) -> None:
    small = Path(shutil.copytree(make_dense("llama", vocab_size=200), tmp_path / "small"))
    refused(small, r"token id \d+, the model has 200 tokens")


def test_shards_are_one_checkpoint(dense: Path, tmp_path: Path, options: SplitOptions) -> None:
    """Split from three files or from one: the same weights, the same plan."""
    split(str(dense), tmp_path / "one", options)
    assert len(shard(dense)) == 3
    split(str(dense), tmp_path / "three", options)
    one, three = tree(tmp_path / "one"), tree(tmp_path / "three")
    # The record holds a fingerprint of the files.
    assert [name for name in one if one[name] != three[name]] == ["moeify.json"]


def test_tensors_that_nobody_needs_are_left_out(dense: Path, tmp_path: Path, options: SplitOptions) -> None:
    change_weights(dense, lambda tensors: tensors.update({"model.rotary_emb.inv_freq": torch.ones(4)}))
    split(str(dense), tmp_path / "out", options)
    written = json.loads((tmp_path / "out" / INDEX).read_text())["weight_map"]
    assert "model.rotary_emb.inv_freq" not in written


def test_fingerprint_is_of_the_content(dense: Path) -> None:
    shards = shard(dense)
    before = open_dense(str(dense)).fingerprint()
    assert open_dense(str(dense)).fingerprint() == before
    tensors = load_file(shards[1])
    next(iter(tensors.values())).view(-1)[0] += 1
    shards[1].unlink()
    save_file(tensors, shards[1], metadata={"format": "pt"})
    changed = open_dense(str(dense)).fingerprint()
    assert changed != before
    change_config(dense, rms_norm_eps=1e-3)
    assert open_dense(str(dense)).fingerprint() not in (before, changed)
