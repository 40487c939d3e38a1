"""How a token's experts are chosen, one method a file: `fit(inputs_TD, norms_TR, weight_T) -> router_RD`.

A router is linear and has no intercept, which is what every native target computes. `norms_TR` holds the norm of what
each routed expert would add to each token's output; a good router ranks experts by it.
"""

from typing import Any, Protocol

from torch import Tensor

from moeify import plugins


class Router(Protocol):
    def __call__(self, inputs_TD: Tensor, norms_TR: Tensor, weight_T: Tensor) -> Tensor: ...


def find(name: str) -> Router:
    method: Router = plugins.load(_package(), name, "fit")
    return method


def names() -> list[str]:
    return plugins.names(_package())


def _package() -> Any:
    from moeify import routers

    return routers
