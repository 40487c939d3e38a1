"""Prove that a converted checkpoint is the dense model, cut: nothing lost, nothing doubled, nothing in the way.

Legend: R routed experts, f neurons of one expert, D hidden size.

Both models are loaded as any user would load them, and the loader of transformers says what it found: a fault of
moeify's own reader does not hide here. What they are is compared, and how they cut text. Then, in memory only: the
dense columns of down_proj are put back (a refit changes them), router rows are set to zero (so that every expert's
weight is exactly the architecture's constant) and every expert is switched on, with the fold for all of them. Its
outputs (logits, or last hidden states where there is no head) must then be the dense ones.

Where whole layers were dropped, the dense model is the stock one with these blocks taken out of its list; where neurons
or whole FFNs are gone, their columns of its down_proj are zero.

Of a fine-tuned checkpoint it is checked what training left alone: with the stages `layers` and `router` all of the
above but the experts' weights, otherwise keys, shapes, config, finite values and the routers of the plan.
"""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from moeify import targets
from moeify.check.contents import KEEPS_NEURONS, Check, cut_layers, place_checks, stored_checks
from moeify.check.logits import logit_difference
from moeify.check.reference import Reference, architecture_difference
from moeify.convert.exactness import twin_inputs
from moeify.data.pairs import text_pairs
from moeify.data.text import evaluation_tokens
from moeify.errors import InputError
from moeify.experts.mixing import Mixing
from moeify.export.in_memory import moe_parameters, routed_layers
from moeify.export.writer import weights_are_exact
from moeify.layout import Layout
from moeify.models import stock
from moeify.models.companions import companion_names
from moeify.models.config import load_config
from moeify.models.dense import DenseModel, open_dense
from moeify.models.files import inside, locate
from moeify.models.heads import LABELLED, auto_name, config_of_experts, decoder_start
from moeify.models.inputs import Inputs
from moeify.models.same_tokens import token_difference
from moeify.models.shallow import without_layers
from moeify.models.tokenizer import load_tokenizer
from moeify.options import Track
from moeify.plan import SHARED, SplitPlan, load_plan
from moeify.progress import shown
from moeify.readable import Readable
from moeify.targets import ROUTER_LIMIT, Target

TOLERANCE = 1e-4
# A score moves a weight by that much at most, and unseen text may score twice as high as the calibration text did.
HEADROOM = 2
CONTEXT = 128
BLOCKS = 2


@dataclass(frozen=True, repr=False)
class VerifyReport(Readable):
    """All checks of one checkpoint.

    Args:
        moe, dense: what was compared.
        checks: in the order they were made.
        max_logit_difference: of outputs, all experts on, in float32 unless rounding alone exceeds the tolerance, then
            in float64; None of a checkpoint whose neurons were trained, and of a GGUF.
        max_gate_deviation: largest distance of an expert's folded weight from one, with the real router; zero for gates
            that are not hard or were trained.
    """

    moe: str
    dense: str
    checks: tuple[Check, ...]
    max_logit_difference: float | None
    max_gate_deviation: float

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks)


