"""config.json is read alike by transformers 5 and by loaders that know the names of transformers 4 only.

    MOEIFY_TF4=FOLDER pytest tests/export/test_old_config.py

also loads checkpoints with a transformers 4 that lies in FOLDER, in a process of its own:

    pip install --no-deps --target FOLDER transformers==4.57.6 huggingface_hub==0.36.0 tokenizers==0.22.2
"""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MakeDense, family_of
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from moeify import families, targets
from moeify.convert.pipeline import split
from moeify.export.old_config import with_old_keys
from moeify.export.writer import MoEWriter
from moeify.layout import Layout
from moeify.models.config import load_config
from moeify.models.dense import open_dense
from moeify.options import SplitOptions
from moeify.targets import static_target

OLD = os.environ.get("MOEIFY_TF4", "")
THETA = 50_000.0
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": THETA,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {"rope_type": "yarn", "rope_theta": THETA, "factor": 4.0, "original_max_position_embeddings": 16}
LONG = {
    "rope_type": "longrope",
    "rope_theta": THETA,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [2.0, 2.5, 3.0, 3.5],
}
PLAIN = {"rope_type": "default", "rope_theta": THETA}
# name: (family, target, values of the dense config); an empty target is static pruning.
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    **{name: (family_of(name), name, {}) for name in targets.names()},
    "qwen2": ("qwen2", "qwen2_moe", {}),
    "granite": ("granite", "granitemoeshared", {}),
    "mistral-window": ("mistral", "mixtral", {"sliding_window": 16}),
    "qwen3-window": (
        "qwen3",
        "qwen3_moe",
        {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 0},
    ),
    "llama3": ("llama", "granitemoeshared", {"rope_parameters": LLAMA3}),
    "llama3-mixtral": ("llama", "mixtral", {"rope_parameters": LLAMA3}),
    "yarn": ("llama", "glm4_moe", {"rope_parameters": YARN}),
    "longrope": ("phi3", "mixtral", {"rope_parameters": LONG, "original_max_position_embeddings": 16}),
    "partial": ("phi3", "glm4_moe", {"rope_parameters": {**PLAIN, "partial_rotary_factor": 0.5}}),
    "bfloat16": ("llama", "mixtral", {"dtype": "bfloat16"}),
    "pruned-llama3": ("llama", "", {"rope_parameters": LLAMA3}),
    **{f"pruned-{family}": (family, "", {}) for family in families.names()},
}
# What a loader of transformers 4 reads of a model with 8 experts, 2 of them shared where they can be; names that have
# not changed are not here.
EXPECTED: Mapping[str, Mapping[str, Any]] = {
    "granitemoeshared": {"rope_theta": THETA, "torch_dtype": "float32", "num_local_experts": 6},
    "mixtral": {"rope_theta": THETA, "torch_dtype": "float32", "num_local_experts": 8},
    "qwen2_moe": {"rope_theta": THETA, "torch_dtype": "float32", "num_experts": 6},
    "qwen3_moe": {"rope_theta": THETA, "torch_dtype": "float32", "num_experts": 8},
    "glm4_moe": {
        "rope_theta": THETA,
        "torch_dtype": "float32",
        "n_routed_experts": 6,
        "partial_rotary_factor": 1.0,
    },
    "llama3": {
        "rope_theta": THETA,
        "rope_scaling": {name: value for name, value in LLAMA3.items() if name != "rope_theta"},
    },
    "yarn": {
        "rope_theta": THETA,
        "rope_scaling": {name: value for name, value in YARN.items() if name != "rope_theta"},
        "partial_rotary_factor": 1.0,
    },
    "longrope": {"rope_theta": THETA, "original_max_position_embeddings": 16},
    "partial": {"rope_theta": THETA, "partial_rotary_factor": 0.5},
    "bfloat16": {"torch_dtype": "bfloat16"},
    "pruned-llama": {"rope_theta": THETA, "torch_dtype": "float32"},
}


def dense_of(make_dense: MakeDense, name: str) -> Path:
    family, _, values = MODELS[name]
    # That of modernbert is written for each kind of layer.
    rotates = family != "modernbert" and hasattr(AutoConfig.for_model(family), "rope_parameters")
    return make_dense(family, **({"rope_parameters": dict(PLAIN)} if rotates else {}) | values)


def writer_of(make_dense: MakeDense, name: str) -> MoEWriter:
    dense = open_dense(str(dense_of(make_dense, name)))
    target = targets.find(MODELS[name][1]) if MODELS[name][1] else static_target(dense)
    shared = 2 if target.holds_shared else 0
    layout = Layout(8, shared, 6) if MODELS[name][1] else Layout(8, 4, 4)
    return MoEWriter(dense, target, layout, dense.config.dtype)


