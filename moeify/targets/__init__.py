"""Native MoE architectures, one file each: by what names and config values stock software computes a split model.

Legend: R routed experts, f expert width, s width of all shared experts together, D hidden size.

Every target makes the selected experts' weights one, or a constant that is folded into down_proj. A router row is
scaled by ROUTER_SCALE so that the weights of a trained router stay near that constant, while its ranking, which is all
that hard routing needs, survives. Where weights are normalised, that of a single routed expert is one whatever its
score, so its router is written at full size.

Whether a target represents a dense model exactly is not written here: convert/exactness.py converts a toy twin of the
model and compares. A target only says what its layout cannot be, and has words for what a twin may find.

To add one, copy `mixtral.py`; nothing else is edited.
"""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from moeify import plugins
from moeify.engines import Engine, Shape
from moeify.experts.slices import SplitFFN
from moeify.families import Blocks, Family, FFNFormat, GGUFFormat, lists_of
from moeify.layout import Layout, resolve_layout
from moeify.modeling.modeling_moeify import PREFIX
from moeify.models.dense import DenseModel
from moeify.models.ffn import pack
from moeify.models.heads import LANGUAGE_MODEL, auto_name, class_of, classes_of_type
from moeify.options import Style

# A larger scale lets engines rank more choices as float64 does, and moves weights away from the one that a split is
# fitted for. SmolLM2-135M, 4 of 8 experts, 8,192 tokens of Moby Dick that nothing was fitted to: choices of a token in
# a layer that a ranked float32 softmax makes otherwise (granitemoeshared, mixtral; llama.cpp ranks so), root mean
# square and maximum of a weight's distance from one, perplexity over that with weights of one; squared error of a
# layer's output over that with weights of one, mean and worst layer (mixtral; 2 cores of an Intel Xeon, 2026-11-26):
#     2^-10   0.026 0.022 %   0.0005, 0.004   1.001 0.997 (+- 0.002)   1.001, 1.04
#     2^-9    0.009 0.011 %   0.0010, 0.007   1.003 0.999 (+- 0.002)
#     2^-8    0.006 0.002 %   0.0020, 0.014   1.005 1.000 (+- 0.003)   1.013, 1.37
#     2^-7    0.003 0.002 %   0.0040, 0.028   1.002 0.998 (+- 0.003)   1.049, 2.37
# Perplexity knows no difference. A larger scale ranks half to a tenth of so few choices otherwise; with 2^-10 a loss
# that is computed with weights of one is that of the checkpoint.
ROUTER_SCALE = 2.0**-10
# Largest router score of a calibration token, before it is scaled.
ROUTER_LIMIT = 4.0
# What every target's config takes over from the dense model's, as far as that has it.
CARRIED = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "rope_parameters",
    "attention_dropout",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "tie_word_embeddings",
    "use_cache",
)
# And that of a model with a head for classes.
LABELS = ("id2label", "label2id", "problem_type")


@dataclass(frozen=True)
class Modules:
    """Where stock transformers keeps the parts of one MoE layer, relative to the decoder layer; for `verify`.

    Args:
        experts, shared: modules.
        router: module that gives the chosen experts and their weights; `router_weight` is its matrix, and
            `router_hidden` are weight and bias of a hidden layer that it may have.
        shared_gate_up, shared_down: modules of the shared part.
        shared_gate: the module that weights it.
    """

    experts: str
    router: str
    router_weight: str = "weight"
    router_hidden: tuple[str, ...] = ()
    shared: str = ""
    shared_gate_up: tuple[str, ...] = ()
    shared_down: str = ""
    shared_gate: str = ""

    @property
    def router_parts(self) -> tuple[str, ...]:
        """Names of all parameters that a router may have."""
        return (self.router_weight, *self.router_hidden)


def as_llama(name: str, tensor: Tensor, dense: DenseModel) -> dict[str, Tensor]:
    """A tensor besides FFNs as llama-like architectures have it.

    q, k and v of one matrix are taken apart. Rows of q and k that rotate as neighbouring pairs are put into halves, so
    that row i and row i + n/2 are a pair. What a norm adds to its weight is added in float32: rounded to bfloat16 it
    would be another number.
    """
    family = dense.family
    if ".self_attn.qkv_proj." in name:
        queries = int(dense.text_config.num_attention_heads) * dense.attention.head_dim
        keys = (tensor.shape[0] - queries) // 2
        parts = tensor.split([queries, keys, keys])
        return {name.replace("qkv_proj", f"{part}_proj"): rows for part, rows in zip("qkv", parts, strict=True)}
    if family.rotates_pairs and (".self_attn.q_proj." in name or ".self_attn.k_proj." in name):
        return {name: _in_halves(tensor, dense)}
    if family.norm_offset and tensor.ndim == 1 and name.endswith("norm.weight"):
        return {name: tensor.float() + family.norm_offset}
    return {name: tensor}