def verify(
    moe: str | Path, dense: str | Path | DenseModel, *, tolerance: float = TOLERANCE, track: Track[Any] = shown
) -> VerifyReport:
    """Compare a converted checkpoint with the dense model it came from.

    Args:
        moe: folder of the converted checkpoint, or a .gguf file of it, which is read back without computing logits.
        dense: the dense model.
        tolerance: largest allowed difference of an output in float32.
        track: shows the progress of making the embedded model.

    Raises:
        InputError: one of them cannot be read, or the plan is of another model.

    Example:
        assert moeify.verify("my-moe", "builtin").passed
    """
    if is_gguf(moe):
        try:
            from moeify.check.gguf import verify_gguf
        except ImportError as error:
            if error.name != "gguf":
                raise
            raise InputError("reading GGUF needs the gguf package", "pip install 'moeify[gguf]'") from error
        return verify_gguf(moe, dense, track=track)
    path = locate(str(moe))
    plan = load_plan(path)
    source, dropped = open_dense(dense, track), plan.options.drop_layers
    num_layers = len(plan.layers) + len(dropped)
    if plan.family != source.family.model_type or num_layers != source.num_layers:
        raise InputError(
            f"{moe} was made from a {plan.family} of {num_layers} layers, "
            f"{source.name} is a {source.family.model_type} of {source.num_layers}",
            f"name the dense model that it was split from: {plan.source}",
        )
    if plan.layout.is_static:
        raise InputError(f"{moe} is statically pruned: it has no experts to switch on", "`moeify eval` measures it")
    source = _as_wide(without_layers(source, dropped), plan)
    target = targets.for_model(plan.target, source)
    inputs = _inputs(source)
    hard = Mixing.of(plan.options).style == "hard" and not plan.trained
    # Before the other two models are in memory.
    deviation = _gate_deviation(path, inputs, target, plan) if hard else 0.0
    reference, stored = Reference.of(source), load_config(path).dtype
    model, keys = _load_all_on(path, plan.layout)
    whole = set(plan.trained) <= KEEPS_NEURONS
    places = place_checks(model, reference, plan, target, stored)
    checks = [keys, *(places if whole else places[:1]), *stored_checks(path, reference, plan, target)]
    checks += _identity_checks(path, model, reference, stored, values=whole)
    if not whole:
        return VerifyReport(str(moe), source.name, tuple(checks), None, deviation)
    _restore_dense(model, reference, plan, target, stored)
    difference, allowed = logit_difference(model, reference.model, inputs, stored, tolerance)
    checks += [
        Check(
            f"{_output_name(reference.model)} equal dense, all experts on",
            f"max |d| {difference:.1e}",
            f"<= {allowed:.0e}",
            difference <= allowed,
        ),
    ]
    if hard:
        found = f"max |w - 1| {deviation:.1e}"
        limit = gate_limit(plan, target)
        checks += [Check("expert weights are one", found, f"<= {limit:.1e}", deviation <= limit)]
    return VerifyReport(str(moe), source.name, tuple(checks), difference, deviation)


def _as_wide(source: DenseModel, plan: SplitPlan) -> DenseModel:
    """The dense model with the neurons of zeros that the plan has behind its own.

    Raises:
        InputError: the plan is of narrower FFNs, or of wider ones where none are padded.
    """
    neurons = plan.layers[0].labels_F.numel()
    padding = neurons - source.num_neurons
    if padding < 0 or (padding and targets.find(plan.target).is_stock):
        raise InputError(
            f"the plan is of FFNs of {neurons:,} neurons, those of {source.name} have {source.num_neurons:,}",
            f"name the dense model that it was split from: {plan.source}",
        )
    return replace(source, padding=padding) if padding else source


def gate_limit(plan: SplitPlan, target: Target) -> float:
    """Largest allowed distance from one of an expert's folded weight."""
    return 0.0 if weights_are_exact(target, plan.layout) else HEADROOM * ROUTER_LIMIT * plan.router_scale


def is_gguf(model: str | Path) -> bool:
    """Whether it is named as a file for llama.cpp."""
    return str(model).lower().endswith(".gguf")


def _load_all_on(path: Path, layout: Layout) -> tuple[Any, Check]:
    """The stock model in float32 with every routed expert selected, and what loading said about its keys."""
    config = load_config(path)
    experts = config_of_experts(config)
    experts.num_experts_per_tok = layout.num_routed
    experts.num_experts_per_tok_by_layer = None
    if layout.is_adaptive:
        experts.min_experts_per_tok = layout.num_routed
    if layout.is_mixed:
        experts.ffn_by_layer = [_all_on(values) for values in experts.ffn_by_layer]
    model, report = stock.load_with_report(path, config=config)
    wrong = {"missing": report.missing, "unexpected": report.unexpected, "mismatched": tuple(report.mismatched)}
    found = ", ".join(f"{len(names)} {kind}" for kind, names in wrong.items())
    first = next((names[0] for names in wrong.values() if names), "")
    check = Check(
        "stock transformers loads every key",
        found + (f" ({first})" if first else ""),
        "0 missing, 0 unexpected, 0 mismatched",
        not any(wrong.values()),
    )
    return model.eval(), check


def _all_on(values: dict[str, int]) -> dict[str, int]:
    """What a config says of one layer, with every expert chosen."""
    names = ("num_experts_per_tok", *(["min_experts_per_tok"] if "min_experts_per_tok" in values else []))
    return {**values, **dict.fromkeys(names, values["num_experts"])}


