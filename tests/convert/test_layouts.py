"""Layouts that nobody asked for, targets that engines run, and what is said of those that they do not."""

import importlib
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MakeDense
from transformers import AutoConfig

from moeify import families
from moeify.cli.app import run_command
from moeify.convert.exactness import Twin
from moeify.convert.layouts import _check_width, choose_layout, expert_counts, preferred_counts, verdicts
from moeify.convert.preview import preview
from moeify.convert.search import search
from moeify.errors import InputError, MoeifyWarning, UsageError
from moeify.layout import ALIKE, Layout
from moeify.models.fingerprint import Fingerprint
from moeify.options import SplitOptions

SMOLLM2 = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "tie_word_embeddings": True,
}
search_module = importlib.import_module("moeify.convert.search")


def dense_of(family: str, **values: Any) -> Twin:
    """A model that exists as a config only."""
    config = AutoConfig.for_model(family, **{**families.find(family).tiny_values, **values})
    return Twin("model", Path(), config, families.find(family), {}, Fingerprint(Path(), {}, {}), {})


def choose(dense: Twin, **options: Any) -> tuple[Layout, str, str]:
    layout, target, reason = choose_layout(dense, SplitOptions(**options), ALIKE, torch.bfloat16, writable=True)
    return layout, target.model_type, reason


@pytest.mark.parametrize(
    ("num_neurons", "experts"),
    [
        (1536, 24),  # SmolLM2-135M: 64 wide; 256 would leave six
        (2560, 20),  # SmolLM2-360M: 128
        (3072, 24),  # 128; 256 would leave twelve
        (4864, 19),  # Qwen2.5-0.5B
        (5632, 22),  # TinyLlama
        (8192, 32),  # Llama-3.2-1B and 3B
        (8960, 35),  # Qwen2.5-1.5B: 256, more than usual
        (9728, 19),  # Qwen3-4B: 512
        (11008, 43),  # Llama-2-7B
        (14336, 28),  # Llama-3-8B: 512
        (18944, 37),  # Qwen2.5-7B: 512
        (512, 8),  # builtin
        (64, 8),
        (96, 8),
    ],
)
def test_the_width_of_an_ffn_decides(num_neurons: int, experts: int) -> None:
    dtype = torch.bfloat16 if num_neurons > 100 else torch.float32
    counts = preferred_counts(num_neurons, dtype)
    assert counts[0] == experts
    assert sorted(counts) == list(expert_counts(num_neurons, dtype))


def test_the_first_number_that_engines_run_is_taken() -> None:
    # 35 of 256, three quarters active: 26 routed ones without shared experts, and llama.cpp runs 18 of mixtral's.
    dense = dense_of("mistral", **{**SMOLLM2, "intermediate_size": 8960, "sliding_window": 16})
    layout, target, _ = choose(dense)
    assert (target, layout) == ("mixtral", Layout(20, 0, 15))
    layout, target, reason = choose(dense, experts=35)
    assert (target, layout.num_active) == ("mixtral", 26)
    assert "llama.cpp refuses it: 26 routed experts" in reason


def test_a_number_that_was_asked_for_stays() -> None:
    layout, target, _ = choose(dense_of("llama", **SMOLLM2), experts=8)
    assert (layout, target) == (Layout(8, 2, 6), "granitemoeshared")
    assert choose(dense_of("llama", **SMOLLM2), active=40)[0].num_experts == 48


def test_auto_gives_way_to_a_target_that_the_refusing_engine_runs() -> None:
    dense = dense_of("llama", **SMOLLM2)
    layout, target, reason = choose(dense, experts=64, active=48)
    assert (layout.num_routed_active, target) == (36, "qwen2_moe")
    assert "granitemoeshared: llama.cpp refuses it: 36 routed experts" in reason
    # None runs there: the preferred one stays, and the reasons are given.
    layout, target, reason = choose(dense, experts=128, active=96)
    assert target == "granitemoeshared"
    assert "qwen2_moe: llama.cpp refuses it: 72 routed experts" in reason


def test_an_engine_that_must_run_it_moves_active_experts_to_the_shared_part() -> None:
    dense = dense_of("llama", **SMOLLM2)
    layout, target, _ = choose(dense, experts=128, active=96, engine="llama.cpp")
    assert (layout, target) == (Layout(128, 69, 96), "granitemoeshared")
    assert choose(dense, experts=128, active=96, engine="vllm")[0] == Layout(128, 24, 96)
    # What is asked for is not changed.
    with pytest.raises(InputError, match=r"runs in llama\.cpp.*92 routed experts"):
        choose(dense, experts=128, active=96, shared=4, engine="llama.cpp")
    with pytest.raises(InputError, match=r"llama\.cpp does not run this as mixtral: 24 routed experts"):
        choose(dense, experts=32, active=24, target="mixtral", engine="llama.cpp")


