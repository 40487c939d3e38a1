"""Wall time of a split over that of one dense forward pass on the same calibration tokens, and where it goes.

    python tests/benchmark_split.py MODEL TEXT [REPEATS [EXPERTS]]

Both in one process, in turn, float32, files warm; the forward pass is stock transformers' with its LM head, in batches
of 2,048 tokens. The split is everything `moeify.split` does: text, calibration, fit, write, sync.
"""

import cProfile
import json
import pstats
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from moeify.convert.pipeline import split
from moeify.convert.prepare import prepare
from moeify.convert.texts import calibration_text
from moeify.models.dense import open_dense
from moeify.options import SplitOptions

STEPS = {
    "attention and streams": "attend",
    "text to tokens": "calibration_text",
    "FFN activations": "hidden",
    "statistics": "measure",
    "partition": "partition",
    "expert norms": "_expert_norms",
    "router": "fit",
    "refit": "refit",
    "converted output": "_outputs",
    "reading": "get",
    "writing": "_write",
}


@torch.no_grad()
def forward_seconds(model: torch.nn.Module, ids_BC: torch.Tensor) -> float:
    began = time.perf_counter()
    for batch_BC in ids_BC.split(max(1, 2048 // ids_BC.shape[1])):
        model(batch_BC, use_cache=False)
    return time.perf_counter() - began


def split_seconds(model: str, options: SplitOptions, profile: cProfile.Profile | None = None) -> float:
    folder = Path(tempfile.mkdtemp())
    began = time.perf_counter()
    if profile is None:
        split(model, folder / "out", options)
    else:
        profile.runcall(split, model, folder / "out", options)
    elapsed = time.perf_counter() - began
    shutil.rmtree(folder)
    return elapsed


def shares(profile: cProfile.Profile) -> dict[str, float]:
    """Cumulative seconds of each step."""
    functions = pstats.Stats(profile).stats  # type: ignore[attr-defined]
    found = {}
    for label, name in STEPS.items():
        times = [entry[3] for key, entry in functions.items() if key[2] == name and "moeify" in key[0]]
        found[label] = round(max(times, default=0.0), 2)
    return found


if __name__ == "__main__":
    path, text = sys.argv[1:3]
    repeats = int(sys.argv[3]) if len(sys.argv) > 3 else 3
    asked = SplitOptions(experts=int(sys.argv[4]) if len(sys.argv) > 4 else 8, calibration=(text,))
    prepared = prepare(open_dense(path), asked)
    ids = calibration_text(prepared).ids_BC
    dense = AutoModelForCausalLM.from_pretrained(prepared.dense.path, dtype=torch.float32).eval()
    forward_seconds(dense, ids[:4])
    pairs = [(forward_seconds(dense, ids), split_seconds(path, asked)) for _ in range(repeats)]
    profiler = cProfile.Profile()
    split_seconds(path, asked, profiler)
    report = {
        "tokens": ids.numel(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "forward_seconds": [round(forward, 2) for forward, _ in pairs],
        "split_seconds": [round(total, 2) for _, total in pairs],
        "median_ratio": round(statistics.median(total / forward for forward, total in pairs), 3),
        "profiled_seconds_cumulative": shares(profiler),
    }
    sys.stdout.write(json.dumps(report, indent=1) + "\n")
