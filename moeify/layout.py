"""How many experts there are, and how many of them run: for a whole model or layer by layer. Imports nothing heavy."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from moeify.errors import InputError, UsageError
from moeify.layout_checks import check_layout


@dataclass(frozen=True)
class LayerChoice:
    """What was asked for single layers.

    Args:
        dense: layers that stay as they are.
        static: layers that keep as many slices as are active, and choose none.
        active, experts: numbers of each layer.
    """

    dense: tuple[int, ...] = ()
    static: tuple[int, ...] = ()
    active: tuple[int, ...] = ()
    experts: tuple[int, ...] = ()

    def among(self, kept: Sequence[int]) -> "LayerChoice":
        """The choice for a model that has these layers alone, in this order."""
        return LayerChoice(
            *(
                tuple(number for number, layer in enumerate(kept) if layer in some)
                for some in (self.dense, self.static)
            ),
            *(tuple(numbers[layer] for layer in kept) if numbers else () for numbers in (self.active, self.experts)),
        )


ALIKE = LayerChoice()


@dataclass(frozen=True)
class Layout:
    """How every FFN is cut: E equal slices, S of them always on, A of them run for a token, shared ones included.

    FFNs of `dense_layers` are not cut. With `max_active` a token runs as many slices as have a score above a threshold,
    at least `min_active` and at most `max_active` of them; `num_active` is the mean then.

    With `active_by_layer` every layer has a number of its own, and `num_active` is the mean of those that are cut,
    rounded. One that stays dense has all. One without an FFN has none, as one that goes, in the choice of a search.

    `static_layers` keep as many slices as are active of them for every token; the others are gone, and nothing chooses.
    With `experts_by_layer` every layer is cut into as many slices as it says; `num_experts` is the most, and shared
    ones and the range of active ones are scaled to a layer's own number.
    """

    num_experts: int
    num_shared: int
    num_active: int
    dense_layers: tuple[int, ...] = ()
    min_active: int = 0
    max_active: int = 0
    active_by_layer: tuple[int, ...] = ()
    static_layers: tuple[int, ...] = ()
    experts_by_layer: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        check_layout(self)

    @property
    def mean(self) -> int:
        """Active experts of the layers that are cut, in the mean, rounded."""
        return mean_active(self.active_by_layer, self.experts_by_layer or self.num_experts)

    def scaled(self, number: int, experts: int) -> int:
        """So many of all experts in a layer of so many."""
        return number if experts == self.num_experts else -(-number * experts // self.num_experts)

    @classmethod
    def joined(cls, layers: Sequence["Layout | None"]) -> "Layout":
        """The layout whose layers have these, in each of which all are alike; None goes as a whole.

        The most common one of those that choose experts says what is shared, and the range of active experts.
        """
        given = [layer for layer in layers if layer is not None]
        experts = max(layer.num_experts for layer in given)
        routed = [layer for layer in given if not layer.is_static]
        first = max(routed, key=lambda layer: (layer.num_experts, routed.count(layer))) if routed else None
        counts = tuple(0 if layer is None else layer.num_active for layer in layers)
        of_layers = tuple(experts if layer is None else layer.num_experts for layer in layers)
        cut = {(layer.num_experts, layer.num_active) for layer in given if not layer.is_whole}
        alike = len(cut) == 1 and all(layer.num_active for layer in given)
        by_experts = () if len(set(of_layers)) == 1 else of_layers
        return cls(
            experts,
            0 if first is None else first.num_shared * experts // first.num_experts,
            next(iter(cut))[1] if alike else mean_active(counts, by_experts or experts),
            dense_layers=tuple(n for n, layer in enumerate(layers) if layer is not None and layer.is_whole),
            min_active=0 if first is None else first.min_active,
            max_active=0 if first is None else first.max_active,
            active_by_layer=() if alike and not by_experts else counts,
            static_layers=tuple(
                n
                for n, layer in enumerate(layers)
                if layer and layer.is_static and 0 < layer.num_active < layer.num_experts
            ),
            experts_by_layer=by_experts,
        )

    @property
    def cut_counts(self) -> tuple[int, ...]:
        """Active experts of every layer that is cut; one number where they are alike."""
        numbers = enumerate(self.active_by_layer)
        return tuple(n for layer, n in numbers if 0 < n < self.experts_of(layer)) or (self.num_active,)

    @property
    def routed_counts(self) -> list[int]:
        """Active experts of the layers that choose some of the most."""
        layers = [layer for layer in range(len(self.active_by_layer)) if self.is_routed(layer)]
        return [self.active_by_layer[layer] for layer in layers if self.experts_of(layer) == self.num_experts]

    def experts_of(self, layer: int) -> int:
        """Slices that a layer is cut into."""
        return self.experts_by_layer[layer] if self.experts_by_layer else self.num_experts

    def active_of(self, layer: int) -> int:
        """Slices of a layer that run for a token, in the mean."""
        if self.active_by_layer:
            return self.active_by_layer[layer]
        return self.num_experts if layer in self.dense_layers else self.num_active

    def of_layer(self, layer: int) -> "Layout":
        """The layout that a layer has, in which all layers are alike: of one that stays dense all is always on."""
        experts, active = self.experts_of(layer), self.active_of(layer)
        if layer in self.dense_layers:
            return Layout(experts, experts, experts)
        if active == 0 or self.is_static or layer in self.static_layers:
            return Layout(experts, active, active)
        if not self.is_mixed and not self.active_by_layer:
            return self
        shared, least, most = (self.scaled(n, experts) for n in (self.num_shared, self.min_active, self.max_active))
        return Layout(experts, shared, active, min_active=least, max_active=most)

    def among(self, kept: Sequence[int]) -> "Layout":
        """The layout of a model that has these layers alone, in this order."""
        own = LayerChoice(self.dense_layers, self.static_layers, self.active_by_layer, self.experts_by_layer).among(
            kept
        )
        return replace(
            self,
            dense_layers=own.dense,
            static_layers=own.static,
            active_by_layer=own.active,
            experts_by_layer=own.experts,
        )

    def is_routed(self, layer: int) -> bool:
        """Whether a token chooses experts in a layer: it is not dense, nor static, nor without an FFN."""
        return not self.of_layer(layer).is_static

    @property
    def is_mixed(self) -> bool:
        """Layers differ in more than their active experts: some are static, without an FFN, or cut otherwise."""
        return bool(self.static_layers or self.experts_by_layer or 0 in self.active_by_layer)

    @property
    def is_empty(self) -> bool:
        """Of a layer without an FFN."""
        return self.num_shared == self.num_active == 0

    @property
    def num_slices(self) -> int:
        """Of one layer, those that are written: a static one has lost the others."""
        return self.num_active if self.is_static else self.num_experts

    @property
    def is_adaptive(self) -> bool:
        """A token's scores say how many experts it gets."""
        return self.max_active > 0

    @property
    def routed_range(self) -> tuple[int, int]:
        """Least and most routed experts of a token."""
        if self.is_adaptive:
            return self.min_active - self.num_shared, self.max_active - self.num_shared
        return self.num_routed_active, self.num_routed_active

    @property
    def num_routed(self) -> int:
        return self.num_experts - self.num_shared

    @property
    def num_routed_active(self) -> int:
        return self.num_active - self.num_shared

    @property
    def is_static(self) -> bool:
        """Nothing is routed: the active slices are always the same, which is static pruning."""
        return self.num_routed_active == 0

    @property
    def is_whole(self) -> bool:
        """Nothing is cut away or routed: every slice is always on."""
        return self.num_shared == self.num_experts

    @property
    def active_share(self) -> float:
        """Share of a cut FFN that a token uses, in the mean over layers; those that have none are left out."""
        shares = [number / self.experts_of(layer) for layer, number in enumerate(self.active_by_layer)]
        cut = [share for share in shares if 0 < share < 1] or [self.num_active / self.num_experts]
        return sum(cut) / len(cut)

    def model_share(self, num_layers: int, num_dropped: int = 0) -> float:
        """Share of all FFN parameters that a token uses.

        Args:
            num_layers: of the layout's model.
            num_dropped: layers that the dense model had besides.
        """
        if self.active_by_layer:
            shares = (number / self.experts_of(layer) for layer, number in enumerate(self.active_by_layer))
            return sum(shares) / (num_layers + num_dropped)
        dense = len(self.dense_layers)
        return (dense + (num_layers - dense) * self.active_share) / (num_layers + num_dropped)

    @property
    def slices(self) -> int:
        """The least number of equal slices of an FFN of which every layer's experts are made."""
        return math.lcm(self.num_experts, *self.experts_by_layer)

    def expert_width(self, num_neurons: int) -> int:
        """Neurons in one slice.

        Raises:
            InputError: the slices would not be equal; the hint lists expert counts that work.
        """
        if num_neurons % self.num_experts:
            works = [str(n) for n in range(2, 129) if num_neurons % n == 0]
            raise InputError(
                f"{num_neurons} neurons do not divide into {self.num_experts} experts",
                f"--experts {', '.join(works)} work for this model" if works else "",
            )
        return num_neurons // self.num_experts


