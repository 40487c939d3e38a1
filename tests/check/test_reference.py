"""What `verify` compares with is the stock model, so that a fault of moeify's own reader is found like any other."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MakeDense
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from moeify.check.logits import USUAL_LOGIT, logit_difference
from moeify.check.reference import Reference, architecture_difference
from moeify.check.verify import verify
from moeify.convert.pipeline import split
from moeify.errors import InputError
from moeify.models import stock
from moeify.models.dense import DenseModel, open_dense
from moeify.options import SplitOptions

ARCHITECTURE = "architecture is the dense model's"
TOKENS = "text is cut into the dense model's tokens"
WEIGHTS = "model.safetensors"
ATTENTION = "model.layers.1.self_attn.q_proj.weight"

Change = Callable[[Path], None]


@pytest.fixture(scope="module")
def dense(make_dense: MakeDense) -> Path:
    return make_dense("llama", tie_word_embeddings=False)


@pytest.fixture(scope="module")
def moe(dense: Path, calibration_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("sound") / "moe"
    return split(str(dense), out, SplitOptions(tokens=1024, calibration=(str(calibration_file),))).out


@pytest.fixture
def moe_copy(moe: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(moe, tmp_path / "moe"))


@pytest.fixture
def dense_copy(dense: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(dense, tmp_path / "dense"))


def config(folder: Path, **values: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    (file,) = folder.glob("model*.safetensors")
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def faults(moe: Path, dense: Path) -> set[str]:
    """Checks that fail; a refusal counts as one."""
    try:
        return {check.name for check in verify(moe, str(dense)).checks if not check.passed}
    except InputError as error:
        return {str(error)}


def test_a_sound_checkpoint_is_the_dense_model(moe: Path, dense: Path) -> None:
    report = verify(moe, str(dense))
    assert report.passed
    assert {ARCHITECTURE, TOKENS} <= {check.name for check in report.checks}


def test_a_lost_head_is_found(moe: Path, moe_copy: Path, dense: Path, dense_copy: Path) -> None:
    """The checkpoint's head is the embedding, or the dense model's is another than it was."""

    def tie(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    weights(moe_copy, tie)
    assert {ARCHITECTURE} < faults(moe_copy, dense)
    weights(dense_copy, tie)
    assert {ARCHITECTURE} < faults(moe, dense_copy)
    config(moe_copy, tie_word_embeddings=True)
    assert ARCHITECTURE in faults(moe_copy, dense)


ROPE = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}


@pytest.mark.parametrize("rope", [{"rope_type": "default", "rope_theta": 5e5}, ROPE])
def test_another_rotation_is_found(
    rope: dict[str, Any], moe: Path, moe_copy: Path, dense: Path, dense_copy: Path
) -> None:
    config(moe_copy, rope_parameters=rope)
    assert ARCHITECTURE in faults(moe_copy, dense)
    config(dense_copy, rope_parameters=rope)
    assert ARCHITECTURE in faults(moe, dense_copy)


def test_attention_that_the_reader_made_up_is_found(
    dense: Path, calibration_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Random numbers in the place of what the file holds; moeify's own reader gives them to split and to verify."""
    read = DenseModel.get
    made_up = torch.randn(open_dense(str(dense)).shapes[ATTENTION], generator=torch.Generator().manual_seed(3))

    def get(self: DenseModel, names: Any) -> dict[str, torch.Tensor]:
        return {name: made_up if name == ATTENTION else tensor for name, tensor in read(self, names).items()}

    monkeypatch.setattr(DenseModel, "get", get)
    split(str(dense), tmp_path / "out", SplitOptions(tokens=1024, calibration=(str(calibration_file),)))
    assert faults(tmp_path / "out", dense) == {"logits equal dense, all experts on"}


def test_missing_attention_is_found(moe: Path, dense_copy: Path) -> None:
    weights(dense_copy, lambda tensors: tensors.__delitem__(ATTENTION))
    (message,) = faults(moe, dense_copy)
    assert "missing" in message
    assert ATTENTION in message


