"""config.json for transformers 4 and engines pinned to it: its names of what transformers 5 calls otherwise.

An old loader that does not find a name takes its class's default and says nothing: rope_theta 1e6 for a mixtral, half
of each head rotated in a glm4_moe, 128 experts in a qwen3_moe. Each key written here says again what a key of
transformers 5 says, and transformers 5 reads the same config from the file with and without them.

Source: the config classes and modeling_rope_utils.py of transformers 4.57.6, read on 2026-11-26.
"""

import json
from collections.abc import Mapping
from typing import Any

from transformers.models.auto.configuration_auto import CONFIG_MAPPING

# Parts of a rotation that stand beside its scaling in transformers 4, not in it.
BESIDE_SCALING = ("rope_theta", "partial_rotary_factor")
# Names of the number of routed experts.
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")


def with_old_keys(text: str) -> str:
    """The text of a config.json and the names of transformers 4; what transformers 5 reads of it stays as it is.

    Args:
        text: of an architecture that transformers knows.
    """
    values = json.loads(text)
    old = {"torch_dtype": values.get("dtype"), **_expert_counts(values)}
    added = {name: value for name, value in old.items() if value is not None and values.get(name) is None}
    return json.dumps({**values, **added, **_rotation(values)}, indent=2, sort_keys=True) + "\n"


def _rotation(values: Mapping[str, Any]) -> dict[str, Any]:
    """One rotation for all layers; transformers 4 has no common names for several.

    What stands in rope_parameters goes before what stands beside it, where a config may keep a class's default.
    """
    rotation = values.get("rope_parameters")
    if not isinstance(rotation, dict) or "rope_theta" not in rotation or values.get("rope_scaling"):
        return {}
    old = {name: rotation[name] for name in BESIDE_SCALING if name in rotation}
    kind = rotation.get("rope_type", "default")
    if kind != "default":
        # transformers 5 takes it in the place of rope_parameters, and completes it by the two beside it.
        old["rope_scaling"] = {name: value for name, value in rotation.items() if name not in BESIDE_SCALING}
    if kind == "longrope" and "original_max_position_embeddings" in rotation:
        old["original_max_position_embeddings"] = rotation["original_max_position_embeddings"]
    return old


def _expert_counts(values: Mapping[str, Any]) -> dict[str, Any]:
    """The names that transformers 5 knows for one that is in the file: some were the only one in transformers 4."""
    names: Mapping[str, str] = CONFIG_MAPPING[values["model_type"]].attribute_map
    return {name: values.get(stored) for name, stored in names.items() if name in EXPERTS}
