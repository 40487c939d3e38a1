"""Whether a target computes the same function as a dense model: a toy twin of the model is converted and compared.

The twin has the model's very config, but for its sizes, and random weights; norms and biases are far from trivial. It
is cut into experts, written under the target's names, loaded by stock transformers with every expert on, and its
outputs (logits, or the last hidden state of a model without a head) are compared with those of the dense twin. That
takes a fraction of a second, reads no weight of the model, and knows what no list of traits does: a norm that adds one
to its weight, a factor on residuals, a rotation of other pairs.

Legend: L layers, D hidden size, C tokens.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers import AutoConfig

from moeify import engines, families, targets
from moeify.engines import Engine, Shape
from moeify.errors import InputError, first_line
from moeify.experts.slices import SplitFFN, slice_experts
from moeify.export.writer import MoEWriter
from moeify.families import Family
from moeify.layout import Layout
from moeify.models.dense import DenseModel
from moeify.models.fingerprint import Fingerprint
from moeify.models.heads import class_of
from moeify.models.inputs import Inputs, output_of, uncached
from moeify.models.stock import quiet
from moeify.options import Style
from moeify.plan import SHARED, LayerPlan
from moeify.targets import Target

# Largest difference of a logit relative to the largest logit. Exact twins stay under 1e-6, wrong ones exceed 1e-2.
TOLERANCE = 1e-4
NUM_EXPERTS = 4
# At most so many layers; every kind of layer that the config lists is among them.
MAX_LAYERS = 4
# Long enough to tell rotations of low frequency apart.
CONTEXT = 256
WINDOW = 32
# Frames of sound of one position, and tokens that a decoder has written.
FRAMES = 2
WRITTEN = 16
# Which layers a backbone of images hands out.
BACKBONE = ("stage_names", "out_features", "out_indices")
# As small as trained embeddings, so that a wrong epsilon in a norm shows.
EMBEDDING_SCALE = 0.02
# What transformers raises for a model that it cannot build; its configs' own errors are no ValueErrors.
STOPS = (RuntimeError, ValueError, TypeError, KeyError, AttributeError, NotImplementedError, StrictDataclassError)


@dataclass(frozen=True)
class Exactness:
    """Whether a target represents a model exactly.

    Args:
        exact: with every expert on, it computes the same function.
        reason: why not, or "".
        difference: of the twins' logits, relative to the largest; None if the target was ruled out before, or cannot
            be loaded.
    """

    exact: bool
    reason: str = ""
    difference: float | None = None


def check_target(
    target: Target, dense: DenseModel, layout: Layout, style: Style = "hard", dtype: torch.dtype = torch.float32
) -> Exactness:
    """Whether `target` represents the model exactly in this layout and type; from its config alone."""
    reason = targets.refusal(target, dense, layout, style, dtype)
    if reason:
        return Exactness(False, reason)
    config = json.dumps(twin_values(dense.config, dense.family), sort_keys=True, default=str)
    found = _compare(target.model_type, config, _twin_layout(layout))
    if found.exact:
        return found
    words = target.explain(dense)
    return Exactness(False, f"{words} ({found.reason})" if words else found.reason, found.difference)


def choose_target(
    dense: DenseModel,
    resolve: Callable[[Target], Layout],
    style: Style = "hard",
    engine: Engine | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[Target, Layout, str]:
    """The preferred target that represents the model exactly, its layout, and why it was taken.

    One whose layout an engine refuses gives way to the next that this engine runs.

    Args:
        dense: the model.
        resolve: gives the layout for a target.
        style: how the experts' outputs are weighted.
        engine: must run it.
        dtype: of the checkpoint.

    Raises:
        InputError: there is none; the message gives each target's reason.
    """
    reasons: list[str] = []
    refused: tuple[Target, Layout, set[str]] | None = None
    candidates = [targets.for_model(name, dense) for name in targets.names()]
    for target in sorted(candidates, key=lambda target: (not target.is_stock, not target.holds_shared)):
        layout = resolve(target)
        exactness = check_target(target, dense, layout, style, dtype)
        if not exactness.exact:
            reasons.append(f"{target.model_type}: {exactness.reason}")
            continue
        shape, known = Shape.of(dense, target.model_type, layout), target.known_to(layout)
        if engine is not None:
            refusals = {engine.name: words} if (words := target.refusal_of(engine, shape)) else {}
        else:
            refusals = {verdict.engine: verdict.refusal for verdict in engines.judge(shape, known) if verdict.refusal}
        if not refusals and (refused is None or refused[2] <= set(known)):
            return target, layout, _why(target, layout, reasons)
        if refused is None and engine is None:
            refused = target, layout, set(refusals)
        reasons += [f"{target.model_type}: {name} refuses it: {words}" for name, words in refusals.items()]
    if refused is not None:
        target, layout, _ = refused
        return target, layout, _why(target, layout, reasons)
    runs = f" and runs in {engine.name}" if engine else ""
    raise InputError(f"no target represents this model exactly{runs}: {'; '.join(reasons)}", "see `moeify inspect`")


def _why(target: Target, layout: Layout, reasons: Sequence[str]) -> str:
    shared = f"{'with' if layout.num_shared else 'without'} shared experts"
    why = f"represents the model exactly, {shared}; {target.loaded_by(layout)}"
    return why + target.caution + (f" ({'; '.join(reasons)})" if reasons else "")


def twin_values(config: Any, family: Family) -> dict[str, Any]:
    """Config values of the twin: the model's own, with the sizes of a tiny one.

    Args:
        config: the dense model's.
        family: names the sizes.
    """
    text = config.get_text_config()
    if text is not config:
        # No text passes the other parts: they only have to be there.
        rest = {name: value for name, value in config.to_dict().items() if name not in config.sub_configs}
        return {**rest, **family.towers, "text_config": twin_values(text, family)}
    values: dict[str, Any] = config.to_dict()
    heads, keys = int(config.num_attention_heads), int(getattr(config, "num_key_value_heads", 0) or 0)
    # Relations between sizes that an architecture may rely on stay what they are.
    sizes = {
        **family.sizes,
        family.width: family.sizes["intermediate_size"],
        "num_key_value_heads": {heads: 4, 1: 1}.get(keys, 2),
        "pad_token_id": None if getattr(config, "pad_token_id", None) is None else 0,
    }
    # Names that only some configs have for the same.
    sizes |= {"num_kv_heads": sizes["num_key_value_heads"], "rotary_dim": 4}
    sizes |= dict.fromkeys(("num_decoder_layers", "decoder_layers"), 2)
    if values.get("head_dim") is not None:
        default = int(config.head_dim) * heads == int(config.hidden_size)
        sizes["head_dim"] = 8 if default else 16
    window, limit = getattr(config, "sliding_window", None), int(getattr(config, "max_position_embeddings", 0))
    # A window that no text of this model fills does nothing, and does nothing in the twin.
    if window is not None and window < limit:
        sizes["sliding_window"] = WINDOW
    sizes["max_position_embeddings"] = max(CONTEXT + family.reserved(config), limit)
    for name, size in sizes.items():
        if config.attribute_map.get(name, name) in values:
            values[config.attribute_map.get(name, name)] = size
    layers = int(config.num_hidden_layers)
    listed = {name: value for name, value in values.items() if isinstance(value, list | tuple) and len(value) == layers}
    kept = _kinds(listed, layers)
    values[config.attribute_map.get("num_hidden_layers", "num_hidden_layers")] = len(kept)
    values |= {name: [value[layer] for layer in kept] for name, value in listed.items()}
    for name in BACKBONE:
        # Layers by their numbers, of which the twin has fewer.
        values.pop(name, None)
    _shorten_rotation(values, sizes.get("head_dim", 8))
    return values


def _kinds(listed: Mapping[str, Any], num_layers: int) -> list[int]:
    """Layers that the twin keeps: the first of every kind, and at least two."""
    first: dict[str, int] = {}
    for layer in range(num_layers):
        first.setdefault(repr([value[layer] for value in listed.values()]), layer)
    kept = sorted(first.values())[:MAX_LAYERS]
    further = [layer for layer in range(num_layers) if layer not in kept]
    return sorted([*kept, *further[: max(0, 2 - len(kept))]])


def _shorten_rotation(values: dict[str, Any], head_dim: int) -> None:
    """Factors of single frequencies, in place: as many as the twin's heads have."""
    rope = values.get("rope_parameters")
    if not isinstance(rope, dict):
        return
    pairs = int(head_dim * rope.get("partial_rotary_factor", 1.0)) // 2
    for name in ("short_factor", "long_factor"):
        if name in rope:
            values["rope_parameters"] = rope = {**rope, name: rope[name][:pairs]}
    if (sections := rope.get("mrope_section")) is not None:
        later = [max(1, pairs * section // sum(sections)) for section in sections[1:]]
        values["rope_parameters"] = {**rope, "mrope_section": [pairs - sum(later), *later]}


def _twin_layout(layout: Layout) -> Layout:
    """Every expert on; shared experts and dense layers where the layout has them."""
    leading = layout.dense_layers == tuple(range(len(layout.dense_layers)))
    dense_layers = ((0,) if leading else (1,)) if layout.dense_layers else ()
    return Layout(NUM_EXPERTS, min(1, layout.num_shared), NUM_EXPERTS, dense_layers)


@dataclass(frozen=True)
class Twin(DenseModel):
    """A small dense model in memory."""

    tensors: Mapping[str, Tensor]

    def dtype_of(self, name: str) -> torch.dtype:
        return self.tensors[name].dtype if name in self.tensors else torch.float32

    def get(self, names: Any) -> dict[str, Tensor]:
        return {name: self.tensors[name] for name in names}


def make_twin(values: Mapping[str, Any]) -> Twin:
    """A dense model of these config values with random weights, the same ones every time."""
    rest = {name: value for name, value in values.items() if name != "model_type"}
    config = AutoConfig.for_model(values["model_type"], **rest)
    family = families.of(config)
    files = Fingerprint(Path(), {}, {})
    empty = Twin("twin", Path(), config, family, {}, files, {})
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, shape in empty.shapes.items():
        noise = torch.randn(shape, generator=generator)
        if len(shape) > 1:
            small = "embed" in name or ".wte." in name or ".wpe." in name
            tensors[name] = noise * (EMBEDDING_SCALE if small else shape[-1] ** -0.5)
        else:
            tensors[name] = 1 + 0.1 * noise if name.endswith("weight") else 0.3 * noise
    return Twin("twin", Path(), config, family, {}, files, tensors)


@lru_cache(maxsize=8)
def _twin(config: str) -> tuple[Twin, Tensor, str]:
    """A twin of this config, its outputs, and what is wrong with it, or ""."""
    twin = make_twin(json.loads(config))
    return twin, *_outputs(twin.config, twin.tensors, twin_inputs(twin))


def twin_inputs(twin: DenseModel) -> dict[str, Tensor]:
    """One block of noise of the kind that the model takes."""
    generator = torch.Generator().manual_seed(1)
    if twin.family.modality == "image":
        size = int(twin.config.image_size)
        return {"pixel_values": torch.randn(1, int(twin.config.num_channels), size, size, generator=generator)}
    vocabulary = int(twin.text_config.vocab_size)
    written = {"decoder_input_ids": torch.randint(3, vocabulary, (1, WRITTEN), generator=generator)}
    if twin.family.modality == "audio":
        frames = FRAMES * int(twin.config.max_source_positions)
        return {
            "input_features": torch.randn(1, int(twin.config.num_mel_bins), frames, generator=generator),
            **written,
        }
    if not twin.family.is_pair:
        return {"input_ids": torch.randint(3, vocabulary, (1, CONTEXT), generator=generator)}
    context = min(CONTEXT, twin.family.context_of(twin.config))
    return {"input_ids": torch.randint(3, vocabulary, (1, context), generator=generator), **written}


@lru_cache(maxsize=256)
def _compare(target_name: str, config: str, layout: Layout) -> Exactness:
    """Convert the twin of this config and compare outputs."""
    try:
        twin, dense, wrong = _twin(config)
        target = targets.for_model(target_name, twin)

        def experts_of(layer: int) -> SplitFFN:
            return slice_experts(twin.ffn(layer), _scattered(layer, twin, layout), layout)

        if wrong:
            return Exactness(False, f"the dense architecture itself {wrong}")
        writer = MoEWriter(twin, target, layout, torch.float32)
        converted = writer.values(list(writer.shapes()), experts_of)
        outputs, wrong = _outputs(writer.config(), converted, twin_inputs(twin))
    except STOPS as error:
        # Whatever stops a conversion that nobody has seen before is the reason why it is not done.
        return Exactness(False, f"a toy twin cannot be converted: {first_line(error):.160}")
    if wrong:
        return Exactness(False, wrong)
    difference = float((outputs - dense).abs().max() / dense.abs().max())
    if difference <= TOLERANCE:
        return Exactness(True, "", difference)
    return Exactness(False, f"a toy twin's outputs differ by {difference:.2g} of the largest", difference)


def _scattered(layer: int, twin: Twin, layout: Layout) -> LayerPlan:
    """Neurons dealt out at random; a router of zeros, which gives every expert the architecture's constant weight."""
    if layer in layout.dense_layers:
        return LayerPlan(layer, torch.full((twin.num_neurons,), SHARED, dtype=torch.int16), None)
    shuffled_F = torch.randperm(twin.num_neurons, generator=torch.Generator().manual_seed(layer))
    labels_F = (shuffled_F % layout.num_experts - layout.num_shared).clamp(min=SHARED).to(torch.int16)
    return LayerPlan(layer, labels_F, torch.zeros(layout.num_routed, twin.hidden_size))


@torch.no_grad()
def _outputs(config: Any, tensors: Mapping[str, Tensor], inputs: Inputs) -> tuple[Tensor, str]:
    """Outputs of the stock model with these tensors, and in words the first tensor that does not belong to it."""
    with quiet():
        loaded: Any = class_of(config).from_pretrained(
            None,
            config=config,
            state_dict=dict(tensors),
            dtype=torch.float32,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    model, info = loaded
    for kind, words in (
        ("unexpected_keys", "has no place for"),
        ("missing_keys", "also needs"),
        ("mismatched_keys", "has another shape of"),
    ):
        # Beside a name of another shape the loader reports both shapes.
        if names := sorted(key if isinstance(key, str) else key[0] for key in info[kind]):
            return torch.empty(0), f"{words} {names[0]}"
    if model._can_set_experts_implementation():
        model.set_experts_implementation("eager")
    outputs = output_of(model.eval()(**inputs, **uncached(model)))
    if not math.isfinite(float(outputs.abs().max())):
        return outputs, "a toy twin's outputs are not finite"
    return outputs, ""
