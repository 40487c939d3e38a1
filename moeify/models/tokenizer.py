"""The tokenizer of a model folder and the files beside it, checked when they are read.

A tokenizer that cannot be loaded, encodes nothing or gives ids that the model has no embedding for is refused. Broken
files that only chats and generation need are carried on with a warning.
"""

import base64
import binascii
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from jinja2 import Environment, TemplateError, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from transformers import AutoTokenizer

from moeify.errors import InputError, first_line, warn
from moeify.models.companions import tokenizer_names
from moeify.models.config import load_config
from moeify.models.json_files import read_mapping

LIMIT_BYTES = 1 << 28
STDOUT = 1
# Letters, digits, signs, spaces and lines, and characters of two to four bytes.
PROBE = "Hello, world! 12,345 times:\n\n\t\u00e4\u00f6\u20ac \u6f22\u5b57 \U0001f642.\n"


def load_tokenizer(path: Path) -> Any:
    """The tokenizer of a model's folder.

    Raises:
        InputError: the folder has none that transformers can load without remote code, or it does not fit the model.
    """
    try:
        tokenizer = stock_tokenizer(path)
        ids = tokenizer(PROBE, add_special_tokens=False, verbose=False)["input_ids"]
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        # A panic of the tokenizers library is no Exception.
        raise _unusable(path, error) from error
    if not isinstance(ids, list) or not ids or not all(isinstance(token, int) and token >= 0 for token in ids):
        raise InputError(f"the tokenizer in {path} gives no tokens for a text", "fetch its files again")
    vocab_size = load_config(path).get_text_config().vocab_size
    if max(ids) >= vocab_size:
        raise InputError(
            f"the tokenizer gives token id {max(ids)}, the model has {vocab_size} tokens",
            "tokenizer and weights are not of the same model",
        )
    for file, fault in _faults(path):
        warn(f"{file} is broken and kept as it is: {fault}")
    if fault := _template_fault(getattr(tokenizer, "chat_template", None)):
        warn(f"the chat template in {path} is broken and kept as it is: {fault}")
    return tokenizer


def stock_tokenizer(path: Path, **arguments: Any) -> Any:
    """The tokenizer as stock transformers loads it; nothing of the folder runs, and nothing in it is printed.

    Args:
        path: the folder.
        arguments: passed on to `from_pretrained`.
    """
    with _no_output():
        # False, not the default: that one asks whoever sits at the terminal, and runs the code at a "y".
        return AutoTokenizer.from_pretrained(path, trust_remote_code=False, **arguments)


@contextmanager
def _no_output() -> Iterator[None]:
    """Let compiled code print nothing: the tokenizers library writes to stdout what it does not know in a file."""
    sys.stdout.flush()
    try:
        kept = os.dup(STDOUT)
    except OSError:
        # There is no stdout.
        yield
        return
    try:
        with Path(os.devnull).open("w") as nowhere:
            os.dup2(nowhere.fileno(), STDOUT)
        yield
    finally:
        os.dup2(kept, STDOUT)
        os.close(kept)


def _unusable(path: Path, error: BaseException) -> InputError:
    """Name the file that is broken or the package that is missing; the library's message often names another one."""
    for file, fault in _faults(path):
        return InputError(f"no usable tokenizer in {path}: {file.name}: {fault}", "fetch it again")
    model = path / "tokenizer.model"
    if model.is_file() and not (path / "tokenizer.json").is_file():
        packages = ("tiktoken",) if _is_tiktoken(model) else ("sentencepiece", "google.protobuf")
        missing = [name.rpartition(".")[2] for name in packages if not _is_installed(name)]
        if missing:
            return InputError(
                f"the tokenizer in {path} is a {model.name} alone, which needs the package {' and '.join(missing)}",
                f"pip install {' '.join(missing)}, or copy tokenizer.json beside the weights",
            )
    return InputError(f"no usable tokenizer in {path}: {first_line(error)}", "copy tokenizer.json beside the weights")


def _is_installed(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except (ImportError, ValueError):
        return False


def _is_tiktoken(file: Path) -> bool:
    """Whether a tokenizer.model is a text of tokens in base64 and their ranks; sentencepiece's is binary."""
    with file.open("rb") as reader:
        token, _, rank = reader.readline(1 << 10).partition(b" ")
    try:
        return bool(base64.b64decode(token, validate=True)) and rank.strip().isdigit()
    except binascii.Error:
        return False


def _faults(path: Path) -> Iterator[tuple[Path, str]]:
    """Files of a tokenizer that are not what their names say, and why."""
    for name in tokenizer_names(path):
        file = path / name
        try:
            if name.endswith(".json"):
                read_mapping(file, limit_bytes=LIMIT_BYTES)
            elif name.endswith((".txt", ".jinja")):
                file.read_text("utf-8")
        except InputError as error:
            yield file, str(error).removeprefix(f"{file} ")
        except (OSError, UnicodeDecodeError) as error:
            yield file, first_line(error)


class Generation(Extension):
    """The tag that marks a model's own words in a template; transformers' addition to jinja."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        """Take it for its content."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _template_fault(template: Any) -> str:
    """Why a chat template, or one of several by name, cannot be used; it is parsed, never run."""
    if isinstance(template, dict):
        return next((fault for one in template.values() if (fault := _template_fault(one))), "")
    if template is None:
        return ""
    if not isinstance(template, str):
        return f"it is a {type(template).__name__}, expected a text"
    try:
        Environment(extensions=["jinja2.ext.loopcontrols", Generation], autoescape=True).parse(template)
    except (TemplateError, RecursionError) as error:
        return first_line(error)
    return ""
