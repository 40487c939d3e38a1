"""Inputs of models with an encoder and a decoder, of which nobody says what is to be written.

    of text, sentinel tokens     spans are hidden from the encoder, the decoder writes them, as T5 was trained
                                 (Raffel et al., https://arxiv.org/abs/1910.10683, section 3.1.4)
    of text, none of these       the decoder writes the second half of what the encoder reads the first of
    of sound                     the decoder writes what the dense model itself hears

Nothing is padded: every block has as many tokens as any other.

Legend: B blocks of C tokens of text, S tokens of a source, L of what is written.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moeify.data.text import Provenance
from moeify.models.dense import DenseModel
from moeify.models.inputs import Inputs


@dataclass(frozen=True)
class PairBlocks:
    """Inputs made of B blocks of text."""

    inputs: dict[str, Tensor]
    provenance: Provenance


# Share of a text that is hidden, and tokens of a hidden span in the mean; as in the paper.
HIDDEN_SHARE = 0.15
SPAN_TOKENS = 3
# Tokens that are written of one piece of sound, at most: people say up to a hundred in half a minute.
WRITTEN_TOKENS = 128
# And at least, text before it included: of 20 short recordings the refit of a decoder has too few else. Word error rate
# of whisper-tiny.en (0.190), 400 words, with 27 tokens each and with 96: 4 of 8 experts 0.239, 0.222, static pruning of
# as much 0.359, 0.315; 6 of 8 experts 0.202, 0.215, five words apart (2026-11-26).
LEAST_TOKENS = 96
# Pieces of sound that are heard at once.
HEARD = 8
# What Whisper's tokenizers call the token in front of text that was written before.
EARLIER = "<|startofprev|>"


def text_pairs(ids_BC: Tensor, tokenizer: Any, start: int, seed: int = 0) -> dict[str, Tensor]:
    """Inputs of a model that reads a text and writes one.

    Args:
        ids_BC: the text.
        tokenizer: of the model.
        start: the token that a decoder begins with.
        seed: of the spans.

    Returns:
        input_ids_BS and decoder_input_ids_BL; the decoder predicts each of its tokens but the first.
    """
    marks, end = sentinels(tokenizer), int(tokenizer.eos_token_id)
    if marks:
        generator = torch.Generator().manual_seed(seed)
        rows = [_spans(ids, marks, generator) for ids in ids_BC.tolist()]
    else:
        half = ids_BC.shape[1] // 2
        rows = [(ids[:half], ids[half:]) for ids in ids_BC.tolist()]
    sources = torch.tensor([[*source, end] for source, _ in rows])
    return {"input_ids": sources, "decoder_input_ids": torch.tensor([[start, *written] for _, written in rows])}


def sentinels(tokenizer: Any) -> list[int]:
    """Ids of the tokens that stand for hidden spans, in their order."""
    vocabulary: dict[str, int] = tokenizer.get_vocab()
    marks: list[int] = []
    while (name := f"<extra_id_{len(marks)}>") in vocabulary:
        marks.append(vocabulary[name])
    return marks


def _spans(ids: Sequence[int], marks: Sequence[int], generator: torch.Generator) -> tuple[list[int], list[int]]:
    """A text with a mark in place of each hidden span, and the spans, each behind its mark; it begins unhidden."""
    num_hidden = max(1, round(HIDDEN_SHARE * len(ids)))
    num_spans = max(1, min(round(num_hidden / SPAN_TOKENS), len(marks)))
    source: list[int] = []
    written: list[int] = []
    place = 0
    lengths = (_parts(len(ids) - num_hidden, num_spans, generator), _parts(num_hidden, num_spans, generator))
    for mark, shown, hidden in zip(marks, *lengths, strict=False):
        source += [*ids[place : place + shown], mark]
        written += [mark, *ids[place + shown : place + shown + hidden]]
        place += shown + hidden
    return source, written


def _parts(total: int, count: int, generator: torch.Generator) -> list[int]:
    """That many whole numbers above zero, at random, which add up to the total."""
    cuts = (torch.randperm(total - 1, generator=generator)[: count - 1].sort().values + 1).tolist()
    return [end - begin for begin, end in zip([0, *cuts], [*cuts, total], strict=True)]


@torch.no_grad()
def heard(model: Any, inputs: Inputs, tokenizer: Any, length: int | None = None) -> dict[str, Tensor]:
    """Inputs of a model that hears, with what it writes itself: the likeliest token each time.

    Shorter texts have some of the others in front of them, as what was said before.

    Args:
        model: the dense model.
        inputs: its features of some pieces of sound.
        tokenizer: of the model.
        length: tokens of each; what is longer is cut off. None means those of the longest, at least LEAST_TOKENS.
    """
    room = int(model.config.max_target_positions)
    generated = _generated(model, inputs["input_features"], min(WRITTEN_TOKENS, room // 2))
    texts = [_without_ends(ids, model) for ids in generated]
    length = length or max(min(LEAST_TOKENS, room), *map(len, texts))
    return {
        "input_features": inputs["input_features"],
        "decoder_input_ids": _behind_one_another([text[:length] for text in texts], tokenizer, length),
    }


@torch.no_grad()
def dictation(model: Any, inputs: Inputs, texts: Sequence[str | None], tokenizer: Any) -> dict[str, Tensor]:
    """Inputs of a model that hears, with what it has to write, as it does in use: no text is in front of another.

    Args:
        model: the dense model, which writes down what nobody else did.
        inputs: its features of some pieces of sound.
        texts: what is said in each, where that is known.
        tokenizer: of the model.

    Returns:
        input_features, decoder_input_ids_BL and decoder_attention_mask_BL: behind a text stands its end, masked.
    """
    room, features = int(model.config.max_target_positions), inputs["input_features"]
    rows: list[list[int]] = [[] for _ in texts]
    for is_known in (True, False):
        places = [place for place, text in enumerate(texts) if (text is not None) == is_known]
        if not places:
            continue
        # Of what is known the model writes what stands in front of every text alone, such as the language.
        for place, ids in zip(places, _generated(model, features[places], 1 if is_known else room // 2), strict=True):
            if is_known:
                said = tokenizer(f" {str(texts[place]).strip()}", add_special_tokens=False)["input_ids"]
                rows[place] = [*ids[:-1], *said]
            else:
                rows[place] = _without_ends(ids, model)
    longest = min(room, max(map(len, rows)) + 1)
    rows = [row[: longest - 1] for row in rows]
    end = _ends(model)[0]
    return {
        "input_features": features,
        "decoder_input_ids": torch.tensor([[*row, *[end] * (longest - len(row))] for row in rows]),
        "decoder_attention_mask": torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows]),
    }


def without_gaps(inputs: Inputs, dense: DenseModel) -> dict[str, Tensor]:
    """The same inputs with earlier texts in front of shorter ones, in place of what is masked behind them."""
    if "decoder_attention_mask" not in inputs:
        return dict(inputs)
    rows = zip(inputs["decoder_input_ids"], inputs["decoder_attention_mask"].bool(), strict=True)
    texts = [ids[is_text].tolist() for ids, is_text in rows]
    filled = _behind_one_another(texts, dense.tokenizer(), max(map(len, texts)))
    return {"input_features": inputs["input_features"], "decoder_input_ids": filled}


def _generated(model: Any, features: Tensor, most: int) -> list[list[int]]:
    """What a model writes of each piece of sound: at most so many tokens behind those that begin every text."""
    texts: list[list[int]] = []
    for some in features.split(HEARD):
        written = model.generate(
            input_features=some.to(model.device, model.dtype),
            max_new_tokens=most,
            do_sample=False,
            num_beams=1,
            # All of it: prompts too, whatever the language is.
            force_unique_generate_call=True,
        )
        texts += written.tolist()
    return texts


def _ends(model: Any) -> list[int]:
    ends = model.generation_config.eos_token_id
    return ends if isinstance(ends, list) else [ends]


def _without_ends(ids: list[int], model: Any) -> list[int]:
    """What was written, without what fills up a batch; the end itself is never an input."""
    ends = _ends(model)
    for place, token in enumerate(ids):
        if place and token in ends:
            return ids[:place]
    return ids


def _behind_one_another(texts: Sequence[list[int]], tokenizer: Any, length: int) -> Tensor:
    """ids_BL of texts no longer than that, each behind as much of those before it as there is room for."""
    earlier = [] if EARLIER not in tokenizer.get_vocab() else [int(tokenizer.get_vocab()[EARLIER])]
    return torch.tensor([_filled(place, texts, earlier, length) for place in range(len(texts))])


def _filled(place: int, texts: Sequence[list[int]], earlier: Sequence[int], length: int) -> list[int]:
    """A text behind as much of those before it as there is room for."""
    missing = length - len(texts[place])
    before: list[int] = []
    number = place
    while len(before) < missing:
        number -= 1
        before = [*texts[number % len(texts)], *before]
    before = before[len(before) - missing :]
    return [*earlier[:missing], *before[len(earlier) :], *texts[place]]
