"""A checkpoint whose matrices hold the numbers that a GGUF of some type would hold: transformers computes with them."""

import shutil
from pathlib import Path

import gguf
import numpy as np
import torch
from safetensors.torch import load_file, save_file

# What stays in float32: routers, and whatever has one dimension.
KEPT = ("router", "mlp.gate.weight", "block_sparse_moe.gate.weight", "shared_expert_gate")


def rounded(source: Path, out: Path, kind: str) -> Path:
    """Copy a checkpoint; every matrix is quantised and dequantised.

    Args:
        source: a folder.
        out: the copy.
        kind: f16, q8_0 or q4_0.
    """
    shutil.copytree(source, out)
    for file in sorted(out.glob("*.safetensors")):
        tensors = load_file(file)
        values = {name: tensor if _is_kept(name, tensor) else _round(tensor, kind) for name, tensor in tensors.items()}
        save_file(values, file, metadata={"format": "pt"})
    return out


def _is_kept(name: str, tensor: torch.Tensor) -> bool:
    return tensor.ndim < 2 or any(word in name for word in KEPT)


def _round(tensor: torch.Tensor, kind: str) -> torch.Tensor:
    number = getattr(gguf.GGMLQuantizationType, kind.upper())
    rows = np.ascontiguousarray(tensor.to(torch.float32).numpy())
    flat = rows.reshape(-1, rows.shape[-1])
    values = gguf.quants.dequantize(gguf.quants.quantize(flat, number), number)
    return torch.from_numpy(values.astype(np.float32).reshape(rows.shape)).to(tensor.dtype)
