"""The model that is converted is the one that transformers loads, or a refusal says why; nothing of its folder runs."""

import ast
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MakeDense
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import moeify
from moeify import families
from moeify.check.evaluate import load
from moeify.check.verify import verify
from moeify.convert.pipeline import split
from moeify.convert.prepare import prepare
from moeify.errors import InputError, MoeifyWarning
from moeify.families import lists_of
from moeify.models import stock
from moeify.models.config import load_config
from moeify.models.dense import open_dense
from moeify.models.files import SINGLE_FILE
from moeify.models.heads import LANGUAGE_MODEL, auto_class, auto_name
from moeify.options import SplitOptions

EMBEDDING, HEAD, UP = "model.embed_tokens.weight", "lm_head.weight", "model.layers.0.mlp.up_proj.weight"
PACKAGE = Path(moeify.__file__).parent


@pytest.fixture
def dense(make_dense: MakeDense, tmp_path: Path) -> Path:
    """A llama with tied embeddings that a test may change."""
    return Path(shutil.copytree(make_dense("llama"), tmp_path / "dense"))


def store(folder: Path, tensors: dict[str, Tensor]) -> None:
    (folder / SINGLE_FILE).unlink(missing_ok=True)
    save_file(tensors, folder / SINGLE_FILE, metadata={"format": "pt"})


