"""llama.cpp's programs as shell scripts: what a file is called says what they do with it. And small GGUF files."""

from pathlib import Path
from typing import Any

import numpy as np

# nan, silent, crash ... in the file's name; the others take a time that grows with the file's size.
BENCH = """#!/bin/sh
prompts= tokens= threads=
log="$(dirname "$0")/calls"
while [ $# -gt 0 ]; do
    case "$1" in
        -m) file="$2"; shift;; -p) prompts="$2"; shift;; -n) tokens="$2"; shift;; -t) threads="$2"; shift;;
    esac
    shift
done
name="$(basename "$file")"
echo "$name $threads $prompts" >> "$log"
case "$name" in
    *abort*) echo "some words" >&2; echo "ggml.c:1814: GGML_ASSERT(obj_new) failed" >&2; kill -ABRT $$;;
    *illegal*) kill -ILL $$;;
    *refused*) echo "llama_bench: error: failed to load model" >&2; exit 1;;
    *hang*) sleep 600;;
    *words*) echo "hello"; exit 0;;
    *number*) echo "3"; exit 0;;
    *less*) prompts="${prompts%%,*}";;
    *shape*) echo '[{"n_prompt": 8}]'; exit 0;;
esac
size="$(wc -c < "$file" | tr -d ' ')"
round="$(grep -c "^$name $threads " "$log")"
row() { echo "{\\"n_prompt\\": $1, \\"n_gen\\": $2, \\"avg_ns\\": $(( ($1 + $2) * size * round * 1000 / threads )),
    \\"build_number\\": 7, \\"build_commit\\": \\"abc\\"},"; }
echo "["
for prompt in $(echo "$prompts" | tr ',' ' '); do row "$prompt" 0; done
row 0 "$tokens" | sed '$ s/,$//'
echo "]"
"""
PERPLEXITY = """#!/bin/sh
case "$*" in
    *running-nan*) echo "[1]12.0,[2]nan,";;
    *lost*) echo "perplexity: calculating perplexity over 2 chunks" >&2; echo "[1]12.0,[2]12.5000,";;
    *nan*) echo "Final estimate: PPL = nan +/- nan";;
    *short*) echo "perplexity: you need at least 64 tokens" >&2;;
    *) echo "Final estimate: PPL = 12.5000 +/- 0.1" >&2;;
esac
"""


def programs(folder: Path) -> Path:
    """Both programs."""
    folder.mkdir(exist_ok=True)
    for name, script in (("llama-bench", BENCH), ("llama-perplexity", PERPLEXITY)):
        (folder / name).write_text(script)
        (folder / name).chmod(0o755)
    return folder


def calls(folder: Path) -> list[list[str]]:
    """File, threads and prompts of each call of llama-bench, in their order."""
    return [line.split() for line in (folder / "calls").read_text().splitlines()]


def write_gguf(file: Path, *, experts: int = 0, used: int = 0, width: int = 64, shared: int = 0, **more: Any) -> Path:
    """One layer of 32 hidden values, zeros, 40 words; values of the header besides."""
    from gguf import GGUFWriter

    architecture = "granitemoe" if experts else "llama"
    writer = GGUFWriter(file, architecture)
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_head_count(4)
    writer.add_file_type(more.get("file_type", 0))
    if experts:
        writer.add_expert_count(experts)
        writer.add_expert_used_count(used)
    shapes: dict[str, tuple[int, ...]] = {"token_embd": (more.get("words", 40), 32), "blk.0.attn_q": (32, 32)}
    shapes |= {"blk.0.attn_norm": (32,), "blk.0.ffn_norm": (32,), "output_norm": (32,)}
    if experts:
        shapes |= {f"blk.0.ffn_{name}_exps": (experts, width, 32) for name in ("gate", "up")}
        shapes |= {"blk.0.ffn_down_exps": (experts, 32, width), "blk.0.ffn_gate_inp": (experts, 32)}
        if shared:
            shapes |= {"blk.0.ffn_gate_shexp": (shared, 32), "blk.0.ffn_up_shexp": (shared, 32)}
            shapes |= {"blk.0.ffn_down_shexp": (32, shared)}
    elif width:
        shapes |= {"blk.0.ffn_gate": (width, 32), "blk.0.ffn_up": (width, 32), "blk.0.ffn_down": (32, width)}
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", np.zeros(shape, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file
