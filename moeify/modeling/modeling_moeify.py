"""A dense model of transformers whose feed-forward layers (FFNs) are experts; all else is its own class's.

Every tensor besides the FFNs keeps its name, heads among them. With every expert chosen it computes the dense model:
the weight of a chosen expert is exactly one, and the bias of the output of an FFN is added once.

Legend: T tokens, D hidden size, R routed experts, K of them chosen for a token, f neurons of one, P = 2f or f rows.
"""

import shutil
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoConfig
from transformers.activations import ACT2FN
from transformers.integrations.moe import use_experts_implementation
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from .configuration_moeify import of_layer

# What lies beside weights for transformers without moeify.
CODE_FILES = ("configuration_moeify.py", "modeling_moeify.py")
# What the name of a dense class is preceded by.
PREFIX = "Moe"
# Standard deviation of new weights, where a config says nothing.
INITIAL = 0.02
# Kinds of heads that are carried: classes of transformers that choose a model by its config.
AUTO_CLASSES = (
    "AutoModel",
    "AutoModelForCausalLM",
    "AutoModelForMaskedLM",
    "AutoModelForSeq2SeqLM",
    "AutoModelForSpeechSeq2Seq",
    "AutoModelForImageTextToText",
    "AutoModelForPreTraining",
    "AutoModelForSequenceClassification",
    "AutoModelForTokenClassification",
    "AutoModelForQuestionAnswering",
    "AutoModelForImageClassification",
)