@pytest.mark.parametrize("name", EXPECTED)
def test_old_names_say_what_the_new_ones_say(name: str, make_dense: MakeDense) -> None:
    values = json.loads(writer_of(make_dense, name).config_text())
    assert {key: values.get(key) for key in EXPECTED[name]} == EXPECTED[name]
    assert values["dtype"] == values["torch_dtype"]
    assert values["rope_parameters"]["rope_theta"] == values["rope_theta"]
    assert ("rope_scaling" in values) == (values["rope_parameters"]["rope_type"] != "default")


@pytest.mark.parametrize("name", MODELS)
def test_transformers_5_reads_the_same_config_with_and_without_them(
    name: str, make_dense: MakeDense, tmp_path: Path
) -> None:
    writer = writer_of(make_dense, name)
    text, read = writer.config_text(), []
    for case, content in (("with", text), ("without", writer.config().to_json_string(use_diff=False))):
        (tmp_path / case).mkdir()
        (tmp_path / case / "config.json").write_text(content)
        config = load_config(tmp_path / case)
        read.append({key: value for key, value in config.to_dict().items() if key != "_name_or_path"})
    assert {key: value for key, value in read[0].items() if key in read[1]} == read[1]
    # Some classes keep an old key beside the new one that says the same.
    old = {"partial_rotary_factor", "original_max_position_embeddings", "rope_theta"}
    assert read[0].keys() - read[1].keys() <= old
    # What is read and written again is the same file.
    assert with_old_keys(text) == text


def test_what_transformers_5_reads_of_a_file_is_not_changed() -> None:
    said = {"model_type": "llama", "dtype": "float32", "torch_dtype": "bfloat16"}
    rotation = {"rope_type": "linear", "factor": 2.0, "rope_theta": 7.0}
    values = json.loads(with_old_keys(json.dumps({**said, "rope_theta": 5.0, "rope_parameters": rotation})))
    assert {key: values[key] for key in said} == said
    assert values["rope_theta"] == 7.0, "rope_parameters goes first"
    assert values["rope_scaling"] == {"rope_type": "linear", "factor": 2.0}
    old = {**said, "rope_theta": 5.0, "rope_scaling": {"type": "linear", "factor": 4.0}}
    # There rope_scaling goes first.
    for text in (json.dumps(old), json.dumps({**old, "rope_parameters": rotation})):
        assert json.loads(with_old_keys(text)) == json.loads(text)


CHILD = """
import json, sys, warnings
sys.path.insert(0, sys.argv[1])
import torch, transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
assert transformers.__version__.startswith("4."), transformers.__version__
torch.set_num_threads(1)
for folder in sys.argv[3:]:
    said = {}
    try:
        model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, dtype="auto")
        said = {key: sorted(map(str, value)) for key, value in info.items() if value}
        said["dtype"] = str(model.dtype)
        ids = torch.load(sys.argv[2])
        torch.save(model.float().eval()(ids).logits.detach(), folder + "/old.pt")
        said["tokens"] = AutoTokenizer.from_pretrained(folder)("The 12 old\\n\\nloaders, <s> read it.")["input_ids"]
        said["generated"] = model.generate(ids, do_sample=False, max_new_tokens=4).shape[1] > ids.shape[1]
    except Exception as error:
        said["error"] = f"{type(error).__name__}: {error}"[:2000]
    print(json.dumps(said))
"""


@pytest.fixture(scope="module")
def loaded(make_dense: MakeDense, calibration_file: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Every checkpoint, and what transformers 4 says of it; one process loads all."""
    if not OLD:
        pytest.skip("MOEIFY_TF4 names no folder with transformers 4; the head of this file says how to make one")
    folders, base = {}, tmp_path_factory.mktemp("old")
    torch.save(torch.randint(2, 300, (2, 60), generator=torch.Generator().manual_seed(1)), base / "ids.pt")
    for name, (_, target, _) in MODELS.items():
        options = {"target": target} if target else {"static": True}
        folders[name] = base / name
        values = {"tokens": 1024, "calibration": (str(calibration_file),), **options}
        split(str(dense_of(make_dense, name)), folders[name], SplitOptions(**values))
    command = [sys.executable, "-c", CHILD, OLD, str(base / "ids.pt"), *map(str, folders.values())]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": ""})
    assert done.returncode == 0, done.stderr
    said = [json.loads(line) for line in done.stdout.splitlines()]
    return {"ids": base / "ids.pt", **{name: (folders[name], said[i]) for i, name in enumerate(folders)}}


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_transformers_4_computes_the_same(name: str, loaded: dict[str, Any]) -> None:
    folder, said = loaded[name]
    assert "error" not in said, said["error"]
    assert not {key: value for key, value in said.items() if key.endswith("_keys") or key == "error_msgs"}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    assert said["dtype"] == str(model.dtype)
    with torch.no_grad():
        new = model.float()(torch.load(loaded["ids"])).logits
    old = torch.load(folder / "old.pt")
    assert float((old - new).norm() / new.norm()) < 1e-5
    assert said["tokens"] == AutoTokenizer.from_pretrained(folder)("The 12 old\n\nloaders, <s> read it.")["input_ids"]
    assert said["generated"]
