"""Engines that run converted checkpoints, one file each: what of a layout each refuses, and what runs slowly there.

A target says which engines know its architecture; an engine says which of its layouts it runs. Nothing here is
guessed: a limit was measured or stands in the engine's source, and the file says which, of what version and when.

To add one, copy `sglang.py`; nothing else is edited.
"""

from collections.abc import Callable
from dataclasses import dataclass

from moeify import plugins
from moeify.plan import Layout


@dataclass(frozen=True)
class Shape:
    """What an engine's limits depend on.

    Args:
        target: MoE architecture, by its model_type.
        layout: how FFNs are cut.
        num_layers: of the model.
        num_neurons: width of the dense FFN.
        hidden_size: of the model.
    """

    target: str
    layout: Layout
    num_layers: int
    num_neurons: int
    hidden_size: int

    @property
    def expert_width(self) -> int:
        """Neurons of one expert."""
        return self.layout.expert_width(self.num_neurons)


def nothing(_: Shape) -> str:
    """What an engine says that runs every layout well."""
    return ""


@dataclass(frozen=True)
class Engine:
    """One engine.

    Args:
        name: as its makers write it, as in `Target.engines`.
        tested: version, what was tested of it and when; or "from source" and the date.
        refuse: why it cannot run a checkpoint of this shape, or "".
        caution: what runs slowly there and what would not, or "".
    """

    name: str
    tested: str
    refuse: Callable[[Shape], str] = nothing
    caution: Callable[[Shape], str] = nothing


def names() -> list[str]:
    """All engines."""
    return plugins.names(__name__)


def find(name: str) -> Engine:
    engine = plugins.load(__name__, name, "ENGINE")
    assert isinstance(engine, Engine)
    return engine
