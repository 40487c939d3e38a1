"""Tiny real models, seeded, and a text to calibrate them on. What a fixture returns is shared: copy, then change."""

import json
import multiprocessing
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# Read when the libraries are imported: no test waits for a network.
os.environ["HF_HUB_OFFLINE"] = "1"
if "PYTEST_XDIST_WORKER" in os.environ:
    # Workers share the cores, and so do the processes that their tests start.
    os.environ["OMP_NUM_THREADS"] = "1"

import jsonschema
import pytest
import torch

# Without a GPU the kernels run in triton's interpreter. Whether they do is read where they are defined, so it is said
# before anything imports moeify.kernels, also to the processes that tests start. Compiling for a GPU needs it unset.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from transformers import AutoConfig, AutoTokenizer

from moeify import families, targets
from moeify.models.builtin import BuiltinRecipe, builtin_documents, builtin_model, train_tokenizer
from moeify.models.ffn import FFNWeights
from moeify.models.heads import auto_class

MakeDense = Callable[..., Path]

# A family that a target represents exactly, where that is no llama.
FAMILY_OF = {
    "cohere2_moe": "cohere2",
    "dots1": "qwen3",
    "ernie4_5_moe": "ernie4_5",
    "flex_olmo": "olmo2",
    "hunyuan_v1_moe": "hunyuan_v1_dense",
    "lfm2_moe": "lfm2",
    "qwen3_5_moe_text": "qwen3_5_text",
    "qwen3_moe": "qwen3",
    "qwen3_vl_moe_text": "qwen3_vl",
}


def family_of(target: str) -> str:
    """A family to try a target with."""
    return FAMILY_OF.get(target, "llama")


def target_of(name: str) -> targets.Target:
    """A target as that family's models have it."""
    return targets.find(name, families.find(family_of(name)))


CONTEXT = 64
# More than half a minute each on one core, longest first; the others follow in the order of their names.
LONGEST = [
    "test_real.py",
    "test_readme.py",
    "training/test_finetune.py",
    "kernels/test_kernels_compile.py",
    "training/test_finetune_runs.py",
    "targets/test_targets.py",
    "kernels/test_kernels.py",
    "kernels/test_kernels_experts.py",
    "convert/test_resume.py",
]
# Imports alone: a forked process starts with nothing done.
PRELOADED = [
    "moeify.cli.commands.split",
    "moeify.convert.pipeline",
    "moeify.kernels.ops",
    "moeify.cli.commands.finetune",
    "moeify.training.finetune",
    "moeify.training.stage",
    "moeify.training.trainer",
    "torch.nn.parallel",
    "torch.distributed.fsdp",
    "transformers.models.glm4_moe.modeling_glm4_moe",
    "transformers.models.llama.modeling_llama",
    "transformers.models.mixtral.modeling_mixtral",
    "transformers.trainer",
    "ot",
    "sklearn.cluster",
]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that take longest come first, so that workers end together."""
    folder = Path(__file__).parent
    rank = {folder / name: number for number, name in enumerate(LONGEST)}
    assert all(path.is_file() for path in rank), "LONGEST names a file that is not there"
    items.sort(key=lambda item: rank.get(item.path, len(rank)))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With -n: one worker for all tests of a file, which share what is slow to make, and files in their order."""
    from xdist.scheduler import LoadFileScheduling

    config.option.loadscopereorder = False
    return LoadFileScheduling(config, log)


