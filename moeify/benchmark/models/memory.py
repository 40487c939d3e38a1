"""Peak memory of loading and of running a model, each model in a process of its own: peaks are a process's.

    python -m moeify.benchmark.models.memory REQUEST.json

reads what to do and writes REQUEST.json.out; `measure_memory` makes the request and starts it.
"""

import json
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from moeify.benchmark.children import child_environment, run_child
from moeify.models.inputs import Inputs


@dataclass(frozen=True)
class Memory:
    """Bytes, resident on a CPU (Python and its libraries included), allocated on CUDA.

    Args:
        load_peak_bytes: up to where the model is ready.
        peak_bytes: with one prefill and one decoded token as well, or one pass over examples.
        reason: why one is not known.
    """

    load_peak_bytes: int | None
    peak_bytes: int | None
    reason: str = ""


def measure_memory(path: Path, inputs: Inputs, *, writes: bool, dtype: str, device: str) -> Memory:
    """Load a model in a new process as moeify.load does, and run the inputs.

    Args:
        path: the checkpoint's folder.
        inputs: prompts, or examples.
        writes: they are prompts, and one token is decoded.
        dtype, device: names.
    """
    with tempfile.TemporaryDirectory() as folder:
        request, answer = Path(folder) / "request.json", Path(folder) / "request.json.out"
        tensors = {name: tensor.contiguous() for name, tensor in inputs.items()}
        save_file(tensors, file := Path(folder) / "inputs.safetensors")
        request.write_text(
            json.dumps({"path": str(path), "dtype": dtype, "device": device, "inputs": str(file), "writes": writes})
        )
        environment = child_environment(OMP_NUM_THREADS=str(torch.get_num_threads()))
        done = run_child("moeify.benchmark.models.memory", str(request), environment=environment)
        found = json.loads(answer.read_text()) if answer.is_file() else {}
    reason = ""
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [""])[-1]
        reason = f"its process ended with {done.returncode}: {last}"[:200]
    return Memory(found.get("load_peak_bytes"), found.get("peak_bytes"), reason)


@torch.no_grad()
def main(request: Path) -> None:
    """Do what a request asks for; peaks are written as soon as they are known."""
    from moeify.check.evaluate import load
    from moeify.check.features import on_device

    asked = json.loads(request.read_text())
    model = load(asked["path"], dtype=asked["dtype"], device=asked["device"])
    found = {"load_peak_bytes": peak_bytes(model.device)}
    _write(request, found)
    inputs = on_device(load_file(asked["inputs"]), model)
    if asked["writes"]:
        ids_BC = inputs["input_ids"]
        out = model(ids_BC, use_cache=True, logits_to_keep=1)
        model(ids_BC[:, -1:], past_key_values=out.past_key_values, use_cache=True, logits_to_keep=1)
    else:
        model(**inputs)
    _write(request, {**found, "peak_bytes": peak_bytes(model.device)})


def peak_bytes(device: torch.device) -> int:
    """Of this process since it began."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    status = Path("/proc/self/status")
    if status.is_file():
        # Not getrusage: its peak begins with that of the process which started this one.
        (line,) = (line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak) * (1 if sys.platform == "darwin" else 1024)


def _write(request: Path, found: dict[str, int]) -> None:
    request.with_name(f"{request.name}.out").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
