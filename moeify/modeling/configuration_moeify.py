"""Config of a dense model whose feed-forward layers (FFNs) are experts: the dense model's own, and what follows.

This file and modeling_moeify.py need torch and transformers alone, so that they can lie beside the weights.
"""

from functools import lru_cache
from types import SimpleNamespace
from typing import Any

from transformers import PreTrainedConfig

MODEL_TYPE = "moeify"
# What a layer may have otherwise than the others.
BY_LAYER = (
    "num_experts",
    "num_experts_per_tok",
    "min_experts_per_tok",
    "moe_intermediate_size",
    "shared_expert_intermediate_size",
)


class ExpertsFields:
    """What the config of a dense model is extended by.

    Args:
        dense_model_type: the dense model's own type.
        num_experts: routed experts of a layer; `num_experts_per_tok` of them are chosen for a token.
        num_experts_per_tok_by_layer: if it is there, the number of every layer, of a dense one zero;
            `num_experts_per_tok` is the largest.
        min_experts_per_tok: if it is there, only so many are chosen whatever their scores are, and further ones whose
            score is above the router's threshold.
        ffn_by_layer: if it is there, what the layers have in place of the values above and below, each layer by
            their names: of one that chooses no experts `num_experts` is zero.
        moe_intermediate_size: neurons of one of them.
        shared_expert_intermediate_size: neurons of the part that is always on; 0 if there is none.
        dense_layers: layers whose FFN is not cut.
        mixing: what the chosen experts' outputs are multiplied with: `hard`, one; `softmax`, a softmax over the scores
            of the chosen ones times their number; `soft` the same, with every expert chosen.
        router_width: units of a router's hidden layer; 0 where its scores are linear.
        expert_activation: its name in transformers.
        expert_gate: experts have a gate, down(act(gate(x)) * up(x)); else they are down(act(up(x))).
        expert_bias: gate and up have biases.
        output_bias: the FFN's output has one, added once.
        ffn_blocks: the list of blocks, by its name in the model with its head; of several lists the blocks are numbered
            one behind the other. Of `list.*.module` the rest is said of this module of a block.
        ffn_read: module of a block that the experts stand for; it gives what `ffn_write` gave.
        ffn_write: module of a block whose output was that of the FFN.
        ffn_between: modules between both, which are passed.
    """

    dense_model_type: str = ""
    num_experts: int = 8
    num_experts_per_tok: int = 2
    num_experts_per_tok_by_layer: list[int] | None = None
    min_experts_per_tok: int | None = None
    ffn_by_layer: list[dict[str, int]] | None = None
    moe_intermediate_size: int = 1
    shared_expert_intermediate_size: int = 0
    dense_layers: list[int] | None = None
    mixing: str = "hard"
    router_width: int = 0
    expert_activation: str = "silu"
    expert_gate: bool = True
    expert_bias: bool = False
    output_bias: bool = False
    ffn_blocks: str | list[str] = "model.layers"
    ffn_read: str = "mlp"
    ffn_write: str = "mlp"
    ffn_between: list[str] | None = None


def of_layer(config: Any, layer: int) -> Any:
    """The values of BY_LAYER that a layer has, by name.

    Args:
        config: of the model.
        layer: its number.
    """
    values = {name: getattr(config, name) for name in BY_LAYER}
    if config.num_experts_per_tok_by_layer:
        values["num_experts_per_tok"] = config.num_experts_per_tok_by_layer[layer]
    return SimpleNamespace(**values | (config.ffn_by_layer[layer] if config.ffn_by_layer else {}))


class MoeifyConfig(PreTrainedConfig):
    """Makes the config of the dense model's own class, extended by ExpertsFields; has no instances of its own."""

    model_type = MODEL_TYPE

    def __new__(cls, **values: Any) -> Any:
        """The extended config of a dense model of the type `dense_model_type`.

        Raises:
            ValueError: transformers has no such type.
        """
        values.pop("model_type", None)
        return config_class(str(values.get("dense_model_type", "")))(**values)


@lru_cache
def config_class(dense_model_type: str) -> Any:
    """The class of a dense model's config, extended.

    Raises:
        ValueError: transformers has no such type.
    """
    # Behind this file's own import: that of transformers' names imports this file, to register it.
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    from .modeling_moeify import register

    if dense_model_type not in CONFIG_MAPPING or dense_model_type == MODEL_TYPE:
        raise ValueError(f"dense_model_type is {dense_model_type!r}, expected a model type of transformers")
    dense: Any = CONFIG_MAPPING[dense_model_type]
    own = {name: value for name, value in vars(ExpertsFields).items() if not name.startswith("__")}
    extended = type(
        f"Moe{dense.__name__}",
        (dense,),
        {
            **own,
            "__annotations__": ExpertsFields.__annotations__,
            "__module__": __name__,
            "__doc__": f"{dense.__name__} with experts.",
            "model_type": MODEL_TYPE,
        },
    )
    register(extended, dense)
    return extended
