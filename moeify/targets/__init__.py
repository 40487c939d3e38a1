"""Native MoE architectures, one file each: which dense models one holds exactly, and by what names and config values.

Legend: R routed experts, f expert width, s width of all shared experts together, D hidden size.

Every target makes the selected experts' weights one, or a constant that is folded into down_proj. A router row is
scaled by ROUTER_SCALE so that the weights of a trained router stay within a bf16 ulp of that constant, while its
ranking, which is all that hard routing needs, survives in full (2^-10 does not round in bf16).

To add one, copy `mixtral.py`; nothing else is edited.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from moeify import plugins
from moeify.errors import InputError
from moeify.families import Family, Traits
from moeify.options import Style
from moeify.plan import Layout

ROUTER_SCALE = 2.0**-10
# Largest router score of a calibration token: 4 * ROUTER_SCALE = 2^-8 is half the spacing of bf16 numbers above one.
ROUTER_LIMIT = 4.0


@dataclass(frozen=True)
class SplitFFN:
    """One layer's FFN, cut. Folds are already in the down weights; without shared experts s is zero."""

    gate_sD: Tensor
    up_sD: Tensor
    down_Ds: Tensor
    gate_RfD: Tensor
    up_RfD: Tensor
    down_RDf: Tensor
    router_RD: Tensor


@dataclass(frozen=True)
class Modules:
    """Where stock transformers keeps the parts of one MoE layer, relative to the decoder layer; for `verify`."""

    experts: str
    router: str
    shared: str = ""
    shared_gate_up: tuple[str, ...] = ()
    shared_down: str = ""


@dataclass(frozen=True)
class Target:
    """One MoE architecture of transformers.

    Args:
        model_type: the value in config.json; also the file's name.
        architecture: class name in config.json.
        holds_shared: has experts that are always on.
        engines: what else has the architecture in its sources; only transformers is tested here.
        engines_with_dense: those that also take models whose FFNs are not all experts; none means that transformers
            does not either.
        mixings: what the weights of its experts can be.
        refuse: why a dense model with these traits does not fit, or "" if it is held exactly.
        config: config values that differ from the dense model's, given its config, its traits, the layout and the
            expert width.
        routed_fold: factor on the routed down_proj that undoes the architecture's expert weights.
        shared_fold: the same for the shared part.
        ffn_tensors: on-disk names of one MoE layer, given `model.layers.N` and its parts.
        extra_tensors: further tensors one layer needs, as name -> shape; written as zeros.
        untie: an engine needs lm_head.weight written out although the dense model ties it.
        modules: where the loaded model keeps its parts.
    """

    model_type: str
    architecture: str
    holds_shared: bool
    engines: tuple[str, ...]
    refuse: Callable[[Traits, Any, Layout], str]
    config: Callable[[Any, Traits, Layout, int], dict[str, Any]]
    routed_fold: Callable[[Layout], float]
    ffn_tensors: Callable[[str, SplitFFN], dict[str, Tensor]]
    modules: Modules
    engines_with_dense: tuple[str, ...] = ()
    mixings: tuple[Style, ...] = ("hard",)
    shared_fold: float = 1.0
    extra_tensors: Callable[[str, Any, Traits], Mapping[str, tuple[int, ...]]] = lambda prefix, config, traits: {}
    untie: bool = False


# From most to least preferred: engines that load it, then whether shared experts are plain (no gate to fold).
PREFERENCE = ("granitemoeshared", "qwen2_moe", "glm4_moe", "qwen3_moe", "mixtral")


def carried(config: Any) -> dict[str, Any]:
    """Config values every target takes over unchanged from the dense model."""
    keys = [
        "vocab_size",
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "hidden_act",
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
    ]
    return {key: getattr(config, key) for key in keys}


def head_dim(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def has_default_head_dim(config: Any) -> bool:
    return head_dim(config) * int(config.num_attention_heads) == int(config.hidden_size)


def names() -> list[str]:
    """All targets, the preferred ones first."""
    known = plugins.names(__name__)
    return sorted(known, key=lambda name: (PREFERENCE.index(name) if name in PREFERENCE else len(PREFERENCE), name))


def find(name: str) -> Target:
    target = plugins.load(__name__, name, "TARGET")
    assert isinstance(target, Target)
    return target


def refusal(target: Target, traits: Traits, config: Any, layout: Layout, style: Style = "hard") -> str:
    """Why `target` cannot hold the model exactly under this layout and mixing, or ""."""
    if traits.ffn_bias:
        return "no native target has biases inside its experts"
    if style not in target.mixings:
        return f"its experts' weights cannot be {style}"
    if layout.dense_layers and not target.engines_with_dense:
        return "has no dense layers"
    if layout.num_shared and not target.holds_shared:
        return "has no shared experts (use --shared 0)"
    if layout.num_routed_active == 0:
        return "nothing is routed (use --static for pruning)"
    return target.refuse(traits, config, layout)


def choose(
    traits: Traits, config: Any, resolve: Callable[[bool], Layout], style: Style = "hard"
) -> tuple[Target, Layout, str]:
    """The best target that holds the model exactly, its layout, and why it was taken.

    Args:
        traits: what must be held.
        config: the dense config.
        resolve: gives the layout for a target with (True) or without (False) shared experts.
        style: what the experts' weights must be.

    Raises:
        InputError: none holds it; the message gives each target's reason.
    """
    reasons: list[str] = []
    targets = [find(name) for name in names()]
    for target in sorted(targets, key=lambda target: not target.holds_shared):
        layout = resolve(target.holds_shared)
        reason = refusal(target, traits, config, layout, style)
        if not reason:
            engines = target.engines_with_dense if layout.dense_layers else target.engines
            why = f"holds the model exactly, {'with' if layout.num_shared else 'without'} shared experts; known to " + (
                ", ".join(("transformers", *engines))
            )
            passed = f" ({'; '.join(reasons)})" if reasons else ""
            return target, layout, why + passed
        reasons.append(f"{target.model_type}: {reason}")
    raise InputError("no target holds this model exactly: " + "; ".join(reasons), "see `moeify inspect`")


def static_target(family: Family) -> Target:
    """Static pruning as a target: the family's own architecture, its FFN narrower; the control to beat."""

    def ffn_tensors(prefix: str, ffn: SplitFFN) -> dict[str, Tensor]:
        layer = int(prefix.rsplit(".", maxsplit=1)[-1])
        return dict(zip(family.ffn_names(layer), (ffn.gate_sD, ffn.up_sD, ffn.down_Ds), strict=True))

    return Target(
        model_type=family.model_type,
        architecture="",
        holds_shared=True,
        engines=("everything that loads the dense model",),
        refuse=lambda traits, config, layout: "",
        config=lambda config, traits, layout, width: {
            **config.to_dict(),
            "intermediate_size": layout.num_active * width,
        },
        routed_fold=lambda layout: 1.0,
        ffn_tensors=ffn_tensors,
        modules=Modules(experts="", router=""),
    )