def test_engines_that_are_none_and_pruned_models() -> None:
    with pytest.raises(UsageError, match="'onnx' is not an engine"):
        choose(dense_of("llama", **SMOLLM2), engine="onnx")
    with pytest.raises(UsageError, match="--static writes a dense model"):
        SplitOptions(static=True, engine="vLLM")
    assert verdicts(dense_of("llama"), *_static(dense_of("llama"))) == ()


def _static(dense: Twin) -> tuple[Any, Layout]:
    layout, target, _ = choose_layout(dense, SplitOptions(experts=8, static=True), ALIKE, torch.float32, writable=True)
    return target, layout


@pytest.fixture(scope="module")
def wide(make_dense: MakeDense) -> Path:
    """As wide as engines' kernels care for, and short."""
    return make_dense("llama", hidden_size=256, intermediate_size=512, num_hidden_layers=2)


def test_a_preview_warns_of_slow_layouts_and_not_of_good_ones(wide: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        good = preview(wide, SplitOptions(dtype="bfloat16"))
    assert (good.layout.num_experts, good.expert_width) == (8, 64)
    assert [verdict.caution for verdict in good.engines] == ["", "", ""]
    with pytest.warns(MoeifyWarning) as caught:
        preview(wide, SplitOptions(experts=32, dtype="bfloat16"))
    messages = [str(warning.message) for warning in caught]
    assert [message.split(" runs this layout slowly")[0] for message in messages] == ["llama.cpp"]
    assert "no quantised type takes the rows" in messages[-1]


def test_the_tables_name_engines_and_the_width(wide: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run_command(["split", str(wide), "--dry-run"]) == 0
    out, err = capfd.readouterr()
    assert "64 neurons" in out
    assert "take it: vLLM, SGLang, llama.cpp" in " ".join(out.split())
    assert "warning" not in err.lower()
    assert run_command(["inspect", str(wide), "--experts", "32"]) == 0
    out, err = capfd.readouterr()
    assert "run it slowly: llama.cpp" in " ".join(out.split())
    assert "16 neurons an expert" in " ".join(out.replace("│", " ").split())
    assert "llama.cpp runs this layout slowly" in " ".join(err.split())


Limit = Callable[[int], None]


@pytest.fixture
def limit(monkeypatch: pytest.MonkeyPatch) -> Limit:
    """llama.cpp as if it had room for fewer routed experts, since a model of two layers never reaches its limit."""

    def lower(most: int) -> None:
        module = importlib.import_module("moeify.engines.llama_cpp")
        monkeypatch.setattr(module, "most_active", lambda shape, further_nodes=0: most)  # noqa: ARG005

    return lower


def test_a_search_for_an_engine_takes_only_layouts_that_it_runs(
    make_dense: MakeDense, calibration_file: Path, limit: Limit, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search_module, "CHECK_TOKENS", 512)
    monkeypatch.setattr(search_module, "matmul_rate", lambda _: 1e10)
    dense = make_dense("llama", num_hidden_layers=2, intermediate_size=128)
    options = SplitOptions(calibration=(str(calibration_file),), tokens=1024, experts=16, engine="llama.cpp")
    limit(5)
    result = search(dense, 0.75, options)
    # 3 of 12 shared would leave 9 routed ones; it needs 7 shared, and tries 9.
    assert set(result.losses) == {"12/16+7", "12/16+9", "without the layer", "without its FFN"}
    assert result.choice.layout.num_routed_active <= 5
    assert result.choice.layout.dense_layers == ()
    assert result.choice.share == pytest.approx(0.75)
    losses = {key: sum(values) for key, values in result.losses.items()}
    assert f"12/16+{result.options['shared']}" == min(losses, key=lambda key: losses[key])
    limit(0)
    with pytest.raises(InputError, match=r"runs in llama\.cpp"):
        search(dense, 0.75, options)


@pytest.mark.parametrize("family", families.names())
def test_static_pruning_is_refused_where_no_field_is_the_width(family: str) -> None:
    config = AutoConfig.for_model(family, **families.find(family).tiny_config())
    model = Twin("twin", Path(), config, families.find(family), {}, Fingerprint(Path(), {}, {}), {})
    try:
        _check_width(model)
    except InputError as error:
        assert family in {"gpt_neox_japanese", "mpt"}, error
    else:
        assert family not in {"gpt_neox_japanese", "mpt"}
