"""Engines that run converted checkpoints, one file each: what of a layout each refuses, and what runs slowly there.

A target says which engines know its architecture; an engine says which of its layouts it runs. Nothing here is
guessed: a limit was measured or stands in the engine's source, and the file says which, of what version and when.

To add one, copy `sglang.py`; nothing else is edited.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from moeify import plugins
from moeify.errors import unknown
from moeify.layout import Layout

if TYPE_CHECKING:
    from moeify.models.dense import DenseModel

# Models of a smaller hidden size are toys: nothing is slow in them.
TOY_SIZE = 256


@dataclass(frozen=True)
class Shape:
    """What an engine's limits depend on.

    Args:
        target: MoE architecture, by its model_type.
        layout: how FFNs are cut.
        num_layers: of the model.
        num_neurons: width of the dense FFN.
        hidden_size: of the model.
        qkv_bias, output_bias, qk_norm: whether the dense model's attention has these tensors.
        tied: lm_head and embedding are one tensor.
    """

    target: str
    layout: Layout
    num_layers: int
    num_neurons: int
    hidden_size: int
    qkv_bias: bool = False
    output_bias: bool = False
    qk_norm: bool = False
    tied: bool = True

    @classmethod
    def of(cls, dense: "DenseModel", target: str, layout: Layout) -> "Shape":
        """The shape that a dense model has as `target` in this layout."""
        attention = dense.attention
        return cls(
            target,
            layout,
            dense.num_layers,
            dense.num_neurons,
            dense.hidden_size,
            qkv_bias=attention.qkv_bias,
            output_bias=attention.output_bias,
            qk_norm=attention.qk_norm,
            tied=bool(dense.tied),
        )

    @property
    def expert_width(self) -> int:
        """Neurons of one expert."""
        return self.layout.expert_width(self.num_neurons)

    @property
    def shared_width(self) -> int:
        """Neurons of the part that is always on, which engines run as one FFN."""
        return self.layout.num_shared * self.expert_width


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
        caution: what runs slowly there and what would not, or ""; a warning.
        note: what else to know of this shape there, or ""; no warning.
    """

    name: str
    tested: str
    refuse: Callable[[Shape], str] = nothing
    caution: Callable[[Shape], str] = nothing
    note: Callable[[Shape], str] = nothing


@dataclass(frozen=True)
class Verdict:
    """What one engine says to a shape.

    Args:
        engine: its name.
        refusal: why it cannot run the shape, or "".
        caution: what runs slowly there, or "".
        note: what else to know, or "".
    """

    engine: str
    refusal: str
    caution: str
    note: str


def names() -> list[str]:
    """All engines, by their files."""
    return plugins.names(__name__)


def find(name: str) -> Engine:
    """An engine by its file."""
    engine = plugins.load(__name__, name, "ENGINE")
    assert isinstance(engine, Engine)
    return engine


def named(name: str) -> Engine:
    """An engine by its own name or its file's, in any case: llama.cpp, llama_cpp, vllm.

    Raises:
        UsageError: there is none.
    """
    for file in names():
        engine = find(file)
        if name.lower() in (file, engine.name.lower()):
            return engine
    raise unknown("an engine", name, [find(file).name for file in names()])


def judge(shape: Shape, known: Iterable[str]) -> tuple[Verdict, ...]:
    """What engines say to a shape, in their order.

    Args:
        shape: of the checkpoint.
        known: names of the engines that know its target, as in `Target.engines`; what is no engine here says nothing.
    """
    engines = {engine.name: engine for engine in map(find, names())}
    chosen = [engines[name] for name in known if name in engines]
    toy = shape.hidden_size < TOY_SIZE
    return tuple(
        Verdict(
            engine.name, engine.refuse(shape), "" if toy else engine.caution(shape), "" if toy else engine.note(shape)
        )
        for engine in chosen
    )
