"""What a chat template puts around questions and answers, and templates that do not do what they should."""

from typing import Any

import pytest
from tiny_tokenizers import byte_level

from moeify.errors import InputError, MoeifyWarning
from moeify.models import chat
from moeify.models.chat import chat_turns, conversation, turns_of

CHATML = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nBe brief.<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
BRACKETS = (
    "{% for m in messages %}{% if m.role == 'user' %}<s>[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }}</s>{% endif %}{% endfor %}"
)
ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return byte_level(size=400)


def with_template(tokenizer: Any, template: str) -> Any:
    tokenizer.chat_template = template
    return tokenizer


def test_turns(tokenizer: Any) -> None:
    turns = turns_of(with_template(tokenizer, CHATML), "a model")
    assert [tokenizer.decode(piece) for piece in (turns.opening, turns.answer, turns.next)] == [
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n",
        "<|im_end|>\n<|im_start|>assistant\n",
        "<|im_end|>\n<|im_start|>user\n",
    ]


@pytest.mark.parametrize(
    ("template", "fault"),
    [
        (BRACKETS, "marks the end of each question by no token of its own"),
        ("<s>", "does not repeat the messages one after the other"),
        ("{{ raise_exception('roles') }}", "does not take this conversation: TemplateError: roles"),
    ],
)
def test_a_template_without_turns_is_said(tokenizer: Any, template: str, fault: str) -> None:
    with pytest.warns(MoeifyWarning, match=f"the chat template of a model {fault}.*written without it"):
        assert chat_turns(with_template(tokenizer, template), "a model") is None


@pytest.mark.filterwarnings("error")
def test_no_template_no_turns(tokenizer: Any) -> None:
    assert chat_turns(with_template(tokenizer, ""), "a model") is None


def test_a_template_that_does_not_end_is_given_up(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat, "LIMIT_SECONDS", 0.2)
    # As long as the test needs, not for ever: the thread goes on.
    endless = ENDLESS.replace("99999", "900")
    with pytest.raises(InputError, match="does not end within 0 seconds"):
        conversation(with_template(tokenizer, endless * 40), [{"role": "user", "content": "Hi"}], "a model")