def _in_halves(tensor: Tensor, dense: DenseModel) -> Tensor:
    """Rows of q or k, or their biases, pairs apart by half of what rotates of a head."""
    head_dim = dense.attention.head_dim
    rotated = int(head_dim * (dense.text_config.rope_parameters or {}).get("partial_rotary_factor", 1.0))
    order = [*range(0, rotated, 2), *range(1, rotated, 2), *range(rotated, head_dim)]
    rows: Tensor = tensor.unflatten(0, (-1, head_dim))[:, order].flatten(0, 1)
    return rows


def as_it_is(name: str, tensor: Tensor, dense: DenseModel) -> dict[str, Tensor]:
    """A tensor besides FFNs of a family whose own MoE sibling the target is."""
    return {name: tensor}


@dataclass(frozen=True)
class Target:
    """One MoE architecture of transformers.

    Args:
        model_type: the value in config.json; also the file's name.
        architecture: class name in config.json.
        preference: the target with the lowest number is tried first: engines that load it, then whether shared experts
            are plain (no sigmoid to fold).
        holds_shared: has experts that are always on.
        num_shared: how many of these it has, where that is no choice.
        engines: what else has the architecture in its sources; only transformers is tested here.
        engines_with_dense: those that also take models whose FFNs are not all experts; none means that transformers
            does not either.
        mixings: what the weights of its experts can be.
        normalised: the weights of the chosen experts add up to one, so that of a single one is exactly one.
        refuse: why engines cannot run it for this model in this layout, or "".
        explain: why it may compute something else than the model, in words, or ""; only shown, a twin decides.
        config: config values that differ from CARRIED, given the model, the layout and the expert width.
        routed_fold: factor on the routed down_proj that undoes the architecture's expert weights.
        shared_fold: the same for the shared part.
        ffn_tensors: on-disk names of one MoE layer, given the block's name and its experts.
        carry: on-disk names and values of a tensor that belongs to no FFN; one that it makes wider is written so.
        extra_tensors: further tensors one layer needs, as name -> shape, given the block's name; written as zeros.
        dense_ffn: how an FFN that is not cut lies on disk.
        untie: an engine needs lm_head.weight written out although the dense model ties it.
        blocks: by their names in the stock model.
        modules: where the loaded model keeps its parts.
        gguf: how llama.cpp has it; None if it does not.
        autocast: what mixed precision does to its routing and what to do instead, for the model card; "" where the same
            experts are chosen. A test measures it for every target.
        needs_float32: why its routers work in float32 only, or "".
        is_stock: transformers itself has it, not moeify.
        exact_weights: the weight of a chosen expert is one whatever its score is.
        holder: model type of the whole of which it is the part that reads text; "" if it is the whole.
    """

    model_type: str
    architecture: str
    preference: int
    holds_shared: bool
    engines: tuple[str, ...]
    config: Callable[[DenseModel, Layout, int], dict[str, Any]]
    routed_fold: Callable[[Layout], float]
    ffn_tensors: Callable[[str, SplitFFN], dict[str, Tensor]]
    modules: Modules
    engines_with_dense: tuple[str, ...] = ()
    mixings: tuple[Style, ...] = ("hard",)
    normalised: bool = False
    refuse: Callable[[DenseModel, Layout], str] = lambda dense, layout: ""
    explain: Callable[[DenseModel], str] = lambda dense: ""
    shared_fold: float = 1.0
    carry: Callable[[str, Tensor, DenseModel], dict[str, Tensor]] = as_llama
    extra_tensors: Callable[[str, DenseModel], Mapping[str, tuple[int, ...]]] = lambda prefix, dense: {}
    dense_ffn: FFNFormat = field(default_factory=FFNFormat)
    untie: bool = False
    blocks: Blocks = field(default_factory=lambda: Blocks(lists_of("model.layers")))
    gguf: GGUFFormat | None = None
    autocast: str = ""
    needs_float32: str = ""
    num_shared: int | None = None
    is_stock: bool = True
    exact_weights: bool = False
    holder: str = ""

    @property
    def caution(self) -> str:
        """`autocast` in a few words, for the reason why the target was taken; begins with a separator."""
        return "; not for training under autocast, its model card says why" if self.autocast else ""

    @property
    def frozen(self) -> tuple[str, ...]:
        """How the names end, in the loaded model, of the parameters that training must leave alone."""
        gate = self.modules.shared_gate
        router = [f".{self.modules.router}.{name}" for name in self.modules.router_parts]
        return (*router, *([f".{gate}.weight"] if gate else []))

    def layout(self, experts: int, shared: int | None = None, active: int | None = None) -> Layout:
        """Fill in what is open, as this target has it; all layers are alike."""
        shared = self.num_shared if shared is None else shared
        return resolve_layout(experts, shared, active, holds_shared=self.holds_shared)

    @property
    def holds_dense(self) -> bool:
        """Whether layers may stay dense."""
        return bool(self.engines_with_dense) or not self.is_stock

    def known_to(self, layout: Layout) -> tuple[str, ...]:
        """Engines that know the architecture in such a layout."""
        return self.engines_with_dense if layout.dense_layers else self.engines

    def loaded_by(self, layout: Layout) -> str:
        """What loads a checkpoint, in words."""
        if not self.is_stock:
            return "loads in transformers where moeify is imported"
        return "known to " + ", ".join(("transformers", *self.known_to(layout)))

    def refusal_of(self, engine: Engine, shape: Shape) -> str:
        """Why an engine does not run this target in this shape, or ""."""
        if engine.name not in self.known_to(shape.layout):
            return f"it does not know {self.model_type}" + (" with dense layers" if shape.layout.dense_layers else "")
        return engine.refuse(shape)

    def block(self, layer: int) -> str:
        """Name of the module that the FFN of a block lies in, usually the block itself."""
        return self.blocks.site(layer)


