"""How numbers lie in a GGUF: which type a tensor gets, and its rows in that type."""

from collections.abc import Mapping
from pathlib import Path

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from gguf import LlamaFileType
from torch import Tensor

from moeify.command_line import command_line, quoted
from moeify.errors import InputError, UsageError
from moeify.words import listing

# What `--type` takes besides `auto`: how matrices are stored, and what llama.cpp calls such a file.
TYPES: Mapping[str, tuple[Kind, LlamaFileType]] = {
    "f32": (Kind.F32, LlamaFileType.ALL_F32),
    "f16": (Kind.F16, LlamaFileType.MOSTLY_F16),
    "bf16": (Kind.BF16, LlamaFileType.MOSTLY_BF16),
    "q8_0": (Kind.Q8_0, LlamaFileType.MOSTLY_Q8_0),
    "q4_0": (Kind.Q4_0, LlamaFileType.MOSTLY_Q4_0),
    "q4_1": (Kind.Q4_1, LlamaFileType.MOSTLY_Q4_1),
    "q5_0": (Kind.Q5_0, LlamaFileType.MOSTLY_Q5_0),
    "q5_1": (Kind.Q5_1, LlamaFileType.MOSTLY_Q5_1),
}
# Of the types that llama-quantize alone writes.
K_BLOCK = 256
# llama.cpp computes with these in float32 only; so it does with whatever has one dimension.
FLOAT32 = ("_norm.weight", "position_embd.weight", ".ffn_gate_inp.weight", ".ffn_gate_inp_shexp.weight")
# Of the shared experts; llama.cpp computes its sigmoid as silu(x) / x.
SHARED_MIXING = ".ffn_gate_inp_shexp.weight"
FALLBACK = Kind.F16
# The largest number of float16, in which every type but float32 and bfloat16 keeps its scales.
LARGEST = 65504.0


def default_type(dtype: str) -> str:
    """What `--type auto` stands for.

    Args:
        dtype: of the checkpoint, in the words of safetensors.
    """
    return "bf16" if dtype == "BF16" else "f16"


def check_type(name: str, model: str, file: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse a type that the gguf package cannot write; for those of llama-quantize, with the commands that make it.

    Args:
        name: of the type.
        model, file: what becomes what.
        shapes: of the tensors, by name.

    Raises:
        UsageError: the type is not one of TYPES, nor auto.
    """
    if name == "auto" or name in TYPES:
        return
    if not hasattr(LlamaFileType, f"MOSTLY_{name.upper()}"):
        raise UsageError(f"--type {name} is unknown", f"--type takes auto, {', '.join(TYPES)}")
    widths = sorted({shape[-1] for shape in shapes.values() if len(shape) > 1 and shape[-1] % K_BLOCK})
    odd = ""
    if widths and "_K" in name.upper():
        odd = f"; rows of {listing(widths)} numbers are not multiples of {K_BLOCK} and get larger types there"
    whole = str(file.with_name(f"{file.stem}-f16.gguf"))
    raise UsageError(
        f"--type {name} is written by llama.cpp's llama-quantize only{odd}",
        f"{command_line('export', model, gguf=whole, type='f16')} && "
        f"{quoted(['llama-quantize', whole, str(file), name.upper()])}",
    )


def kind_of(name: str, shape: tuple[int, ...], kind: Kind) -> Kind:
    """The type of one tensor: float32 for what llama.cpp computes in it, and float16 for rows that are no whole blocks.

    Args:
        name: in the GGUF.
        shape: of the tensor.
        kind: of matrices.
    """
    if len(shape) == 1 or name.endswith(FLOAT32):
        return Kind.F32
    return kind if shape[-1] % block_size(kind) == 0 else FALLBACK


def block_size(kind: Kind) -> int:
    """Numbers of a row that share a scale."""
    return int(gguf.GGML_QUANT_SIZES[kind][0])


def num_bytes(shape: tuple[int, ...], kind: Kind) -> int:
    """Of a tensor."""
    block, size = gguf.GGML_QUANT_SIZES[kind]
    return int(np.prod(shape, dtype=np.int64)) // block * size


def encode(name: str, rows: Tensor, kind: Kind) -> np.ndarray:
    """Rows in a type, as bytes.

    Raises:
        InputError: a number is NaN, infinite, or beyond the range of the type.
    """
    numbers = rows.to(torch.float32)
    least, largest = (float(end) for end in numbers.aminmax())
    reach = max(-least, largest)
    if not (np.isfinite(least) and np.isfinite(largest)):
        raise InputError(f"{name} holds NaN or infinite values", "the checkpoint is damaged: make it again")
    if reach > LARGEST and kind not in (Kind.F32, Kind.BF16):
        raise InputError(
            f"{name} has values up to {reach:,.0f}, and {kind.name} reaches to {LARGEST:,.0f}", "--type bf16 or f32"
        )
    if reach == 0 and name.endswith(SHARED_MIXING):
        raise InputError(f"{name} is all zero, of which llama.cpp computes 0 / 0", "split the model again")
    encoded: np.ndarray = gguf.quants.quantize(np.ascontiguousarray(numbers.numpy()), kind)
    return encoded.view(np.uint8)
