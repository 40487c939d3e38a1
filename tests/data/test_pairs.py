"""What encoders read and decoders write where nobody says what: hidden spans, second halves, what a model hears."""

from typing import Any

import pytest
import torch
from conftest import MakeDense

from moeify.convert.exactness import twin_inputs
from moeify.data import pairs
from moeify.data.pairs import EARLIER, HIDDEN_SHARE, heard, sentinels, text_pairs
from moeify.models import stock
from moeify.models.dense import open_dense

END, START = 1, 0


class Tokens:
    """As much of a tokenizer as is asked for."""

    eos_token_id = END

    def __init__(self, *names: str) -> None:
        self.names = names

    def get_vocab(self) -> dict[str, int]:
        return {name: 1000 + place for place, name in enumerate(self.names)}


def marks(count: int) -> Tokens:
    return Tokens(*(f"<extra_id_{number}>" for number in range(count)))


def texts(rows: int = 3, context: int = 64) -> torch.Tensor:
    return torch.arange(2, 2 + rows * context).view(rows, context)


@pytest.mark.parametrize(("count", "spans"), [(100, 3), (2, 2), (1, 1)])
def test_hidden_spans_and_what_is_left_are_the_text(count: int, spans: int) -> None:
    ids_BC = texts()
    made = text_pairs(ids_BC, marks(count), START)
    hidden = round(HIDDEN_SHARE * 64)
    assert made["input_ids"].shape == (3, 64 - hidden + spans + 1)
    assert made["decoder_input_ids"].shape == (3, 1 + hidden + spans)
    for ids, source, written in zip(ids_BC.tolist(), *(made[name].tolist() for name in made), strict=True):
        assert (source[-1], written[0]) == (END, START)
        filled: list[int] = []
        for token in source[:-1]:
            if token < 1000:
                filled.append(token)
                continue
            place = written.index(token) + 1
            stop = next((later for later in range(place, len(written)) if written[later] >= 1000), len(written))
            filled += written[place:stop]
        assert filled == ids
        assert source[0] < 1000
    assert torch.equal(text_pairs(ids_BC, marks(count), START)["input_ids"], made["input_ids"])
    # A single span is always the last.
    other = text_pairs(ids_BC, marks(count), START, seed=1)["input_ids"]
    assert torch.equal(other, made["input_ids"]) is (spans == 1)


def test_without_sentinels_the_second_half_is_written() -> None:
    made = text_pairs(texts(1, 10), Tokens("<extra_id_1>"), START)
    assert made["input_ids"].tolist() == [[2, 3, 4, 5, 6, END]]
    assert made["decoder_input_ids"].tolist() == [[START, 7, 8, 9, 10, 11]]
    assert sentinels(marks(7)) == list(range(1000, 1007))


class Dictation:
    """A model that writes what it is told to."""

    device, dtype = "cpu", torch.float32
    generation_config = type("Defaults", (), {"eos_token_id": END})
    config = type("Config", (), {"max_target_positions": 8})

    def __init__(self, rows: list[list[int]]) -> None:
        self.rows = rows

    def generate(self, input_features: torch.Tensor, **_: Any) -> torch.Tensor:
        done, self.rows = self.rows[: len(input_features)], self.rows[len(input_features) :]
        return torch.tensor(done)


@pytest.mark.parametrize(("names", "first"), [((EARLIER,), [1000, 13, 5, 11]), ((), [5, 12, 13, 5, 11])])
def test_shorter_texts_have_those_before_them_in_front(
    names: tuple[str, ...], first: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pairs, "HEARD", 2)
    monkeypatch.setattr(pairs, "LEAST_TOKENS", 1)
    rows = [[5, 11, END, END, END], [5, 20, 21, 22, END], [5, 12, 13, END, END]]
    model = Dictation([[*row, *[END] * (5 - len(row))] for row in rows])
    made = heard(model, {"input_features": torch.zeros(3, 8, 4)}, Tokens(*names))["decoder_input_ids"]
    assert made.tolist()[1] == [5, 20, 21, 22]
    assert made.tolist()[0] == first[-4:]
    monkeypatch.setattr(pairs, "LEAST_TOKENS", 6)
    model.rows = [[*row, *[END] * (5 - len(row))] for row in rows]
    longer = heard(model, {"input_features": torch.zeros(3, 8, 4)}, Tokens(*names))["decoder_input_ids"]
    assert longer.tolist()[1][-4:] == [5, 20, 21, 22]
    assert longer.shape == (3, 6)
    assert made.shape == (3, 4)
    model.rows = [[*row, *[END] * (5 - len(row))] for row in rows]
    cut = heard(model, {"input_features": torch.zeros(3, 8, 4)}, Tokens(*names), 3)["decoder_input_ids"]
    assert cut.tolist()[1:] == [[5, 20, 21], [5, 12, 13]]


def test_a_whisper_writes_what_its_decoder_is_calibrated_on(make_dense: MakeDense) -> None:
    dense = open_dense(str(make_dense("whisper", decoder_start_token_id=5)))
    model, one = stock.load(dense.path).eval(), twin_inputs(dense)["input_features"]
    made = heard(model, {"input_features": torch.cat([one, one.flip(-1)])}, dense.tokenizer())
    ids_BL = made["decoder_input_ids"]
    assert ids_BL.shape[1] <= int(dense.config.max_target_positions)
    logits_BLV = model(input_features=torch.cat([one, one.flip(-1)]), decoder_input_ids=ids_BL).logits
    assert logits_BLV.isfinite().all()
