"""Quality equals perplexity as evaluate has it and divergence by its definition; experts are counted one by one."""

import math
from collections import Counter
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MakeDense
from tiny_moe import ARCHITECTURES, chosen_of, text, tiny
from torch import Tensor

from moeify.benchmark.models import quality as quality_module
from moeify.benchmark.models.anatomy import experts_modules
from moeify.benchmark.models.expert_use import SMALLEST_COUNT, expert_use, output_energies, top_places
from moeify.benchmark.models.quality import block_scores, measure_quality
from moeify.benchmark.models.results import ALL_TEXTS, Interval
from moeify.benchmark.models.samples import write_samples
from moeify.check.bootstrap import RESAMPLES, draws, interval
from moeify.check.evaluate import evaluate, load
from moeify.data.text import evaluation_tokens

CONTEXT = 16


def ids_of(num_blocks: int = 6, context: int = 12) -> Tensor:
    return text(num_blocks, context).cpu()


@pytest.fixture(scope="module")
def moe() -> Any:
    return tiny("GraniteMoeShared", num_hidden_layers=2, num_local_experts=6).eval().cpu()


def test_intervals_of_a_mean_are_those_of_the_normal_distribution() -> None:
    values = torch.randn(400, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    low, high = interval(values[draws(400)].mean(dim=1))
    error = 1.96 * float(values.std()) / math.sqrt(400)
    assert low == pytest.approx(float(values.mean()) - error, abs=0.1 * error)
    assert high == pytest.approx(float(values.mean()) + error, abs=0.1 * error)
    assert draws(7).shape == (RESAMPLES, 7)
    assert torch.equal(draws(7), draws(7))


def test_scores_are_their_definitions(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    model_LV, its_LV = (3 * torch.randn(40, 9, generator=generator) for _ in range(2))
    ids_L = torch.randint(9, (40,), generator=generator)
    p, q = its_LV.double().softmax(-1), model_LV.double().softmax(-1)
    expected = [
        float(-q.log()[torch.arange(40), ids_L].mean()),
        float((p * (p.log() - q.log())).sum(-1).mean()),
        float((p.argmax(-1) == q.argmax(-1)).double().mean()),
    ]
    assert 0 < expected[2] < 1
    for chunk in (64, 7, 1):
        monkeypatch.setattr(quality_module, "CHUNK_TOKENS", chunk)
        assert block_scores(model_LV, its_LV, ids_L).tolist() == pytest.approx(expected, rel=1e-6)


def test_perplexity_is_that_of_evaluate(make_dense: MakeDense, calibration_file: Path, tokenizer: Any) -> None:
    folders = {"dense": str(make_dense("llama")), "other": str(make_dense("llama", seed=1))}
    source = str(calibration_file)
    ids_BC = evaluation_tokens(source, tokenizer, num_tokens=10 * CONTEXT).ids_T.view(-1, CONTEXT)
    rows = measure_quality({name: load(folder) for name, folder in folders.items()}, "dense", {"text": ids_BC})
    known = evaluate(list(folders.values()), [source], tokens=ids_BC.numel(), context=CONTEXT, stride=CONTEXT)
    dense, other = rows
    assert [row.perplexity for row in rows] == pytest.approx([result.perplexity for result in known], rel=1e-5)
    assert {row.num_tokens for row in rows} == {known[0].num_tokens}
    assert (dense.ratio, dense.ratio_low, dense.ratio_high) == (1, 1, 1)
    assert (dense.kl_nats, dense.top1_agreement) == (0, 1)
    assert other.ratio == pytest.approx(known[1].perplexity / known[0].perplexity, rel=1e-5)
    assert other.ratio_low < other.ratio < other.ratio_high
    assert other.perplexity_low < other.perplexity < other.perplexity_high
    assert 0 < other.kl_low < other.kl_nats < other.kl_high
    assert 0 <= other.top1_agreement < 1


def test_a_ratio_to_a_static_model_is_of_the_same_blocks(make_dense: MakeDense) -> None:
    """Blocks differ more than models: two ratios to dense may overlap where this one is sure."""
    models = {name: load(str(make_dense("llama", seed=seed))) for name, seed in (("dense", 0), ("moe", 1), ("cut", 2))}
    dense, moe, cut = measure_quality(models, "dense", {"text": ids_of()}, static=["cut"])
    assert dense.over_static == cut.over_static == {}
    over = moe.over_static["cut"]
    assert over.value == pytest.approx(moe.perplexity / cut.perplexity)
    assert over.low < over.value < over.high
    (_, same) = measure_quality({**models, "cut": models["moe"]}, "dense", {"text": ids_of()}, static=["cut"])[:2]
    assert same.over_static["cut"] == Interval(1, 1, 1)


def test_a_model_that_overflows_has_no_finite_perplexity(make_dense: MakeDense) -> None:
    folder = str(make_dense("llama"))
    broken = load(folder)
    with torch.no_grad():
        broken.model.norm.weight.fill_(math.nan)
    found = measure_quality({"dense": load(folder), "broken": broken}, "dense", {"text": ids_of()})
    assert math.isfinite(found[0].perplexity)
    assert found[1].perplexity == found[1].ratio == math.inf


@torch.no_grad()
def test_load_and_company_are_counted_by_hand(moe: Any) -> None:
    ids_BC = ids_of()
    chosen: dict[int, list[list[int]]] = {0: [], 1: []}
    handles = [
        moe.model.layers[layer].block_sparse_moe.router.register_forward_hook(
            lambda _, __, out, layer=layer: chosen[layer].extend(chosen_of(out).tolist())
        )
        for layer in chosen
    ]
    for ids_C in ids_BC:
        moe(ids_C[None])
    for handle in handles:
        handle.remove()
    found = expert_use(moe, {"text": ids_BC}, str)
    assert [one.layer for one in found] == [0, 1]
    total = ids_BC.numel()
    for one in found:
        counts = Counter(expert for row in chosen[one.layer] for expert in row)
        assert one.load == pytest.approx([counts[expert] / (2 * total) for expert in range(6)])
        assert sum(one.load) == pytest.approx(1)
        for i in range(6):
            for j in range(6):
                both = sum(i in row and j in row for row in chosen[one.layer])
                independent = counts[i] * counts[j] / total
                expected = both / independent - 1 if i != j and independent else 0.0
                assert one.coactivation[i][j] == pytest.approx(expected, abs=1e-4)
        occurrences = Counter(ids_BC.flatten().tolist())
        for expert, tokens in enumerate(one.top_tokens):
            chose = Counter(
                token
                for token, row in zip(ids_BC.flatten().tolist(), chosen[one.layer], strict=True)
                if expert in row and occurrences[token] >= SMALLEST_COUNT
            )
            best = sorted((chose[token] / occurrences[token] for token in chose), reverse=True)[:8]
            assert [chose[int(token)] / occurrences[int(token)] for token in tokens] == best


def test_quality_over_all_texts_is_that_of_their_blocks_together(make_dense: MakeDense) -> None:
    models = {name: load(str(make_dense("llama", seed=seed))) for name, seed in (("dense", 0), ("moe", 1))}
    texts = {"a": ids_of(3, 12), "b": ids_of(5, 12) // 2}
    rows = measure_quality(models, "dense", texts)
    together = measure_quality(models, "dense", {ALL_TEXTS: torch.cat(list(texts.values()))})
    assert [row.data for row in rows[:: len(models)]] == ["a", "b", ALL_TEXTS]
    assert rows[-len(models) :] == together


def test_each_of_several_texts_has_its_own_load(moe: Any) -> None:
    texts = {"a": ids_of(4, 12), "b": ids_of(2, 12) // 2}
    both = expert_use(moe, texts, str)
    for name, ids_BC in texts.items():
        alone = expert_use(moe, {name: ids_BC}, str)
        # Of one text there is nothing to tell apart.
        assert [one.texts for one in alone] == [{}, {}]
        for one, other in zip(both, alone, strict=True):
            assert one.texts[name] == pytest.approx(other.load)
    assert both[0].load == pytest.approx([(4 * a + 2 * b) / 6 for a, b in zip(*both[0].texts.values(), strict=True)])
    assert both[0].texts["a"] != both[0].texts["b"]


@torch.no_grad()
def test_samples_take_the_likeliest_token_again_and_again(moe: Any) -> None:
    class Words:
        eos_token_id = None
        decode = staticmethod(lambda ids, **_: " ".join(map(str, torch.as_tensor(ids).tolist())) + " ")

    texts = {"a": ids_of(4, 12), "b": ids_of(4, 12) // 2}
    samples = write_samples({"dense": moe, "moe": moe}, texts, Words(), longest=16)
    assert [sample.data for sample in samples] == ["a", "b"]
    for sample in samples:
        ids = texts[sample.data][0, :8].tolist()
        assert sample.prompt.split() == list(map(str, ids))
        for _ in range(8):
            ids.append(int(moe(torch.tensor([ids])).logits[0, -1].argmax()))
        assert sample.continuations["moe"].split() == list(map(str, ids[8:]))
        assert sample.continuations["moe"] == sample.continuations["dense"]


@pytest.mark.parametrize("name", ARCHITECTURES)
@torch.no_grad()
def test_outputs_of_experts_by_hand(name: str) -> None:
    model = tiny(name).eval().cpu()
    module = list(experts_modules(model).values())[-1]
    inputs_TD = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    found_TE = output_energies(module, inputs_TD)
    for expert in range(found_TE.shape[1]):
        if module.has_bias:
            hidden_TF = module.act_fn(inputs_TD @ module.up_proj[expert].T + module.up_proj_bias[expert])
        elif module.has_gate:
            gate_TF, up_TF = (inputs_TD @ module.gate_up_proj[expert].T).chunk(2, dim=1)
            hidden_TF = module.act_fn(gate_TF) * up_TF
        else:
            hidden_TF = module.act_fn(inputs_TD @ module.up_proj[expert].T)
        outputs_TD = hidden_TF @ module.down_proj[expert].T
        assert torch.allclose(found_TE[:, expert], outputs_TD.square().sum(dim=1), rtol=1e-4)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_is_understood(name: str) -> None:
    model = tiny(name).eval().cpu()
    found = expert_use(model, {"text": ids_of()}, str)
    assert [one.layer for one in found] == sorted(experts_modules(model))
    for one in found:
        assert sum(one.load) == pytest.approx(1)
        assert 0 < one.random_capture < 1
        assert 0 < one.oracle_capture <= 1
        assert len(one.top_tokens) == len(one.load) == len(one.coactivation)


@torch.no_grad()
def test_the_router_is_compared_with_the_best_and_a_random_choice(moe: Any) -> None:
    """An oracle router captures everything; one that takes the worst experts less than a random choice."""
    ids_BC = ids_of()
    plain = expert_use(moe, {"text": ids_BC}, str)[0]
    assert plain.random_capture < 1
    layer = moe.model.layers[0].block_sparse_moe

    class Unwatched:
        __call__ = staticmethod(layer.experts.forward)
        parameters = staticmethod(layer.experts.parameters)

    def choose(largest: bool) -> Any:
        def route(_: Any, arguments: Any, out: Any) -> Any:
            # Not the module itself, whose calls are watched.
            energy_TE = output_energies(Unwatched(), arguments[0])
            chosen_TK = energy_TE.topk(2, dim=1, largest=largest).indices
            return tuple(chosen_TK if part is chosen_of(out) else part for part in out)

        return route

    captures = {}
    for largest in (True, False):
        handle = layer.router.register_forward_hook(choose(largest))
        captures[largest] = expert_use(moe, {"text": ids_BC}, str)[0]
        handle.remove()
    assert captures[True].oracle_capture == pytest.approx(1)
    assert captures[False].oracle_capture < captures[False].random_capture < 1
    assert captures[True].random_capture == pytest.approx(plain.random_capture, rel=1e-5)
    # Every choice of two of six, and the mean of what they add.
    inputs_TD: list[Tensor] = []
    handle = layer.router.register_forward_hook(lambda _, arguments, __: inputs_TD.append(arguments[0]))
    for ids_C in ids_BC:
        moe(ids_C[None])
    handle.remove()
    energy_TE = output_energies(layer.experts, torch.cat(inputs_TD))
    adds = [float(energy_TE[:, list(pair)].sum()) for pair in combinations(range(6), 2)]
    assert plain.random_capture == pytest.approx(
        sum(adds) / len(adds) / float(energy_TE.topk(2).values.sum()), rel=1e-4
    )


def test_top_tokens_are_those_that_choose_an_expert_most_often() -> None:
    counts_UE = torch.tensor([[10.0, 10], [8, 0], [6, 2], [3, 0], [0, 12], [4, 0]])
    occurrences_U = torch.tensor([10.0, 8, 8, 3, 12, 4])
    # The fourth is too rare to say anything.
    assert occurrences_U[3] < SMALLEST_COUNT
    assert top_places(counts_UE, occurrences_U, 0) == [0, 1, 5, 2]
    assert top_places(counts_UE, occurrences_U, 1) == [4, 0, 2]


def test_a_long_text_takes_no_more_oracle_tokens(moe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from moeify.benchmark.models import expert_use as module

    seen: list[int] = []

    def spy(experts: Any, inputs_TD: Tensor) -> Tensor:
        seen.append(len(inputs_TD))
        return output_energies(experts, inputs_TD)

    monkeypatch.setattr(module, "ORACLE_TOKENS", 24)
    monkeypatch.setattr(module, "output_energies", spy)
    found = expert_use(moe, {"text": ids_of(8, 12)}, lambda token: f"<{token}>")
    assert sum(seen) == 2 * 24
    assert all(token.startswith("<") for one in found for tokens in one.top_tokens for token in tokens)
    assert any(tokens for one in found for tokens in one.top_tokens)
