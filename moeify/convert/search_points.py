"""The points that a search can choose: scored layers as problems for strategies, and what a whole choice gives.

A layer stays dense, is cut, or goes as a whole: attention, cache and FFN. In moeify's own architecture every layer has
as many active experts as it needs, so that all layouts are candidates of one choice; in a stock one cut layers are
alike, and each layout is a choice of its own. With the FFN alone nothing is written, see depth.py. What goes costs no
FFN parameter, whatever else it saves; a choice with such layers is taken only if its measured loss is lower than that
of the best one without. Every choice cuts some layer: one that only drops some is a pruned dense model, which stands
beside the others as the control by depth.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache

import numpy as np

from moeify import strategies, targets
from moeify.convert.depth import BY_DEPTH, DEPTH_TRIALS, DROPPED, STAYS, depth_problem, left_out
from moeify.convert.estimate import count_parameters
from moeify.convert.prepare import WHOLE_SLICES, Prepared
from moeify.convert.search_layouts import affordable_layouts
from moeify.convert.search_scores import Absent, Change, OutputChange, OutputCheck, ScoredLayer
from moeify.layout import Layout
from moeify.models.shallow import kept_layers, without_layers
from moeify.strategies import Choice, Problem

# The first candidate that is cut; STAYS and DROPPED come before it.
CUT = 2
Menu = tuple[int, ...]


@dataclass(frozen=True)
class Point:
    """One choice, and the model's loss on the check text with it.

    Args:
        strategy: the plug-in that made it.
        share: of the FFN parameters, active per token.
        active_parameters: of the whole model.
        layout: how the cut layers are cut, and which stay dense; of a choice that cuts none, how nothing is cut.
        predicted: sum of the losses of single layers, KL in nats per token.
        divergence: measured, all layers changed together.
        perplexity: measured on the same text.
        dropped_layers: those that go as a whole; numbers are the dense model's, as in `layout`.
    """

    strategy: str
    share: float
    active_parameters: int
    layout: Layout
    predicted: float
    divergence: float
    perplexity: float
    dropped_layers: tuple[int, ...] = ()


class Points:
    """The scored layers as problems for strategies: one for each layout, or one with all of them.

    Args:
        prepared: the model and the methods.
        layouts: how a layer can be cut.
        scored: every layer's losses.
        check: measures whole choices.
        droppable: whether layers may go.
    """

    def __init__(
        self,
        prepared: Prepared,
        layouts: Sequence[Layout],
        scored: Sequence[ScoredLayer],
        check: OutputCheck,
        *,
        droppable: bool,
    ) -> None:
        self._prepared, self._layouts, self._scored = prepared, layouts, scored
        # Where all layers are cut alike, one that goes buys nothing for the others.
        self._by_depth, self._droppable = droppable, droppable and bool(prepared.layout.dense_layers)
        # Indices of the layouts that one choice may have.
        every = range(len(layouts))
        self._menus: list[Menu] = [(i,) for i in every] if prepared.target.is_stock else [tuple(every)]
        self.dense_perplexity = math.exp(check.dense().log_perplexity)
        self._measure = cache(lambda menu, choice: self._joint(check, menu, choice))

    @property
    def cheapest(self) -> float:
        return min(layout.active_share for layout in self._layouts)

    @property
    def losses(self) -> dict[str, list[float]]:
        """Layout, or what is left out -> KL of every layer if only it is changed."""
        several = len({layout.num_active for layout in self._layouts}) < len(self._layouts)
        losses = {
            f"{layout.num_active}/{layout.num_experts}" + (f"+{layout.num_shared}" if several else ""): [
                layer.changes[i].divergence for layer in self._scored
            ]
            for i, layout in enumerate(self._layouts)
        }
        without = {
            "without the layer": [layer.without_layer.divergence for layer in self._scored],
            "without its FFN": [layer.without_ffn.divergence for layer in self._scored],
        }
        return {**losses, **without}

    def best(self, budget: float, choose: strategies.Strategy, name: str, trials: int) -> Point:
        """The layers that a strategy chooses in the layout whose first choice is best.

        A single trial goes by predicted losses; of more, each layout gets one and the best layout the others. Layers
        that differ must lose less than layers that are alike: sums of single layers' losses do not see that.
        """
        point = self._best(budget, choose, name, trials, droppable=False)
        assert point is not None
        differs = point.layout.active_by_layer or point.layout.static_layers
        if differs and (alike := self.uniform(budget)).divergence < point.divergence:
            point = alike
        other = self._best(budget, choose, name, trials, droppable=True) if self._droppable else None
        return point if other is None or not other.divergence < point.divergence else other

    def uniform(self, budget: float) -> Point:
        """Every layer cut alike, with experts."""
        routed = [tuple(i for i in menu if not self._layouts[i].is_static) for menu in self._menus]
        point = self._best(budget, strategies.find("uniform"), "uniform", 1, droppable=False, menus=routed)
        assert point is not None
        return point

    def by_depth(self, budget: float) -> Point | None:
        """The control: whole layers go, nothing else changes; None where no layer can go."""
        if not self._by_depth:
            return None
        losses = [layer.without_layer.divergence for layer in self._scored]
        measure = self._measure
        problem = depth_problem(losses, budget, lambda choice: measure((), choice).divergence, DEPTH_TRIALS)
        return self._point(BY_DEPTH, (), strategies.find("stepwise")(problem), measured=True)

    def _best(
        self,
        budget: float,
        choose: strategies.Strategy,
        name: str,
        trials: int,
        *,
        droppable: bool,
        menus: Sequence[Menu] = (),
    ) -> Point | None:
        """None where the strategy only drops layers and cuts none."""
        affordable = set(affordable_layouts(self._layouts, budget))
        menus = [menu for menu in menus or self._menus if affordable & set(menu)]
        firsts = {menu: choose(self._problem(menu, budget, 1, droppable=droppable)) for menu in menus}
        cutting = {menu: choice for menu, choice in firsts.items() if _cuts(choice) or not droppable}
        if not cutting:
            return None
        points = {menu: self._point(name, menu, choice, measured=trials > 1) for menu, choice in cutting.items()}
        best = min(points, key=lambda menu: points[menu].divergence if trials > 1 else points[menu].predicted)
        left = max(1, trials - len(menus) + 1)
        choice = choose(self._problem(best, budget, left, droppable=droppable))
        return self._point(name, best, choice if _cuts(choice) else firsts[best], measured=True)

    def _problem(self, menu: Menu, budget: float, trials: int, *, droppable: bool) -> Problem:
        shares = [self._layouts[i].active_share for i in menu]
        costs = np.tile([1.0, 0.0 if droppable else math.inf, *shares], (len(self._scored), 1))
        if not self._prepared.layout.dense_layers:
            # What the layout costs, and no more: no layer can stay dense.
            budget = shares[0]
        return Problem(
            costs, self._losses(menu), budget, lambda choice: self._measure(menu, choice).divergence, trials, self._seed
        )

    @property
    def _seed(self) -> int:
        return self._prepared.options.seed

    def _losses(self, menu: Menu) -> np.ndarray:
        """Of the candidates of each layer."""
        return np.array(
            [
                [0.0, layer.without_layer.divergence, *(layer.changes[i].divergence for i in menu)]
                for layer in self._scored
            ]
        )

    def _point(self, name: str, menu: Menu, choice: Choice, *, measured: bool) -> Point:
        layout, dropped = self._layout(menu, choice), left_out(choice)
        change = self._measure(menu, choice) if measured else OutputChange(math.nan, math.nan)
        return Point(
            strategy=name,
            share=layout.model_share(len(choice) - len(dropped), len(dropped)),
            active_parameters=self._active_parameters(layout, dropped),
            layout=layout,
            predicted=float(self._losses(menu)[np.arange(len(choice)), choice].sum()),
            divergence=change.divergence,
            perplexity=math.exp(change.log_perplexity),
            dropped_layers=dropped,
        )

    def _active_parameters(self, layout: Layout, dropped: Sequence[int]) -> int:
        dense = self._prepared.dense
        kept = kept_layers(dense.num_layers, dropped)
        # Where nothing is cut it stays a dense model.
        target = targets.static_target(dense) if layout.is_whole else self._prepared.target
        shallow = without_layers(dense, dropped)
        prepared = replace(self._prepared, dense=shallow, layout=layout.among(kept), target=target)
        return count_parameters(prepared.writer)[1]

    def _layout(self, menu: Menu, choice: Choice) -> Layout:
        if not menu or not _cuts(choice):
            return Layout(WHOLE_SLICES, WHOLE_SLICES, WHOLE_SLICES)
        cut = {CUT + place: self._layouts[i] for place, i in enumerate(menu)}
        whole = Layout(*(cut[CUT].num_experts,) * 3)
        candidates = {STAYS: whole, DROPPED: None, **cut}
        return Layout.joined([candidates[one] for one in choice])

    def _joint(self, check: OutputCheck, menu: Menu, choice: Choice) -> OutputChange:
        changes: list[Change] = []
        for layer, candidate in zip(self._scored, choice, strict=True):
            change: Change = Absent.LAYER if candidate == DROPPED else None
            if candidate >= CUT:
                change = layer.plan(menu[candidate - CUT])
            changes.append(change)
        return check.joint(self._layout(menu, choice), changes)


def _cuts(choice: Choice) -> bool:
    """Whether a layer is cut."""
    return max(choice) >= CUT
