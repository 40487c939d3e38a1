"""From a plan to a checkpoint that stock transformers, vLLM, SGLang and llama.cpp load: shard by shard, nothing else.

Legend: s neurons of the shared part, R routed experts, f neurons of one, D hidden size.
"""

import json
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from torch import Tensor
from transformers import AutoConfig

from moeify.errors import InputError
from moeify.experts.mixing import UNIT, Mixing
from moeify.experts.slices import SplitFFN
from moeify.export.old_config import with_old_keys
from moeify.export.workspace import Workspace
from moeify.layout import Layout
from moeify.modeling.remote_code import auto_map, code_files
from moeify.models.dense import DenseModel
from moeify.models.ffn import FFNWeights, pack
from moeify.models.files import INDEX_FILE
from moeify.options import Track
from moeify.progress import Resumed
from moeify.targets import ROUTER_SCALE, Target, architecture_of

# Memory while writing is about twice this.
SHARD_BYTES = 1 << 30
# A tensor of the dense model, a layer whose FFN it is, or neither: a constant that the target needs.
Source = str | int | None
# The experts of one layer, folds not yet applied; of a layer that stays dense its FFN as the shared part.
ExpertsOf = Callable[[int], SplitFFN]


@dataclass(frozen=True)
class MoEWriter:
    """Names, shapes and values of everything in the converted checkpoint.

    Args:
        dense: where unchanged tensors come from.
        target: what the names are.
        layout: how FFNs are cut.
        dtype: of every weight written.
        mixing: what the routed experts' outputs are multiplied with.
        router_scale: what the plan's router rows are multiplied with.
        remote_code: code lies beside the weights, for transformers without moeify.
        router_width: hidden units of the routers; 0 if they are linear.
    """

    dense: DenseModel
    target: Target
    layout: Layout
    dtype: torch.dtype
    mixing: Mixing = UNIT
    router_scale: float = ROUTER_SCALE
    remote_code: bool = False
    router_width: int = 0

    @property
    def is_static(self) -> bool:
        """The dense model's own architecture is written."""
        return self.layout.is_static or self.target.model_type == self.dense.config.model_type

    def config(self) -> Any:
        """The target's transformers config."""
        width = self.layout.expert_width(self.dense.num_neurons)
        values, model_type = self.target.config(self.dense, self.layout, width), self.target.model_type
        if not self.target.is_stock:
            values |= {"mixing": self.mixing.style, "router_width": self.router_width}
        if self.remote_code:
            values["auto_map"] = auto_map(self.dense.family.model_type)
        if self.target.untie:
            values["tie_word_embeddings"] = False
        rotation = values.get("rope_parameters") or {}
        if "partial_rotary_factor" in rotation:
            # Older ones of transformers 5 keep the class's default beside it, and read that with a rope_scaling.
            values["partial_rotary_factor"] = rotation["partial_rotary_factor"]
        if self.target.holder:
            whole = self.dense.config.to_dict()
            if self.target.untie:
                whole["tie_word_embeddings"] = False
            values, model_type = {**whole, "text_config": {**values, "model_type": model_type}}, self.target.holder
        if not self.is_static:
            values["architectures"] = [architecture_of(self.target, self.dense)]
        values["dtype"] = self.dtype
        values.pop("model_type", None)
        return AutoConfig.for_model(model_type, **values)

    def config_text(self) -> str:
        """What config.json holds: the config, for old loaders too."""
        return with_old_keys(self.config().to_json_string(use_diff=False))

    def shapes(self) -> dict[str, Tensor]:
        """Every tensor of the checkpoint on the meta device, by name."""
        return {name: tensor for _, tensors in self._parts() for name, tensor in tensors.items()}

    @property
    def num_bytes(self) -> int:
        """Of all tensors of the checkpoint."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.shapes().values())

    def _parts(self) -> Iterator[tuple[Source, dict[str, Tensor]]]:
        """The checkpoint from front to back: a source, and what it becomes, on the meta device."""
        ffns = {name for layer in range(self.dense.num_layers) for name in self.dense.ffn_names(layer)}
        carried = [name for name in self.dense.shapes if name not in ffns]
        if self.target.untie:
            carried += self.dense.tied
        for name in carried:
            stored = self.dense.tied.get(name, name)
            meta = torch.empty(self.dense.shapes[stored], dtype=self.dense.dtype_of(stored), device="meta")
            yield name, self._carried(name, meta)
        whole = self.dense.ffn_shapes.map(lambda tensor: tensor.to(self.dtype))
        for layer in range(self.dense.num_layers):
            yield layer, self.layer(layer, self._cut(whole, self.layout.of_layer(layer)))
        for layer in range(self.dense.num_layers):
            extra = self.target.extra_tensors(self.target.block(layer), self.dense)
            shapes = {name: torch.empty(shape, dtype=self.dtype, device="meta") for name, shape in extra.items()}
            yield None, shapes

    def _cut(self, whole: FFNWeights, layout: Layout) -> SplitFFN:
        """A layer of this layout, on the meta device."""
        width, routed = layout.expert_width(whole.num_neurons), layout.num_routed
        shared = whole.neurons(slice(layout.num_shared * width))
        if layout.is_static:
            return SplitFFN(shared, whole.neurons(slice(0)), whole.up_FD.new_empty(0, whole.hidden_size))
        router_RD = whole.up_FD.new_empty(routed, self.router_width or whole.hidden_size)
        units_HC = whole.up_FD.new_empty(self.router_width, whole.hidden_size + 1) if self.router_width else None
        threshold_R = router_RD.new_empty(routed) if layout.is_adaptive else None
        return SplitFFN(shared, whole.neurons(slice(routed * width)), router_RD, units_HC, threshold_R)

    def _carried(self, name: str, tensor: Tensor) -> dict[str, Tensor]:
        """What a tensor that belongs to no FFN becomes; what the target makes wider stays so."""
        parts = self.target.carry(name, tensor, self.dense)
        return {key: rows.to(self.dtype) if rows.dtype == tensor.dtype else rows for key, rows in parts.items()}

    def layer(self, layer: int, experts: SplitFFN) -> dict[str, Tensor]:
        """Names and values of one layer's experts, folds applied, router scaled."""
        prefix = self.target.block(layer)
        if layer in self.layout.dense_layers:
            return pack(self.target.dense_ffn, prefix, self.dense.unpadded(experts.shared))
        folded = experts.folded(
            shared=self.target.shared_fold,
            routed=routed_fold(self.target, self.layout.of_layer(layer), self.mixing),
            router=self.router_scale,
        )
        return self.target.ffn_tensors(prefix, folded)

    def write(self, workspace: Workspace, experts_of: ExpertsOf, track: Track[Any]) -> None:
        """Write all shards that are not there yet, then index, config and generation config."""
        meta = self.shapes()
        shards = split_torch_state_dict_into_shards(
            meta, filename_pattern="model{suffix}.safetensors", max_shard_size=SHARD_BYTES
        )
        files = _numbered(shards.filename_to_tensors)
        written = Resumed(files, sum(1 for _ in takewhile(workspace.has, files)))
        for file in track(written, "writing shards", len(files)):
            if not workspace.has(file):
                workspace.write_tensors(file, self.values(set(files[file]), experts_of), {"format": "pt"})
        index = {
            "metadata": {"total_size": sum(t.numel() * t.element_size() for t in meta.values())},
            "weight_map": {name: file for file, names in files.items() for name in names},
        }
        workspace.write_text(INDEX_FILE, json.dumps(index, indent=2, sort_keys=True) + "\n")
        workspace.write_text("config.json", self.config_text())
        for name, content in code_files().items() if self.remote_code else ():
            workspace.write_bytes(name, content)

    def values(self, names: Collection[str], experts_of: ExpertsOf) -> dict[str, Tensor]:
        """The named tensors; a layer, or a matrix that is taken apart, is read again for each shard with a part of it.

        Raises:
            InputError: a value does not fit the checkpoint's type.
        """
        values: dict[str, Tensor] = {}
        for source, shapes in self._parts():
            if not any(name in names for name in shapes):
                continue
            if isinstance(source, int):
                tensors = self.layer(source, experts_of(source))
            elif isinstance(source, str):
                stored = self.dense.tied.get(source, source)
                tensors = self._carried(source, self.dense.get([stored])[stored])
            else:
                tensors = {name: torch.zeros(meta.shape, dtype=meta.dtype) for name, meta in shapes.items()}
            for name, tensor in tensors.items():
                if name in names:
                    check_fits(name, tensor)
                    values[name] = tensor.contiguous()
        return values


