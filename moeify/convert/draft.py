"""The family file that an unknown model type would need, filled in as far as the stock model shows it.

The blocks are the list of as many modules as the config has layers. Their FFN is what goes from the hidden size to a
wider inner one and back, outside of attention. Where it reads and writes, and its activation, a tiny model proves.

Shapes: D hidden size, F inner width.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from moeify import families
from moeify.convert.draft_proof import proven
from moeify.errors import InputError
from moeify.families import Family, FFNFormat
from moeify.models.config import empty_model, load_config
from moeify.models.files import locate
from moeify.models.heads import auto_name
from moeify.options import Track
from moeify.progress import shown
from moeify.readable import Readable

# Parts of names of what has matrices and is no FFN.
OTHERS = ("attn", "attention", "mixer", "conv", "mamba", "expert", "router")
# Names that a gate has where two matrices lead to the inner width.
GATES = ("gate", "w1")
FIELDS = ("hidden_act", "hidden_activation", "activation_function", "activation")
WIDTHS = ("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size")
HINT = "write the file by hand; moeify/families/llama.py is the simplest"


@dataclass(frozen=True, repr=False)
class FamilyDraft(Readable):
    """A family file that would be needed.

    Args:
        model_type: of the model.
        nearest: supported families with the most similar names.
        file: where the text belongs.
        text: of the file.
    """

    model_type: str
    nearest: tuple[str, ...]
    file: str
    text: str


def draft(model: str | Path, *, track: Track[Any] = shown) -> FamilyDraft:
    """Write the family file of a model, from its config alone.

    Args:
        model: a folder, a .gguf file or a hub id.
        track: shows the progress of fetching it.

    Raises:
        InputError: it cannot be read, or nothing in it looks like an FFN.
    """
    config = load_config(locate(str(model), track))
    name = str(config.model_type)
    skeleton = empty_model(config, buffers=False)
    blocks, layers = _blocks(config, skeleton)
    ffns = [found for block in layers if (found := _ffn(block, int(config.hidden_size))) is not None]
    if not ffns:
        raise InputError(f"no block of {name} has an FFN of matrices to a wider inner size and back", HINT)
    ffn, inner = ffns[0]
    parent = ffn.down.rpartition(".")[0]
    # By its name in the model with its head.
    above = f"{skeleton.base_model_prefix}." if skeleton.base_model is skeleton else ""
    guess = Family(
        name,
        blocks=above + blocks,
        read=parent or ffn.up,
        write=parent or ffn.down,
        ffn=ffn,
        activation=next((field for field in FIELDS if isinstance(getattr(config, field, None), str)), "silu"),
        width=_width(config, inner),
        auto=auto_name(config),
        modality="image" if skeleton.main_input_name == "pixel_values" else "text",
    )
    family = proven(guess, config)
    nearest = tuple(get_close_matches(name, families.names(), n=3, cutoff=0.4))
    text = _text(family or guess, config, inner, is_proven=family is not None)
    return FamilyDraft(name, nearest, f"moeify/families/{name}.py", text)


def _blocks(config: Any, model: nn.Module) -> tuple[str, list[nn.Module]]:
    count = int(config.num_hidden_layers)
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return name, list(module)
    raise InputError(f"{config.model_type} has no list of {count} blocks", HINT)


def _ffn(block: nn.Module, hidden: int) -> tuple[FFNFormat, int] | None:
    """How the FFN of a block lies, and its inner width."""
    shapes = dict(_shapes(block))
    transposed = {name for name, module in block.named_modules() if isinstance(module, Conv1D)}
    for down, (out, inner) in shapes.items():
        inward = [name for name in shapes if shapes[name][1] == hidden]
        # Of one module, or of several as in bert.
        beside = [name for name in inward if name.rpartition(".")[0] == down.rpartition(".")[0]] or inward
        wide = [name for name in beside if name != down and shapes[name][0] == inner]
        double = [name for name in beside if shapes[name][0] == 2 * inner]
        if out != hidden or not (wide or double):
            continue
        if not wide:
            return FFNFormat(up=double[0], down=down, gate=double[0], fused=True), inner
        gate = None
        if len(wide) > 1:
            gate = next((name for name in wide if any(part in name.rpartition(".")[2] for part in GATES)), wide[0])
        up = next(name for name in wide if name != gate)
        return FFNFormat(up=up, down=down, gate=gate, transposed=down in transposed), inner
    return None


def _shapes(block: nn.Module) -> Iterator[tuple[str, tuple[int, int]]]:
    """Outputs and inputs of every matrix that may belong to an FFN."""
    for name, module in block.named_modules():
        if any(part in name.lower() for part in OTHERS):
            continue
        if isinstance(module, nn.Linear):
            yield name, (module.out_features, module.in_features)
        elif isinstance(module, Conv1D):
            yield name, (module.weight.shape[1], module.weight.shape[0])


def _width(config: Any, inner: int) -> str:
    """The config's field of the inner width: one of that value, or one that is open; llama's where there is none."""
    fields: Mapping[str, Any] = config.to_dict()
    others = {config.attribute_map.get(name, name) for name in families.TINY if name != Family.width}
    names = [name for name, value in fields.items() if type(value) is int and value == inner and name not in others]
    usual = Family.width
    names = names or [name for name in WIDTHS if name in fields and fields[name] is None]
    return usual if usual in names or not names else names[0]


def _text(family: Family, config: Any, inner: int, *, is_proven: bool) -> str:
    """The file, with what differs from a llama, and what has to be looked at."""
    usual, plain = Family(""), FFNFormat()
    ffn = {name: value for name, value in vars(family.ffn).items() if value != getattr(plain, name)}
    parts = [f'"{family.model_type}"']
    parts += [
        f"{name}={getattr(family, name)!r}"
        for name in ("blocks", "read", "write", "between")
        if getattr(family, name) != getattr(usual, name)
    ]
    if ffn:
        parts.append(f"ffn=FFNFormat({', '.join(f'{name}={value!r}' for name, value in ffn.items())})")
    parts += [
        f"{name}={getattr(family, name)!r}"
        for name in ("activation", "width", "auto", "modality")
        if getattr(family, name) != getattr(usual, name)
    ]
    doubts = []
    if not is_proven:
        doubts.append("# The FFN of a tiny model gives something else, or none runs: look at site and activation.")
    if not hasattr(config, family.width):
        doubts.append(f"# No field of the config is the inner width, {inner}: --static cannot prune such a model.")
    lines = [
        f'"""{family.model_type}: say what it has that llama has not."""',
        "",
        f"from moeify.families import {'Family, FFNFormat' if ffn else 'Family'}",
        "",
        *doubts,
        "FAMILY = Family(",
        *(f"    {part}," for part in parts),
        ")",
        "",
    ]
    return "\n".join(lines).replace("'", '"')