def share_of_cores() -> int:
    """Threads of this process, so that all workers together use every core."""
    return max(1, (os.cpu_count() or 1) // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")))


@pytest.fixture(autouse=True)
def _json_follows_its_schema(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a command prints with --json, in any test, is what its schema says."""
    from moeify.cli import render
    from moeify.results import json_schema, to_json

    def checked(value: Any) -> dict[str, Any]:
        printed = to_json(value)
        name = printed["schema"].removeprefix("moeify.").removesuffix("/1")
        jsonschema.validate(json.loads(json.dumps(printed)), json_schema(name))
        return printed

    monkeypatch.setattr(render, "to_json", checked)


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Neither the user's cache nor his thread count decides what a test finds."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOEIFY_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def forking() -> Any:
    """multiprocessing's context for processes of their own: forked from one that has imported what takes seconds."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    """A byte-level BPE of 384 tokens: any text goes in."""
    return train_tokenizer(BuiltinRecipe(vocab_size=384, context=CONTEXT), builtin_documents(heldout=True))


@pytest.fixture(scope="session")
def calibration_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Text of well over 4,096 tokens."""
    path = tmp_path_factory.mktemp("text") / "calibration.txt"
    path.write_text("\n\n".join(builtin_documents(heldout=False))[:60_000])
    return path


@pytest.fixture(scope="session")
def make_dense(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> MakeDense:
    """make_dense(family, *, seed=0, dtype="float32", **config_overrides) -> folder; equal calls give one folder."""
    made: dict[str, Path] = {}

    def make(family: str, *, seed: int = 0, dtype: str = "float32", **overrides: Any) -> Path:
        key = repr((family, seed, dtype, sorted(overrides.items())))
        if key not in made:
            folder = tmp_path_factory.mktemp(f"dense-{family}-")
            found = families.find(family)
            values = {
                "tie_word_embeddings": found.tiny.get("tie_word_embeddings", True),
                "vocab_size": len(tokenizer),
                "max_position_embeddings": CONTEXT,
                "bos_token_id": tokenizer.bos_token_id,
                "eos_token_id": tokenizer.eos_token_id,
                **overrides,
            }
            values[found.width] = overrides.get("intermediate_size", 64)
            config = AutoConfig.for_model(family, **found.tiny_config(**values))
            model = auto_class(config).from_config(config).eval()
            fill(model, seed)
            model.to(getattr(torch, dtype)).save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            if family in ("qwen2", "qwen3_5_text"):
                # As published ones are: of the class that transformers takes for a qwen2, whatever the files say.
                AutoTokenizer.from_pretrained(folder, tokenizer_type="qwen2").save_pretrained(folder)
            made[key] = folder
        return made[key]

    return make


@pytest.fixture(scope="session")
def taught(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small llama that was really trained, in a few seconds: its experts have something to specialise in."""
    recipe = BuiltinRecipe(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=128,
        num_layers=2,
        context=CONTEXT,
        steps=400,
        batch_size=8,
        warmup_steps=50,
    )
    # With -n: the folder of all workers, of which the first one trains.
    session = tmp_path_factory.getbasetemp()
    return builtin_model(session.parent if "PYTEST_XDIST_WORKER" in os.environ else session, recipe=recipe)


class DenseModels(dict[str, Path]):
    """One plain model of a family, made when it is asked for."""

    def __init__(self, make: MakeDense) -> None:
        self._make = make

    def __missing__(self, family: str) -> Path:
        return self.setdefault(family, self._make(family))


@pytest.fixture(scope="session")
def dense_models(make_dense: MakeDense) -> dict[str, Path]:
    return DenseModels(make_dense)


@torch.no_grad()
def fill(model: torch.nn.Module, seed: int) -> None:
    """Weights that keep hidden states near one and logits at a few units, unlike the library's of 0.02."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if name.endswith("norm.weight"):
            parameter.copy_(1 + 0.1 * noise)
        elif parameter.ndim == 1:
            parameter.copy_(0.3 * noise)
        elif "embed" in name or "lm_head" in name or ".wte." in name or ".wpe." in name:
            parameter.copy_(0.5 * noise)
        else:
            parameter.copy_(noise / parameter.shape[1] ** 0.5)


def toy_ffn(num_neurons: int = 24, hidden: int = 8, num_tokens: int = 600, seed: int = 0) -> tuple[FFNWeights, Any]:
    """One FFN and inputs_TD for it."""
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    gate_FD, up_FD, down_DF = (noise(*shape) for shape in [(num_neurons, hidden)] * 2 + [(hidden, num_neurons)])
    return FFNWeights(0, gate_FD / hidden**0.5, up_FD / hidden**0.5, down_DF, "silu"), noise(num_tokens, hidden)
