"""The built-in text and model: no overlap, reproducible training, a cache that is complete or absent."""

import os
import random
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from moeify.errors import InputError
from moeify.models import builtin
from moeify.models.builtin import BuiltinRecipe, builtin_documents, builtin_model, model_config, train_tokenizer

TINY = BuiltinRecipe(
    vocab_size=300,
    hidden_size=16,
    intermediate_size=32,
    num_layers=1,
    num_heads=2,
    num_kv_heads=1,
    context=32,
    steps=4,
    batch_size=2,
    warmup_steps=2,
)


def content_of(documents: list[str]) -> set[str]:
    paragraphs = (" ".join(paragraph.split()) for document in documents for paragraph in document.split("\n\n"))
    return {paragraph for paragraph in paragraphs if len(paragraph) >= 40}


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return builtin_model(tmp_path_factory.mktemp("cache"), recipe=TINY)


def test_training_and_heldout_parts_share_no_paragraph() -> None:
    training, heldout = builtin_documents(heldout=False), builtin_documents(heldout=True)
    assert len(content_of(heldout)) > 100
    assert len(content_of(training)) > 800
    assert not content_of(training) & content_of(heldout)


def test_heldout_part_is_large_and_varied_enough() -> None:
    heldout = [len(document.encode()) for document in builtin_documents(heldout=True)]
    assert 40_000 <= sum(heldout) <= 120_000
    assert max(heldout) < 0.5 * sum(heldout)
    assert sum(len(document) for document in builtin_documents(heldout=False)) > 4 * sum(heldout)


def test_heldout_topics_do_not_depend_on_the_order_of_topics(monkeypatch: pytest.MonkeyPatch) -> None:
    import pydoc_data.topics

    before = builtin_documents(heldout=True)
    shuffled = list(pydoc_data.topics.topics.items())
    random.Random(1).shuffle(shuffled)
    monkeypatch.setattr(pydoc_data.topics, "topics", dict(shuffled))
    assert builtin_documents(heldout=True) == before


def test_folder_is_complete_and_loads_with_the_auto_classes(tiny_model: Path) -> None:
    files = {path.name for path in tiny_model.iterdir()}
    assert files >= {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"}
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    assert model.config.model_type == "llama"
    assert model.dtype == torch.float32
    assert model.config.vocab_size == len(tokenizer) == 300
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1)
    assert (model.config.bos_token_id, model.generation_config.eos_token_id) == (0, 1)


@pytest.mark.parametrize(
    "text", ["plain words", "  two\n\n\ttabs ", "caf\u00e9 \u4e2d\u6587 \U0001f600", "x = {'a': 1}  # end\n"]
)
def test_tokenizer_round_trip(tiny_model: Path, text: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    trained = train_tokenizer(TINY, builtin_documents(heldout=False))
    assert trained(text)["input_ids"] == ids


def test_second_call_returns_the_cached_folder(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(builtin, "train_model", pytest.fail)
    assert builtin_model(tiny_model.parent, recipe=TINY) == tiny_model
    assert [path.name for path in tiny_model.parent.iterdir()] == [tiny_model.name]


def test_two_trainings_are_bit_identical_and_another_seed_is_not(tiny_model: Path, tmp_path: Path) -> None:
    torch.manual_seed(99)
    again = builtin_model(tmp_path, recipe=TINY)
    assert again.name == tiny_model.name
    for name in ("model.safetensors", "tokenizer.json", "config.json"):
        assert (again / name).read_bytes() == (tiny_model / name).read_bytes(), name
    other = builtin_model(tmp_path, recipe=BuiltinRecipe(**{**vars(TINY), "seed": 1}))
    assert other.name != again.name
    weights, others = load_file(again / "model.safetensors"), load_file(other / "model.safetensors")
    assert not any(torch.equal(weights[name], others[name]) for name in weights if "proj" in name)


def test_training_lowers_the_loss(tmp_path: Path) -> None:
    recipe = BuiltinRecipe(**{**vars(TINY), "steps": 60, "batch_size": 8, "warmup_steps": 5, "learning_rate": 1e-2})
    documents = builtin_documents(heldout=False)
    tokenizer = train_tokenizer(recipe, documents)
    ids_BC = torch.tensor(tokenizer("\n".join(documents)[:4000])["input_ids"])[: 16 * 32].view(16, 32)
    losses = [
        builtin.train_model(BuiltinRecipe(**{**vars(recipe), "steps": steps}), tokenizer, documents)(
            input_ids=ids_BC, labels=ids_BC
        ).loss.item()
        for steps in (0, 60)
    ]
    # ln 300 = 5.7 is chance.
    assert losses[0] == pytest.approx(5.7, abs=0.2)
    assert losses[1] < losses[0] - 0.5


def test_another_architecture_is_trained_the_same_way() -> None:
    documents = builtin_documents(heldout=False)
    tokenizer = train_tokenizer(TINY, documents)
    config = model_config(TINY, tokenizer, "qwen3", head_dim=8)
    before, after = (
        builtin.train_model(BuiltinRecipe(**{**vars(TINY), "steps": steps}), tokenizer, documents, config=config)
        for steps in (0, 2)
    )
    assert (after.config.model_type, after.config.head_dim) == ("qwen3", 8)
    assert after.config.vocab_size == len(tokenizer)
    assert after.config.intermediate_size == TINY.intermediate_size
    assert not any(map(torch.equal, before.parameters(), after.parameters()))


def test_callers_random_state_and_threads_stay(tmp_path: Path) -> None:
    torch.manual_seed(5)
    random.seed(5)
    before = torch.get_rng_state(), random.getstate(), torch.get_num_threads(), torch.is_grad_enabled()
    builtin_model(tmp_path, recipe=TINY)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (random.getstate(), torch.get_num_threads(), torch.is_grad_enabled()) == before[1:]


def test_trains_inside_no_grad(tmp_path: Path) -> None:
    with torch.no_grad():
        assert (builtin_model(tmp_path, recipe=TINY) / "model.safetensors").is_file()


def test_progress_counts_every_step(tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []

    def track(items: Iterable[int], label: str, total: int) -> Iterable[int]:
        for item in items:
            yield item
            seen.append((label, item, total))

    builtin_model(tmp_path, recipe=TINY, track=track)
    assert seen == [("training the built-in model", step, 4) for step in range(4)]


def test_a_crash_leaves_no_model_and_the_next_call_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(builtin, "train_model", crash)
        with pytest.raises(KeyboardInterrupt):
            builtin_model(tmp_path, recipe=TINY)
    assert list(tmp_path.iterdir()) == []
    assert (builtin_model(tmp_path, recipe=TINY) / "config.json").is_file()


def test_unwritable_cache_is_an_input_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(InputError, match=r"cannot write to the cache .*file") as caught:
        builtin_model(tmp_path / "file", recipe=TINY)
    assert "MOEIFY_CACHE" in caught.value.hint


def test_default_width_divides_into_experts() -> None:
    assert all(BuiltinRecipe().intermediate_size % num_experts == 0 for num_experts in (2, 4, 8, 16, 32))


def test_folder_can_be_read_by_others(tiny_model: Path) -> None:
    mask = os.umask(0)
    os.umask(mask)
    assert tiny_model.stat().st_mode & 0o777 == 0o777 & ~mask