class Router(nn.Module):
    """Chooses experts: one row of weights for each, on the hidden states or on a layer of units between."""

    def __init__(self, config: Any, hidden_size: int, layer: int = 0) -> None:
        super().__init__()
        sizes = of_layer(config, layer)
        self.num_chosen, self.num_experts = int(sizes.num_experts_per_tok), int(sizes.num_experts)
        self.mixing, self.min_chosen = config.mixing, sizes.min_experts_per_tok
        width = int(config.router_width)
        if width:
            self.hidden_weight = nn.Parameter(torch.empty(width, hidden_size))
            self.hidden_bias = nn.Parameter(torch.empty(width))
        self.is_linear = not width
        self.threshold: Tensor
        if self.min_chosen is not None:
            self.register_buffer("threshold", torch.zeros(self.num_experts))
        self.weight = nn.Parameter(torch.empty(self.num_experts, width or hidden_size))

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Scores_TR, weights_TK and numbers of the chosen experts_TK."""
        if not self.is_linear:
            hidden_states = nn.functional.linear(hidden_states, self.hidden_weight, self.hidden_bias).relu()
        scores_TR = nn.functional.linear(hidden_states, self.weight)
        if self.min_chosen is not None:
            scores_TR = scores_TR - self.threshold
        best_TK, chosen_TK = scores_TR.topk(self.num_chosen, dim=-1)
        if self.min_chosen is not None:
            keep_TK = best_TK > 0
            keep_TK[:, : self.min_chosen] = True
            # What is no expert's number adds nothing and costs nothing.
            return scores_TR, keep_TK.to(best_TK.dtype), torch.where(keep_TK, chosen_TK, self.num_experts)
        if self.mixing == "hard":
            return scores_TR, torch.ones_like(best_TK), chosen_TK
        weights_TK = best_TK.softmax(dim=-1, dtype=torch.float32) * self.num_chosen
        return scores_TR, weights_TK.to(best_TK.dtype), chosen_TK


class _Experts(nn.Module):
    """All routed experts of a layer; transformers computes them as it is told to."""

    gated, biased = True, False
    # Kernels that read it leave out the zeros of `down_proj_bias`.
    has_down_bias = False
    _apply_gate: Any

    def __init__(self, config: Any, hidden_size: int, layer: int = 0) -> None:
        super().__init__()
        sizes = of_layer(config, layer)
        self.num_experts, self.width = sizes.num_experts, sizes.moe_intermediate_size
        self.hidden_dim = hidden_size
        name, rows = ("gate_up_proj", 2 * self.width) if self.gated else ("up_proj", self.width)
        self.register_parameter(name, nn.Parameter(torch.empty(self.num_experts, rows, hidden_size)))
        if self.biased:
            self.register_parameter(f"{name}_bias", nn.Parameter(torch.empty(self.num_experts, rows)))
        self.down_proj = nn.Parameter(torch.empty(self.num_experts, hidden_size, self.width))
        self.act_fn = ACT2FN[config.expert_activation]

    @property
    def down_proj_bias(self) -> Tensor:
        """Zeros: the FFN's bias is added once, whatever is chosen."""
        return self.down_proj.new_zeros(self.num_experts, self.hidden_dim)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Expert after expert, in a fixed order."""
        outputs_TD = torch.zeros_like(hidden_states)
        for expert in range(self.num_experts):
            token, place = (top_k_index == expert).nonzero(as_tuple=True)
            if len(token):
                rows = self._rows(hidden_states[token], expert)
                hidden = self._apply_gate(rows) if self.gated else self.act_fn(rows)
                part = nn.functional.linear(hidden, self.down_proj[expert]) * top_k_weights[token, place, None]
                outputs_TD.index_add_(0, token, part.to(outputs_TD.dtype))
        return outputs_TD

    def _rows(self, hidden: Tensor, expert: int) -> Tensor:
        name = "gate_up_proj" if self.gated else "up_proj"
        bias = getattr(self, f"{name}_bias")[expert] if self.biased else None
        return nn.functional.linear(hidden, getattr(self, name)[expert], bias)


@use_experts_implementation
class GatedExperts(_Experts):
    """down(act(gate(x)) * up(x))."""


@use_experts_implementation(has_bias=True)
class GatedBiasedExperts(_Experts):
    """down(act(gate(x) + b) * (up(x) + c))."""

    biased = True


@use_experts_implementation(has_gate=False)
class PlainExperts(_Experts):
    """down(act(up(x)))."""

    gated = False


@use_experts_implementation(has_gate=False, has_bias=True)
class PlainBiasedExperts(_Experts):
    """down(act(up(x) + b))."""

    gated, biased = False, True


EXPERTS: dict[tuple[bool, bool], type[_Experts]] = {
    (True, False): GatedExperts,
    (True, True): GatedBiasedExperts,
    (False, False): PlainExperts,
    (False, True): PlainBiasedExperts,
}


class SharedExperts(nn.Module):
    """The part of an FFN that is always on."""

    def __init__(self, config: Any, hidden_size: int, layer: int = 0) -> None:
        super().__init__()
        width, bias = of_layer(config, layer).shared_expert_intermediate_size, config.expert_bias
        self.gate_proj = nn.Linear(hidden_size, width, bias=bias) if config.expert_gate else None
        self.up_proj = nn.Linear(hidden_size, width, bias=bias)
        self.down_proj = nn.Linear(width, hidden_size, bias=False)
        self.act_fn = ACT2FN[config.expert_activation]

    def forward(self, hidden_states: Tensor) -> Tensor:
        rows = self.up_proj(hidden_states)
        hidden = self.act_fn(rows) if self.gate_proj is None else self.act_fn(self.gate_proj(hidden_states)) * rows
        outputs: Tensor = self.down_proj(hidden)
        return outputs


class MoeFFN(nn.Module):
    """Stands where an FFN read, and gives what it wrote; a layer may choose no experts, or have no part at all."""

    def __init__(self, config: Any, hidden_size: int, layer: int = 0) -> None:
        super().__init__()
        sizes = of_layer(config, layer)
        chooses, shares = sizes.num_experts > 0, sizes.shared_expert_intermediate_size > 0
        self.router = Router(config, hidden_size, layer) if chooses else None
        self.experts = EXPERTS[config.expert_gate, config.expert_bias](config, hidden_size, layer) if chooses else None
        if self.experts is not None:
            # Has transformers' implementations expect numbers beyond the last expert.
            self.experts._is_expert_parallel = sizes.min_experts_per_tok is not None  # type: ignore[assignment]
        self.shared = SharedExperts(config, hidden_size, layer) if shares else None
        self.bias = nn.Parameter(torch.empty(hidden_size)) if config.output_bias else None
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            else:
                nn.init.normal_(parameter, std=getattr(config, "initializer_range", INITIAL))

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        hidden_TD = hidden_states.reshape(-1, hidden_states.shape[-1])
        parts: list[Tensor] = []
        if self.router is not None and self.experts is not None:
            _, weights_TK, chosen_TK = self.router(hidden_TD)
            parts.append(self.experts(hidden_TD, chosen_TK, weights_TK))
        if self.shared is not None:
            parts.append(self.shared(hidden_TD))
        if self.bias is not None:
            parts.append(self.bias.expand_as(hidden_TD))
        outputs_TD = sum(parts[1:], start=parts[0]) if parts else torch.zeros_like(hidden_TD)
        return outputs_TD.view_as(hidden_states)


class Passed(nn.Module):
    """Stands where nothing is done any more; a block may give it further arguments."""

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        return hidden_states


class _WithExperts:
    """What is added to the dense model's class."""

    def __init__(self, config: Any, *arguments: Any, **named: Any) -> None:
        # The dense model inside has no experts that it knows of, and takes no other word for how they are computed.
        implementation, config._experts_implementation_internal = config._experts_implementation, "eager"
        super().__init__(config, *arguments, **named)  # type: ignore[call-arg]
        config._experts_implementation_internal = self.get_correct_experts_implementation(implementation)  # type: ignore[attr-defined]
        for number, block in enumerate(sites_in(self, config.ffn_blocks)):
            if number not in (config.dense_layers or ()):
                put_experts(block, config, number)
        # The dense class did so before: parallel plans and types belong to modules that are gone.
        self.post_init()  # type: ignore[attr-defined]

    def save_pretrained(self, save_directory: Any, *arguments: Any, **named: Any) -> None:
        """As every model of transformers has it; code that lay beside the weights lies beside them again."""
        super().save_pretrained(save_directory, *arguments, **named)  # type: ignore[misc]
        if getattr(self.config, "auto_map", None):  # type: ignore[attr-defined]
            for name in CODE_FILES:
                shutil.copyfile(Path(__file__).with_name(name), Path(save_directory) / name)