@pytest.mark.parametrize("kind", ["another first space", "other special token", "other template"])
def test_another_tokenizer_is_found(kind: str, moe_copy: Path, dense: Path) -> None:
    file = moe_copy / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    if kind == "another first space":
        tokenizer["pre_tokenizer"] = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True}
        file.write_text(json.dumps(tokenizer))
    elif kind == "other template":
        (moe_copy / "chat_template.jinja").write_text("{{ messages }}")
    else:
        settings = moe_copy / "tokenizer_config.json"
        settings.write_text(json.dumps({**json.loads(settings.read_text()), "eos_token": "the"}))
    assert faults(moe_copy, dense) == {TOKENS}


def test_a_classifier_is_found(moe: Path, dense_copy: Path) -> None:
    config(dense_copy, architectures=["LlamaForSequenceClassification"])
    weights(dense_copy, lambda tensors: tensors.update({"score.weight": torch.ones(2, 32)}))
    (message,) = faults(moe, dense_copy)
    assert "LlamaForSequenceClassification" in message


@pytest.mark.parametrize(
    ("fact", "values"),
    [
        ("layers 2, the dense model 3", {"num_hidden_layers": 3}),
        ("vocabulary 384, the dense model 400", {"vocab_size": 400}),
        ("hidden size 32, the dense model 48", {"hidden_size": 48}),
    ],
)
def test_every_fact_is_compared(fact: str, values: dict[str, Any], moe: Path, make_dense: MakeDense) -> None:
    ours = stock.load(moe)
    other = Reference.of(open_dense(str(make_dense("llama", tie_word_embeddings=False, **values))))
    assert architecture_difference(ours, other.model, torch.float32, values=False) == fact


def test_a_checkpoint_is_compared_with_the_dense_model_rounded_like_it(moe: Path, dense: Path) -> None:
    reference = Reference.of(open_dense(str(dense)))
    assert architecture_difference(stock.load(moe), reference.model, torch.float32, values=True) == ""
    found = architecture_difference(stock.load(moe), reference.model, torch.bfloat16, values=True)
    assert found == "its input embedding is not the dense model's"


@pytest.mark.parametrize(("scale", "limit"), [(1.0, 1e-4), (1e6, 1e-4 * 1e6)])
def test_the_tolerance_grows_with_logits_beyond_usual_ones_alone(scale: float, limit: float, dense: Path) -> None:
    models = [stock.load(dense).eval() for _ in range(2)]
    ids = torch.arange(64).view(1, -1)
    with torch.no_grad():
        largest = float(models[0](ids).logits.abs().max())
        for model in models:
            model.lm_head.weight.mul_(scale * 20 / largest)
        models[0].lm_head.weight.mul_(1 + 2 * limit / scale / 20)
    models[0].set_experts_implementation = lambda _: None
    difference, allowed = logit_difference(models[0], models[1], ids, torch.float32, 1e-4)
    assert allowed == pytest.approx(max(1e-4, 1e-4 * 20 * scale / USUAL_LOGIT))
    assert difference == pytest.approx(2 * limit, rel=0.05)
    assert difference > allowed


def test_sharp_attention_is_compared_in_float64(dense_copy: Path, calibration_file: Path, tmp_path: Path) -> None:
    """Scores in the thousands: their last bits in float32 decide, also in a float64 model, whose norms stay float32."""

    def sharpen(tensors: dict[str, torch.Tensor]) -> None:
        for name in ("q_proj", "k_proj"):
            tensors[f"model.layers.1.self_attn.{name}.weight"] *= 60

    weights(dense_copy, sharpen)
    options = SplitOptions(tokens=1024, calibration=(str(calibration_file),))
    split(str(dense_copy), tmp_path / "out", options)
    assert verify(tmp_path / "out", str(dense_copy)).passed


def test_a_tokenizer_is_the_one_that_stock_transformers_takes(moe: Path, dense: Path) -> None:
    text = "def f(x):\n    return x  # 1234\n"
    ids = [AutoTokenizer.from_pretrained(folder)(text)["input_ids"] for folder in (moe, dense)]
    assert ids[0] == ids[1]