def change_config(folder: Path, **values: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def loaded(folder: Path) -> dict[str, Tensor]:
    """What transformers itself loads and would save, what is shared once."""
    model = auto_class(load_config(folder)).from_pretrained(folder)
    shared = model.all_tied_weights_keys
    return {name: tensor for name, tensor in model.state_dict().items() if name not in shared}


def assert_same_as_transformers(folder: Path) -> None:
    model, expected = open_dense(str(folder)), loaded(folder)
    computed = {name: model.skeleton.get_parameter(name) for name in model.computed(model.skeleton)}
    read = model.get(model.shapes) | computed
    assert read.keys() == expected.keys()
    assert all(torch.equal(read[name], expected[name]) for name in read)


def test_no_other_file_loads_models() -> None:
    """`from_pretrained` of a model is called in stock.py, and on tensors in memory in the toy twin."""
    calls = {
        f"{path.relative_to(PACKAGE)}: {ast.unparse(node.func)}"
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "from_pretrained"
    }
    others = ("AutoConfig", "AutoTokenizer", "AutoImageProcessor", "AutoFeatureExtractor", "GenerationConfig")
    models = {call for call in calls if not call.endswith(tuple(f"{name}.from_pretrained" for name in others))}
    assert models == {
        "models/stock.py: maker.from_pretrained",
        "models/stock.py: class_of(config).from_pretrained",
        "convert/exactness.py: class_of(config).from_pretrained",
        "modeling/modeling_moeify.py: cls.leads_to(config).from_pretrained",
    }


# transformers itself has no place for their tensors then.
NEEDS_PREFIX = {"qwen2_vl", "qwen2_5_vl"}


# Nothing stands below the head of a t5.
@pytest.mark.parametrize("family", [name for name in families.names() if name not in ("t5", "mt5")])
@pytest.mark.parametrize("prefix", ["", "without", "twice"])
def test_names_that_the_loader_renames(make_dense: MakeDense, tmp_path: Path, family: str, prefix: str) -> None:
    folder = Path(shutil.copytree(make_dense(family), tmp_path / family))
    base = lists_of(families.find(family).blocks)[0][0].split(".")[0] + "."
    names = {
        "": lambda n: n,
        "without": lambda n: n.removeprefix(base),
        "twice": lambda n: base + n if n.startswith(base) else n,
    }
    store(folder, {names[prefix](name): tensor for name, tensor in load_file(folder / SINGLE_FILE).items()})
    if prefix and family in NEEDS_PREFIX:
        missing = auto_class(load_config(folder)).from_pretrained(folder, output_loading_info=True)[1]["missing_keys"]
        # Up to transformers 5.17 also if the prefix is there twice.
        assert missing or prefix == "twice"
        if missing:
            with pytest.raises(InputError, match="are missing"):
                open_dense(str(folder))
            return
    assert_same_as_transformers(folder)


def test_positions_that_marian_computes_are_read_where_they_are_stored(make_dense: MakeDense, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(make_dense("marian"), tmp_path / "marian"))
    names = ("model.encoder.embed_positions.weight", "model.decoder.embed_positions.weight")
    assert open_dense(str(folder)).computed(open_dense(str(folder)).skeleton) == list(names)
    stored = load_file(folder / SINGLE_FILE)
    store(folder, stored | {name: torch.randn(64, 32, generator=torch.Generator().manual_seed(0)) for name in names})
    assert not open_dense(str(folder)).computed(open_dense(str(folder)).skeleton)
    assert_same_as_transformers(folder)
    store(folder, stored)
    change_config(folder, max_position_embeddings=2**30)
    with pytest.raises(InputError, match=r"would be 34,359,738,368 numbers"):
        open_dense(str(folder))


def test_tensors_that_the_loader_makes_of_others_are_refused(dense: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = stock.placed
    monkeypatch.setattr(
        "moeify.models.dense.placed",
        lambda *arguments: ({n: s for n, s in original(*arguments)[0].items() if n != UP}, original(*arguments)[1]),
    )
    with pytest.raises(InputError, match=f"transformers makes {UP} of tensors with other names"):
        open_dense(str(dense))


def test_a_place_is_known_by_the_stand_in(dense: Path) -> None:
    """Names of the same shape are told from each other, what is computed of several is none of them."""
    model = open_dense(str(dense))
    shapes = {tensor.name: tensor.shape for tensor in model.stored.values()}
    gate, up = UP.replace("up_proj", "gate_proj"), UP
    assert shapes[gate] == shapes[up]
    places, report = stock.placed(model.config, shapes)
    assert (places[gate], places[up], places[HEAD], report) == (gate, up, EMBEDDING, stock.Report((), (), {}))
    del shapes[gate]
    places, report = stock.placed(model.config, {**shapes, up: (3, 32)})
    assert up not in places
    assert (report.missing, dict(report.mismatched)) == ((gate,), {up: ((3, 32), (64, 32))})


def test_tied_model_with_a_head_of_its_own(dense: Path, tmp_path: Path, calibration_file: Path) -> None:
    tensors = load_file(dense / SINGLE_FILE)
    tensors[HEAD] = tensors[EMBEDDING] + 0.02 * torch.randn(tensors[EMBEDDING].shape)
    store(dense, tensors)
    with pytest.warns(MoeifyWarning, match=f"{HEAD} differs from {EMBEDDING}"):
        model = open_dense(str(dense))
    assert not model.config.tie_word_embeddings
    assert not model.tied
    options = SplitOptions(calibration=(str(calibration_file),), tokens=1024)
    out = split(model, tmp_path / "out", options).out
    moe = AutoModelForCausalLM.from_pretrained(out)
    assert torch.equal(moe.lm_head.weight, tensors[HEAD])
    assert torch.equal(moe.get_input_embeddings().weight, tensors[EMBEDDING])
    with pytest.warns(MoeifyWarning):
        assert verify(str(out), str(dense)).passed


def test_tied_model_with_the_same_head_twice(dense: Path) -> None:
    before = open_dense(str(dense))
    tensors = load_file(dense / SINGLE_FILE)
    store(dense, {**tensors, HEAD: tensors[EMBEDDING].clone()})
    model = open_dense(str(dense))
    assert (model.tied, model.shapes) == (before.tied, before.shapes)
    assert_same_as_transformers(dense)


def test_tied_model_that_stores_the_head_alone(dense: Path) -> None:
    tensors = load_file(dense / SINGLE_FILE)
    tensors[HEAD] = tensors.pop(EMBEDDING)
    store(dense, tensors)
    assert open_dense(str(dense)).tied
    assert_same_as_transformers(dense)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_reward_models_keep_their_head(make_dense: MakeDense, tmp_path: Path, family: str) -> None:
    config = open_dense(str(make_dense(family))).config
    config.num_labels, config.pad_token_id = 1, 0
    folder = Path(shutil.copytree(make_dense(family), tmp_path / "reward"))
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    assert_same_as_transformers(folder)
    assert "score.weight" in open_dense(str(folder)).shapes
    # Without its class the tensor tells that something would be lost.
    change_config(folder, architectures=None)
    with pytest.raises(InputError, match=r"score\.weight belongs to a head"):
        open_dense(str(folder))


@pytest.mark.parametrize("names", [None, [], ["LlamaForCausalLM"], ["LLaMAForCausalLM"], ["LlamaModel"]])
def test_architectures_of_language_models(dense: Path, names: Any) -> None:
    config = open_dense(str(dense)).config
    config.architectures = names
    assert auto_name(config) == LANGUAGE_MODEL


def test_tensors_that_transformers_leaves_out_are_said(dense: Path) -> None:
    tensors = load_file(dense / SINGLE_FILE)
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    store(dense, tensors | extra)
    open_dense(str(dense))
    store(dense, tensors | extra | {"model.layers.0.a\x1b.weight": torch.ones(4), "z": torch.ones(4)})
    with pytest.warns(
        MoeifyWarning, match=r"2 tensors are not part of the model, the first is model\.layers\.0\.a\\x1b"
    ):
        open_dense(str(dense))
    with pytest.warns(MoeifyWarning, match="2 tensors are not part"):
        load(str(dense))


@pytest.mark.parametrize(("asked", "written"), [("auto", "bfloat16"), ("float32", "float32")])
def test_mixed_types_are_said(dense: Path, asked: Any, written: str) -> None:
    tensors = {name: tensor.bfloat16() for name, tensor in load_file(dense / SINGLE_FILE).items()}
    prepare(open_dense(str(dense)), SplitOptions(dtype=asked))
    store(dense, tensors | {name: tensor.float() for name, tensor in tensors.items() if "norm" in name})
    with pytest.warns(MoeifyWarning, match=f"15 as BF16 and 5 as F32: all are written as {written}"):
        prepare(open_dense(str(dense)), SplitOptions(dtype=asked))


@pytest.mark.parametrize(("name", "pattern"), [(UP, "1 tensors of llama are missing"), (None, r"has shape \[3, 32\]")])
def test_loading_what_is_not_whole(dense: Path, name: str | None, pattern: str) -> None:
    tensors = load_file(dense / SINGLE_FILE)
    store(dense, {key: t for key, t in tensors.items() if key != name} | ({} if name else {UP: torch.zeros(3, 32)}))
    for use in (load, open_dense):
        with pytest.raises(InputError, match=pattern):
            use(str(dense))


@pytest.mark.parametrize(
    "values",
    [
        {"attn_implementation": "evil/kernel"},
        {"_attn_implementation": "evil/kernel"},
        {"experts_implementation": "evil/kernel"},
        {"_attn_implementation_internal": "evil/kernel"},
        {"fusion_config": {"evil": True}},
        {"auto_map": {"AutoModelForCausalLM": "evil.Model"}},
    ],
)
def test_config_that_names_an_implementation(dense: Path, values: dict[str, Any]) -> None:
    """It would be fetched from the hub and run; here it has no effect, for whoever loads the model."""
    (dense / "evil.py").write_text("raise SystemExit('evil code runs')")
    change_config(dense, **values)
    model = open_dense(str(dense))
    assert model.skeleton.config._attn_implementation == "sdpa"
    assert load(str(dense)).config._attn_implementation == "sdpa"


def test_config_that_names_the_file_of_weights(dense: Path) -> None:
    change_config(dense, transformers_weights="other.safetensors")
    for use in (open_dense, load):
        with pytest.raises(InputError, match=r"weights are in .other\.safetensors."):
            use(str(dense))


def test_adapters_are_refused_by_whoever_loads(dense: Path) -> None:
    (dense / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "evil/model"}')
    for use in (open_dense, load):
        with pytest.raises(InputError, match="holds an adapter"):
            use(str(dense))
