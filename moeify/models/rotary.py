"""What a config says of rotary embeddings, checked: transformers warns of most faults and computes NaN from them."""

from collections.abc import Iterator, Mapping
from typing import Any

from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

# Values of a rotation: above 0, or 0 as well.
ABOVE_ZERO = (
    "rope_theta",
    "factor",
    "low_freq_factor",
    "high_freq_factor",
    "original_max_position_embeddings",
    "beta_fast",
    "beta_slow",
    "partial_rotary_factor",
)
FROM_ZERO = ("attention_factor", "mscale", "mscale_all_dim")
# How many pairs of dimensions rotate by the place in time, in height and in width.
SECTIONS = "mrope_section"
# One for each pair of dimensions that rotate.
PAIRED = ("short_factor", "long_factor")
NUM_SECTIONS = 3
LARGEST = 1e30


def rotary_fault(config: Any) -> tuple[str, Any, str] | None:
    """The first value that no rotation can be computed from: its name, itself, and what is expected instead."""
    for name, values in _rotations(config):
        if not isinstance(values, Mapping):
            return name, values, "a mapping"
        kind = values.get("rope_type", "default")
        kinds = {"default", config.default_rope_type, *ROPE_INIT_FUNCTIONS}
        if not isinstance(kind, str) or kind not in kinds:
            return f"{name}.rope_type", kind, f"one of {', '.join(sorted(kinds))}"
        for key, value in values.items():
            # Sections that take turns need not fill a head.
            free = key == SECTIONS and values.get("mrope_interleaved")
            expected = _expected(key, value, None if free else _pairs(config, values))
            if expected:
                return f"{name}.{key}", value, expected
        low, high = values.get("low_freq_factor"), values.get("high_freq_factor")
        if low is not None and high is not None and high <= low:
            return f"{name}.high_freq_factor", high, f"a number above low_freq_factor, {low}"
    return None


def _rotations(config: Any) -> Iterator[tuple[str, Any]]:
    """Each rotation, by its name in the config: one, or one for every kind of layer."""
    values = getattr(config, "rope_parameters", None)
    if not values:
        return
    if not isinstance(values, Mapping):
        yield "rope_parameters", values
        return
    kinds = getattr(config, "_rope_type_labels", None) or getattr(config, "layer_types", None) or ()
    nested = [key for key in values if key in kinds]
    for key in nested:
        if values[key] is not None:
            yield f"rope_parameters.{key}", values[key]
    if not nested:
        yield "rope_parameters", values


def _expected(key: str, value: Any, num_pairs: int | None) -> str:
    """What a value must be; nothing if it is."""
    # Several may be left out, and then are null in some files.
    optional = value is None and key not in ("rope_theta", "factor", "low_freq_factor", "high_freq_factor", *PAIRED)
    fits, expected = True, ""
    if key in PAIRED:
        fits = isinstance(value, list) and all(_is_number(one) and one > 0 for one in value)
        fits = fits and (num_pairs is None or len(value) == num_pairs)
        expected = f"{num_pairs or 'some'} numbers above 0"
    elif key == SECTIONS:
        whole = isinstance(value, list) and len(value) == NUM_SECTIONS and all(type(one) is int for one in value)
        fits, expected = whole and min(value) >= 0, f"{NUM_SECTIONS} whole numbers from 0 on"
        if fits and num_pairs is not None and sum(value) != num_pairs:
            fits, expected = False, f"{NUM_SECTIONS} whole numbers whose sum is {num_pairs}"
    elif isinstance(value, Mapping):
        fits, expected = False, "one rotation: this architecture has one kind of layer"
    elif key == "partial_rotary_factor":
        fits, expected = _is_number(value) and 0 < value <= 1, "a number above 0, at most 1"
    elif key in ABOVE_ZERO:
        fits, expected = _is_number(value) and value > 0, "a finite number above 0"
    elif key in FROM_ZERO:
        fits, expected = _is_number(value) and value >= 0, "a finite number from 0 on"
    return "" if fits or optional else expected


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= LARGEST


def _pairs(config: Any, values: Mapping[str, Any]) -> int | None:
    """Pairs of dimensions that rotate, where the config says it."""
    heads = getattr(config, "num_attention_heads", None)
    head_dim = getattr(config, "head_dim", None) or (heads and config.hidden_size // heads)
    part = values.get("partial_rotary_factor") or 1.0
    return int(head_dim * part) // 2 if head_dim and _is_number(part) else None
