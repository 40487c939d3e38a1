"""Text that a model writes itself."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from moeify.data.conversations import Conversations
from moeify.data.sampling import sample_from_model
from moeify.models.chat import Turns


@pytest.fixture(scope="module")
def make_model() -> Callable[..., LlamaForCausalLM]:
    def make(**tokens: Any) -> LlamaForCausalLM:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
            return LlamaForCausalLM(LlamaConfig(vocab_size=50, initializer_range=0.5, **sizes, **tokens))

    return make


def test_sampling_starts_from_bos_and_follows_the_seed(make_model: Callable[..., LlamaForCausalLM]) -> None:
    model = make_model(bos_token_id=3, eos_token_id=4)
    # Settings that `generate` would obey and that must not shape the sample.
    model.generation_config.top_k = 1
    model.train()
    state = torch.get_rng_state()
    ids_BC = sample_from_model(model, num_tokens=40 * 12 + 5, context=12, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert ids_BC.shape == (40, 12)
    assert ids_BC.dtype == torch.int64
    assert ids_BC[:, 0].tolist() == [3] * 40
    assert len({tuple(row) for row in ids_BC.tolist()}) == 40
    assert torch.equal(ids_BC, sample_from_model(model, num_tokens=40 * 12, context=12, seed=1))
    assert not torch.equal(ids_BC, sample_from_model(model, num_tokens=40 * 12, context=12, seed=2))


def test_sampling_follows_the_models_distribution(make_model: Callable[..., LlamaForCausalLM]) -> None:
    model = make_model(bos_token_id=3, eos_token_id=4).eval()
    ids_BC = sample_from_model(model, num_tokens=3000 * 3, context=3, seed=0)
    with torch.no_grad():
        first_V = model(input_ids=torch.tensor([[3]])).logits[0, -1].softmax(-1)
        likely = int(first_V.argmax())
        second_V = model(input_ids=torch.tensor([[3, likely]])).logits[0, -1].softmax(-1)
    after_BC = ids_BC[ids_BC[:, 1] == likely]
    for chances_V, sampled in ((first_V, ids_BC[:, 1]), (second_V, after_BC[:, 2])):
        found_V = torch.bincount(sampled, minlength=50) / len(sampled)
        # Four standard deviations of a frequency.
        assert (found_V - chances_V).abs().max() < 4 * 0.5 / len(sampled) ** 0.5


@pytest.mark.parametrize(("eos", "first"), [(4, {4}), ([5, 6], {5}), (None, set(range(50)))])
def test_sampling_without_bos(make_model: Callable[..., LlamaForCausalLM], eos: Any, first: set[int]) -> None:
    model = make_model(bos_token_id=None, eos_token_id=eos)
    found = set(sample_from_model(model, num_tokens=200, context=1, seed=0)[:, 0].tolist())
    assert found <= first
    assert len(found) > 0.8 * len(first)


def test_sampled_blocks_can_train(make_model: Callable[..., LlamaForCausalLM]) -> None:
    model = make_model(bos_token_id=3)
    ids_BC = sample_from_model(model, num_tokens=8, context=4, seed=0)
    assert not ids_BC.is_inference()
    model(input_ids=ids_BC, labels=ids_BC).loss.backward()


TURNS = Turns(opening=(10, 11), answer=(20, 21), next=(30, 31))


def test_conversations_go_on_as_the_template_says() -> None:
    chats = Conversations(TURNS, {4}, num_rows=2)
    drawn = [1, 1, 5, 4, 1, 1, 6, 4, 1, 7, 20, 1, 8, 30, 1, 9]
    rows = torch.cat([chats.follow(torch.tensor([[1], [token]])) for token in drawn], dim=1)
    assert rows[0].tolist() == [1] * len(drawn)
    # A question ends as the template says, an answer by the token that the model ended it with.
    assert rows[1].tolist() == [10, 11, 5, 20, 21, 1, 6, 4, 31, 7, 20, 21, 8, 30, 31, 9]


def test_every_second_block_is_a_conversation(make_model: Callable[..., LlamaForCausalLM]) -> None:
    model = make_model(bos_token_id=3, eos_token_id=4)
    ids_BC = sample_from_model(model, num_tokens=6 * 40, context=40, seed=0, turns=TURNS)
    assert ids_BC[::2, 0].tolist() == [3] * 3
    assert ids_BC[1::2, :2].tolist() == [[10, 11]] * 3
    follows = {(20, 21), (4, 31), (30, 31), (10, 11)}
    for row in ids_BC[1::2].tolist():
        pairs = set(itertools.pairwise(row))
        assert not {pair for pair in pairs if pair[0] == 4} - follows
    # A block without room for one stays free.
    short = [sample_from_model(model, num_tokens=48, context=12, seed=0, turns=turns) for turns in (TURNS, None)]
    assert torch.equal(*short)
