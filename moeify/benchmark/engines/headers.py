"""What a model of a GGUF file is made of, from the file's header: no weight is read, and no config is needed.

Layers are taken to be alike, and all of one type where bytes are counted.
"""

import math
from collections.abc import Mapping
from pathlib import Path

from moeify.benchmark.models.results import PARTS, Kind, Model, Part
from moeify.benchmark.models.sizes import FLOPS_PER_WEIGHT
from moeify.errors import InputError
from moeify.models.gguf import Header

# What a tensor's name holds -> its part; the first that applies.
NAMES: Mapping[str, str] = {
    "token_embd": "embedding",
    "norm": "norm",
    "ffn_gate_inp": "router",
    "exp_probs_b": "router",
    "ffn_": "ffn",
    "attn_": "attention",
    "output": "head",
}
ROUTED = "_exps."


def model_of_file(name: str, source: str, header: Header, dense_ffn: int | None, *, context: int) -> Model:
    """Sizes of a model in a GGUF file.

    Args:
        name, source: in the run, and as it was asked for.
        header: of the file.
        dense_ffn: parameters of the dense model's FFNs; None for the dense model itself.
        context: positions that a token sees.

    Raises:
        InputError: there are no FFNs in it.
    """
    num_experts, num_chosen = (int(header.own.get(key) or 0) for key in ("expert_count", "expert_used_count"))
    num_bytes = Path(source).expanduser().stat().st_size
    parts = _parts(header, num_chosen / num_experts if num_experts else 1.0, num_bytes, context)
    if "ffn" not in parts:
        raise InputError(f"{source} has no FFNs (blk.*.ffn_*)", "name the GGUF file of a model that writes text")
    ffn = parts["ffn"]
    share = ffn.active_parameters / (ffn.parameters if num_experts or dense_ffn is None else dense_ffn)
    kind: Kind = "moe" if num_experts else "dense" if share == 1 else "static"
    num_shared = _num_shared(header) if num_experts else 0
    return Model(
        name=name,
        path=source,
        kind=kind,
        model_type=header.architecture,
        num_layers=int(header.own.get("block_count") or 0),
        num_experts=num_experts + num_shared if num_experts else None,
        num_shared=num_shared if num_experts else None,
        num_active=num_chosen + num_shared if num_experts else None,
        active_share=share,
        parts=parts,
        bytes_on_disk=num_bytes,
    )


def vocab_size(header: Header) -> int:
    """Rows of the embedding."""
    return max((shape[-1] for name, shape in header.shapes.items() if name == "token_embd.weight"), default=0)


def _parts(header: Header, routed_share: float, num_bytes: int, context: int) -> dict[str, Part]:
    """What one token costs, as `sizes.parts_of` counts it, but with bytes of the file's mean weight."""
    stored, active, multiplied = ({} for _ in range(3))  # type: tuple[dict[str, int], dict[str, int], dict[str, int]]
    for tensor, shape in header.shapes.items():
        part = next((part for word, part in NAMES.items() if word in tensor), None)
        if part is None:
            continue
        weights = math.prod(shape)
        used = round(weights * routed_share) if ROUTED in tensor else weights
        stored[part] = stored.get(part, 0) + weights
        active[part] = active.get(part, 0) + used
        multiplied[part] = multiplied.get(part, 0) + (used if len(shape) > 1 else 0)
    if "head" in stored and "embedding" in stored:
        active["embedding"] = multiplied["embedding"] = 0
    per_weight = num_bytes / max(1, sum(stored.values()))
    return {
        part: Part(
            stored[part],
            active[part],
            FLOPS_PER_WEIGHT * multiplied[part] + (_attention_flops(header, context) if part == "attention" else 0),
            round(active[part] * per_weight),
        )
        for part in PARTS
        if part in stored
    }


def _attention_flops(header: Header, context: int) -> int:
    """Scores and their sums over values, in all layers."""
    heads, hidden = int(header.own.get("attention.head_count") or 0), int(header.own.get("embedding_length") or 0)
    width = heads * int(header.own.get("attention.key_length") or (hidden // heads if heads else 0))
    return 2 * FLOPS_PER_WEIGHT * width * context * int(header.own.get("block_count") or 0)


def _num_shared(header: Header) -> int:
    """How many times wider than one expert the always-on part is, as `anatomy.Experts` counts it."""
    widths = {
        word: shape[1]
        for word in ("ffn_gate_exps", "ffn_gate_shexp")
        for name, shape in header.shapes.items()
        if f".{word}." in name and len(shape) > 1
    }
    if len(widths) < 2:
        return 0
    times, rest = divmod(widths["ffn_gate_shexp"], widths["ffn_gate_exps"])
    return 1 if rest else times
