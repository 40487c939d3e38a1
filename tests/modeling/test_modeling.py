"""moeify's own architecture: every family is held exactly, by classes of transformers with only their FFNs replaced."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MakeDense
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from moeify import families, targets
from moeify.check.evaluate import load
from moeify.check.verify import verify
from moeify.convert.exactness import check_target, make_twin, twin_values
from moeify.convert.pipeline import split
from moeify.errors import InputError
from moeify.experts.mixing import Mixing
from moeify.export.writer import MoEWriter
from moeify.kernels import register
from moeify.layout import Layout
from moeify.modeling.configuration_moeify import config_class
from moeify.modeling.modeling_moeify import EXPERTS, MoeFFN, Router
from moeify.models.config import load_config
from moeify.models.dense import open_dense
from moeify.options import SplitOptions, Style

LAYOUTS = [Layout(8, 2, 6), Layout(8, 0, 3), Layout(8, 1, 4, (1,))]
# Shapes of FFNs and of blocks: a gate or none, biases or none, a module of its own or not.
KINDS = ["gpt2", "opt", "nemotron", "gemma3_text", "phi"]


def small_config(family: str, **overrides: Any) -> Any:
    found = families.find(family)
    return AutoConfig.for_model(family, **found.tiny_config(**{found.width: 64, **overrides}))


def moe_config(**values: Any) -> Any:
    """Of a gpt2 with experts."""
    return config_class("gpt2")(**families.find("gpt2").tiny_values, dense_model_type="gpt2", **values)


@pytest.mark.parametrize("family", families.names())
def test_every_family_is_represented_exactly(family: str) -> None:
    config = small_config(family)
    twin = make_twin(twin_values(config, families.of(config)))
    for layout in LAYOUTS:
        found = check_target(targets.for_model("moeify", twin), twin, layout)
        assert found.exact, found.reason
        assert found.difference is not None
        assert found.difference < 1e-5


def test_a_target_completes_its_own_config_and_not_the_models() -> None:
    """A factor that qwen3_5_moe_text adds to rotations made every twin after it another model."""
    twin = make_twin(twin_values(small_config("cwm"), families.find("cwm")))
    before = json.dumps(twin.config.to_dict(), sort_keys=True, default=str)
    MoEWriter(twin, targets.find("qwen3_5_moe_text"), LAYOUTS[0], torch.float32).config()
    assert json.dumps(twin.config.to_dict(), sort_keys=True, default=str) == before


@pytest.mark.parametrize("family", KINDS)
def test_a_checkpoint_is_what_was_decided_and_loads_by_its_name(
    family: str, make_dense: MakeDense, calibration_file: Path, tmp_path: Path
) -> None:
    dense, out = make_dense(family), tmp_path / "out"
    text = {"calibration": (str(calibration_file),), "tokens": 1024}
    result = split(str(dense), out, SplitOptions(experts=8, **text))
    assert result.target == "moeify"
    report = verify(str(out), str(dense))
    assert report.passed, report.checks
    assert report.max_gate_deviation == 0
    loaded: Any = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    model, info = loaded
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert type(model).__name__ == json.loads((out / "config.json").read_text())["architectures"][0]
    ids = torch.arange(3, 20)[None]
    plain = model.eval()(ids).logits
    register()
    for implementation in ("eager", "batched_mm", "moeify"):
        model.set_experts_implementation(implementation)
        torch.testing.assert_close(model(ids).logits, plain, rtol=1e-4, atol=1e-4)
    # Below the head, and with another one.
    assert not AutoModel.from_pretrained(out, output_loading_info=True)[1]["missing_keys"]
    if family in ("gpt2", "opt", "phi"):
        other = AutoModelForSequenceClassification.from_pretrained(out)
        assert [n for n, m in other.named_modules() if isinstance(m, MoeFFN)]


def test_it_loads_in_a_new_process_whatever_is_imported_first(make_dense: MakeDense, tmp_path: Path) -> None:
    out = tmp_path / "out"
    split(str(make_dense("gpt2")), out, SplitOptions(experts=8, tokens=1024, calibration=("builtin",)))
    both = "import moeify", "from transformers import AutoModelForCausalLM"
    for order in (both, both[::-1]):
        code = "; ".join((*order, f"print(type(AutoModelForCausalLM.from_pretrained({str(out)!r})).__name__)"))
        found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert found.stdout.strip().endswith("MoeGPT2LMHeadModel")


def test_importing_moeify_imports_neither_torch_nor_transformers() -> None:
    code = "import moeify, sys; print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_experts_are_computed_as_told_where_the_dense_model_was_loaded_before(
    make_dense: MakeDense, tmp_path: Path
) -> None:
    dense, out = make_dense("gpt2"), tmp_path / "out"
    split(str(dense), out, SplitOptions(experts=8, tokens=1024, calibration=("builtin",)))
    assert not AutoModelForCausalLM.from_pretrained(dense)._can_set_experts_implementation()
    model: Any = AutoModelForCausalLM.from_pretrained(out)
    for implementation in ("grouped_mm", "eager"):
        model.set_experts_implementation(implementation)
        assert model.config._experts_implementation == implementation


@pytest.mark.parametrize("style", ["hard", "softmax", "soft"])
def test_the_router_weights_as_a_split_does(style: Style) -> None:
    layout = Layout(6, 1, 6 if style == "soft" else 4)
    config = moe_config(num_experts=layout.num_routed, num_experts_per_tok=layout.num_routed_active, mixing=style)
    router = Router(config, 32)
    torch.nn.init.normal_(router.weight)
    scores_TR, weights_TK, chosen_TK = router(torch.randn(20, 32, generator=torch.Generator().manual_seed(0)))
    dense_TR = torch.zeros_like(scores_TR).scatter(1, chosen_TK, weights_TK)
    torch.testing.assert_close(dense_TR, Mixing(style).weights(scores_TR, layout))


@pytest.mark.parametrize(("gated", "biased"), EXPERTS)
def test_experts_are_an_ffn_cut_in_slices(gated: bool, biased: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    values = {"num_experts": 4, "num_experts_per_tok": 4, "moe_intermediate_size": 16, "mixing": "hard"}
    more = {"expert_gate": gated, "expert_bias": biased, "output_bias": biased, "expert_activation": "gelu"}
    config = moe_config(**values, **more, shared_expert_intermediate_size=8)
    config._experts_implementation = "eager"
    ffn = MoeFFN(config, 32)
    for parameter in ffn.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
    inputs = torch.randn(2, 5, 32, generator=generator)
    up = "gate_up_proj" if gated else "up_proj"
    expected = ffn.shared(inputs) + (ffn.bias if biased else 0)
    for expert in range(4):
        bias = getattr(ffn.experts, f"{up}_bias")[expert] if biased else None
        rows = torch.nn.functional.linear(inputs, getattr(ffn.experts, up)[expert], bias)
        act = torch.nn.functional.gelu
        hidden = act(rows[..., :16]) * rows[..., 16:] if gated else act(rows)
        expected = expected + hidden @ ffn.experts.down_proj[expert].T
    torch.testing.assert_close(ffn(inputs), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("dense_model_type", "nothing", "dense_model_type is"),
        ("dense_model_type", "moeify", "dense_model_type is"),
        ("mixing", "some", "mixing is"),
        ("num_experts_per_tok", 99, "num_experts_per_tok is 99"),
        ("ffn_blocks", "nowhere", "has no attribute"),
        ("expert_activation", "os.system", "expert_activation is"),
    ],
)
def test_a_config_that_cannot_be_right_is_refused(
    field: str, value: Any, message: str, make_dense: MakeDense, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    split(str(make_dense("gpt2")), out, SplitOptions(experts=8, tokens=1024, calibration=("builtin",)))
    file = out / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), field: value}))
    with pytest.raises(InputError, match=message):
        load(str(out))


def test_a_converted_model_is_not_converted_again(make_dense: MakeDense, tmp_path: Path) -> None:
    out = tmp_path / "out"
    split(str(make_dense("gpt2")), out, SplitOptions(experts=8, tokens=1024, calibration=("builtin",)))
    assert load_config(out).model_type == "moeify"
    with pytest.raises(InputError, match="'moeify' is not supported"):
        open_dense(str(out))
