"""Numbers that nothing can be computed from are refused with their place; those that are merely odd work."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MakeDense, toy_ffn
from safetensors.torch import load_file, save_file
from torch import Tensor

from moeify import partition, routers
from moeify.calibration.activations import Activations, measure
from moeify.calibration.overflow import LARGEST, check_activations
from moeify.calibration.stream import HiddenStream
from moeify.convert.layer import LayerFit, fit_layer
from moeify.convert.pipeline import split
from moeify.data.sampling import sample_from_model
from moeify.errors import InputError
from moeify.experts.mixing import UNIT
from moeify.layout import Layout
from moeify.models import stock
from moeify.models.dense import open_dense
from moeify.models.ffn import FFNWeights
from moeify.options import SplitOptions

IDS = torch.arange(4 * 32).view(4, 32)


@pytest.fixture
def scaled(make_dense: MakeDense, tmp_path: Path) -> Callable[..., Path]:
    """scaled(part, factor, **config) -> a llama whose tensors of that name are multiplied."""

    def make(part: str, factor: float, **config: Any) -> Path:
        folder = Path(shutil.copytree(make_dense("llama"), tmp_path / "dense"))
        tensors = load_file(folder / "model.safetensors")
        for name in tensors:
            if part and part in name:
                tensors[name] = (tensors[name].double() * factor).clamp(-3.4e38, 3.4e38).float()
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        values = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**values, **config}))
        return folder

    return make


def walk(folder: Path) -> HiddenStream:
    """Through the dense model."""
    source = open_dense(str(folder))
    stream = HiddenStream(source, {"input_ids": IDS})
    for layer in range(source.num_layers):
        stream.pass_through(layer, source.ffn(layer))
    stream.check_head()
    return stream


@pytest.mark.parametrize("values", [[0.0, -LARGEST], [], [1e-45, 3.0]])
def test_usual_numbers_are_let_through(values: list[float]) -> None:
    check_activations(torch.tensor(values), "layer 3: the outputs")


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ([1.0, float("nan")], "are not finite on this text (1 of 2 are NaN or infinite)"),
        ([float("inf"), -float("inf")], "are not finite on this text (2 of 2 are NaN or infinite)"),
        ([-2e15, 1.0], "reach 2.0e+15 on this text, expected at most 1e+15"),
    ],
)
def test_other_numbers_are_refused_with_their_place(values: list[float], words: str) -> None:
    with pytest.raises(InputError) as caught:
        check_activations(torch.tensor(values), "layer 3: the outputs")
    assert str(caught.value).startswith(f"layer 3: the outputs {words}")
    assert "rope_theta" in caught.value.hint


@pytest.mark.parametrize(
    ("part", "factor", "place"),
    [
        ("embed_tokens", 1e20, "in front of the first layer: the hidden states reach"),
        ("layers.1.self_attn.q_proj", 3e38, "layer 1: the inputs of its FFN are not finite"),
        ("layers.0.self_attn.v_proj", 1e20, "layer 0: the hidden states behind it reach"),
        ("layers.1.mlp.down_proj", 1e20, "layer 1: the hidden states behind it reach"),
        ("model.norm", 3e38, "behind the last layer: the logits"),
    ],
)
def test_the_layer_where_it_begins_is_named(part: str, factor: float, place: str, scaled: Callable[..., Path]) -> None:
    with pytest.raises(InputError) as caught:
        walk(scaled(part, factor))
    assert str(caught.value).startswith(place)


@pytest.mark.parametrize("factor", [0.0, -1.0, 1e-20, 1e4, 1e10])
@pytest.mark.parametrize("part", ["embed_tokens", "q_proj", "model.norm"])
def test_scaled_weights_that_can_be_computed_with_pass(part: str, factor: float, scaled: Callable[..., Path]) -> None:
    stream = walk(scaled(part, factor))
    assert stream.losses(IDS).isfinite().all()


@pytest.mark.parametrize("partition_name", partition.names())
def test_huge_weights_never_reach_a_method(partition_name: str, scaled: Callable[..., Path], tmp_path: Path) -> None:
    folder = scaled("", 1.0)
    tensors = {name: tensor * 1e4 for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match="on this text"):
        split(str(folder), tmp_path / "out", SplitOptions(partition=partition_name, tokens=1024))


def test_a_model_that_gives_nan_writes_no_text(scaled: Callable[..., Path]) -> None:
    model = stock.load(scaled("model.norm", 3e38))
    with pytest.raises(InputError, match="cannot write a text: its logits after 1 tokens are not finite"):
        sample_from_model(model, num_tokens=64, context=32, seed=0)


def test_losses_that_are_not_finite_are_refused(scaled: Callable[..., Path]) -> None:
    source = open_dense(str(scaled("model.norm", 3e38)))
    with pytest.raises(InputError, match="behind the last layer: the losses are not finite"):
        HiddenStream(source, {"input_ids": IDS}).losses(IDS)


@pytest.mark.parametrize(("part", "words"), [("", "energy"), ("up_FD", "outputs of its FFN")])
def test_what_neurons_do_is_checked(part: str, words: str) -> None:
    """Also where their outputs are small: the refit adds up squares of what goes into down_proj."""
    ffn, inputs_TD = toy_ffn()
    tensors = ffn.tensors()
    factors = {"up_FD": 1e20} if part else {"up_FD": 1e20, "down_DF": 1e-20}
    huge = FFNWeights(
        5, *(tensors[name] * factors.get(name, 1.0) for name in ("gate_FD", "up_FD", "down_DF")), ffn.activation
    )
    words = "squares of its neurons" if not part else words
    with pytest.raises(InputError, match=f"layer 5: the {words}"):
        measure(huge, inputs_TD, Activations(huge, inputs_TD), seed=0)


Odd = Callable[[FFNWeights, Tensor], tuple[FFNWeights, Tensor]]


def with_tensors(ffn: FFNWeights, **changed: Tensor) -> FFNWeights:
    parts = {**ffn.tensors(), **changed}
    return FFNWeights(ffn.layer, parts["gate_FD"], parts["up_FD"], parts["down_DF"], ffn.activation)


ODD: dict[str, Odd] = {
    "a layer of zeros": lambda ffn, x: (ffn.map(torch.zeros_like), x),
    "one token, repeated": lambda ffn, x: (ffn, x[:1].expand_as(x).clone()),
    "inputs of zero": lambda ffn, x: (ffn, torch.zeros_like(x)),
    "inputs of 1e-20": lambda ffn, x: (ffn, x * 1e-20),
    "identical neurons": lambda ffn, x: (ffn.neurons(torch.zeros(ffn.num_neurons, dtype=torch.long)), x),
    "dead neurons": lambda ffn, x: (
        with_tensors(ffn, gate_FD=torch.cat([ffn.gate_FD[:2], torch.zeros_like(ffn.gate_FD[2:])])),  # type: ignore[index]
        x,
    ),
    "one neuron that is all": lambda ffn, x: (
        with_tensors(ffn, down_DF=torch.cat([ffn.down_DF[:, :1] * 1e6, ffn.down_DF[:, 1:] * 1e-6], 1)),
        x,
    ),
}


METHODS = [("partition", name) for name in partition.names()] + [("router", name) for name in routers.names()]


@pytest.mark.parametrize("odd", ODD)
@pytest.mark.parametrize(
    "method", [*(("partition", n) for n in partition.names()), *(("router", n) for n in routers.names())]
)
def test_odd_layers_are_cut(method: tuple[str, str], odd: str) -> None:
    """By every method, into experts of the right sizes, with numbers that are finite."""
    ffn, inputs_TD = ODD[odd](*toy_ffn(hidden=16, num_tokens=300))
    names = {"partition": "energy", "router": "centroid", method[0]: method[1]}
    layout = Layout(6, 2, 4)
    fit = LayerFit(
        layout=layout,
        partition=partition.find(names["partition"]),
        router=routers.find(names["router"]),
        mixing=UNIT,
        refit=True,
        dtype=torch.float32,
        seed=0,
    )
    gradient = torch.randn(inputs_TD.shape, generator=torch.Generator().manual_seed(1))
    wants = partition.needs_gradients(names["partition"])
    cut, outputs_TD = fit_layer(ffn, inputs_TD, fit, gradient_GD=gradient if wants else None)
    cut.plan.check(layout)
    assert outputs_TD.isfinite().all()
    assert cut.plan.router_RD is None or cut.plan.router_RD.isfinite().all()
    assert all(map(math.isfinite, cut.plan.diagnostics.values()))


def test_weights_beyond_float16_are_refused(
    scaled: Callable[..., Path], calibration_file: Path, tmp_path: Path
) -> None:
    options = SplitOptions(dtype="float16", tokens=1024, calibration=(str(calibration_file),))
    with pytest.raises(InputError, match="has values beyond the range of float16"):
        split(str(scaled("up_proj", 1e6)), tmp_path / "out", options)


def test_a_router_beyond_float16_is_refused() -> None:
    ffn, inputs_TD = toy_ffn()
    methods = {"partition": partition.find("energy"), "router": routers.find("centroid"), "mixing": UNIT}
    fit = LayerFit(layout=Layout(6, 2, 4), refit=False, dtype=torch.float16, seed=0, **methods)
    with pytest.raises(InputError, match="the router of layer 0 has values beyond the range of float16"):
        fit_layer(ffn, inputs_TD * 1e-8, fit)
