"""The whole road on tiny models: what is written, that it is the same every time, and that it is what was asked for."""

import hashlib
import importlib
import json
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MakeDense
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from moeify import routers
from moeify.cli.tables.split import split_table
from moeify.convert.pipeline import SplitResult, split
from moeify.convert.prepare import prepare
from moeify.convert.preview import preview
from moeify.convert.texts import calibration_text
from moeify.errors import MoeifyWarning, UsageError
from moeify.export import writer
from moeify.layout import Layout
from moeify.models.dense import DenseModel, open_dense
from moeify.options import SplitOptions
from moeify.plan import SHARED, load_plan
from moeify.targets import ROUTER_SCALE
from moeify.version import __version__

# The package binds the name to the function.
prepare_module = importlib.import_module("moeify.convert.prepare")

LAYERS, HIDDEN, NEURONS, CONTEXT = 3, 32, 128, 64
SIZES: dict[str, Any] = {
    "num_hidden_layers": LAYERS,
    "hidden_size": HIDDEN,
    "intermediate_size": NEURONS,
    "max_position_embeddings": CONTEXT,
}
INDEX = "model.safetensors.index.json"

Run = Callable[..., SplitResult]


def tree(folder: Path) -> dict[str, str]:
    """sha256 of every file below a folder, by name."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def weights(folder: Path) -> dict[str, Tensor]:
    """Every tensor that the index lists."""
    weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
    loaded = {file: load_file(folder / file) for file in set(weight_map.values())}
    assert {name for tensors in loaded.values() for name in tensors} == set(weight_map)
    return {name: loaded[file][name] for name, file in weight_map.items()}


@pytest.fixture(scope="module")
def dense(make_dense: MakeDense) -> Path:
    return make_dense("llama", **SIZES)


@pytest.fixture(scope="module")
def run(dense: Path, calibration_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """run(model=the llama, out=a new folder, **options): a small split."""

    def convert(model: Path | None = None, out: Path | None = None, **changed: Any) -> SplitResult:
        options = {"calibration": (str(calibration_file),), "tokens": 1024, **changed}
        out = out or tmp_path_factory.mktemp("split") / "out"
        return split(str(model or dense), out, SplitOptions(**options))

    return convert


@pytest.fixture(scope="module")
def plain(run: Run) -> SplitResult:
    """A split with nothing but the defaults."""
    return run()


@torch.no_grad()
def logits(folder: Path) -> Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    found: Tensor = model(torch.arange(4, 4 + 2 * 48).view(2, 48)).logits
    return found


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"partition": "kmeans", "experts": 4, "seed": 3},
        {"partition": "random", "target": "mixtral"},
        {"static": True},
        {"refit": False, "dtype": "bfloat16"},
        {"calibration": ("self",)},
    ],
)
def test_the_same_split_gives_the_same_folder(run: Run, options: dict[str, Any]) -> None:
    """Every file, bit for bit, whatever the random state was before."""
    first = run(**options)
    torch.manual_seed(torch.seed())
    torch.rand(7)
    assert tree(run(**options).out) == tree(first.out)


def test_the_callers_random_state_stays_as_it_is(run: Run) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    run()
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("options", [{}, {"partition": "kmeans"}, {"partition": "random"}])
def test_another_seed_gives_another_split(run: Run, options: dict[str, Any]) -> None:
    first, second = (run(**options, seed=seed).plan for seed in (0, 1))
    assert first.calibration["sha256"] != second.calibration["sha256"]
    assert any(not torch.equal(a.labels_F, b.labels_F) for a, b in zip(first.layers, second.layers, strict=True))


@pytest.mark.parametrize("options", [{}, {"experts": 4, "shared": 1, "active": 2}, {"target": "mixtral"}])
def test_a_saved_plan_gives_the_same_checkpoint(
    run: Run, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the folder or the file; with the same text also the refit columns come out the same."""
    first = run(**options)
    rest = {key: value for key, value in options.items() if key == "target"}
    monkeypatch.setattr(prepare_module.partition, "find", lambda _: None)
    monkeypatch.setattr(prepare_module.routers, "find", lambda _: None)
    for plan in (first.out, first.out / "split_plan.safetensors"):
        again = run(**rest, plan=str(plan))
        found, expected = tree(again.out), tree(first.out)
        # The record, the card and the plan's header name the plan that was used.
        named = {"README.md", "moeify.json", "split_plan.safetensors"}
        assert {name for name in expected if found[name] != expected[name]} <= named
        assert again.layout == first.layout
        for layer, other in zip(load_plan(again.out).layers, load_plan(first.out).layers, strict=True):
            assert torch.equal(layer.labels_F, other.labels_F)
            assert layer.router_RD is not None
            assert other.router_RD is not None
            assert torch.equal(layer.router_RD, other.router_RD)


