"""What a GGUF carries from a dense model besides its FFNs: attention, norms and embeddings; and its routers."""

from collections.abc import Iterator

import gguf
import torch
from torch import Tensor

from moeify import targets
from moeify.check.contents import Check
from moeify.check.gguf_file import GGUFFile
from moeify.models.dense import DenseModel
from moeify.words import printable

HEAD, EMBEDDING = "output.weight", "token_embd.weight"
# Of rotations; compared with the metadata.
FACTORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
ROUTER, SHARED_GATE, BIAS = "ffn_gate_inp.weight", "ffn_gate_inp_shexp.weight", "exp_probs_b.bias"
EXPERTS = ("ffn_gate", "ffn_up", "ffn_down")


def carried_check(opened: GGUFFile, source: DenseModel, dtype: torch.dtype) -> Check:
    """Attention, norms and embeddings are the dense ones, rounded, and nothing else is there.

    Args:
        opened: the file.
        source: the dense model.
        dtype: to which its numbers were rounded before.
    """
    wrong: list[str] = []
    names: set[str] = set()
    for name, values in _carried(opened, source):
        names.add(name)
        stored = opened.tensors.get(name)
        if stored is None or not stored.holds(values.to(dtype)):
            wrong.append(name)
    left = {name for name in opened.tensors if name not in names and not _is_other(name)}
    total = len(names)
    wrong += sorted(left)
    equal = f"{total - len(set(wrong) & names):,} equal" + (f", not {printable(wrong[0])}" if wrong else "")
    return Check("attention, norms and embeddings are the dense ones", equal, f"{total:,}", not wrong)


def routers_check(opened: GGUFFile) -> Check:
    """Routers are float32 and finite, in the shape of the experts; none multiplies by nothing."""
    wrong = []
    experts, hidden = opened.own("expert_count"), opened.own("embedding_length")
    routed = [layer for layer in range(opened.num_layers) if opened.get(layer, "ffn_gate_exps")]
    for layer in routed:
        for name, shape in ((ROUTER, (experts, hidden)), (SHARED_GATE, None), (BIAS, (experts,))):
            stored = opened.tensors.get(f"blk.{layer}.{name}")
            if stored is None:
                fits = name != ROUTER
            else:
                fits = stored.kind == gguf.GGMLQuantizationType.F32 and shape in (None, stored.shape)
                fits = fits and bool(stored.numbers().isfinite().all())
                # llama.cpp computes silu(x) / x of it.
                fits = fits and (name != SHARED_GATE or bool(stored.numbers().any()))
            if not fits:
                wrong.append(f"blk.{layer}.{name}")
    good = len(routed) - len({name.split(".")[1] for name in wrong})
    found = f"{good} layers" + (f", not {wrong[0]}" if wrong else "")
    return Check("routers are float32 and finite", found, f"{len(routed)} layers", bool(routed) and not wrong)


def _is_other(name: str) -> bool:
    """Whether a tensor is looked at elsewhere."""
    inside = name.split(".", 2)[-1]
    return name in FACTORS or inside in (ROUTER, SHARED_GATE, BIAS) or inside.startswith(EXPERTS)


def _carried(opened: GGUFFile, source: DenseModel) -> Iterator[tuple[str, Tensor]]:
    """Names in the file and dense values, in the order that the file has."""
    target = targets.for_model(opened.target, source)
    number = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == opened.architecture)
    names = gguf.get_tensor_name_map(number, source.num_layers)
    inside = {name for layer in range(source.num_layers) for name in source.ffn_names(layer)}
    carried = [name for name in source.shapes if name not in inside]
    # A head that is tied may be written all the same.
    carried += [name for name in source.tied if HEAD in opened.tensors or target.untie]
    for name in carried:
        stored = source.tied.get(name, name)
        for part, values in target.carry(name, source.get([stored])[stored], source).items():
            module, _, suffix = part.rpartition(".")
            place = f"{names.get_name(module) or part}.{suffix}"
            yield place, _ordered(place, values, opened, source)
    for layer in range(source.num_layers):
        for part, shape in target.extra_tensors(target.block(layer), source).items():
            module, _, suffix = part.rpartition(".")
            yield f"{names.get_name(module) or part}.{suffix}", torch.zeros(shape)


def _ordered(place: str, values: Tensor, opened: GGUFFile, source: DenseModel) -> Tensor:
    """Rows of q and k as llama.cpp rotates them: neighbours instead of halves, in some architectures."""
    heads = {"attn_q": source.config.num_attention_heads, "attn_k": source.config.num_key_value_heads}
    count = heads.get(place.split(".")[-2])
    if count is None or not opened.is_interleaved:
        return values
    half = values.shape[0] // count // 2
    order = torch.arange(values.shape[0]).view(count, 2, half).transpose(1, 2).flatten()
    return values[order]
