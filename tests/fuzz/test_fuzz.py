"""Whatever stands in a file that moeify reads: it is read, or refused with a message, soon and in little memory.

A seeded part of it runs always. `MOEIFY_FUZZ_SECONDS=600 pytest -m fuzz` goes on with new seeds for so long.
"""

import json
import os
import resource
import shutil
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import MakeDense
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from hypothesis.configuration import set_hypothesis_home_dir
from mutations import changed_bytes, changed_json
from safetensors.torch import load_file, save_file
from transformers import GenerationConfig, LlamaConfig, PreTrainedTokenizerFast

from moeify.check.compare import Comparison, Row
from moeify.convert.pipeline import split
from moeify.errors import MoeifyError
from moeify.models.dense import open_dense
from moeify.models.generation import usable_generation
from moeify.models.tokenizer import load_tokenizer
from moeify.options import SplitOptions
from moeify.plan import PLAN_FILE, load_plan
from moeify.recipes.model import load_recipe
from moeify.results import read, write

# Random changes of each file; together about 25 s on one core.
EXAMPLES = 500
# Of processor time: other work on the machine does not count.
LIMIT_SECONDS = 5
LIMIT_BYTES = 1 << 30
INDEX = "model.safetensors.index.json"
RECIPE = """
version: 1
model: builtin
out: runs/quickstart
split: {experts: 8, tokens: 1024, calibration: [builtin]}
controls: {static: {static: true}, random: {partition: random}}
finetune: {tokens: 65536, data: [builtin]}
finetune_controls: [static]
verify: true
compare: {budget: [0.5]}
eval: {data: [builtin-heldout], tokens: 4096}
bench: {batch: [1]}
limits: {max_ratio: 1.5, beats: [static], max_decode_time: 1.0}
"""


# Whatever else transformers' configs and tokenizers have or take.
CONFIG_NAMES = (
    *dir(LlamaConfig()),
    *("rope_scaling", "rope_theta", "text_config", "encoder", "torch_dtype", "attn_implementation", "layer_types"),
    *("quantization_config", "auto_map", "num_labels", "sliding_window", "transformers_weights", "fusion_config"),
    *("mlp_layer_types", "vision_config", "decoder", "generator", "tie_encoder_decoder", "_commit_hash"),
)
TOKENIZER_NAMES = (
    *dir(PreTrainedTokenizerFast),
    *("tokenizer_file", "tokenizer_object", "gguf_file", "vocab_file", "merges_file", "auto_map", "backend"),
    *("extra_special_tokens", "additional_special_tokens", "subfolder", "from_slow", "fix_mistral_regex"),
)


def open_and_read(folder: Path) -> None:
    """Weights of a layer too, which are read when they are needed."""
    open_dense(folder).ffn(1)


@dataclass(frozen=True)
class Kind:
    """A file that is changed, and who reads it.

    Args:
        file: its name in the folder.
        read: reads the folder.
        header: it is safetensors, and the JSON in front of it is changed.
        names: of keys that mean something to its reader.
    """

    file: str
    read: Callable[[Path], Any]
    header: bool = False
    names: tuple[str, ...] = ()


KINDS: Mapping[str, Kind] = {
    "config": Kind("config.json", open_dense, names=CONFIG_NAMES),
    "index": Kind(INDEX, open_dense),
    "weights": Kind("model-1.safetensors", open_and_read, header=True),
    "tokenizer": Kind("tokenizer.json", load_tokenizer),
    "tokenizer settings": Kind("tokenizer_config.json", load_tokenizer, names=TOKENIZER_NAMES),
    "special tokens": Kind("special_tokens_map.json", load_tokenizer),
    "added tokens": Kind("added_tokens.json", load_tokenizer),
    "generation": Kind("generation_config.json", usable_generation, names=tuple(dir(GenerationConfig()))),
    "recipe": Kind("recipe.yaml", lambda folder: load_recipe(folder / "recipe.yaml")),
    "plan": Kind(PLAN_FILE, load_plan, header=True),
    "result": Kind("compare.json", lambda folder: read(folder / "compare.json", Comparison)),
}


