"""Models with an encoder and a decoder: both are cut, verified and measured; what is not for them is refused."""

import copy
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MakeDense
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSeq2SeqLM, T5ForSequenceClassification

from moeify import evaluate
from moeify.check.compare import compare
from moeify.check.verify import verify
from moeify.convert.pipeline import split
from moeify.convert.search import search
from moeify.errors import InputError, MoeifyWarning
from moeify.models.dense import open_dense
from moeify.options import SplitOptions
from moeify.training.finetune import finetune
from moeify.training.options import FinetuneOptions

SENTINELS = 30
# Text alone decides nothing here.
TEXT = {"calibration": ("builtin",), "tokens": 1024, "context": 64}


@pytest.fixture(scope="module")
def t5(make_dense: MakeDense, tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """t5(**config) -> folder of a tiny T5 whose tokenizer has sentinels."""
    marked = copy.deepcopy(tokenizer)
    marked.add_tokens([f"<extra_id_{number}>" for number in range(SENTINELS)])

    def make(**config: Any) -> Path:
        whole = make_dense("t5", vocab_size=len(marked), decoder_start_token_id=0, **config)
        folder = Path(shutil.copytree(whole, tmp_path_factory.mktemp("t5") / "dense"))
        marked.save_pretrained(folder)
        return folder

    return make


@pytest.mark.parametrize("activation", ["gated-gelu", "relu"])
def test_encoder_and_decoder_are_cut_and_verified(activation: str, t5: Any, tmp_path: Path) -> None:
    dense, out = t5(feed_forward_proj=activation, num_decoder_layers=3), tmp_path / "out"
    result = split(str(dense), out, SplitOptions(experts=8, dense_layers=(3,), **TEXT))
    assert (result.target, len(result.plan.layers)) == ("moeify", 5)
    report = verify(str(out), str(dense))
    assert report.passed, report.checks
    loaded: Any = AutoModelForSeq2SeqLM.from_pretrained(out, output_loading_info=True)
    model, info = loaded
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    names = [name for name, module in model.named_modules() if type(module).__name__ == "MoeFFN"]
    cut = [f"encoder.block.{number}.layer.1" for number in range(2)]
    cut += [f"decoder.block.{number}.layer.2" for number in (0, 2)]
    assert names == [f"{name}.DenseReluDense" for name in cut]
    one, other = evaluate([str(dense), str(out)], "builtin-heldout", tokens=2048, context=64)
    assert one.measure == other.measure == "target perplexity"
    # 10 of 64 tokens are hidden, in 3 spans.
    assert one.num_tokens == other.num_tokens == 2048 // 64 * 13
    assert other.perplexity == pytest.approx(one.perplexity, rel=0.2)
    # Not of three layers: transformers makes a cache for as many as the encoder has.
    model.generation_config.use_cache = False
    assert model.generate(torch.arange(5, 15)[None], max_new_tokens=4).shape[1] <= 5


def test_static_pruning_makes_a_narrower_t5(t5: Any, tmp_path: Path) -> None:
    dense, out = t5(), tmp_path / "out"
    split(str(dense), out, SplitOptions(experts=8, active=4, static=True, **TEXT))
    assert json.loads((out / "config.json").read_text())["d_ff"] == 32
    (row,) = evaluate([str(out)], "builtin-heldout", tokens=1024, context=64)
    assert row.perplexity > 1


def test_a_head_of_its_own_stays(t5: Any, tmp_path: Path) -> None:
    """T5 1.1 and Flan-T5 have one, whatever transformers makes of tie_word_embeddings."""
    dense, out = t5(), tmp_path / "out"
    file = dense / "model.safetensors"
    tensors = load_file(file)
    tensors["lm_head.weight"] = tensors["shared.weight"].flip(0).contiguous()
    save_file(tensors, file, {"format": "pt"})
    config = json.loads((dense / "config.json").read_text())
    (dense / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
    with pytest.warns(MoeifyWarning, match="lm_head.weight differs"):
        split(str(dense), out, SplitOptions(experts=8, **TEXT))
    with pytest.warns(MoeifyWarning, match="lm_head.weight differs"):
        assert verify(str(out), str(dense)).passed


def test_methods_and_layouts_are_compared_by_the_change_of_outputs(t5: Any) -> None:
    dense = str(t5())
    table = compare(dense, 0.5, "builtin-heldout", SplitOptions(experts=8, **TEXT), tokens=512, only=["CMoE"])
    assert table.measure == "KL"
    assert next(row.method for row in table.rows) == "dense"
    assert table.rows[0].value == 0
    assert all(row.value > 0 for row in table.rows[1:])
    found = search(dense, 0.75, SplitOptions(experts=8, **TEXT), frontier=False, quick=True)
    assert found.choice.share <= 0.75


def test_a_pair_is_trained_towards_what_the_dense_model_writes(t5: Any, tmp_path: Path) -> None:
    dense, out = t5(), tmp_path / "out"
    split(str(dense), out, SplitOptions(experts=8, active=3, **TEXT))
    options = FinetuneOptions(stage=("layers", "router", "lora"), tokens=2048, context=64, eval_tokens=512, batch=4)
    result = finetune(str(out), str(dense), tmp_path / "trained", options)
    first, *later = result.stages
    assert first.after["layer_error"] < first.before["layer_error"]
    assert [stage.stage for stage in later] == ["router", "lora"]
    assert later[-1].after["kl"] < later[0].before["kl"]
    assert verify(str(tmp_path / "trained"), str(dense)).passed
    with pytest.raises(InputError, match="not trained on text of its own"):
        finetune(str(out), str(dense), tmp_path / "other", replace(options, data=("self",)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"drop_layers": (1,)}, "an encoder and a decoder, of which no layers can be dropped"),
        ({"calibration": ("self",)}, "writes nothing of its own"),
        ({"partition": "gradient"}, "needs a language model"),
        ({"context": 1024}, "takes 16 to 64 tokens"),
    ],
)
def test_what_is_not_for_them_is_refused(options: dict[str, Any], message: str, t5: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        split(str(t5()), tmp_path / "out", SplitOptions(experts=8, **{**TEXT, **options}))


def test_a_classifier_is_refused(t5: Any, tmp_path: Path) -> None:
    dense = t5()
    T5ForSequenceClassification.from_pretrained(dense).save_pretrained(tmp_path / "classifier")
    with pytest.raises(InputError, match="a head for SequenceClassification"):
        open_dense(str(tmp_path / "classifier"))


def test_ffns_of_two_sizes_are_refused(make_dense: MakeDense) -> None:
    with pytest.raises(InputError, match="FFNs of the encoder have 64 x 32 weights, those of the decoder 96 x 32"):
        open_dense(str(make_dense("whisper", decoder_ffn_dim=96)))


def test_a_decoder_of_other_weights_is_refused(t5: Any) -> None:
    dense = t5(num_decoder_layers=3)
    config = json.loads((dense / "config.json").read_text())
    (dense / "config.json").write_text(json.dumps({**config, "num_decoder_layers": 2}))
    with pytest.raises(InputError, match="2 layers in the decoder, the weights have 3"):
        open_dense(str(dense))
