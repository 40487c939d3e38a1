"""The model card of a converted checkpoint: what it is, how it was made, how to load it, how to make it again.

Names come from users and files and may hold anything: the head is YAML by a library, elsewhere they stand as code on
one line, where no character has a meaning.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from moeify import families, targets
from moeify.command_line import command_line
from moeify.export.origin import Origin
from moeify.export.writer import weights_are_exact
from moeify.models.heads import LANGUAGE_MODEL
from moeify.plan import SplitPlan
from moeify.version import __version__
from moeify.words import on_one_line, ranges

CARD = """{head}
# {name}

{source} ({family}) {how} by moeify {version}: {cut}.
Nothing was trained. {parameters:,} parameters, {active:,} of them used for a token.

```python
{loading}
```

## How it was made

| what | value |
|---|---|
{rows}

`split_plan.safetensors` holds every neuron's expert and the routers, `moeify.json` the resolved options and versions.

```bash
{split}
{verify}
```

## Limits

Its output differs from the dense model's: measure it on your own text (`moeify eval`) before you rely on it. The
licence and the limits of {source} apply.
{training}"""


# How a model is loaded: of stock transformers, of moeify's own architecture, and of that with code beside the weights.
STOCK = """\
from transformers import {auto}

model = {auto}.from_pretrained("path/to/this/folder")  # {architecture}, no custom code"""
OWN = """\
import moeify  # tells transformers of this architecture, which it does not have itself
from transformers import {auto}

model = {auto}.from_pretrained("path/to/this/folder")  # {architecture}"""
WITH_CODE = """\
from transformers import {auto}

# Runs configuration_moeify.py and modeling_moeify.py of this folder; after `import moeify` nothing of it runs.
model = {auto}.from_pretrained("path/to/this/folder", trust_remote_code=True)  # {architecture}"""
# What the hub calls the job of a model.
JOBS = {
    "AutoModel": "feature-extraction",
    "AutoModelForCausalLM": "text-generation",
    "AutoModelForMaskedLM": "fill-mask",
    "AutoModelForSeq2SeqLM": "text2text-generation",
    "AutoModelForSpeechSeq2Seq": "automatic-speech-recognition",
    "AutoModelForImageTextToText": "image-text-to-text",
    "AutoModelForSequenceClassification": "text-classification",
    "AutoModelForTokenClassification": "token-classification",
    "AutoModelForQuestionAnswering": "question-answering",
    "AutoModelForImageClassification": "image-classification",
}


def model_card(
    plan: SplitPlan, architecture: str, parameters: tuple[int, int], origin: Origin, auto: str = LANGUAGE_MODEL
) -> str:
    """README.md for the folder. Holds no date and no machine, so that the same split gives the same folder.

    Args:
        plan: what was decided.
        architecture: name of the model's class.
        parameters: of the whole model, and those that a token uses.
        origin: of the dense model.
        auto: name of the Auto class that loads it.
    """
    layout, options, calibration = plan.layout, plan.options, plan.calibration
    if layout.is_static:
        cut = f"the {layout.num_active} that contribute most are kept, the others are gone (static pruning)"
    else:
        cut = (
            f"{layout.num_shared} always run, {layout.num_routed_active} of the other {layout.num_routed} "
            "are chosen for each token"
        )
    if layout.active_by_layer:
        active = ", ".join(map(str, layout.active_by_layer))
        cut = f"{layout.num_shared} always run, others are chosen for each token: {active} in all, layer by layer"
        if 0 in layout.active_by_layer:
            cut += " (a layer of 0 has no FFN)"
    if layout.is_adaptive:
        cut += f", in the mean, {layout.min_active} to {layout.max_active} for a token"
    if layout.static_layers:
        cut += f"; layers {ranges(layout.static_layers)} choose none: as many slices are left, the others are gone"
    which = "every feed-forward layer"
    if layout.dense_layers:
        which += f" but {', '.join(map(str, layout.dense_layers))}"
    experts = ", ".join(map(str, layout.experts_by_layer)) or layout.num_experts
    how = f"with {which} cut into {experts} equal slices"
    if options.drop_layers:
        dropped = f"layers {ranges(options.drop_layers)}, with their attention,"
        how, cut = ("made shallower", f"{dropped} are gone") if layout.is_whole else (how, f"{cut}; {dropped} are gone")
    rows = {
        "dense model": f"{code(plan.source)} ({code(plan.family)})",
        "written as": code(architecture),
        "partition": options.partition if options.plan is None else f"from {code(options.plan)}",
        "router": options.router if plan.is_routed else "none",
        "down_proj refit": "yes, in closed form" if options.refit else "no",
        "calibration text": ", ".join(map(code, options.calibration)) if calibration else "none",
        "calibration tokens": f"{calibration['num_tokens']:,} in blocks of {calibration['context']}"
        if calibration
        else "none",
        "sha256 of the token ids": f"`{calibration['sha256']}`" if calibration else "none",
        "seed": options.seed,
    }
    return CARD.format(
        head=_head(origin, "mixture-of-experts" if plan.is_routed else "pruned", auto),
        source=code(plan.source),
        family=code(plan.family),
        how=how,
        name=f"{code(Path(plan.source).name)} {'as a mixture of experts' if plan.is_routed else 'pruned'}",
        version=plan.version,
        cut=cut,
        parameters=parameters[0],
        active=parameters[1],
        loading=_loading(plan, auto, architecture),
        rows=_table(rows),
        split=_split_again(plan),
        verify=command_line("verify", "OUT", dense=plan.source),
        training=_training(plan),
    )


