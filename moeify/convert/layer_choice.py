"""Layers that are named one by one: those that go, stay dense or static, and numbers of each."""

from dataclasses import replace

from moeify.errors import InputError, UsageError
from moeify.layout import LayerChoice
from moeify.models.dense import DenseModel
from moeify.models.shallow import kept_layers
from moeify.options import SplitOptions


def by_layer(dense: DenseModel, options: SplitOptions) -> SplitOptions:
    """The options with what the numbers of single layers say: dense layers, and nothing of one that goes.

    Raises:
        UsageError: the numbers are not those of this model's layers.
    """
    active, experts, option = options.active_by_layer, options.experts_by_layer, "--active-by-layer"
    for name, numbers in ((option, active), ("--experts-by-layer", experts)):
        if numbers and len(numbers) != dense.num_layers:
            raise UsageError(
                f"{name} has {len(numbers)} numbers, {dense.name} has {dense.num_layers} layers", "write one for each"
            )
    if experts:
        options = replace(options, experts=max(experts))
        # As without the option: three quarters of each.
        active = active or tuple(
            number if layer in options.dense_layers else max(1, number * 3 // 4) for layer, number in enumerate(experts)
        )
    if not active:
        return options
    if options.experts is None:
        raise UsageError(f"{option} needs to know of how many experts", "name --experts")
    experts = experts or (options.experts,) * len(active)
    active = tuple(0 if layer in options.drop_layers else number for layer, number in enumerate(active))
    whole = tuple(layer for layer, number in enumerate(active) if number == experts[layer])
    if options.dense_layers and set(options.dense_layers) != set(whole):
        raise UsageError(
            f"{option} has all experts in layers {list(whole)}, --dense-layers names {list(options.dense_layers)}",
            "leave --dense-layers out",
        )
    return replace(options, active_by_layer=active, dense_layers=whole)


def kept(dense: DenseModel, options: SplitOptions) -> list[int]:
    """Numbers of the layers that are not dropped.

    Raises:
        InputError: there is no such layer to leave dense or static, or nothing is cut.
        UsageError: a layer is to be two things.
    """
    last = dense.num_layers - 1
    for name, layers in (("dense", options.dense_layers), ("static", options.static_layers)):
        if missing := [layer for layer in layers if not 0 <= layer <= last]:
            raise InputError(f"there is no layer {missing[0]} to leave {name}", f"--{name}-layers takes 0 to {last}")
        if both := sorted(set(layers) & set(options.drop_layers)):
            raise UsageError(f"layer {both[0]} is to stay {name} and to go", "name it in one of both options")
    left = kept_layers(dense.num_layers, options.drop_layers)
    if left and set(left) <= set(options.dense_layers):
        raise InputError("every layer is to stay dense, nothing is cut", "leave a layer out of --dense-layers")
    return left


def choice(options: SplitOptions, layers: list[int]) -> LayerChoice:
    """What is asked for those layers that are not dropped, by their new numbers."""
    dense, static = (tuple(sorted(set(some))) for some in (options.dense_layers, options.static_layers))
    return LayerChoice(dense, static, options.active_by_layer, options.experts_by_layer).among(layers)