def _identity_checks(path: Path, model: Any, reference: Reference, stored: torch.dtype, *, values: bool) -> list[Check]:
    """What both models are, as stock transformers sees them, and how both read a text."""
    other = architecture_difference(model, reference.model, stored, values=values)
    checks = [Check("architecture is the dense model's", other or "equal", "equal", not other)]
    if reference.family.modality == "text":
        tokens = token_difference(load_tokenizer(path), reference.tokenizer())
        return [*checks, Check("text is cut into the dense model's tokens", tokens or "equal", "equal", not tokens)]
    files = _other_files(path, reference.path)
    return [*checks, Check("inputs are prepared as the dense model's", files or "equal", "equal", not files)]


def _other_files(path: Path, dense: Path) -> str:
    """The first file that says how inputs are prepared and is not the dense model's, or ""."""
    for name in companion_names(dense):
        if name.endswith("processor_config.json"):
            given = inside(path, name).read_bytes() if (path / name).is_file() else None
            if given != inside(dense, name).read_bytes():
                return name
    return ""


@torch.no_grad()
def _restore_dense(model: Any, source: Reference, plan: SplitPlan, target: Target, stored: torch.dtype) -> None:
    """Dense down columns with the fold for all experts on, and routers of zero; in memory only.

    What static layers and those without an FFN have lost, the dense model loses as well.
    """
    everything = Layout(plan.layout.num_experts, plan.layout.num_shared, plan.layout.num_experts)
    for layer in plan.layers:
        own = plan.layout.of_layer(layer.layer)
        if own.is_static and not own.is_whole:
            gone = torch.cat([layer.neurons(expert) for expert in range(own.num_routed)])
            source.silence(layer.layer, gone)
    for layer in cut_layers(plan):
        own, down_DF = plan.layout.of_layer(layer.layer), source.ffn(layer.layer).down_DF.to(stored).float()
        parts = moe_parameters(model.get_submodule(target.block(layer.layer)), target.modules)
        if not own.is_static:
            parts["router"].zero_()
            routed = [down_DF[:, layer.neurons(expert)] for expert in range(own.num_routed)]
            parts["down"].copy_(torch.stack(routed) * target.routed_fold(everything))
        if "shared_down" in parts:
            parts["shared_down"].copy_(down_DF[:, layer.neurons(SHARED)] * target.shared_fold)


@torch.no_grad()
def _gate_deviation(path: Path, inputs: Inputs, target: Target, plan: SplitPlan) -> float:
    """Largest |weight * fold - 1| that the experts of the unchanged model receive."""
    model, _ = stock.load_with_report(path)
    model.set_experts_implementation("eager")
    fold = target.routed_fold(plan.layout)
    largest = 0.0

    def look(num_routed: int, _: Any, arguments: tuple[Any, ...]) -> None:
        nonlocal largest
        # A number beyond the last expert is no choice.
        weights_TK = arguments[2][arguments[1] < num_routed]
        deviation = float((weights_TK * fold - 1).abs().max())
        # Not max(), which drops NaN.
        largest = largest if deviation <= largest else deviation

    for layer in routed_layers(plan.layout, len(plan.layers)):
        block = model.get_submodule(target.block(layer))
        seen = partial(look, plan.layout.of_layer(layer).num_routed)
        block.get_submodule(target.modules.experts).register_forward_pre_hook(seen)
    model(**inputs)
    return largest


def _output_name(model: Any) -> str:
    return "last hidden states" if model.base_model is model else "logits"


def _inputs(source: DenseModel) -> Inputs:
    """A few blocks of held-out text in the model's own tokens; noise for a model of something else."""
    if source.family.modality != "text":
        return twin_inputs(source)
    context = min(CONTEXT, source.family.context_of(source.text_config))
    stream = evaluation_tokens("builtin-heldout", source.tokenizer(), num_tokens=BLOCKS * context)
    blocks_BC = stream.ids_T.view(BLOCKS, context)
    if source.family.is_pair:
        return text_pairs(blocks_BC, source.tokenizer(), decoder_start(source.config))
    # A classifier of a language model reads the last token, and needs to know of padding where there are several texts.
    return {"input_ids": blocks_BC[:1] if auto_name(source.config) in LABELLED else blocks_BC}
