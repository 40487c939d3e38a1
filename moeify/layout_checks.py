"""Whether the numbers of a layout fit each other. Imports nothing heavy."""

from typing import TYPE_CHECKING

from moeify.errors import UsageError

if TYPE_CHECKING:
    from moeify.layout import Layout


def check_layout(layout: "Layout") -> None:
    """Raise UsageError unless the numbers of a layout fit each other; hints name options of a split."""
    further = (
        layout.min_active,
        layout.max_active,
        *layout.active_by_layer,
        *layout.static_layers,
        *layout.experts_by_layer,
    )
    numbers = (layout.num_experts, layout.num_shared, layout.num_active, *layout.dense_layers, *further)
    if wrong := [number for number in numbers if type(number) is not int]:
        raise UsageError(
            f"a layout has the number {wrong[0]!r}, expected whole numbers",
            "a layout has numbers of experts, shared and active ones, and layers",
        )
    if layout.num_experts < 2:
        raise UsageError(f"{layout.num_experts} experts are not a mixture", "--experts takes 2 or more")
    if not (0 if layout.is_empty else 1) <= layout.num_active <= layout.num_experts:
        raise UsageError(
            f"{layout.num_active} active of {layout.num_experts} experts is impossible",
            f"--active takes 1 to {layout.num_experts}",
        )
    if not 0 <= layout.num_shared <= layout.num_active:
        raise UsageError(
            f"{layout.num_shared} shared of {layout.num_active} active experts is impossible",
            f"--shared takes 0 to {layout.num_active}; shared experts count as active",
        )

    if both := sorted(set(layout.static_layers) & set(layout.dense_layers)):
        raise UsageError(
            f"layer {both[0]} is to keep {layout.active_of(both[0])} slices and to stay dense",
            "a static layer has fewer active experts than there are",
        )
    if layout.experts_by_layer:
        _check_experts(layout)
    if layout.active_by_layer:
        _check_layers(layout)
    # Of layers of other numbers of experts the same is seen when theirs are made.
    routed = layout.routed_counts if layout.active_by_layer else [layout.num_active]
    least, most = min(routed, default=layout.min_active), max(routed, default=layout.min_active)
    if layout.is_adaptive and not (
        layout.num_shared <= layout.min_active <= least <= most <= layout.max_active <= layout.num_experts
    ):
        active = f"{least}" if least == most else f"{least} to {most}"
        raise UsageError(
            f"{layout.min_active} to {layout.max_active} active experts are impossible with {layout.num_shared} shared "
            f"and {active} active of {layout.num_experts}",
            "shared <= --min-active <= --active <= --max-active <= --experts",
        )
    for layer, experts in enumerate(layout.experts_by_layer):
        if experts < layout.num_experts:
            layout.of_layer(layer)


def _check_experts(layout: "Layout") -> None:
    """Raise UsageError unless the numbers of experts of single layers fit the others."""
    numbers, option = layout.experts_by_layer, "--experts-by-layer"
    if min(numbers) < 2:
        raise UsageError(f"{min(numbers)} experts are not a mixture", f"{option} takes 2 or more for each layer")
    if max(numbers) != layout.num_experts:
        raise UsageError(
            f"{option} has up to {max(numbers)} experts, a layer has {layout.num_experts}", "leave --experts out"
        )
    if len(numbers) != len(layout.active_by_layer):
        raise UsageError(
            f"{option} has {len(numbers)} numbers, --active-by-layer {len(layout.active_by_layer)}",
            "write one for each layer",
        )


def _check_layers(layout: "Layout") -> None:
    """Raise UsageError unless the numbers of single layers fit each other and the others."""
    numbers, option = layout.active_by_layer, "--active-by-layer"
    layers = [(layer, number, layout.experts_of(layer)) for layer, number in enumerate(numbers)]
    for _, number, experts in layers:
        if not 0 <= number <= experts:
            raise UsageError(
                f"{number} active of {experts} experts is impossible",
                f"{option} takes {layout.num_shared + 1} to {experts}",
            )
    if not any(0 < number < experts for _, number, experts in layers):
        raise UsageError("no layer has fewer active experts than there are", f"{option} cuts one or more")
    for layer, number, experts in layers:
        shared = layout.scaled(layout.num_shared, experts)
        if 0 < number <= shared and number < experts and not layout.is_static and layer not in layout.static_layers:
            raise UsageError(
                f"a layer of {number} active experts has none to choose beside {shared} shared ones",
                f"{option} takes {shared + 1} to {experts}, or lower --shared, or --static-layers {layer}",
            )
    whole, mean = tuple(layer for layer, number, experts in layers if number == experts), layout.mean
    if whole != layout.dense_layers or layout.num_active != mean:
        raise UsageError(
            f"{option} has all experts in {list(whole)}, dense layers are {list(layout.dense_layers)}, the mean of "
            f"the others is {mean}, active are {layout.num_active}",
            f"a layer that stays dense has as many as --experts in {option}",
        )
