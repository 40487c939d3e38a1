"""Fine-tuning makes a converted model better, whatever its format, and what comes out is again that format."""

import itertools
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from moeify.check.evaluate import evaluate
from moeify.check.verify import verify
from moeify.convert.pipeline import split
from moeify.errors import CheckError, InputError, UsageError
from moeify.models.files import find_shards
from moeify.options import SplitOptions
from moeify.plan import load_plan
from moeify.training import losses as finetune_losses
from moeify.training import stage as stage_module
from moeify.training.finetune import FinetuneResult, _precision, finetune
from moeify.training.model import Student
from moeify.training.options import FinetuneOptions
from moeify.training.trainer import FinetuneTrainer

Cut = Callable[..., Path]
OPTIONS = FinetuneOptions(
    stage=("full",),
    tokens=16_384,
    context=64,
    batch=8,
    eval_tokens=2048,
    learning_rate=1e-3,
    every=16,
    # Tests compare numbers of different runs, on any machine.
    precision="float32",
)

# Where no figure must have become better.
SHORT = replace(OPTIONS, tokens=4096)


@pytest.fixture(scope="session")
def cut(taught: Path, tmp_path_factory: pytest.TempPathFactory) -> Cut:
    """cut(target, **options) -> a folder that `moeify split` wrote; equal calls give one folder."""
    made: dict[str, Path] = {}

    def make(target: str = "granitemoeshared", **options: Any) -> Path:
        key = repr((target, sorted(options.items())))
        if key not in made:
            values = {"experts": 8, "active": 4, "tokens": 4096, "context": 64, "target": target, **options}
            # What a model writes itself depends on the machine's arithmetic.
            values["calibration"] = ("builtin",)
            if values.get("static"):
                del values["target"]
            made[key] = tmp_path_factory.mktemp("cut") / "moe"
            split(str(taught), made[key], SplitOptions(**values))
        return made[key]

    return make


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: load_file(file)[name] for name, file in find_shards(folder).items()}


def perplexities(*folders: Path) -> list[float]:
    return [row.perplexity for row in evaluate([str(f) for f in folders], tokens=4096, context=64)]