def test_a_saved_plan_without_refit_needs_no_text(run: Run) -> None:
    first = run(refit=False)
    again = run(refit=False, plan=str(first.out), calibration=("/no/such/text",))
    assert all(torch.equal(tensor, weights(first.out)[name]) for name, tensor in weights(again.out).items())
    # Its routers saw the first text, and nothing was measured of this checkpoint.
    assert again.plan.options.calibration == first.plan.options.calibration
    assert again.plan.calibration == first.plan.calibration
    assert first.plan.layers[0].diagnostics
    assert not any(layer.diagnostics for layer in again.plan.layers)
    values = list(split_table(again).columns[1].cells)
    assert values[-1] == "not measured: the plan was taken over, and no text was read"


@pytest.mark.parametrize("refit", [True, False])
def test_a_saved_plan_in_another_type(run: Run, plain: SplitResult, refit: bool) -> None:
    """The router comes from the plan, whose type is that of the first split."""
    again = run(plan=str(plain.out), dtype="bfloat16", refit=refit)
    assert {tensor.dtype for tensor in weights(again.out).values()} == {torch.bfloat16}


def test_static_with_all_slices_is_the_dense_model(dense: Path, run: Run) -> None:
    with pytest.warns(MoeifyWarning, match="8 of 8 experts are active for every token, which saves nothing"):
        result = run(static=True, active=8, refit=False)
    assert result.target == "llama"
    assert torch.equal(logits(result.out), logits(dense))
    assert result.num_parameters == open_dense(str(dense)).num_parameters


def test_static_prunes_whatever_the_gate(run: Run) -> None:
    """A recipe's control has the mixing of the split it is compared with."""
    assert run(static=True, mixing="soft").layout == Layout(8, 6, 6)


