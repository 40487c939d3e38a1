"""Peak memory of a split of a large model: a randomly initialised llama of 3B shape, made on disk shard by shard.

    python tests/benchmark_memory.py FOLDER      # needs 14 GB of disk and, on 2 cores, about 5 minutes

The split runs in a process of its own; its peak resident set is what the kernel counted.
"""

import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import torch
from accelerate import init_empty_weights
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from moeify.models.builtin import BuiltinRecipe, builtin_documents, train_tokenizer

TOKENS = 2048


def make(folder: Path) -> None:
    """28 layers of 3072 x 8192 in bfloat16, one shard a layer, so that the maker needs no memory either."""
    folder.mkdir(parents=True)
    config = LlamaConfig(
        vocab_size=128256,
        hidden_size=3072,
        intermediate_size=8192,
        num_hidden_layers=28,
        num_attention_heads=24,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        dtype=torch.bfloat16,
        architectures=["LlamaForCausalLM"],
    )
    config.save_pretrained(folder)
    train_tokenizer(BuiltinRecipe(), builtin_documents(heldout=False)).save_pretrained(folder)
    with init_empty_weights():
        shapes = {name: tensor.shape for name, tensor in LlamaForCausalLM(config).state_dict().items()}
    del shapes["lm_head.weight"]
    shards: dict[str, list[str]] = {}
    for name in shapes:
        shards.setdefault(name.split(".")[2] if ".layers." in name else "rest", []).append(name)
    weight_map = {}
    generator = torch.Generator().manual_seed(0)
    for number, names in enumerate(shards.values(), start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        weights = {
            name: torch.ones(shapes[name], dtype=torch.bfloat16)
            if "norm" in name
            else (torch.randn(shapes[name], generator=generator) * 0.02).bfloat16()
            for name in names
        }
        save_file(weights, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


if __name__ == "__main__":
    place = Path(sys.argv[1])
    if not (place / "dense").exists():
        make(place / "dense")
    command = [sys.executable, "-m", "moeify", "split", str(place / "dense"), "-o", str(place / "moe")]
    began = time.monotonic()
    subprocess.run([*command, "--tokens", str(TOKENS), "--overwrite"], check=True)
    seconds = time.monotonic() - began
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    sys.stdout.write(
        json.dumps({"tokens": TOKENS, "seconds": round(seconds), "peak_gib": round(peak / 2**20, 2)}) + "\n"
    )