@pytest.mark.parametrize(
    ("target", "stage"),
    [
        # Fused experts, and separate ones with biases for the choice; then what others store in ways of their own.
        *itertools.product(["granitemoeshared", "glm4_moe"], ["layers", "router", "lora", "full"]),
        *itertools.product(["mixtral", "moeify"], ["layers", "lora"]),
        ("qwen2_moe", "layers"),
    ],
)
def test_every_stage_helps_every_target(cut: Cut, taught: Path, tmp_path: Path, target: str, stage: str) -> None:
    moe = cut(target)
    options = replace(OPTIONS, stage=(stage,), learning_rate=3e-3 if stage == "lora" else 1e-3)
    result = finetune(str(moe), str(taught), tmp_path / "out", options)
    figure = "layer_error" if stage == "layers" else "kl"
    assert result.stages[0].after[figure] < result.stages[0].before[figure]
    loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(loaded[1][kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    before, after = perplexities(moe, tmp_path / "out")
    # Routers alone are trained to diverge less, which moves perplexity by a thousandth, up or down by the processor.
    assert after < before * (1.003 if stage == "router" else 1)
    report = verify(str(tmp_path / "out"), str(taught))
    assert report.passed, report.checks
    assert (report.max_logit_difference is not None) == (stage in ("layers", "router"))


def test_verify_finds_a_router_that_is_not_the_plans_and_values_that_are_broken(
    cut: Cut, taught: Path, tmp_path: Path
) -> None:
    finetune(str(cut()), str(taught), tmp_path / "out", SHORT)
    for part, value in (("router.layer.weight", 0.5), ("block_sparse_moe.input_linear.weight", float("nan"))):
        copy = tmp_path / part
        shutil.copytree(tmp_path / "out", copy)
        (file,) = copy.glob("model-*.safetensors")
        stored = load_file(file)
        next(tensor for name, tensor in stored.items() if name.endswith(part)).view(-1)[0] = value
        save_file(stored, file, metadata={"format": "pt"})
        report = verify(str(copy), str(taught))
        assert [check.name for check in report.checks if not check.passed] == ["experts and routers are the plan's"]


def test_what_a_stage_does_not_train_stays_bit_for_bit(cut: Cut, taught: Path, tmp_path: Path) -> None:
    moe = cut()
    before = tensors(moe)
    for stage, changed in {
        "layers": {"router.layer", "block_sparse_moe.output_linear", "shared_mlp.output_linear"},
        "router": {"router.layer"},
    }.items():
        finetune(str(moe), str(taught), tmp_path / stage, replace(SHORT, stage=(stage,)))
        after = tensors(tmp_path / stage)
        assert set(after) == set(before)
        differs = {name for name in before if not torch.equal(before[name], after[name])}
        assert differs
        assert {part for part in changed if any(part in name for name in differs)} == changed
        assert all(any(part in name for part in changed) for name in differs)


def test_routing_moves_and_that_alone_lowers_the_loss(cut: Cut, taught: Path, tmp_path: Path) -> None:
    """Stage `router` changes nothing else, and its gates stay near one: what helps is who is chosen."""
    moe = cut("glm4_moe")
    options = replace(OPTIONS, stage=("router",), tokens=32_768, router_rate=0.03)
    result = finetune(str(moe), str(taught), tmp_path / "out", options)
    assert result.stages[0].after["kl"] < 0.97 * result.stages[0].before["kl"]
    blind = finetune(str(moe), str(taught), tmp_path / "blind", replace(options, explore=0.0))
    # The gradient of chosen experts' weights alone makes routers worse.
    assert blind.stages[0].after["kl"] > result.stages[0].after["kl"]
    ids = torch.randint(3, 500, (4, 64), generator=torch.Generator().manual_seed(0))
    chosen: list[list[set[int]]] = []
    for folder in (moe, tmp_path / "out"):
        student = Student.open(folder, load_plan(folder))
        found: list[set[int]] = []
        weights: list[torch.Tensor] = []

        def note(_: Any, __: Any, output: Any, found: Any = found, weights: Any = weights) -> None:
            found.extend(set(row) for row in output[2].tolist())
            weights.append(output[1])

        for router in student.routers:
            router.register_forward_hook(note)
        with torch.no_grad():
            student.model(ids)
        assert max(float((weight - 1).abs().max()) for weight in weights) < 0.02
        chosen.append(found)
    moved = sum(one != other for one, other in zip(*chosen, strict=True)) / len(chosen[0])
    assert 0.02 < moved < 1


@pytest.mark.parametrize("rate", [None, 0.01])
def test_routers_stay_unless_they_are_trained_and_never_set_the_scale_of_other_gradients(
    cut: Cut, taught: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rate: float | None
) -> None:
    norms: list[float] = []
    make = FinetuneTrainer.create_optimizer

    def watched(trainer: FinetuneTrainer, model: Any = None) -> torch.optim.Optimizer:
        optimizer = make(trainer, model)
        routers = {id(weight) for weight in trainer._student.router_weights()}
        others = [p for group in optimizer.param_groups for p in group["params"] if id(p) not in routers]
        optimizer.register_step_pre_hook(
            lambda *_: norms.append(float(torch.stack([p.grad.norm() for p in others if p.grad is not None]).norm()))
        )
        return optimizer

    monkeypatch.setattr(FinetuneTrainer, "create_optimizer", watched)
    # Of these gradients little would be left beside those of routers that are stored scaled down.
    monkeypatch.setattr(stage_module, "CLIP_NORM", 1e-3)
    moe = cut()
    finetune(str(moe), str(taught), tmp_path / "out", replace(SHORT, router_rate=rate))
    assert norms == pytest.approx([1e-3] * len(norms), rel=1e-2)
    before, after = tensors(moe), tensors(tmp_path / "out")
    routers = [name for name in before if "router" in name]
    assert len(routers) == 2
    assert all(torch.equal(before[name], after[name]) == (rate is None) for name in routers)


def test_a_pruned_control_is_an_ordinary_smaller_dense_model_and_trains_alike(
    cut: Cut, taught: Path, tmp_path: Path
) -> None:
    pruned = cut(static=True)
    config = json.loads((pruned / "config.json").read_text())
    assert (config["model_type"], config["intermediate_size"]) == ("llama", 64)
    for stage in ("full", "lora", "layers"):
        result = finetune(str(pruned), str(taught), tmp_path / stage, replace(OPTIONS, stage=(stage,)))
        figure = "layer_error" if stage == "layers" else "kl"
        assert result.stages[0].after[figure] < result.stages[0].before[figure]
    assert tensors(tmp_path / "full")["model.layers.0.mlp.down_proj.weight"].shape == (64, 64)
    assert load_plan(tmp_path / "full").trained == ("full",)


def test_a_dense_model_can_be_trained_as_a_control(taught: Path, tmp_path: Path) -> None:
    options = replace(OPTIONS, kl=0, lm=1)
    result = finetune(str(taught), str(taught), tmp_path / "out", options)
    assert result.stages[0].before["kl"] < 1e-6 < result.stages[0].after["kl"]
    assert perplexities(tmp_path / "out")[0] > 1
    finetune(str(taught), str(taught), tmp_path / "out", replace(options, tokens=512), overwrite=True)


def test_stages_follow_each_other_and_are_recorded(cut: Cut, taught: Path, tmp_path: Path) -> None:
    options = replace(OPTIONS, stage=("layers", "router", "lora", "full"), tokens=4096)
    result = finetune(str(cut()), str(taught), tmp_path / "out", options)
    assert [stage.stage for stage in result.stages] == list(options.stage)
    for earlier, later in zip(result.stages[1:], result.stages[2:], strict=False):
        assert later.before["kl"] == pytest.approx(earlier.after["kl"], rel=1e-4)
    plan = load_plan(tmp_path / "out")
    assert plan.trained == options.stage
    history = json.loads((tmp_path / "out" / "finetune.json").read_text())
    logged = [entry for entry in history["stages"][3]["history"] if "loss" in entry]
    assert {"kl", "lm", "balance", "load_entropy", "dead_experts"} <= set(logged[-1])
    assert "split" not in (tmp_path / "out" / "README.md").read_text().split("## How")[0]
    with pytest.raises(UsageError, match="was trained already"):
        finetune(str(tmp_path / "out"), str(taught), tmp_path / "more", replace(OPTIONS, stage=("layers",)))


def test_a_bfloat16_checkpoint_stays_one(cut: Cut, taught: Path, tmp_path: Path) -> None:
    moe = cut(dtype="bfloat16")
    finetune(str(moe), str(taught), tmp_path / "out", replace(OPTIONS, stage=("layers", "full")))
    before, after = tensors(moe), tensors(tmp_path / "out")
    assert {name: tensor.dtype for name, tensor in before.items()} == {n: t.dtype for n, t in after.items()}
    assert perplexities(moe, tmp_path / "out")[1] < perplexities(moe)[0]
    assert verify(str(tmp_path / "out"), str(taught)).passed


def test_other_limits_and_dense_layers_are_trained_too(cut: Cut, taught: Path, tmp_path: Path) -> None:
    soft = cut("granitemoeshared", mixing="softmax", temperature=3.0, fusion="mean")
    dense_layer = cut("qwen2_moe", dense_layers=(0,))
    # The text alone would pull the little that a single cut layer changes away from the teacher.
    options = replace(OPTIONS, stage=("layers", "router", "full"), learning_rate=1e-4, lm=0.0)
    for number, moe in enumerate((soft, dense_layer)):
        out = tmp_path / str(number)
        result = finetune(str(moe), str(taught), out, options)
        assert result.stages[-1].after["kl"] < result.stages[1].before["kl"]
        assert verify(str(out), str(taught)).passed


def test_selection_biases_even_out_the_load_without_a_loss(cut: Cut, taught: Path, tmp_path: Path) -> None:
    moe = cut("glm4_moe")
    options = replace(OPTIONS, stage=("router",), router_rate=0.0, z_loss=0.0, tokens=65_536, balance=0.02)
    finetune(str(moe), str(taught), tmp_path / "out", options)
    logged = [e for e in _history(tmp_path / "out") if "load_entropy" in e]
    early, late = (sum(e["load_entropy"] for e in part) / 16 for part in (logged[:16], logged[-16:]))
    assert late > early
    biases = [tensor for name, tensor in tensors(tmp_path / "out").items() if name.endswith("correction_bias")]
    assert all(bias.dtype == torch.float32 and bias.abs().max() > 0 for bias in biases)


def test_the_switch_loss_evens_out_the_load(cut: Cut, taught: Path, tmp_path: Path) -> None:
    entropies = []
    for balance in (0.0, 10.0):
        out = tmp_path / str(balance)
        options = replace(OPTIONS, stage=("router",), balance=balance, tokens=32_768, router_rate=0.03)
        finetune(str(cut()), str(taught), out, options)
        entropies.append([e["load_entropy"] for e in _history(out) if "load_entropy" in e][-1])
    assert entropies[1] > entropies[0]


def test_layer_outputs_can_be_followed_and_activations_recomputed(cut: Cut, taught: Path, tmp_path: Path) -> None:
    plain = finetune(str(cut()), str(taught), tmp_path / "plain", replace(OPTIONS, hidden=1.0))
    again = finetune(str(cut()), str(taught), tmp_path / "again", replace(OPTIONS, hidden=1.0, checkpointing=True))
    logged = [entry["hidden"] for entry in _history(tmp_path / "plain") if "hidden" in entry]
    assert logged[-1] < logged[0]
    assert again.stages[0].after["kl"] == pytest.approx(plain.stages[0].after["kl"], rel=1e-3)


@pytest.mark.parametrize("fast", [False, True])
def test_precision_auto_takes_what_is_fast_here(fast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: fast)
    assert _precision("auto", "cpu") == ("bfloat16" if fast else "float32")
    assert _precision("auto", "cuda") == "bfloat16"
    assert _precision("float32", "cuda") == "float32"


def test_half_precision_arithmetic_trains_full_precision_weights(cut: Cut, taught: Path, tmp_path: Path) -> None:
    for stage in ("full", "lora"):
        options = replace(OPTIONS, stage=(stage,), precision="bfloat16")
        result = finetune(str(cut()), str(taught), tmp_path / stage, options)
        assert result.stages[0].after["kl"] < result.stages[0].before["kl"]
        stored = tensors(tmp_path / stage)
        assert all(tensor.dtype == torch.float32 for tensor in stored.values())
        moved = stored["model.layers.0.self_attn.q_proj.weight"]
        assert not torch.equal(moved, moved.bfloat16().float())


def test_accumulated_batches_are_one_larger_batch(cut: Cut, taught: Path, tmp_path: Path) -> None:
    whole = finetune(str(cut()), str(taught), tmp_path / "whole", replace(SHORT, balance=0.0))
    parts = finetune(str(cut()), str(taught), tmp_path / "parts", replace(SHORT, balance=0.0, batch=2, accumulate=4))
    assert parts.stages[0].after["kl"] == pytest.approx(whole.stages[0].after["kl"], rel=1e-3)


def test_a_kept_teacher_teaches_the_same(cut: Cut, taught: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("MOEIFY_CACHE", str(tmp_path / "cache"))
    live = finetune(str(cut()), str(taught), tmp_path / "live", OPTIONS)
    kept = finetune(str(cut()), str(taught), tmp_path / "kept", replace(OPTIONS, cache_teacher=True, epochs=1))
    assert kept.stages[0].before["kl"] == pytest.approx(live.stages[0].before["kl"], rel=1e-3)
    # A rounding may turn a choice of experts, and the paths part a little from there.
    assert kept.stages[0].after["kl"] == pytest.approx(live.stages[0].after["kl"], rel=0.1)
    files = list((tmp_path / "cache").glob("teacher-*/hidden.npy"))
    assert len(files) == 2
    assert sum(file.stat().st_size for file in files) < 2 * (OPTIONS.tokens + OPTIONS.eval_tokens) * 64 + 1024
    itself = finetune(str(taught), str(taught), tmp_path / "itself", replace(SHORT, cache_teacher=True))
    assert itself.stages[0].before["kl"] < 1e-6


def test_training_stops_early_and_takes_the_best(cut: Cut, taught: Path, tmp_path: Path) -> None:
    options = replace(OPTIONS, learning_rate=0.03, schedule="constant", warmup=0.0, every=2, patience=2, epochs=4)
    result = finetune(str(cut()), str(taught), tmp_path / "out", options)
    evals = [entry["eval_loss"] for entry in _history(tmp_path / "out") if "eval_loss" in entry]
    assert len(evals) < 4 * OPTIONS.tokens // 512 // 2
    assert result.stages[0].after["loss"] == min(evals[1:])


def test_tensorboard_sees_losses_and_load(cut: Cut, taught: Path, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    finetune(str(cut()), str(taught), tmp_path / "out", SHORT)
    events = EventAccumulator(str(tmp_path / "out" / "logs" / "0-full"))
    events.Reload()
    names = set(events.Tags()["scalars"])
    assert {"train/loss", "train/kl", "train/load_entropy", "train/dead_experts", "eval/perplexity"} <= names
    assert len(events.Scalars("train/kl")) == 8


def test_progress_counts_steps(cut: Cut, taught: Path, tmp_path: Path) -> None:
    seen: dict[str, int] = {}

    def track(items: Any, label: str, total: int) -> Any:
        for item in items:
            seen[f"{label} of {total}"] = seen.get(f"{label} of {total}", 0) + 1
            yield item

    finetune(str(cut()), str(taught), tmp_path / "out", replace(SHORT, stage=("layers", "full")), track=track)
    assert seen["training full of 8"] == 8
    assert seen["fitting layers of 2"] == 2


def test_a_loss_that_breaks_names_the_layer_and_keeps_the_last_good_checkpoint(
    cut: Cut, taught: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare, options = Student.prepare, replace(OPTIONS, tokens=6144, every=4)

    def sabotage(student: Student, *arguments: Any) -> Any:
        calls = 0

        def hook(module: Any, inputs: Any, output: Any) -> Any:
            nonlocal calls
            calls += module.training
            return output * float("nan") if calls > 9 else output

        student.model.model.layers[1].self_attn.o_proj.register_forward_hook(hook)
        return prepare(student, *arguments)

    monkeypatch.setattr(Student, "prepare", sabotage)
    with pytest.raises(CheckError, match=r"nan at step 10: layer 1 is the first.*checkpoint-8"):
        finetune(str(cut()), str(taught), tmp_path / "out", options)
    assert not (tmp_path / "out").exists()
    kept = tmp_path / "out.partial" / "work" / "stage-0-full" / "checkpoint-8"
    assert all(tensor.isfinite().all() for tensor in load_file(kept / "trained.safetensors").values())
    monkeypatch.undo()
    finetune(str(cut()), str(taught), tmp_path / "out", options)


def test_a_gradient_that_breaks_is_never_saved(
    cut: Cut, taught: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def infinite(context: Any, *outputs: Any) -> tuple[Any, ...]:
        return (*(None if grad is None else grad * torch.inf for grad in context.grads), *[None] * 5)

    monkeypatch.setattr(finetune_losses._Scored, "backward", staticmethod(infinite))
    with pytest.raises(CheckError, match="NaN or infinite values after step 1; no checkpoint was written yet"):
        finetune(str(cut()), str(taught), tmp_path / "out", replace(OPTIONS, every=1))


def _history(folder: Path) -> list[dict[str, Any]]:
    stages = json.loads((folder / "finetune.json").read_text())["stages"]
    return [entry for stage in stages for entry in stage["history"]]


def _run(moe: Path, taught: Path, out: Path, **options: Any) -> FinetuneResult:
    return finetune(str(moe), str(taught), out, replace(OPTIONS, **options))


def test_errors_say_what_is_wrong(cut: Cut, taught: Path, tmp_path: Path, make_dense: Any) -> None:
    out, moe = tmp_path / "out", cut()
    empty, short = tmp_path / "empty.txt", tmp_path / "short.txt"
    empty.write_text("")
    short.write_text("Three words only.")
    for source in (empty, short):
        with pytest.raises(InputError, match=r"gives \d+ tokens, one block has 64"):
            _run(moe, taught, out, data=(str(source),))
    with pytest.raises(InputError, match="no block of 64 tokens"):
        _run(moe, taught, out, eval_data=(str(short),))
    with pytest.raises(InputError, match="cut builtin into different tokens"):
        finetune(str(moe), str(make_dense("llama")), out, OPTIONS)
    with pytest.raises(InputError, match="no routers"):
        _run(cut(static=True), taught, out, stage=("router",))
    with pytest.raises(InputError, match="no gradient reaches"):
        _run(cut("mixtral", shared=0, active=1), taught, out, stage=("router",), explore=0.0)
    with pytest.raises(InputError, match="not cut by moeify"):
        _run(taught, taught, out, stage=("layers",))
    with pytest.raises(InputError, match="no model at"):
        finetune("./nowhere", str(taught), out, OPTIONS)
    with pytest.raises(UsageError, match="one of the models themselves"):
        _run(moe, taught, moe)
    with pytest.raises(InputError, match="context 100"):
        _run(moe, taught, out, context=100)
    assert not out.exists()
    assert not out.with_name("out.partial").exists()


def test_a_teacher_of_another_shape_is_refused(cut: Cut, taught: Path, tmp_path: Path, make_dense: Any) -> None:
    other = make_dense("llama", vocab_size=512)
    for file in taught.glob("tokenizer*"):
        (other / file.name).write_bytes(file.read_bytes())
    with pytest.raises(InputError, match=r"has a hidden size of 32, .* has 64"):
        finetune(str(cut()), str(other), tmp_path / "out", replace(OPTIONS, stage=("layers",)))
    # Another width does not matter where distributions alone are compared.
    result = finetune(str(cut()), str(other), tmp_path / "out", SHORT, overwrite=True)
    assert result.stages[0].after["kl"] < result.stages[0].before["kl"]
    small = make_dense("llama", vocab_size=500, seed=3)
    for file in taught.glob("tokenizer*"):
        (small / file.name).write_bytes(file.read_bytes())
    with pytest.raises(InputError, match=r"has 512 tokens and .* 500"):
        finetune(str(cut()), str(small), tmp_path / "other", OPTIONS)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"tokens": 0}, "--tokens 0"),
        ({"kl": -1.0}, "--kl -1.0"),
        ({"kl": 0.0, "lm": 0.0}, "are all zero"),
        ({"stage": ()}, "--stage is empty"),
        ({"stage": ("full", "layers")}, "must be the first"),
        ({"hidden": 1.0, "cache_teacher": True}, "cache holds only"),
        ({"learning_rate": float("nan")}, "--learning-rate nan"),
        ({"device": "cuda:1"}, "'cuda:1' is not a value of --device"),
        ({"z_loss": float("nan")}, "--z-loss nan"),
    ],
)
def test_options_out_of_range_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        FinetuneOptions(**values)
