"""A GGUF is read alone and whole: parts, missing or unread tensors and what transformers leaves out are refused."""

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MakeDense
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from moeify.errors import InputError, MoeifyWarning
from moeify.models.dense import open_dense
from moeify.models.files import SINGLE_FILE
from moeify.models.gguf import from_gguf, read_header

gguf = pytest.importorskip("gguf")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

# What the writer of the package does beside a model's own values.
Change = Callable[[Any], None]


def rotary_order(weight_OD: Tensor, num_heads: int) -> Tensor:
    """Rows in the order llama.cpp keeps those of q and k in: it rotates neighbours, transformers rotates halves."""
    return weight_OD.unflatten(0, (num_heads, 2, -1)).transpose(1, 2).flatten(0, 2).contiguous()


def write_gguf(source: Path, file: Path, change: Change = lambda _: None, without: str = "nothing") -> None:
    """The smallest GGUF that transformers reads as a llama, with the weights and the tokenizer of `source`.

    Args:
        source: a model's folder.
        file: to write.
        change: adds values and tensors.
        without: tensors whose name begins so are left out.
    """
    config = json.loads((source / "config.json").read_text())
    tokenizer = json.loads((source / "tokenizer.json").read_text())["model"]
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(sorted(tokenizer["vocab"], key=tokenizer["vocab"].__getitem__))
    writer.add_token_types([gguf.TokenType.CONTROL] * 2 + [gguf.TokenType.NORMAL] * (config["vocab_size"] - 2))
    writer.add_token_merges([" ".join(merge) for merge in tokenizer["merges"]])
    writer.add_bos_token_id(config["bos_token_id"])
    writer.add_eos_token_id(config["eos_token_id"])
    change(writer)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    for name, tensor in load_file(source / SINGLE_FILE).items():
        rotated = next((rotary_order(tensor, count) for part, count in heads.items() if part in name), tensor)
        stored = names.get_name(name, try_suffixes=(".weight",))
        if not stored.startswith(without):
            writer.add_tensor(stored, rotated.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def file(make_dense: MakeDense, tmp_path: Path) -> Path:
    """A good one, alone in a folder."""
    (tmp_path / "gguf").mkdir()
    write_gguf(make_dense("llama"), tmp_path / "gguf" / "tiny.gguf")
    return tmp_path / "gguf" / "tiny.gguf"


@pytest.fixture
def changed(make_dense: MakeDense, tmp_path: Path) -> Callable[..., Path]:
    """changed(change, without): one with other values or tensors."""

    def make(change: Change = lambda _: None, without: str = "nothing") -> Path:
        write_gguf(make_dense("llama"), tmp_path / "changed.gguf", change, without)
        return tmp_path / "changed.gguf"

    return make


def test_gguf_is_read_through_transformers(
    make_dense: MakeDense, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = load_file(make_dense("llama") / SINGLE_FILE)
    # transformers looks for the name of a GGUF in the working folder first.
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / file.name).write_text("another file")
    monkeypatch.chdir(tmp_path / "elsewhere")
    checkpoint = open_dense(str(file))
    assert checkpoint.dtype == torch.float32
    found = checkpoint.get(checkpoint.shapes)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    ids = torch.arange(40).view(1, -1)
    with torch.no_grad():
        logits = [
            AutoModelForCausalLM.from_pretrained(path)(ids).logits for path in (checkpoint.path, make_dense("llama"))
        ]
    assert torch.equal(*logits)
    assert str(tmp_path / "gguf") not in (checkpoint.path / "config.json").read_text()
    # The folder around it is a model as well, a copy is the same one, and it is converted only once.
    monkeypatch.setattr("moeify.models.gguf.load_gguf", lambda *_: pytest.fail("converted again"))
    assert open_dense(str(file.parent)).path == checkpoint.path
    assert from_gguf(Path(shutil.copy2(file, tmp_path / "copy.gguf"))) == checkpoint.path


def test_the_cached_folder_is_of_the_content(file: Path) -> None:
    before, stat = from_gguf(file), file.stat()
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert from_gguf(file) != before


def test_nothing_beside_it_is_read_nor_asked_for(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (file.parent / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Tok: pass\nclass Model: pass\n")
    evil = {"tokenizer_class": "EvilTok", "auto_map": {"AutoTokenizer": ["evil.Tok", "evil.Tok"]}}
    (file.parent / "tokenizer_config.json").write_text(json.dumps(evil))
    (file.parent / "adapter_config.json").write_text('{"base_model_name_or_path": "evil/model"}')
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a question was asked"))
    model = open_dense(str(file.parent))
    assert model.tokenizer()("a b").input_ids
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("kept", [0, 3, 60, -200])
def test_truncated(file: Path, kept: int) -> None:
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(InputError, match=r"tiny\.gguf") as caught:
        open_dense(str(file))
    assert caught.value.hint


def text(content: bytes) -> bytes:
    return struct.pack("<Q", len(content)) + content


HUGE = 2**62
ARCHITECTURE = text(b"general.architecture") + struct.pack("<I", 8) + text(b"llama")


@pytest.mark.parametrize(
    "content",
    [
        b"GGML" + bytes(60),
        struct.pack("<4sIQQ", b"GGUF", 1, 0, 0),
        struct.pack(">4sIQQ", b"GGUF", 3, 0, 1),
        struct.pack("<4sIQQ", b"GGUF", 3, HUGE, 0),
        struct.pack("<4sIQQ", b"GGUF", 3, 0, HUGE) + bytes(1000),
        struct.pack("<4sIQQ", b"GGUF", 3, 0, 1) + struct.pack("<Q", HUGE),
        struct.pack("<4sIQQ", b"GGUF", 3, 0, 1) + text(b"a") + struct.pack("<I", 99),
        struct.pack("<4sIQQ", b"GGUF", 3, 0, 1) + text(b"a") + struct.pack("<IIQ", 9, 0, HUGE),
        struct.pack("<4sIQQ", b"GGUF", 3, 0, 1) + text(b"a") + struct.pack("<IIQ", 9, 8, HUGE) + bytes(1000),
        struct.pack("<4sIQQ", b"GGUF", 3, 0, 1) + text(b"a") + struct.pack("<IIQ", 9, 9, 1) + bytes(1000),
        struct.pack("<4sIQQ", b"GGUF", 3, 1, 0) + text(b"a") + struct.pack("<I", 2**31),
        struct.pack("<4sIQQ", b"GGUF", 3, 1, 0) + text(b"a") + struct.pack("<IQIQ", 1, 4, 0, HUGE),
        struct.pack("<4sIQQ", b"GGUF", 3, 0, 0),
        struct.pack("<4sIQQ", b"GGUF", 3, 0, 1) + ARCHITECTURE,
    ],
)
def test_header_of_any_content(tmp_path: Path, content: bytes) -> None:
    """Said at once, whatever lengths are announced."""
    (tmp_path / "any.gguf").write_bytes(content)
    with pytest.raises(InputError, match=r"any\.gguf") as caught:
        open_dense(str(tmp_path / "any.gguf"))
    assert caught.value.hint


def test_header(file: Path) -> None:
    header = read_header(file)
    assert header.own["block_count"] == 2
    assert header.metadata["tokenizer.ggml.tokens"] == 384
    assert header.shapes["blk.1.ffn_down.weight"] == (64, 32)
    assert len(header.samples) == len(header.shapes)


def test_one_of_several_parts(changed: Callable[..., Path]) -> None:
    with pytest.raises(InputError, match="one of 3 parts") as caught:
        open_dense(str(changed(lambda writer: writer.add_uint16("split.count", 3))))
    assert "llama-gguf-split --merge" in caught.value.hint


def test_folder_of_several(file: Path) -> None:
    shutil.copy(file, file.with_name("b\x1b.gguf"))
    with pytest.raises(InputError, match=r"holds 2 GGUF files: b\\x1b\.gguf, tiny\.gguf"):
        open_dense(str(file.parent))


def test_folder_with_a_link_that_leads_out(file: Path, tmp_path: Path) -> None:
    (tmp_path / "link").mkdir()
    (tmp_path / "link" / "a.gguf").symlink_to(file)
    with pytest.raises(InputError, match="outside of the model's folder"):
        open_dense(str(tmp_path / "link"))
    # The file itself may be named by a link.
    assert open_dense(str(tmp_path / "link" / "a.gguf")).num_layers == 2


def test_missing_tensors(changed: Callable[..., Path]) -> None:
    with pytest.raises(InputError, match=r"4 tensors of changed\.gguf .llama. are missing, .* model\.layers\.1\.mlp"):
        open_dense(str(changed(without="blk.1.ffn_")))
    with pytest.raises(InputError, match="says 2 blocks, and holds tensors of 1"):
        open_dense(str(changed(without="blk.1")))


def test_a_header_that_describes_a_huge_model(changed: Callable[..., Path]) -> None:
    """Refused before memory is taken."""

    def change(writer: Any) -> None:
        for name, value in {"embedding_length": 2**20, "feed_forward_length": 2**24}.items():
            writer.kv_data[0][f"llama.{name}"].value = value

    with pytest.raises(InputError, match=r"describes a model of [\d,]{14,} weights and holds"):
        open_dense(str(changed(change)))


def test_tensors_that_transformers_does_not_read(changed: Callable[..., Path]) -> None:
    extra = torch.ones(8, 32).numpy()
    with pytest.raises(InputError, match=r"weights, the model that transformers makes of it has"):
        open_dense(str(changed(lambda writer: writer.add_tensor("blk.0.attn_extra.weight", extra))))


ROTATIONS: dict[str, Change] = {
    "rope_freqs": lambda writer: writer.add_tensor("rope_freqs.weight", torch.ones(4).numpy()),
    "rope.scaling.type yarn": lambda writer: writer.add_rope_scaling_type(gguf.RopeScalingType.YARN),
    "rope.scaling.type linear": lambda writer: writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR),
    "rope.scaling.factor = 8": lambda writer: writer.add_rope_scaling_factor(8.0),
    "rope.scale_linear = 4": lambda writer: writer.add_float32("llama.rope.scale_linear", 4.0),
}


@pytest.mark.parametrize("name", ROTATIONS)
def test_scaled_rotary_embeddings(changed: Callable[..., Path], name: str) -> None:
    with pytest.raises(InputError, match=name) as caught:
        open_dense(str(changed(ROTATIONS[name])))
    assert "safetensors" in caught.value.hint


EFFECTS: dict[str, float] = {"attention.scale": 0.5, "logit_scale": 2.0, "final_logit_softcapping": 30.0}


@pytest.mark.parametrize("name", EFFECTS)
def test_values_that_transformers_does_not_read(changed: Callable[..., Path], name: str) -> None:
    with pytest.raises(InputError, match=f"{name} = {EFFECTS[name]}, which transformers does not read"):
        open_dense(str(changed(lambda writer: writer.add_float32(f"llama.{name}", EFFECTS[name]))))


def test_counts_that_differ(changed: Callable[..., Path]) -> None:
    with pytest.raises(InputError, match=r"attention\.value_length = 16, the config that transformers makes of it 8"):
        open_dense(str(changed(lambda writer: writer.add_value_length(16))))
    with pytest.raises(InputError, match=r"expert_count = 4"):
        open_dense(str(changed(lambda writer: writer.add_expert_count(4))))


def test_values_that_change_nothing(changed: Callable[..., Path], recwarn: pytest.WarningsRecorder) -> None:
    def change(writer: Any) -> None:
        writer.add_rope_scaling_type(gguf.RopeScalingType.NONE)
        writer.add_key_length(8)
        writer.add_float32("llama.logit_scale", 1.0)
        writer.add_uint32("llama.expert_count", 0)

    assert open_dense(str(changed(change))).num_layers == 2
    assert not [entry for entry in recwarn if entry.category is MoeifyWarning]


def named(name: str) -> Change:
    def change(writer: Any) -> None:
        writer.kv_data[0]["tokenizer.ggml.pre"].value = name

    return change


@pytest.mark.parametrize(
    ("name", "pieces"),
    [
        ("gpt-2", ["x", "=", "1234567", "!!", "\n\n"]),
        ("smollm", ["x", "=", *"1234567", "!!", "\n\n"]),
        ("llama3", ["x", "=", "123", "456", "7", "!!\n\n"]),
    ],
)
@pytest.mark.filterwarnings("error")
def test_a_text_is_cut_as_the_file_says(changed: Callable[..., Path], name: str, pieces: list[str]) -> None:
    """transformers reads no `tokenizer.ggml.pre` and cuts every text as GPT-2 does."""
    folder = from_gguf(changed(named(name)))
    backend = AutoTokenizer.from_pretrained(folder).backend_tokenizer
    cut = [backend.decoder.decode([piece]) for piece, _ in backend.pre_tokenizer.pre_tokenize_str("x=1234567!!\n\n")]
    assert cut == pieces
    assert backend.model.ignore_merges is (name == "llama3")


def test_a_cut_that_nobody_here_knows_is_said(changed: Callable[..., Path]) -> None:
    with pytest.warns(MoeifyWarning, match=r"changed\.gguf cuts text as a name of next year, which transformers does"):
        open_dense(str(changed(named("a name of next year"))))


def test_values_that_nobody_here_knows_are_said(changed: Callable[..., Path]) -> None:
    with pytest.warns(MoeifyWarning, match=r"changed\.gguf: transformers does not read attention\.new"):
        open_dense(str(changed(lambda writer: writer.add_float32("llama.attention.new", 1.0))))
