"""Hidden states that walk layer by layer are those of the stock model, bit for bit."""

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MakeDense
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from moeify import families
from moeify.calibration import stream as calibration
from moeify.calibration.stream import HiddenStream
from moeify.convert.exactness import twin_inputs
from moeify.models import stock
from moeify.models.dense import open_dense
from moeify.models.ffn import pack

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-biases": ("llama", {"attention_bias": True, "tie_word_embeddings": False}),
    "llama-bf16": ("llama", {"dtype": "bfloat16"}),
    "mistral": ("mistral", {}),
    "mistral-window": ("mistral", {"sliding_window": 16}),
    "qwen2": ("qwen2", {}),
    # One full layer, then one with a window: the mask follows the layer.
    "qwen2-window": ("qwen2", {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1}),
    "qwen3": ("qwen3", {}),
    "qwen3-window": ("qwen3", {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1}),
    **{family: (family, {}) for family in families.names() if family not in ("llama", "mistral", "qwen2", "qwen3")},
}


@torch.no_grad()
def stock_ffn(folder: Path, inputs: dict[str, torch.Tensor]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Inputs and outputs of every FFN of the stock model."""
    model: Any = stock.load(folder).eval()
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    lists = open_dense(str(folder)).sites
    for sites, block in ((one, block) for one in lists for block in model.get_submodule(one.blocks)):
        pair: list[torch.Tensor] = []
        block.get_submodule(sites.read).register_forward_pre_hook(
            lambda _, inputs, pair=pair: pair.append(inputs[0].flatten(0, -2))
        )
        block.get_submodule(sites.write).register_forward_hook(
            lambda _, __, output, pair=pair: seen.append((pair[-1], output.flatten(0, -2)))
        )
    model(**inputs)
    return seen


def ids(num_blocks: int, context: int, vocabulary: int = 384) -> torch.Tensor:
    return torch.randint(vocabulary, (num_blocks, context), generator=torch.Generator().manual_seed(0))


def test_every_family_is_covered() -> None:
    assert {family for family, _ in CASES.values()} == set(families.names())


@pytest.mark.parametrize("case", CASES)
def test_inputs_of_every_ffn_are_the_stock_models(case: str, make_dense: MakeDense) -> None:
    family, overrides = CASES[case]
    folder = make_dense(family, num_hidden_layers=3, **overrides)
    dense = open_dense(str(folder))
    plain = dense.family.modality == "text" and not dense.family.is_pair
    inputs = {"input_ids": ids(4, 48)} if plain else twin_inputs(dense)
    stream = HiddenStream(dense, inputs)
    for layer, (inputs_TD, outputs_TD) in enumerate(stock_ffn(folder, inputs)):
        found = stream.attend(layer)
        assert found.dtype == torch.float32
        assert torch.equal(found, inputs_TD)
        stream.advance(outputs_TD)


@pytest.mark.parametrize(
    ("family", "adds_up"), [("llama", True), ("cohere", True), ("olmo2", False), ("granite", False)]
)
def test_attention_runs_once_only_where_the_output_is_added_as_it_is(
    family: str, adds_up: bool, make_dense: MakeDense
) -> None:
    """A norm behind the FFN, or a factor on it, makes the block run again; the logits stay right."""
    folder, ids_BC = make_dense(family), ids(2, 32)
    dense = open_dense(str(folder))
    stream = HiddenStream(dense, {"input_ids": ids_BC})
    for layer in range(dense.num_layers):
        outputs_TD = dense.ffn(layer)(stream.attend(layer))
        assert stream.adds_up is adds_up
        behind_BCD = stream.behind(outputs_TD[32:], 1)
        stream.advance(outputs_TD)
        assert torch.equal(behind_BCD[0], stream.residual()[32:])
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()(ids_BC).logits
    torch.testing.assert_close(torch.stack(list(stream.outputs(range(2)))), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["roberta", "m2m_100"])
def test_words_that_are_no_padding_have_positions(family: str, make_dense: MakeDense) -> None:
    """Only words of a text are looked up, and none may get the number of padding by it: positions leave that out."""
    folder = make_dense(family, pad_token_id=1, max_position_embeddings=128)
    dense = open_dense(str(folder))
    words = torch.cat([ids(1, 32) + 3, torch.full((1, 4), 1)], dim=1)
    for text in (words, words[:, :32]):
        inputs = {"input_ids": text} | ({"decoder_input_ids": text} if dense.family.is_pair else {})
        stream = HiddenStream(dense, inputs)
        for layer, (inputs_TD, outputs_TD) in enumerate(stock_ffn(folder, inputs)):
            assert torch.equal(stream.attend(layer), inputs_TD)
            stream.advance(outputs_TD)


PAIRS = [name for name in families.names() if families.find(name).is_pair]


@pytest.mark.parametrize("family", PAIRS)
@torch.no_grad()
def test_a_decoder_sees_what_its_encoder_gives_for_the_very_block(
    family: str, make_dense: MakeDense, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense = open_dense(str(make_dense(family)))
    one = twin_inputs(dense)
    inputs = {
        name: torch.cat([tensor, tensor.flip(-1), tensor.roll(1, -1), tensor.roll(3, -1)])
        for name, tensor in one.items()
    }
    expected = stock.load(dense.path).eval()(**inputs).logits
    # Two blocks at a time in the encoder, all at once in the decoder.
    monkeypatch.setattr(calibration, "CHUNK_TOKENS", 2 * HiddenStream(dense, one).block_tokens)
    stream, variants = HiddenStream(dense, inputs), None
    for layer in range(dense.num_layers):
        outputs_TD = dense.ffn(layer)(stream.attend(layer))
        if layer == 1:
            # Two variants of the last two blocks.
            behind_BCD = stream.behind(outputs_TD.chunk(2)[1], 2)
            variants = stream.fork(torch.cat([behind_BCD, behind_BCD]), 2)
        elif variants is not None:
            variants.pass_through(layer, dense.ffn(layer))
        stream.advance(outputs_TD)
    assert variants is not None
    torch.testing.assert_close(torch.stack(list(stream.outputs(range(4)))), expected, rtol=1e-4, atol=1e-4)
    found = torch.stack(list(variants.outputs(range(4))))
    torch.testing.assert_close(found, expected[[2, 3, 2, 3]], rtol=1e-4, atol=1e-4)
    assert (expected[0] - expected[1]).abs().max() > 0.1
    stream.check_head()


@pytest.mark.parametrize("family", families.names())
def test_an_ffn_of_every_family_is_packed_as_it_was_unpacked(family: str, make_dense: MakeDense) -> None:
    dense = open_dense(str(make_dense(family)))
    packed = pack(dense.family.ffn, dense.block(1), dense.ffn(1))
    stored = dense.get(dense.ffn_names(1))
    assert packed.keys() == stored.keys()
    assert all(torch.equal(packed[name], stored[name]) for name in stored)


def test_a_window_is_felt(make_dense: MakeDense) -> None:
    """The test above would prove nothing for windows if 16 of 48 tokens were as good as all."""
    ids_BC = ids(2, 48)
    full, windowed = (
        HiddenStream(open_dense(str(make_dense("mistral", **values))), {"input_ids": ids_BC}).attend(0).view(2, 48, -1)
        for values in ({}, {"sliding_window": 16})
    )
    torch.testing.assert_close(full[:, :16], windowed[:, :16])
    assert (full[:, 16:] - windowed[:, 16:]).abs().max() > 0.1


def test_chunks_do_not_mix_blocks(make_dense: MakeDense, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_dense("llama")
    ids_BC = ids(5, 32)
    whole = HiddenStream(open_dense(str(folder)), {"input_ids": ids_BC}).attend(0)
    # Two blocks at a time, then one that is left; then less than a block.
    for limit in (70, 10):
        monkeypatch.setattr(calibration, "CHUNK_TOKENS", limit)
        torch.testing.assert_close(HiddenStream(open_dense(str(folder)), {"input_ids": ids_BC}).attend(0), whole)


def test_the_next_layer_sees_what_this_one_was_said_to_give(make_dense: MakeDense) -> None:
    checkpoint = open_dense(str(make_dense("llama")))
    ids_BC = ids(2, 32)
    first, second = HiddenStream(checkpoint, {"input_ids": ids_BC}), HiddenStream(checkpoint, {"input_ids": ids_BC})
    inputs_TD = first.attend(0)
    assert torch.equal(second.attend(0), inputs_TD)
    first.advance(torch.zeros_like(inputs_TD))
    second.advance(torch.ones_like(inputs_TD))
    assert not torch.allclose(first.attend(1), second.attend(1), atol=0.1)


def test_only_one_layer_is_in_memory(make_dense: MakeDense) -> None:
    checkpoint = open_dense(str(make_dense("llama")))
    stream = HiddenStream(checkpoint, {"input_ids": ids(2, 32)})
    stream.attend(0)
    assert {p.device.type for p in checkpoint.skeleton.parameters()} == {"meta"}
    assert type(checkpoint.skeleton.model.norm).__name__ == "LlamaRMSNorm"
    assert [type(layer).__name__ for layer in checkpoint.skeleton.model.layers] == ["LlamaDecoderLayer"] * 2


def test_a_fork_goes_on_by_itself(make_dense: MakeDense) -> None:
    checkpoint, ids_BC = open_dense(str(make_dense("llama"))), ids(4, 32)
    stream = HiddenStream(checkpoint, {"input_ids": ids_BC})
    stream.advance(stream.attend(0))
    residual_TD = stream.residual().clone()
    # Two copies of the whole batch, the second of them moved.
    forked = stream.fork(torch.cat([residual_TD, residual_TD + 1]))
    both_TD = forked.attend(1)
    forked.advance(torch.ones_like(both_TD))
    assert torch.equal(stream.residual(), residual_TD)
    torch.testing.assert_close(both_TD[:128], stream.attend(1))
    assert not torch.allclose(both_TD[128:], both_TD[:128], atol=0.01)


@pytest.mark.parametrize("tied", [True, False])
def test_dense_ffns_give_the_stock_models_logits_and_losses(tied: bool, make_dense: MakeDense) -> None:
    folder, ids_BC = make_dense("llama", num_hidden_layers=3, tie_word_embeddings=tied), ids(3, 32)
    checkpoint = open_dense(str(folder))
    stream = HiddenStream(checkpoint, {"input_ids": ids_BC})
    for layer in range(3):
        ffn = checkpoint.ffn(layer)
        residual_TD = stream.pass_through(layer, ffn)
        assert torch.equal(residual_TD, stream.residual())
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()(ids_BC).logits
    torch.testing.assert_close(torch.stack(list(stream.outputs(range(3)))), expected, rtol=1e-4, atol=1e-4)
    losses_BL = torch.stack(
        [cross_entropy(l_CV[:-1], i_C[1:], reduction="none") for l_CV, i_C in zip(expected, ids_BC, strict=True)]
    )
    torch.testing.assert_close(stream.losses(ids_BC), losses_BL, rtol=1e-4, atol=1e-4)
    # Ids of fewer blocks are those of the last ones.
    torch.testing.assert_close(stream.losses(ids_BC[1:]), losses_BL[1:], rtol=1e-4, atol=1e-4)