def carried(dense: DenseModel) -> dict[str, Any]:
    """Config values that every target takes over unchanged from the dense model."""
    values = {key: getattr(dense.text_config, key) for key in CARRIED if hasattr(dense.text_config, key)}
    if auto_name(dense.config) != LANGUAGE_MODEL:
        values |= {key: getattr(dense.config, key) for key in LABELS if getattr(dense.config, key, None) is not None}
    # Configs complete what they are given, rotations among it, in place.
    return copy.deepcopy({**values, "hidden_act": dense.activation})


def sibling(dense: DenseModel, model_type: str) -> dict[str, Any]:
    """Config values that a family's own MoE sibling shares with it by their names; an FFN's sizes are the caller's."""
    base = {part.name for part in fields(PreTrainedConfig)}
    shared = {part.name for part in fields(CONFIG_MAPPING[model_type])} - base
    values = {name: getattr(dense.text_config, name) for name in sorted(shared) if hasattr(dense.text_config, name)}
    return {**copy.deepcopy(values), **carried(dense)}


def names() -> list[str]:
    """All targets, the preferred ones first."""
    return sorted(plugins.names(__name__), key=lambda name: (find(name).preference, name))


def find(name: str, family: Family | None = None, blocks: Blocks | None = None) -> Target:
    """A target by its name.

    Args:
        name: its file's.
        family: the dense model's; one that is no stock architecture has the family's names.
        blocks: of the model, where it is known.

    Raises:
        UsageError: there is none.
    """
    target = plugins.load(__name__, name, "TARGET")
    assert isinstance(target, Target)
    if family is None:
        return target
    if target.is_stock:
        holder = family.holder_of(name)
        return replace(target, holder=holder, blocks=blocks or Blocks(lists_of(family.blocks))) if holder else target
    adapted = plugins.load(__name__, name, "of")(family, blocks)
    assert isinstance(adapted, Target)
    return adapted


def for_model(name: str, dense: DenseModel) -> Target:
    """A target by its name, for a dense model."""
    return find(name, dense.family, dense.blocks)


def refusal(
    target: Target, dense: DenseModel, layout: Layout, style: Style = "hard", dtype: torch.dtype = torch.float32
) -> str:
    """Why this layout, mixing or type, or a kind of FFN, rules `target` out before its twin is built, or ""."""
    reasons = {
        "its experts have a gate and no biases, this model's FFNs are otherwise": (
            target.is_stock and not dense.ffn_shapes.is_plain_gated
        ),
        f"has no {auto_name(dense.config).removeprefix('AutoModelFor')}": not architecture_of(target, dense),
        f"its experts' weights cannot be {style}": style not in target.mixings,
        f"{target.needs_float32} (use --dtype float32)": bool(target.needs_float32) and dtype != torch.float32,
        "its tokens all have as many experts": layout.is_adaptive and target.is_stock,
        "its layers all have as many active experts": bool(layout.active_by_layer) and target.is_stock,
        "its layers are all cut alike": layout.is_mixed and target.is_stock,
        "has no dense layers": bool(layout.dense_layers) and not target.holds_dense,
        "has no shared experts (use --shared 0)": bool(layout.num_shared) and not target.holds_shared,
        "nothing is routed (use --static for pruning)": layout.is_static,
    }
    return next((reason for reason, holds in reasons.items() if holds), "") or target.refuse(dense, layout)


def architecture_of(target: Target, dense: DenseModel) -> str:
    """Name of the target's class with the head that the model has; "" if there is none."""
    if not target.is_stock:
        return PREFIX + str(class_of(dense.config).__name__)
    auto = auto_name(dense.config)
    if auto == LANGUAGE_MODEL:
        return target.architecture
    return next(iter(classes_of_type(auto, target.holder or target.model_type)), "")


def static_target(dense: DenseModel) -> Target:
    """Static pruning as a target: the family's own architecture, its FFN narrower; the control to beat."""
    family = dense.family
    return Target(
        model_type=family.model_type,
        architecture="",
        preference=0,
        holds_shared=True,
        engines=("everything that loads the dense model",),
        config=lambda dense, layout, width: dense.config_with(
            {**family.fixed, **family.with_width(dense.text_config, layout.num_active * width)}
        ),
        routed_fold=lambda layout: 1.0,
        ffn_tensors=lambda prefix, experts: pack(family.ffn, prefix, experts.shared),
        carry=as_it_is,
        dense_ffn=family.ffn,
        blocks=dense.blocks,
        gguf=family.gguf,
        modules=Modules(experts="", router=""),
    )
