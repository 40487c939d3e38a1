"""What models say: as much as was asked, the same again, pieces that make the whole; templates only where asked for."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MakeDense
from transformers import AutoModelForCausalLM, AutoTokenizer

from moeify.check.generate import Conversation, Speaker, generate
from moeify.convert.pipeline import split
from moeify.errors import InputError, MoeifyWarning, UsageError
from moeify.options import GenerateOptions, SplitOptions

PROMPT = "The class of the object"
SHORT = GenerateOptions(tokens=12)
TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{% if add_generation_prompt %}[me]{% endif %}"
)


@pytest.fixture(scope="module")
def moe(taught: Path, calibration_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("generate") / "moe"
    with pytest.warns(MoeifyWarning, match="saves nothing"):
        split(str(taught), out, SplitOptions(active=8, shared=2, tokens=1024, calibration=(str(calibration_file),)))
    return out


def with_template(folder: Path, to: Path, template: str = TEMPLATE) -> Path:
    shutil.copytree(folder, to)
    (to / "chat_template.jinja").write_text(template)
    return to


def test_greedy_text_is_that_of_stock_transformers(taught: Path) -> None:
    tokenizer, model = AutoTokenizer.from_pretrained(taught), AutoModelForCausalLM.from_pretrained(taught)
    ids = tokenizer(PROMPT, return_tensors="pt")
    expected = model.generate(**ids, max_new_tokens=12, do_sample=False)[0, ids["input_ids"].shape[1] :]
    pieces: list[tuple[str, str]] = []
    result = generate([str(taught)], PROMPT, SHORT, show=lambda *piece: pieces.append(piece))
    (made,) = result.generations
    assert made.text == tokenizer.decode(expected, skip_special_tokens=True)
    assert "".join(text for _, text in pieces) == made.text
    assert {name for name, _ in pieces} == {str(taught)}
    assert len(pieces) > 2
    assert (made.num_prompt_tokens, made.num_tokens) == (ids["input_ids"].shape[1], len(expected))
    assert made.ended == (len(expected) < 12)
    assert made.first_token_ms > 0
    assert made.tokens_per_second > 0


def test_a_converted_model_with_all_experts_on_says_the_same(taught: Path, moe: Path) -> None:
    dense, converted = generate([str(taught), str(moe)], PROMPT, SHORT).generations
    assert (dense.model, converted.model) == (str(taught), str(moe))
    assert dense.text == converted.text


def test_a_seed_gives_the_same_text_again_and_leaves_the_caller_s_numbers(taught: Path) -> None:
    def text(seed: int) -> str:
        options = GenerateOptions(tokens=12, temperature=1.5, seed=seed)
        return generate([str(taught)], PROMPT, options).generations[0].text

    before = torch.get_rng_state()
    texts = [text(0), text(0), text(1)]
    assert torch.equal(before, torch.get_rng_state())
    assert texts[0] == texts[1] != texts[2]


def test_what_a_folder_says_of_generation_is_left_out_but_for_its_end(taught: Path, tmp_path: Path) -> None:
    plain = generate([str(taught)], PROMPT, SHORT).generations[0]
    tokenizer = AutoTokenizer.from_pretrained(taught)
    second = tokenizer(PROMPT + plain.text)["input_ids"][plain.num_prompt_tokens + 1]
    folder = Path(shutil.copytree(taught, tmp_path / "other"))
    odd = {"num_beams": 3, "repetition_penalty": 9.0, "max_new_tokens": 3, "do_sample": True, "min_length": 40}
    (folder / "generation_config.json").write_text(json.dumps({**odd, "eos_token_id": [1, second]}))
    made = generate([str(folder)], PROMPT, SHORT).generations[0]
    assert made.ended
    assert made.num_tokens == 2
    assert plain.text.startswith(made.text)


def test_a_conversation_remembers(taught: Path, tmp_path: Path) -> None:
    speaker = Speaker.open(str(with_template(taught, tmp_path / "chat")), GenerateOptions(tokens=4))
    talk = Conversation(speaker, [{"role": "system", "content": "S"}])
    first = talk.answer("one")
    assert talk.messages[1:] == [{"role": "user", "content": "one"}, {"role": "assistant", "content": first.text}]
    # The template says where special tokens are.
    text = f"[system]S[user]one[assistant]{first.text}[user]two[me]"
    ids = speaker.tokenizer(text, add_special_tokens=False)["input_ids"]
    assert talk.answer("two").num_prompt_tokens == len(ids)
    said = list(talk.messages)
    with pytest.raises(InputError, match=r"more than the 64 that .* takes"):
        talk.answer("long " * 60)
    assert talk.messages == said


def test_ctrl_c_leaves_the_conversation_as_it_was(taught: Path) -> None:
    talk = Conversation(Speaker.open(str(taught), SHORT))

    def interrupt(_: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        talk.answer("one", interrupt)
    assert talk.messages == []
    assert talk.answer("one").num_tokens


def test_a_template_is_rendered_only_where_it_is_asked_for(taught: Path, tmp_path: Path) -> None:
    broken = str(with_template(taught, tmp_path / "broken", "{{ raise_exception('no \x1b[2Jsystem') }}"))
    assert generate([broken], PROMPT, SHORT).generations[0].num_tokens
    with pytest.raises(InputError, match=r"does not take this conversation: .*no \\x1b") as caught:
        generate([broken], PROMPT, SHORT, chat=True)
    assert "moeify generate" in caught.value.hint
    # It sees nothing of Python.
    spy = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
    with pytest.raises(InputError, match=r"unsafe|undefined"):
        generate([str(with_template(taught, tmp_path / "spy", spy))], PROMPT, SHORT, chat=True)
    with pytest.raises(InputError, match="has no chat template"):
        generate([str(taught)], PROMPT, SHORT, chat=True)
    with pytest.raises(InputError, match="makes 5,000,000 characters"):
        generate([str(with_template(taught, tmp_path / "long", "{{ 'x' * 5000000 }}"))], "x", SHORT, chat=True)


def test_a_model_that_computes_nan_is_said_to_do_so(make_dense: MakeDense, tmp_path: Path) -> None:
    folder = tmp_path / "nan"
    shutil.copytree(make_dense("llama"), folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.model.norm.weight.fill_(math.inf)
    model.save_pretrained(folder)
    with pytest.raises(InputError, match="computes infinity or NaN"):
        generate([str(folder)], PROMPT, GenerateOptions(tokens=4, temperature=1.0))


@pytest.mark.parametrize("values", [{"temperature": 0.001}, {"temperature": -1.0}, {"tokens": 0}])
def test_options_out_of_range(values: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="--t"):
        GenerateOptions(**values)


def test_a_wrong_name_is_said_before_the_first_model_speaks(taught: Path) -> None:
    said: list[str] = []
    with pytest.raises(InputError, match="no model at"):
        generate([str(taught), "./nowhere"], PROMPT, SHORT, show=lambda *piece: said.extend(piece))
    assert said == []