def router_scale(target: Target, layout: Layout, mixing: Mixing) -> float:
    """What a router's scores are multiplied with when they are written."""
    if mixing.style != "hard":
        return 1 / mixing.temperature
    return 1.0 if weights_are_exact(target, layout) else ROUTER_SCALE


def weights_are_exact(target: Target, layout: Layout) -> bool:
    """Whether the weight of the routed experts is one whatever their scores are."""
    return target.exact_weights or (target.normalised and layout.num_routed_active == 1)


def routed_fold(target: Target, layout: Layout, mixing: Mixing) -> float:
    """Factor on the routed down_proj: what the architecture's expert weights need, and how experts are put together."""
    fold = target.routed_fold(layout)
    return fold if mixing.fusion == "sum" or layout.is_static else fold / layout.num_routed_active


def check_fits(name: str, tensor: Tensor) -> None:
    """Refuse what became infinite when it was rounded to the checkpoint's type; it was finite when it was read."""
    if not all(end.isfinite() for end in tensor.aminmax()):
        dtype = str(tensor.dtype).removeprefix("torch.")
        raise InputError(f"{name} has values beyond the range of {dtype}", "--dtype bfloat16 reaches as far as float32")


def _numbered(shards: Mapping[str, list[str]]) -> dict[str, list[str]]:
    """Shard names with a number even for one: vLLM would load the plan as weights if there were no index."""
    total = len(shards)
    return {f"model-{i:05d}-of-{total:05d}.safetensors": names for i, names in enumerate(shards.values(), start=1)}