@pytest.fixture(scope="module")
def whole(make_dense: MakeDense, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in two files, a plan, a recipe and a result."""
    set_hypothesis_home_dir(tmp_path_factory.mktemp("hypothesis"))
    folder = Path(shutil.copytree(make_dense("llama"), tmp_path_factory.mktemp("fuzz") / "model"))
    options = SplitOptions(experts=4, tokens=1024, context=64, calibration=("builtin",))
    shutil.copy(split(folder, folder.parent / "moe", options).out / PLAN_FILE, folder)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    files = {name: f"model-{1 + ('layers.1' not in name)}.safetensors" for name in tensors}
    for file in set(files.values()):
        save_file({name: t for name, t in tensors.items() if files[name] == file}, folder / file, {"format": "pt"})
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": files}))
    (folder / "special_tokens_map.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": {"content": "</s>"}}))
    (folder / "added_tokens.json").write_text(json.dumps({"<extra>": 383}))
    (folder / "recipe.yaml").write_text(RECIPE)
    row = Row("dense", 1.0, 2.0, 1.0, 3.0, 1.0, 1.0, 1.0, 1.0, {"t": 2.0}, {})
    write(Comparison("m", (row,), {}, {"c": 512}), folder / "compare.json")
    return folder


def changed(kind: Kind, content: bytes) -> st.SearchStrategy[bytes]:
    """Changes of a file's values and of its bytes."""
    if kind.header:
        length = int.from_bytes(content[:8], "little")
        header, body = json.loads(content[8 : 8 + length]), content[8 + length :]
        text = header.get("__metadata__", {}).get("moeify")
        headers = changed_json(header)
        if text is not None:
            metadata = header["__metadata__"]
            inner = changed_json(json.loads(text)).map(bytes.decode)
            headers |= inner.map(
                lambda new: json.dumps({**header, "__metadata__": {**metadata, "moeify": new}}).encode()
            )
        return headers.map(lambda new: len(new).to_bytes(8, "little") + new + body) | changed_bytes(content[:400]).map(
            lambda new: new + content[400:]
        )
    return changed_json(yaml.safe_load(content), kind.names) | changed_bytes(content)


def fuzz(name: str, whole: Path, folder: Path, examples: int, number: int) -> None:
    """Read a file with so many random changes; the number chooses them."""
    kind = KINDS[name]
    shutil.copytree(whole, folder, dirs_exist_ok=True)
    content = (whole / kind.file).read_bytes()
    kind.read(folder)

    @seed(number)
    @settings(max_examples=examples, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(changed(kind, content))
    def check(new: bytes) -> None:
        (folder / kind.file).write_bytes(new)
        began = time.process_time()
        try:
            kind.read(folder)
        except MoeifyError as error:
            assert str(error)
        assert time.process_time() - began < LIMIT_SECONDS

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with warnings.catch_warnings():
        # Of libraries as well: what they warn of is no fault.
        warnings.simplefilter("ignore")
        check()
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < LIMIT_BYTES


@pytest.mark.parametrize("name", KINDS)
def test_random_changes(name: str, whole: Path, tmp_path: Path) -> None:
    fuzz(name, whole, tmp_path / "model", EXAMPLES, 0)


@pytest.mark.fuzz
def test_random_changes_for_as_long_as_asked(whole: Path, tmp_path: Path) -> None:
    end = time.monotonic() + float(os.environ.get("MOEIFY_FUZZ_SECONDS", "60"))
    number = time.time_ns() % 10**9
    while time.monotonic() < end:
        number += 1
        for name in KINDS:
            fuzz(name, whole, tmp_path / "model", 4 * EXAMPLES, number)