def resolve_layout(
    experts: int, shared: int | None, active: int | None, *, holds_shared: bool, layers: LayerChoice = ALIKE
) -> Layout:
    """Fill in what is open: 3/4 active, of these a quarter shared, and at most half of the active ones of any layer.

    Of 8 and 32 experts on SmolLM2-135M, at 75 % and 50 % active, a third to a sixth of the active ones shared had the
    least layer error, up to 7 % less than with half of them shared.
    """
    numbers = layers.active
    if numbers:
        active = mean_active(numbers, layers.experts or experts)
    if active is None:
        active = max(1, experts * 3 // 4)
    if not active:
        raise UsageError(f"0 active of {experts} experts is impossible", f"--active takes 1 to {experts}")
    if shared is None:
        # A static layer chooses none beside its own.
        sizes = layers.experts or (experts,) * len(numbers)
        pairs = zip(numbers, sizes, strict=True)
        routed = [pair for layer, pair in enumerate(pairs) if pair[0] and layer not in layers.static]
        least = min((number * experts // size for number, size in routed), default=active)
        shared = min(-(-active // 4), max(1, least // 2)) if holds_shared and least > 1 else 0
        while any(number <= -(-shared * size // experts) for number, size in routed) and shared:
            shared -= 1
    return Layout(
        experts,
        shared,
        active,
        layers.dense,
        active_by_layer=numbers,
        static_layers=layers.static,
        experts_by_layer=layers.experts,
    )


def mean_active(numbers: Sequence[int], experts: int | Sequence[int]) -> int:
    """Active experts of the layers that are cut, in the mean, of the most that a layer has.

    Args:
        numbers: active experts of each layer.
        experts: of all layers, or of each.
    """
    sizes = [experts] * len(numbers) if isinstance(experts, int) else experts
    shares = [number * max(sizes) / size for number, size in zip(numbers, sizes, strict=True) if 0 < number < size]
    return max(1, round(sum(shares) / len(shares))) if shares else max(sizes)