def test_static_with_all_slices_is_close_to_the_dense_model_after_a_refit(dense: Path, run: Run) -> None:
    with pytest.warns(MoeifyWarning, match="saves nothing"):
        result = run(static=True, active=8)
    assert torch.allclose(logits(result.out), logits(dense), atol=1e-3)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_static_writes_a_smaller_dense_model_of_the_same_family(make_dense: MakeDense, run: Run, family: str) -> None:
    result = run(make_dense(family, **SIZES), static=True, active=5)
    model, info = AutoModelForCausalLM.from_pretrained(result.out, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.config.model_type == family == result.target
    assert model.config.intermediate_size == NEURONS * 5 // 8
    assert model.num_parameters() == result.num_parameters == result.num_active_parameters
    # It depends on what was kept, and comes closer than with other neurons missing.
    assert result.layout == Layout(8, 5, 5)
    kept = [layer.neurons(SHARED) for layer in result.plan.layers]
    assert all(len(neurons) == NEURONS * 5 // 8 for neurons in kept)


@pytest.mark.parametrize("static", [False, True])
def test_without_refit_every_dense_number_is_kept(dense: Path, run: Run, static: bool) -> None:
    """Mixing and up rows always, down columns bit for bit times the target's fold; with a refit only down changes."""
    source = open_dense(str(dense))
    for refit in (False, True):
        result = run(static=static, refit=refit)
        written, layout = weights(result.out), result.layout
        for layer in result.plan.layers:
            ffn = source.ffn(layer.layer)
            prefix = f"model.layers.{layer.layer}"
            shared = layer.neurons(SHARED)
            if static:
                names = source.ffn_names(layer.layer)
                gates, ups, downs = ([written[name]] for name in names)
            else:
                inner = written[f"{prefix}.block_sparse_moe.input_linear.weight"]
                outer = written[f"{prefix}.block_sparse_moe.output_linear.weight"] / layout.num_routed_active
                shared_gate, shared_up = written[f"{prefix}.shared_mlp.input_linear.weight"].chunk(2)
                gates = [shared_gate, *(part.chunk(2)[0] for part in inner)]
                ups = [shared_up, *(part.chunk(2)[1] for part in inner)]
                downs = [written[f"{prefix}.shared_mlp.output_linear.weight"], *outer]
            owners = [shared] if static else [shared, *(layer.neurons(i) for i in range(layout.num_routed))]
            same = []
            for gate, up, down, neurons in zip(gates, ups, downs, owners, strict=True):
                assert torch.equal(gate, ffn.directions_FD[neurons])
                assert torch.equal(up, ffn.up_FD[neurons])
                same.append(torch.equal(down, ffn.down_DF[:, neurons]))
            assert all(same) is not refit
            assert any(same) is not refit


def test_everything_else_is_copied_bit_for_bit(dense: Path, plain: SplitResult) -> None:
    written = weights(plain.out)
    copied = {name: tensor for name, tensor in load_file(dense / "model.safetensors").items() if ".mlp." not in name}
    assert len(copied) == 2 + 6 * LAYERS
    assert all(torch.equal(written[name], tensor) for name, tensor in copied.items())
    routers = [written[f"model.layers.{i}.block_sparse_moe.router.layer.weight"] for i in range(LAYERS)]
    for router, layer in zip(routers, plain.plan.layers, strict=True):
        assert layer.router_RD is not None
        assert torch.equal(router, layer.router_RD * ROUTER_SCALE)


@pytest.mark.parametrize(
    ("stored", "asked", "expected"),
    [
        ("float32", "auto", torch.float32),
        ("bfloat16", "auto", torch.bfloat16),
        ("float16", "auto", torch.float16),
        ("float32", "bfloat16", torch.bfloat16),
        ("float32", "float16", torch.float16),
        ("bfloat16", "float32", torch.float32),
    ],
)
@pytest.mark.parametrize("static", [False, True])
def test_type_of_the_result(
    make_dense: MakeDense, run: Run, stored: str, asked: str, expected: torch.dtype, static: bool
) -> None:
    result = run(make_dense("llama", dtype=stored, **SIZES), dtype=asked, static=static)
    assert {tensor.dtype for tensor in weights(result.out).values()} == {expected}
    model = AutoModelForCausalLM.from_pretrained(result.out)
    assert model.dtype == model.config.dtype == expected


def test_several_shards_hold_what_one_holds(run: Run, plain: SplitResult, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "SHARD_BYTES", 20_000)
    result = run()
    shards = sorted(path.name for path in result.out.glob("model-*.safetensors"))
    assert len(shards) > LAYERS
    assert shards == [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    one, several = weights(plain.out), weights(result.out)
    assert one.keys() == several.keys()
    assert all(torch.equal(one[name], several[name]) for name in one)
    index = json.loads((result.out / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in several.values())
    assert set(index["weight_map"].values()) == set(shards)
    assert torch.equal(logits(result.out), logits(plain.out))
    # The record names the shards.
    others = {name for name in tree(plain.out) if not name.startswith("model") and name != "moeify.json"}
    assert all(tree(plain.out)[name] == tree(result.out)[name] for name in others)


def test_a_single_shard_has_a_number_and_an_index(plain: SplitResult) -> None:
    """Else vLLM would load the plan as weights."""
    assert sorted(path.name for path in plain.out.glob("*.safetensors")) == [
        "model-00001-of-00001.safetensors",
        "split_plan.safetensors",
    ]
    assert set(json.loads((plain.out / INDEX).read_text())["weight_map"].values()) == {
        "model-00001-of-00001.safetensors"
    }


def test_shards_say_what_they_are(plain: SplitResult) -> None:
    """transformers refuses a file without this."""
    with safe_open(plain.out / "model-00001-of-00001.safetensors", framework="pt") as reader:
        assert reader.metadata() == {"format": "pt"}


def test_calibration_on_the_models_own_text(run: Run) -> None:
    result = run(calibration=("self",))
    assert result.plan.calibration["source"] == "self"
    assert result.plan.calibration["num_tokens"] == 1024


def test_calibration_on_a_mixture(run: Run, calibration_file: Path) -> None:
    sources = (str(calibration_file), "builtin", "self")
    result = run(calibration=sources)
    assert result.plan.calibration["source"] == " + ".join(sources)
    assert result.plan.calibration["num_tokens"] == 1024
    assert result.plan.options.calibration == sources
    digests = {run(calibration=(source,)).plan.calibration["sha256"] for source in sources}
    assert len({*digests, result.plan.calibration["sha256"]}) == 4


def test_tokens_are_cut_to_whole_blocks(run: Run) -> None:
    result = run(tokens=1100, context=48)
    assert result.plan.calibration["num_tokens"] == 1100 // 48 * 48
    assert result.plan.calibration["context"] == 48


def test_the_plan_holds_what_was_decided(dense: Path, plain: SplitResult) -> None:
    plan = load_plan(plain.out)
    assert plan.layout == plain.layout == Layout(8, 2, 6)
    assert (plan.source, plan.family, plan.target, plan.version) == (str(dense), "llama", plain.target, __version__)
    assert plan.options == plain.plan.options
    assert [layer.layer for layer in plan.layers] == list(range(LAYERS))
    for layer in plan.layers:
        assert layer.labels_F.dtype == torch.int16
        assert layer.labels_F.shape == (NEURONS,)
        assert {"error_without_refit", "error_with_refit", "router_energy_of_oracle"} <= layer.diagnostics.keys()
        assert layer.diagnostics["error_with_refit"] < layer.diagnostics["error_without_refit"] < 1
        assert 0 < layer.diagnostics["router_energy_of_oracle"] <= 1 + 1e-6


def test_the_record_says_how_to_make_it_again(dense: Path, plain: SplitResult, calibration_file: Path) -> None:
    record = json.loads((plain.out / "moeify.json").read_text())
    assert record["schema"] == "moeify.record/1"
    assert record["parameters"] == plain.num_parameters
    assert record["active_parameters"] == plain.num_active_parameters
    job = record["job"]
    assert job["model"] == open_dense(str(dense)).fingerprint()
    assert job["calibration"]["sha256"] == plain.plan.calibration["sha256"]
    assert job["versions"] == {
        "moeify": __version__,
        "torch": torch.__version__,
        "transformers": importlib.import_module("transformers").__version__,
    }
    # Nothing is left open: not what was chosen, not what a default was at the time.
    options = SplitOptions(**{k: tuple(v) if isinstance(v, list) else v for k, v in job["options"].items()})
    assert options == SplitOptions(
        experts=8,
        shared=2,
        active=6,
        target="granitemoeshared",
        calibration=(str(calibration_file),),
        tokens=1024,
        context=CONTEXT,
    )


def test_the_card_says_what_it_is_and_how_to_make_it_again(
    dense: Path, run: Run, plain: SplitResult, calibration_file: Path
) -> None:
    from moeify.cli.app import app

    card = (plain.out / "README.md").read_text()
    # A local folder is no address on the hub.
    assert "base_model" not in card
    assert f"`{dense}`" in card
    assert "`GraniteMoeSharedForCausalLM`" in card
    assert f"{plain.num_parameters:,} parameters, {plain.num_active_parameters:,} of them used for a token" in card
    assert "2 always run, 4 of the other 6 are chosen for each token" in card
    assert plain.plan.calibration["sha256"] in card
    line = next(line for line in card.splitlines() if line.startswith("moeify split"))
    arguments = line.replace("-o OUT", f"-o {plain.out.with_name('again')} --quiet").split()[1:]
    app(args=arguments, standalone_mode=False)
    assert tree(plain.out.with_name("again")) == tree(plain.out)


@pytest.mark.parametrize(
    "options",
    [
        {"static": True, "active": 5, "seed": 3},
        {"refit": False, "dtype": "bfloat16", "partition": "kmeans", "experts": 4},
        {"target": "mixtral", "context": 48},
        {"calibration": ("builtin", "self"), "tokens": 2048},
        {"mixing": "softmax", "temperature": 0.5, "fusion": "mean"},
        {"target": "qwen2_moe", "dense_layers": (2, 0), "refit_to": "stream"},
    ],
)
def test_the_command_on_the_card_makes_the_same_folder(run: Run, options: dict[str, Any]) -> None:
    from moeify.cli.app import app

    result = run(**options)
    card = (result.out / "README.md").read_text()
    line = next(line for line in card.splitlines() if line.startswith("moeify split"))
    app(args=line.replace("-o OUT", f"-o {result.out.with_name('again')} --quiet").split()[1:], standalone_mode=False)
    found, expected = tree(result.out.with_name("again")), tree(result.out)
    assert {name for name in expected if found[name] != expected[name]} == set()


def test_what_stands_beside_the_weights_is_copied(dense: Path, plain: SplitResult, run: Run, tmp_path: Path) -> None:
    for name in ("tokenizer.json", "generation_config.json"):
        assert (plain.out / name).read_bytes() == (dense / name).read_bytes()
    assert AutoTokenizer.from_pretrained(plain.out)("some text") == AutoTokenizer.from_pretrained(dense)("some text")
    bare = Path(shutil.copytree(dense, tmp_path / "bare"))
    (bare / "generation_config.json").unlink()
    (bare / "chat_template.jinja").write_text("{{ messages }}")
    (bare / "README.md").write_text("the dense model's own card")
    out = run(bare).out
    assert json.loads((out / "generation_config.json").read_text())["eos_token_id"] == 1
    assert (out / "chat_template.jinja").read_text() == "{{ messages }}"
    assert "own card" not in (out / "README.md").read_text()


TARGETS = [
    ("llama", "granitemoeshared", {}),
    ("llama", "granitemoeshared", {"tie_word_embeddings": False}),
    ("llama", "mixtral", {}),
    ("llama", "qwen2_moe", {}),
    ("llama", "glm4_moe", {"tie_word_embeddings": False}),
    ("qwen2", "qwen2_moe", {}),
    ("qwen3", "qwen3_moe", {}),
]


@pytest.mark.parametrize(("family", "target", "changed"), TARGETS)
@pytest.mark.parametrize("experts", [4, 8])
def test_parameters_are_counted_as_stock_transformers_has_them(
    make_dense: MakeDense, run: Run, family: str, target: str, changed: dict[str, Any], experts: int
) -> None:
    result = run(make_dense(family, **{**SIZES, **changed}), target=target, experts=experts, active=experts // 2)
    model = AutoModelForCausalLM.from_pretrained(result.out)
    layout = result.layout
    total = in_experts = 0
    for name, tensor in weights(result.out).items():
        routed = "experts." in name and "shared_experts." not in name
        routed |= "block_sparse_moe.input_linear" in name or "block_sparse_moe.output_linear" in name
        total += tensor.numel()
        in_experts += tensor.numel() if routed else 0
    active = total - in_experts + in_experts * layout.num_routed_active // layout.num_routed
    if not model.config.tie_word_embeddings:
        # Only looked up, not multiplied with.
        active -= model.get_input_embeddings().weight.numel()
    assert result.num_parameters == total
    assert result.num_active_parameters == active
    parameters = {id(parameter): parameter.numel() for parameter in model.parameters()}
    assert total == sum(parameters.values()) + sum(b.numel() for n, b in model.named_buffers() if "correction" in n)


def test_no_more_than_one_layer_is_read_at_a_time(
    run: Run, plain: SplitResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While splitting: the embedding, then layer after layer. While writing: one tensor, or one layer's FFN."""
    read: list[list[str]] = []
    really_get = DenseModel.get

    def get(self: DenseModel, names: Iterable[str]) -> dict[str, Tensor]:
        read.append(list(names))
        return really_get(self, read[-1])

    with monkeypatch.context() as patch:
        patch.setattr(DenseModel, "get", get)
        patch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("a model was loaded"))
        assert tree(run().out) == tree(plain.out)

    def layers(names: list[str]) -> list[int]:
        return sorted({int(name.split(".")[2]) for name in names if name.startswith("model.layers.")})

    assert read[:2] == [["model.embed_tokens.weight"], ["model.norm.weight"]]
    splitting = [layers(names) for names in read[2 : 2 + 2 * LAYERS]]
    assert splitting == [[layer] for layer in range(LAYERS) for _ in range(2)]
    for names in read[2 + 2 * LAYERS :]:
        assert len(names) == 1 or (len(layers(names)) == 1 and all(".mlp." in name for name in names)), names


def test_preview_says_what_split_does(dense: Path, run: Run, plain: SplitResult, calibration_file: Path) -> None:
    options = SplitOptions(calibration=(str(calibration_file),), tokens=1024)
    found = preview(str(dense), options)
    assert (found.target, found.target_reason, found.layout) == (plain.target, plain.target_reason, plain.layout)
    assert found.num_parameters == plain.num_parameters
    assert found.num_active_parameters == plain.num_active_parameters
    assert found.expert_width == NEURONS // 8
    assert found.estimate.checkpoint_bytes == sum(tensor.nbytes for tensor in weights(plain.out).values())
    assert found.options == plain.plan.options


def test_more_active_experts_bring_the_result_closer_to_the_dense_model(dense: Path, run: Run) -> None:
    expected = logits(dense)
    errors = [float((logits(run(active=active, shared=2).out) - expected).square().mean()) for active in (3, 5, 7)]
    assert errors == sorted(errors, reverse=True)


def stream_error(dense: Path, result: SplitResult, calibration_file: Path) -> float:
    """Mean squared distance of the residual stream before the last norm on the calibration tokens."""
    options = SplitOptions(calibration=(str(calibration_file),), tokens=1024)
    ids_BC = calibration_text(prepare(open_dense(str(dense)), options)).ids_BC
    seen = []
    for folder in (dense, result.out):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        model.model.norm.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        with torch.no_grad():
            model(ids_BC)
    return float((seen[0] - seen[1]).square().mean())


def test_a_refit_to_the_stream_brings_it_nearer_to_the_dense_one(dense: Path, run: Run, calibration_file: Path) -> None:
    errors = {
        name: stream_error(dense, run(active=4, **options), calibration_file)
        for name, options in {
            "stream": {"refit_to": "stream"},
            "ffn": {"refit_to": "ffn"},
            "none": {"refit": False},
        }.items()
    }
    assert errors["stream"] < 0.95 * errors["ffn"] < errors["none"]


@pytest.mark.parametrize("options", [{"refit_to": "stream"}, {"mixing": "softmax"}, {"partition": "gradient"}])
def test_a_split_that_was_stopped_after_a_layer_gives_the_same_bits(
    run: Run, options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is replayed is what the layers after it were fitted to."""
    expected = tree(run(**options).out)
    split_module = importlib.import_module("moeify.convert.pipeline")
    fitted: list[int] = []
    stops = [KeyboardInterrupt]
    really_fit = split_module.fit_layer

    def fit_or_stop(ffn: Any, *arguments: Any, **named: Any) -> Any:
        if ffn.layer == LAYERS - 1 and stops:
            raise stops.pop()
        fitted.append(ffn.layer)
        return really_fit(ffn, *arguments, **named)

    monkeypatch.setattr(split_module, "fit_layer", fit_or_stop)
    with pytest.raises(KeyboardInterrupt):
        run(out=tmp_path / "out", **options)
    assert tree(run(out=tmp_path / "out", **options).out) == expected
    assert fitted == list(range(LAYERS))


@pytest.mark.parametrize("router", [name for name in routers.names() if not routers.is_linear(name)])
def test_a_router_that_no_stock_target_holds_is_refused_but_can_be_measured(
    router: str, dense: Path, run: Run, tmp_path: Path, calibration_file: Path
) -> None:
    with pytest.raises(UsageError, match=f"no (stock )?target has a {router} router") as caught:
        run(out=tmp_path / "out", router=router)
    assert "moeify compare" in caught.value.hint
    written = caught.value.hint.removeprefix("--router ").split(" can be")[0].split(", ")
    works = routers.is_linear if routers.is_written(router) else routers.is_written
    assert written == [name for name in routers.names() if works(name)]
    assert not list(tmp_path.iterdir())
    options = SplitOptions(router=router, calibration=(str(calibration_file),), tokens=1024)
    assert prepare(open_dense(str(dense)), options, writable=False).fit().router is routers.find(router)
