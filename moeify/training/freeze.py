"""What further training with other software must leave alone."""

from typing import Any

from moeify import families, targets
from moeify.errors import InputError
from moeify.models.heads import dense_type


def freeze_routers(model: Any) -> tuple[str, ...]:
    """Take the routers of a converted checkpoint out of training, in place.

    Their rows are small (`targets.ROUTER_SCALE`), so an optimizer whose steps have the usual size replaces them and
    tokens go to other experts. Call it before the optimizer is made.

    Args:
        model: as stock transformers loaded it; peft may be wrapped around it.

    Returns:
        Names of the parameters that are frozen.

    Raises:
        InputError: the model is of an architecture that moeify does not write, or has no routers.

    Example:
        model = moeify.load("my-moe")
        moeify.freeze_routers(model)
        optimizer = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)
    """
    # Of a model that reads text in a part of its own, that part has experts.
    parts = model.config.model_type, model.config.get_text_config().model_type
    model_type = next((str(name) for name in parts if name in targets.names()), str(parts[0]))
    if model_type not in targets.names():
        raise InputError(f"{model_type} is not a target of moeify", f"its targets are {', '.join(targets.names())}")
    family = families.find(dense_type(model.config)) if model_type == "moeify" else None
    ends = targets.find(model_type, family).frozen
    frozen = {name: parameter for name, parameter in model.named_parameters() if name.endswith(ends)}
    if not frozen:
        raise InputError(
            f"the model has no parameter whose name ends in {' or '.join(ends)}",
            "it is not a model that moeify wrote, or its parameters were renamed",
        )
    for parameter in frozen.values():
        parameter.requires_grad_(False)
    return tuple(frozen)
