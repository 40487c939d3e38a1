"""Layouts, what is filled in, and plans on disk: a whole one comes back, anything else is an error that says why."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from moeify.errors import InputError, MoeifyError, UsageError
from moeify.layout import LayerChoice, Layout, resolve_layout
from moeify.options import SplitOptions
from moeify.plan import HEADER_TYPES, PLAN_FILE, SHARED, LayerPlan, SplitPlan, load_plan


def make_plan(layout: Layout | None = None, num_layers: int = 2, **changes: Any) -> SplitPlan:
    layout = layout or Layout(4, 2, 3)
    generator = torch.Generator().manual_seed(0)
    labels_F = torch.tensor([SHARED] * 2 * layout.num_shared + [e for e in range(layout.num_routed) for _ in (0, 1)])
    layers = tuple(
        LayerPlan(
            layer=i,
            labels_F=labels_F[torch.randperm(len(labels_F), generator=generator)].to(torch.int16),
            router_RD=None
            if layout.is_static
            else torch.randn(layout.num_routed, 6, generator=generator).to(torch.bfloat16),
            diagnostics={"massive_neurons": 1.0, "refit_strength": 0.3},
        )
        for i in range(num_layers)
    )
    plan = SplitPlan(
        layout=layout,
        layers=layers,
        source="dense model",
        family="llama",
        target="granitemoeshared",
        options=SplitOptions(experts=4),
        calibration={"sha256": "0" * 64, "num_tokens": 1024},
        version="0.1.0",
        router_scale=2.0**-6,
    )
    return replace(plan, **changes)


def header_of(path: Path) -> dict[str, Any]:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as reader:
        header: dict[str, Any] = json.loads(reader.metadata()["moeify"])
    return header


def rewrite(path: Path, tensors: dict[str, torch.Tensor], header: Any) -> None:
    save_file(tensors, path, metadata={"moeify": header if isinstance(header, str) else json.dumps(header)})


@pytest.mark.parametrize(
    ("cut", "hint"),
    [
        ((1, 0, 1), "--experts takes 2 or more"),
        ((0, 0, 0), "--experts takes 2 or more"),
        ((8, 0, 9), "--active takes 1 to 8"),
        ((8, 0, -1), "--active takes 1 to 8"),
        ((8, -1, 4), "--shared takes 0 to 4"),
        ((8, 5, 4), "--shared takes 0 to 4"),
    ],
)
def test_impossible_layouts_are_usage_errors(cut: tuple[int, int, int], hint: str) -> None:
    with pytest.raises(UsageError) as caught:
        Layout(*cut)
    assert hint in caught.value.hint
    assert caught.value.exit_code == 2


def test_numbers_that_follow_from_a_layout() -> None:
    layout = Layout(8, 2, 6)
    assert (layout.num_routed, layout.num_routed_active, layout.active_share) == (6, 4, 0.75)
    assert not layout.is_static
    assert Layout(8, 6, 6).is_static
    assert not Layout(8, 0, 8).is_static


def test_expert_width_and_its_hint() -> None:
    assert Layout(8, 0, 4).expert_width(64) == 8
    with pytest.raises(InputError, match="64 neurons do not divide into 7 experts") as caught:
        Layout(7, 0, 4).expert_width(64)
    counts = [int(word.strip(",")) for word in caught.value.hint.split() if word.strip(",").isdigit()]
    assert counts
    assert all(Layout(count, 0, 1).expert_width(64) * count == 64 for count in counts)
    assert Layout(7, 0, 4).expert_width(7) == 1
    with pytest.raises(InputError) as caught:
        # A prime beyond every count that is tried: no hint is better than a wrong one.
        Layout(8, 0, 4).expert_width(1009)
    assert caught.value.hint == ""


@pytest.mark.parametrize(
    ("experts", "shared", "active", "holds_shared", "expected"),
    [
        (8, None, None, True, (8, 2, 6)),
        (8, None, None, False, (8, 0, 6)),
        (2, None, None, True, (2, 0, 1)),
        (3, None, None, True, (3, 1, 2)),
        (4, None, None, True, (4, 1, 3)),
        (5, None, None, True, (5, 1, 3)),
        (16, None, None, True, (16, 3, 12)),
        (32, None, None, True, (32, 6, 24)),
        (128, None, None, True, (128, 24, 96)),
        (12, None, None, True, (12, 3, 9)),
        (8, None, 4, True, (8, 1, 4)),
        (8, None, 1, True, (8, 0, 1)),
        (8, None, 8, True, (8, 2, 8)),
        (8, 1, None, True, (8, 1, 6)),
        (8, 0, None, True, (8, 0, 6)),
        (8, 2, 4, True, (8, 2, 4)),
        # What was asked for is not silently changed: the target refuses it.
        (8, 2, 4, False, (8, 2, 4)),
    ],
)
def test_what_is_open_is_filled_in(
    experts: int, shared: int | None, active: int | None, holds_shared: bool, expected: tuple[int, int, int]
) -> None:
    assert resolve_layout(experts, shared, active, holds_shared=holds_shared) == Layout(*expected)


def test_a_layer_may_have_no_active_experts_but_not_every_one() -> None:
    assert Layout(8, 0, 0).is_empty
    with pytest.raises(UsageError, match="0 active of 8 experts") as caught:
        resolve_layout(8, 0, 0, holds_shared=True)
    assert caught.value.hint == "--active takes 1 to 8"


@pytest.mark.parametrize("experts", range(2, 130))
def test_defaults_share_a_quarter_of_the_active_experts_rounded_up(experts: int) -> None:
    layout = resolve_layout(experts, None, None, holds_shared=True)
    assert layout.num_active == max(1, experts * 3 // 4)
    assert layout.num_routed_active >= 1
    if layout.num_active > 1:
        assert 4 * (layout.num_shared - 1) < layout.num_active <= 4 * layout.num_shared
    else:
        assert layout.num_shared == 0


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("layout", {"num_experts": 4.0, "num_shared": 0, "num_active": 2, "dense_layers": []}),
        ("layout", {"num_experts": 4, "num_shared": True, "num_active": 2, "dense_layers": []}),
        ("layout", {"num_experts": 4, "num_shared": 0, "num_active": 2, "dense_layers": ["0"]}),
        *((key, value) for key in HEADER_TYPES for value in (None, 7, [])),
    ],
)
def test_a_header_of_other_types_is_refused(key: str, value: Any, tmp_path: Path) -> None:
    with_dense_layers().save(tmp_path / "plan")
    with safe_open(tmp_path / "plan", framework="pt") as reader:
        tensors = {name: reader.get_tensor(name) for name in reader.keys()}  # noqa: SIM118
        header = {**json.loads(reader.metadata()["moeify"]), key: value}
    save_file(tensors, tmp_path / "plan", metadata={"moeify": json.dumps(header)})
    with pytest.raises(InputError, match="is not a complete split plan"):
        load_plan(tmp_path / "plan")


def test_dense_layers_count_in_full() -> None:
    layout = Layout(8, 2, 6, (0, 3))
    assert layout.active_share == 0.75
    assert layout.model_share(4) == 0.5 + 0.5 * 0.75
    assert Layout(8, 2, 6).model_share(4) == 0.75
    assert resolve_layout(8, None, None, holds_shared=True, layers=LayerChoice(dense=(0, 3))) == layout


def with_dense_layers() -> SplitPlan:
    """Three layers, the first and the last of them whole."""
    plan = make_plan(Layout(4, 2, 3, (0, 2)), num_layers=3)
    first, last = (LayerPlan(i, torch.full((8,), SHARED, dtype=torch.int16), None) for i in (0, 2))
    return replace(plan, layers=(first, plan.layers[1], last))


def test_a_plan_with_dense_layers_comes_back(tmp_path: Path) -> None:
    plan = with_dense_layers()
    plan.save(tmp_path / PLAN_FILE)
    found = load_plan(tmp_path)
    assert found.layout == plan.layout
    assert found.layout.dense_layers == (0, 2)
    assert [layer.router_RD is None for layer in found.layers] == [True, False, True]
    assert all(torch.equal(a.labels_F, b.labels_F) for a, b in zip(plan.layers, found.layers, strict=True))


def test_a_plan_from_before_there_were_dense_layers_is_read(tmp_path: Path) -> None:
    make_plan().save(tmp_path / "plan")
    header = header_of(tmp_path / "plan")
    del header["layout"]["dense_layers"]
    rewrite(tmp_path / "plan", load_file(tmp_path / "plan"), header)
    assert load_plan(tmp_path / "plan").layout == Layout(4, 2, 3)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"layers.0.labels": torch.tensor([-1] * 7 + [0], dtype=torch.int16)}, "layer 0 of the plan is dense, but"),
        ({"layers.2.router": torch.zeros(2, 6)}, "layer 2 of the plan has 2 router rows, expected 0"),
        ({"layers.1.labels": torch.full((8,), SHARED, dtype=torch.int16)}, "layer 1 of the plan has neuron counts"),
    ],
)
def test_a_dense_layer_that_is_cut_or_a_cut_one_that_is_dense_is_refused(
    changed: dict[str, torch.Tensor], message: str, tmp_path: Path
) -> None:
    with_dense_layers().save(tmp_path / "plan")
    rewrite(tmp_path / "plan", load_file(tmp_path / "plan") | changed, header_of(tmp_path / "plan"))
    with pytest.raises(InputError, match=message):
        load_plan(tmp_path / "plan")


def test_a_plan_comes_back_from_its_file_and_from_its_folder(tmp_path: Path) -> None:
    plan = make_plan()
    plan.save(tmp_path / PLAN_FILE)
    for path in (tmp_path, tmp_path / PLAN_FILE):
        found = load_plan(path)
        assert found.layout == plan.layout
        for name in ("source", "family", "target", "options", "calibration", "version"):
            assert getattr(found, name) == getattr(plan, name)
        for before, after in zip(plan.layers, found.layers, strict=True):
            assert torch.equal(after.labels_F, before.labels_F)
            assert after.labels_F.dtype == torch.int16
            assert before.router_RD is not None
            assert after.router_RD is not None
            assert after.router_RD.dtype == torch.bfloat16
            assert torch.equal(after.router_RD, before.router_RD)
            assert after.diagnostics == before.diagnostics
            assert after.layer == before.layer


def test_the_same_plan_is_the_same_file(tmp_path: Path) -> None:
    make_plan().save(tmp_path / "a")
    make_plan().save(tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_refit_columns_stay_out_of_the_file(tmp_path: Path) -> None:
    plan = make_plan()
    plan = replace(plan, layers=tuple(replace(layer, down_DF=torch.ones(6, 8)) for layer in plan.layers))
    plan.save(tmp_path / "plan")
    assert sorted(load_file(tmp_path / "plan")) == [
        f"layers.{i}.{kind}" for i in (0, 1) for kind in ("labels", "router")
    ]
    assert load_plan(tmp_path / "plan").layers[0].down_DF is None
    foreign = {**load_file(tmp_path / "plan"), "layers.0.down": torch.ones(6, 8)}
    rewrite(tmp_path / "foreign", foreign, header_of(tmp_path / "plan"))
    assert load_plan(tmp_path / "foreign").layers[0].down_DF is None


def test_a_static_plan_has_no_routers(tmp_path: Path) -> None:
    make_plan(Layout(4, 3, 3)).save(tmp_path / "plan")
    found = load_plan(tmp_path / "plan")
    assert found.layout.is_static
    assert [layer.router_RD for layer in found.layers] == [None, None]


def test_more_than_ten_layers_keep_their_order(tmp_path: Path) -> None:
    plan = make_plan(num_layers=12)
    plan.save(tmp_path / "plan")
    found = load_plan(tmp_path / "plan")
    assert [layer.layer for layer in found.layers] == list(range(12))
    assert all(torch.equal(a.labels_F, b.labels_F) for a, b in zip(plan.layers, found.layers, strict=True))


def test_neurons_are_ascending_and_cover_the_ffn() -> None:
    layer = make_plan().layers[0]
    parts = [layer.neurons(expert) for expert in (SHARED, 0, 1)]
    assert all(part.tolist() == sorted(part.tolist()) for part in parts)
    assert sorted(torch.cat(parts).tolist()) == list(range(8))


@pytest.mark.parametrize(
    "labels",
    [
        [-1, -1, -1, -1, 0, 0, 0, 1],
        [-1, -1, -1, -1, 0, 0, 2, 2],
        [-1, -1, -1, 0, 0, 0, 1, 1],
        [0, 0, 1, 1, 0, 0, 1, 1],
        [-1, -1, -1, -1, 0, 0, 1, 999],
    ],
)
def test_labels_that_do_not_match_the_layout_are_refused(labels: list[int]) -> None:
    with pytest.raises(InputError, match="layer 3 of the plan has neuron counts"):
        LayerPlan(3, torch.tensor(labels, dtype=torch.int16), None).check(Layout(4, 2, 3))


def test_labels_that_do_not_divide_are_refused() -> None:
    with pytest.raises(InputError, match="7 neurons do not divide"):
        LayerPlan(0, torch.zeros(7, dtype=torch.int16), None).check(Layout(4, 2, 3))


def test_a_missing_plan_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=PLAN_FILE) as caught:
        load_plan(tmp_path)
    assert PLAN_FILE in caught.value.hint
    with pytest.raises(InputError, match="nowhere"):
        load_plan(tmp_path / "nowhere")


def test_files_that_are_no_plans_are_refused(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("not a plan, but long enough to look like one")
    (tmp_path / "empty").write_bytes(b"")
    save_file({"weight": torch.zeros(2)}, tmp_path / "weights")
    save_file({"weight": torch.zeros(2)}, tmp_path / "pt", metadata={"format": "pt"})
    rewrite(tmp_path / "json", {"weight": torch.zeros(2)}, "{not json")
    for name in ("text", "empty", "weights", "pt", "json"):
        with pytest.raises(InputError, match=name):
            load_plan(tmp_path / name)


def test_a_truncated_plan_is_refused(tmp_path: Path) -> None:
    make_plan().save(tmp_path / "plan")
    whole = (tmp_path / "plan").read_bytes()
    for length in (4, 100, len(whole) // 2, len(whole) - 1):
        (tmp_path / "cut").write_bytes(whole[:length])
        with pytest.raises(InputError, match="cut"):
            load_plan(tmp_path / "cut")


def test_another_schema_is_named(tmp_path: Path) -> None:
    make_plan().save(tmp_path / "plan")
    header = header_of(tmp_path / "plan") | {"schema": "moeify.plan/99"}
    rewrite(tmp_path / "plan", load_file(tmp_path / "plan"), header)
    with pytest.raises(InputError, match=r"moeify\.plan/99.*expected.*moeify\.plan/2"):
        load_plan(tmp_path / "plan")


def test_a_plan_without_a_layers_labels_is_refused(tmp_path: Path) -> None:
    make_plan().save(tmp_path / "plan")
    tensors = load_file(tmp_path / "plan")
    del tensors["layers.1.labels"]
    rewrite(tmp_path / "plan", tensors, header_of(tmp_path / "plan"))
    with pytest.raises(InputError, match=r"layers\.1\.labels"):
        load_plan(tmp_path / "plan")


def test_a_plan_whose_labels_do_not_fit_is_refused(tmp_path: Path) -> None:
    make_plan().save(tmp_path / "plan")
    tensors = load_file(tmp_path / "plan")
    labels = tensors["layers.1.labels"]
    labels[int((labels == 0).nonzero()[0])] = 1
    rewrite(tmp_path / "plan", tensors, header_of(tmp_path / "plan"))
    with pytest.raises(InputError, match="layer 1 of the plan has neuron counts"):
        load_plan(tmp_path / "plan")


BROKEN_HEADERS: dict[str, Any] = {
    "no layout": lambda header: header.pop("layout"),
    "no target": lambda header: header.pop("target"),
    "no diagnostics": lambda header: header.pop("diagnostics"),
    "unknown layout key": lambda header: header["layout"].update(depth=3),
    "impossible layout": lambda header: header["layout"].update(num_active=9),
    "layout is a list": lambda header: header.update(layout=[4, 2, 3]),
}


@pytest.mark.parametrize("damage", BROKEN_HEADERS)
def test_a_plan_with_a_damaged_header_is_refused(damage: str, tmp_path: Path) -> None:
    make_plan().save(tmp_path / "plan")
    header = header_of(tmp_path / "plan")
    BROKEN_HEADERS[damage](header)
    rewrite(tmp_path / "plan", load_file(tmp_path / "plan"), header)
    with pytest.raises(InputError, match="plan"):
        load_plan(tmp_path / "plan")


BROKEN_TENSORS: dict[str, Any] = {
    "label below shared": lambda tensors: tensors["layers.0.labels"].fill_(-2),
    "labels as floats": lambda tensors: tensors.update({"layers.0.labels": tensors["layers.0.labels"].float() + 0.5}),
    "labels as a matrix": lambda tensors: tensors.update({"layers.0.labels": tensors["layers.0.labels"].view(2, 4)}),
    "no router": lambda tensors: tensors.pop("layers.0.router"),
    "router of another layout": lambda tensors: tensors.update({"layers.0.router": torch.zeros(3, 6)}),
    "router with NaN": lambda tensors: tensors["layers.0.router"].fill_(torch.nan),
}


@pytest.mark.parametrize("damage", BROKEN_TENSORS)
def test_a_plan_with_damaged_tensors_is_refused(damage: str, tmp_path: Path) -> None:
    make_plan().save(tmp_path / "plan")
    tensors = load_file(tmp_path / "plan")
    BROKEN_TENSORS[damage](tensors)
    rewrite(tmp_path / "plan", tensors, header_of(tmp_path / "plan"))
    with pytest.raises(MoeifyError, match="layer 0"):
        load_plan(tmp_path / "plan")


def test_layouts_are_stored_by_name(tmp_path: Path) -> None:
    make_plan().save(tmp_path / "plan")
    assert header_of(tmp_path / "plan")["layout"] == json.loads(json.dumps(asdict(Layout(4, 2, 3))))


def test_a_plan_that_does_not_say_its_scale_has_the_old_one(tmp_path: Path) -> None:
    for number, (mixing, expected) in enumerate({"hard": 2.0**-10, "softmax": 0.5}.items()):
        file = tmp_path / f"{number}.safetensors"
        made = make_plan(options=SplitOptions(experts=4, mixing=mixing, temperature=2.0))
        made.save(file)
        assert load_plan(file).router_scale == made.router_scale == 2.0**-6
        header = header_of(file)
        del header["router_scale"]
        rewrite(file, load_file(file), header)
        assert load_plan(file).router_scale == expected


@pytest.mark.parametrize("scale", [0.0, -1.0, float("inf"), float("nan"), "1", None, True])
def test_a_plan_with_an_impossible_scale_is_refused(scale: Any, tmp_path: Path) -> None:
    make_plan().save(tmp_path / "plan.safetensors")
    header = {**header_of(tmp_path / "plan.safetensors"), "router_scale": scale}
    rewrite(tmp_path / "plan.safetensors", load_file(tmp_path / "plan.safetensors"), header)
    with pytest.raises(InputError, match="router_scale"):
        load_plan(tmp_path / "plan.safetensors")


def test_layers_are_joined_to_the_layout_that_has_them() -> None:
    routed, static, whole = Layout(8, 1, 4), Layout(8, 6, 6), Layout(8, 8, 8)
    for layers in (
        [routed, routed, whole],
        [routed, static, whole, Layout(8, 1, 3)],
        [static, static, whole],
        [Layout(8, 2, 4), Layout(4, 1, 2), Layout(8, 0, 0), whole],
        [Layout(8, 2, 4, min_active=3, max_active=8), Layout(8, 2, 5, min_active=3, max_active=8), static],
    ):
        layout = Layout.joined(layers)
        assert [layout.of_layer(number) for number in range(len(layers))] == [
            replace(layer, dense_layers=layout.dense_layers) if layout.of_layer(number) is layout else layer
            for number, layer in enumerate(layers)
        ]
        assert layout.model_share(len(layers)) == pytest.approx(
            sum(layer.num_active / layer.num_experts for layer in layers) / len(layers)
        )
    gone = Layout.joined([routed, None, static])
    assert gone.among([0, 2]) == Layout.joined([routed, static])