def blocks_in(model: Any, name: str) -> str:
    """Name of the list of blocks in a model, whether it has a head or is what stands below one."""
    prefix = f"{model.base_model_prefix}."
    if model.base_model is model:
        return name.removeprefix(prefix)
    # Some classes with a head call what stands below it in another way than the others of their family, or hold it
    # where these are it.
    first, _, rest = name.partition(".")
    if hasattr(model, first):
        return name
    return prefix + (name if hasattr(model.base_model, first) else rest)


def sites_in(model: Any, names: str | list[str]) -> list[Any]:
    """The modules that FFNs lie in, through all lists of blocks: the blocks themselves, or a module of each."""
    sites: list[Any] = []
    for name in [names] if isinstance(names, str) else names:
        blocks, _, inside = blocks_in(model, name).partition(".*.")
        sites += [block.get_submodule(inside) for block in model.get_submodule(blocks)]
    return sites


def put_experts(block: nn.Module, config: Any, layer: int) -> None:
    """Replace the FFN of a block, which is the layer of this number, in place."""
    for name in (*(config.ffn_between or ()), config.ffn_write):
        if name != config.ffn_read:
            block.set_submodule(name, Passed())
    block.set_submodule(config.ffn_read, MoeFFN(config, config.get_text_config().hidden_size, layer))


@lru_cache
def model_class(dense_class: Any, config_class: Any) -> Any:
    """The dense model's class with experts."""
    return type(
        PREFIX + dense_class.__name__,
        (_WithExperts, dense_class),
        {
            # transformers looks for the decorator of the experts in the source of this module, for attention elsewhere;
            # what it once said of the dense class would be inherited.
            "__module__": __name__,
            "_can_set_experts_implementation_cached_value": True,
            "__doc__": f"{dense_class.__name__} with experts.",
            "_can_set_attn_implementation_cached_value": dense_class._can_set_attn_implementation(),
            "config_class": config_class,
        },
    )


class Door:
    """What an Auto class finds for a config of ours: leads to the class with the same head."""

    auto = "AutoModel"

    @classmethod
    def leads_to(cls, config: Any) -> Any:
        """The model's class."""
        mapping: Any = getattr(transformers, cls.auto)._model_mapping
        found = mapping[CONFIG_MAPPING[config.dense_model_type]]
        choices = found if isinstance(found, (tuple, list)) else (found,)
        named = [one for one in choices if PREFIX + one.__name__ in (config.architectures or ())]
        dense: Any = [*named, *choices][0]
        extended: Any = type(config)
        return model_class(dense, extended)

    @classmethod
    def from_pretrained(cls, name: Any, *arguments: Any, config: Any = None, **named: Any) -> Any:
        """As every model of transformers has it."""
        config = AutoConfig.from_pretrained(name) if config is None else config
        return cls.leads_to(config).from_pretrained(name, *arguments, config=config, **named)

    @classmethod
    def _from_config(cls, config: Any, **named: Any) -> Any:
        return cls.leads_to(config)._from_config(config, **named)

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = None) -> None:
        """Called of code that came with weights; nothing is saved from here."""


def door(auto: str) -> str:
    """Name of the class here that an Auto class finds."""
    return auto.replace("AutoModel", "Moeify", 1) if auto != "AutoModel" else "MoeifyModel"


DOORS = {auto: type(door(auto), (Door,), {"auto": auto, "__module__": __name__}) for auto in AUTO_CLASSES}
# By name, as `auto_map` names them.
globals().update({made.__name__: made for made in DOORS.values()})


def register(config_class: Any, dense_config: Any) -> None:
    """Tell transformers which models a config is of: those with the heads that the dense one has."""
    for auto, made in DOORS.items():
        found: Any = getattr(transformers, auto)
        if dense_config.model_type in found._model_mapping._model_mapping:
            found.register(config_class, made, exist_ok=True)