def _loading(plan: SplitPlan | None, auto: str, architecture: str) -> str:
    """The lines that load the model."""
    text = STOCK
    if plan is not None and not plan.layout.is_static and not targets.find(plan.target).is_stock:
        text = WITH_CODE if plan.options.remote_code else OWN
    return text.format(auto=auto, architecture=on_one_line(architecture))


def _split_again(plan: SplitPlan) -> str:
    """The command that makes the checkpoint again: a budget has become a layout by now."""
    options = replace(plan.options, budget=None)
    return command_line("split", plan.source, options, out="OUT")


FINETUNED = """{head}
# {name}, fine-tuned

{source} ({model_type}), trained by moeify {version} to do what {teacher} does.

```python
{loading}
```

## How it was made

| what | value |
|---|---|
{rows}

`finetune.json` holds every step's losses, `moeify.json` the resolved options and versions.

## Limits

Its output differs from {teacher}'s: measure it on text that it was not trained on (`moeify eval`). The licences and the
limits of {source}, of {teacher} and of the text apply.
{training}"""


def finetuned_card(
    source: str,
    teacher: str,
    config: Mapping[str, Any],
    options: Mapping[str, Any],
    text: Mapping[str, Any],
    *,
    trained: Sequence[str],
    plan: SplitPlan | None,
    origin: Origin,
    auto: str = LANGUAGE_MODEL,
) -> str:
    """README.md for a fine-tuned checkpoint; `plan` is None of a model that moeify did not cut."""
    rows = {
        "stages since the split": ", ".join(trained),
        "text": code(text["data"]["source"]),
        "tokens": f"{text['data']['num_tokens']:,} in blocks of {text['data']['context']}",
        "sha256 of the token ids": f"`{text['data']['sha256']}`",
        **{name: options[name] for name in ("epochs", "kl", "lm", "hidden", "router_rate", "schedule", "seed")},
    }
    return FINETUNED.format(
        head=_head(origin, "fine-tuned", auto),
        source=code(source),
        teacher=code(teacher),
        name=code(Path(source).name),
        version=__version__,
        model_type=code(config["model_type"]),
        loading=_loading(plan, auto, config["architectures"][0]),
        rows=_table(rows),
        training=_training(plan),
    )


TRAINING = """
## Training it further

Freeze the routers, after loading and before the optimizer is made. {reason}:

```python
for name, parameter in model.named_parameters():
    if name.endswith(({ends},)):
        parameter.requires_grad_(False)
```

The trainers of transformers and TRL then leave them out. `moeify.freeze_routers(model)` does the same. With peft name
the parts that are adapted, without routers: `LoraConfig(target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])`.
`moeify finetune` trains routers too, at a rate of their own.
"""


SMALL = """\
They are written at 1/{size} of their size, so that
usual steps of AdamW over all parameters replace them and tokens go to other experts"""
SINGLE = """\
The weight of the one expert that
a token chooses is one whatever its router gives, so that no loss tells the router anything"""


def _training(plan: SplitPlan | None) -> str:
    """What must be known before the checkpoint is trained further; nothing of a model without routers."""
    if plan is None or not plan.is_routed:
        return ""
    target = targets.find(plan.target, families.find(plan.family))
    ends = ", ".join(map(json.dumps, target.frozen))
    # Routers whose scores are weights as well are as large as any other parameter.
    reason = SINGLE if weights_are_exact(target, plan.layout) else SMALL.format(size=round(1 / plan.router_scale))
    text = TRAINING.format(reason=reason, ends=ends) if plan.options.mixing == "hard" else ""
    return text + (f"\n{target.autocast}\n" if target.autocast else "")


def code(text: object) -> str:
    """A name as code: in more backticks than it has in a row, control characters escaped."""
    line = on_one_line(text)
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", line)), default=0))
    # A space on both sides goes again; without it a backtick or a space at an end would belong to the fence, or go.
    inside = f" {line} " if line[:1] in ("`", " ") or line[-1:] in ("`", " ") or not line else line
    return f"{fence}{inside}{fence}"


def _head(origin: Origin, tag: str, auto: str) -> str:
    """What the Hugging Face hub reads, between lines of ---."""
    values = {
        **({"base_model": origin.base_model} if origin.base_model else {}),
        **origin.licence,
        "library_name": "transformers",
        **({"pipeline_tag": JOBS[auto]} if auto in JOBS else {}),
        "tags": ["moeify", tag],
    }
    text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=10_000, default_flow_style=None)
    return f"---\n{text}---\n"


def _table(rows: Mapping[str, Any]) -> str:
    """Rows of two cells; a cell ends at a bar, also in code."""
    cells = ((key, str(value).replace("|", "\\|")) for key, value in rows.items())
    return "\n".join(f"| {key} | {value} |" for key, value in cells)
