"""From a plan to a checkpoint that stock transformers, vLLM, SGLang and llama.cpp load: shard by shard, nothing else.

Legend: s neurons of the shared part, R routed experts, f neurons of one, D hidden size.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from torch import Tensor
from transformers import AutoConfig, GenerationConfig

from moeify.errors import InputError
from moeify.experts.mixing import UNIT, Mixing
from moeify.export.workspace import Workspace
from moeify.models.dense import INDEX_FILE, TOKENIZER_FILES, DenseCheckpoint
from moeify.options import Track
from moeify.plan import SHARED, LayerPlan, Layout
from moeify.targets import ROUTER_SCALE, SplitFFN, Target

# Memory while writing is about twice this.
SHARD_BYTES = 1 << 30
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@dataclass(frozen=True)
class MoEWriter:
    """Names, shapes and values of everything in the converted checkpoint.

    Args:
        dense: where unchanged tensors come from.
        target: what the names are.
        layout: how FFNs are cut.
        dtype: of every weight written.
        mixing: what the routed experts' outputs are multiplied with.
    """

    dense: DenseCheckpoint
    target: Target
    layout: Layout
    dtype: torch.dtype
    mixing: Mixing = UNIT

    def config(self) -> Any:
        """The target's transformers config."""
        width = self.layout.expert_width(self.dense.config.intermediate_size)
        values = self.target.config(self.dense.config, self.dense.traits, self.layout, width)
        values["architectures"] = [self.target.architecture] if self.target.architecture else values["architectures"]
        values["dtype"] = self.dtype
        if self.target.untie:
            values["tie_word_embeddings"] = False
        values.pop("model_type", None)
        return AutoConfig.for_model(self.target.model_type, **values)

    def shapes(self) -> dict[str, Tensor]:
        """Every tensor of the checkpoint on the meta device, by name, in layer order."""
        width = self.layout.expert_width(self.dense.config.intermediate_size)
        hidden = self.dense.config.hidden_size
        shared, routed = self.layout.num_shared * width, self.layout.num_routed

        def empty(*shape: int) -> Tensor:
            return torch.empty(shape, dtype=self.dtype, device="meta")

        ffn = SplitFFN(
            gate_sD=empty(shared, hidden),
            up_sD=empty(shared, hidden),
            down_Ds=empty(hidden, shared),
            gate_RfD=empty(routed, width, hidden),
            up_RfD=empty(routed, width, hidden),
            down_RDf=empty(routed, hidden, width),
            router_RD=empty(routed, hidden),
        )
        tensors = {name: empty(*self.dense.shapes[name]) for name in self._unchanged()}
        if self.target.untie and self.dense.ties_embeddings:
            tensors[HEAD] = empty(*self.dense.shapes[EMBEDDING])
        for layer in self._cut_layers():
            tensors |= self.target.ffn_tensors(f"model.layers.{layer}", ffn)
        return tensors | {name: empty(*shape) for name, shape in self._extra().items()}

    def layer(self, plan: LayerPlan) -> dict[str, Tensor]:
        """Values of one layer's FFN: dense rows in expert order, folds applied, router scaled."""
        gate_FD, up_FD, down_DF = (weight.to(self.dtype) for weight in self.dense.ffn(plan.layer))
        if plan.layer in self.layout.dense_layers:
            return dict(zip(self.dense.family.ffn_names(plan.layer), (gate_FD, up_FD, down_DF), strict=True))
        if plan.down_DF is not None:
            down_DF = plan.down_DF
        shared = plan.neurons(SHARED)
        routed = torch.cat([plan.neurons(expert) for expert in range(self.layout.num_routed)] or [shared[:0]])
        split = (self.layout.num_routed, self.layout.expert_width(self.dense.config.intermediate_size))
        hidden = down_DF.shape[0]
        router_RD = plan.router_RD if plan.router_RD is not None else gate_FD.new_zeros(self.layout.num_routed, hidden)
        ffn = SplitFFN(
            gate_sD=gate_FD[shared],
            up_sD=up_FD[shared],
            down_Ds=down_DF[:, shared] * self.target.shared_fold,
            gate_RfD=gate_FD[routed].unflatten(0, split),
            up_RfD=up_FD[routed].unflatten(0, split),
            down_RDf=down_DF[:, routed].unflatten(1, split).transpose(0, 1)
            * routed_fold(self.target, self.layout, self.mixing),
            router_RD=router_RD * (ROUTER_SCALE if self.mixing.style == "hard" else 1 / self.mixing.temperature),
        )
        return self.target.ffn_tensors(f"model.layers.{plan.layer}", ffn)

    def _cut_layers(self) -> list[int]:
        return [layer for layer in range(self.dense.num_layers) if layer not in self.layout.dense_layers]

    def _unchanged(self) -> list[str]:
        ffn = {name for layer in self._cut_layers() for name in self.dense.family.ffn_names(layer)}
        return [name for name in self.dense.shapes if name not in ffn]

    def write(self, workspace: Workspace, layer_plan: Callable[[int], LayerPlan], track: Track[Any]) -> None:
        """Write all shards that are not there yet, then index, config, generation config and tokenizer files."""
        meta = self.shapes()
        shards = split_torch_state_dict_into_shards(
            meta, filename_pattern="model{suffix}.safetensors", max_shard_size=SHARD_BYTES
        )
        files = _numbered(shards.filename_to_tensors)
        for file in track(files, "writing shards", len(files)):
            if not workspace.has(file):
                workspace.write_tensors(file, self._values(files[file], layer_plan), {"format": "pt"})
        index = {
            "metadata": {"total_size": sum(t.numel() * t.element_size() for t in meta.values())},
            "weight_map": {name: file for file, names in files.items() for name in names},
        }
        workspace.write_text(INDEX_FILE, json.dumps(index, indent=2, sort_keys=True) + "\n")
        workspace.write_text("config.json", self.config().to_json_string(use_diff=False))
        self._copy_companions(workspace)

    def _values(self, names: list[str], layer_plan: Callable[[int], LayerPlan]) -> dict[str, Tensor]:
        """The named tensors; a layer is rebuilt for each shard that holds a part of it."""
        wanted, unchanged, extra = set(names), set(self._unchanged()), self._extra()
        values: dict[str, Tensor] = {}
        for name in names:
            if name in values:
                continue
            if name in unchanged:
                values[name] = self.dense.get([name])[name].to(self.dtype)
            elif name == HEAD:
                values[name] = self.dense.get([EMBEDDING])[EMBEDDING].to(self.dtype)
            elif name in extra:
                values[name] = torch.zeros(extra[name], dtype=self.dtype)
            else:
                layer = self.layer(layer_plan(int(name.split(".")[2])))
                values |= {key: tensor for key, tensor in layer.items() if key in wanted}
        for name, tensor in values.items():
            check_fits(name, tensor)
        return {name: tensor.contiguous() for name, tensor in values.items()}

    def _extra(self) -> dict[str, tuple[int, ...]]:
        shapes: dict[str, tuple[int, ...]] = {}
        for layer in range(self.dense.num_layers):
            shapes |= self.target.extra_tensors(f"model.layers.{layer}", self.dense.config, self.dense.traits)
        return shapes

    def _copy_companions(self, workspace: Workspace) -> None:
        for name in TOKENIZER_FILES:
            if (self.dense.path / name).is_file():
                workspace.copy(self.dense.path / name)
        generation = self.dense.path / "generation_config.json"
        if generation.is_file():
            workspace.copy(generation)
        else:
            workspace.write_text(
                generation.name, GenerationConfig.from_model_config(self.dense.config).to_json_string()
            )


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
