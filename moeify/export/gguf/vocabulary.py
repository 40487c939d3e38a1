"""The tokenizer of a folder, or of another GGUF, as metadata of a GGUF: tokens, how a text is cut, chat template."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf
from transformers import PretrainedConfig

from moeify.errors import InputError, UsageError, first_line, warn
from moeify.export.gguf.tokens import OTHER_CONVERTER, vocabulary_of
from moeify.models.generation import GENERATION_FILE
from moeify.models.gguf import read_header
from moeify.models.json_files import read_mapping
from moeify.models.tokenizer import load_tokenizer
from moeify.words import on_one_line

NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
PREFIX = "tokenizer."
LIMIT_BYTES = 1 << 20


def add_vocabulary(writer: gguf.GGUFWriter, folder: Path, config: PretrainedConfig, *, pre: str = "") -> None:
    """Add tokens, special tokens, how a text is cut, and the chat template.

    Args:
        writer: of the GGUF.
        folder: of the checkpoint, with its tokenizer.
        config: of the checkpoint; there are as many tokens as its vocab_size.
        pre: llama.cpp's name of how a text is cut before merges, where the user states it.

    Raises:
        InputError: llama.cpp cuts no text as this tokenizer does.
        UsageError: `pre` can be no name.
    """
    if pre and not NAME.fullmatch(pre):
        raise UsageError(f"--tokenizer-pre {on_one_line(pre)}: expected a name", "for example llama-bpe or qwen2")
    tokenizer = load_tokenizer(folder)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise InputError(f"the tokenizer in {folder} has no tokenizer.json, and makes none", OTHER_CONVERTER)
    vocabulary = vocabulary_of(json.loads(backend.to_str()), config.get_text_config().vocab_size, pre)
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(list(vocabulary.tokens))
    writer.add_token_types(list(vocabulary.types))
    if vocabulary.scores:
        writer.add_token_scores(list(vocabulary.scores))
    if vocabulary.merges:
        writer.add_token_merges(list(vocabulary.merges))
    writer.add_add_space_prefix(vocabulary.add_space_prefix)
    _add_special(writer, tokenizer, config, _ends(folder, tokenizer, config))
    _add_around(writer, tokenizer)
    template = getattr(tokenizer, "chat_template", None)
    if isinstance(template, dict):
        template = [{"name": name, "template": text} for name, text in template.items()]
    if template:
        writer.add_chat_template(template)


def _add_special(writer: gguf.GGUFWriter, tokenizer: Any, config: PretrainedConfig, ends: Sequence[int]) -> None:
    """Ids of special tokens; the config says what the tokenizer does not."""
    size = config.get_text_config().vocab_size
    for name in ("bos", "unk", "sep", "pad", "mask"):
        numbers = (getattr(one, f"{name}_token_id", None) for one in (tokenizer, config))
        number = next((number for number in numbers if isinstance(number, int) and 0 <= number < size), None)
        if number is not None:
            getattr(writer, f"add_{name}_token_id")(number)
    # llama.cpp ends a text at each of the three.
    for name, number in zip(("eos", "eot", "eom"), ends, strict=False):
        getattr(writer, f"add_{name}_token_id")(number)
    if len(ends) > len(("eos", "eot", "eom")):
        warn(f"a GGUF names three tokens that end a text; left out: {', '.join(map(str, ends[3:]))}")


def _ends(folder: Path, tokenizer: Any, config: PretrainedConfig) -> list[int]:
    """Tokens that end a text: the tokenizer's, the config's, those at which generation stops."""
    numbers = [tokenizer.eos_token_id, config.eos_token_id]
    if (folder / GENERATION_FILE).is_file():
        numbers.append(read_mapping(folder / GENERATION_FILE, limit_bytes=LIMIT_BYTES).get("eos_token_id"))
    flat = [one for number in numbers for one in (number if isinstance(number, list) else [number])]
    size = config.get_text_config().vocab_size
    return list(dict.fromkeys(one for one in flat if isinstance(one, int) and 0 <= one < size))


def _add_around(writer: gguf.GGUFWriter, tokenizer: Any) -> None:
    """Say what is put around a text, as the tokenizer does it."""
    plain, whole = (tokenizer("a", add_special_tokens=special, verbose=False)["input_ids"] for special in (False, True))
    place = next(i for i in range(len(whole) - len(plain) + 1) if whole[i : i + len(plain)] == plain)
    before, after = whole[:place], whole[place + len(plain) :]
    if before not in ([], [tokenizer.bos_token_id]) or after not in ([], [tokenizer.eos_token_id]):
        warn(
            f"the tokenizer puts {tokenizer.convert_ids_to_tokens(before)} before a text and "
            f"{tokenizer.convert_ids_to_tokens(after)} behind it; llama.cpp puts one bos and one eos there at most"
        )
    writer.add_add_bos_token(before[:1] == [tokenizer.bos_token_id])
    writer.add_add_eos_token(after[-1:] == [tokenizer.eos_token_id])


def copy_vocabulary(writer: gguf.GGUFWriter, source: Path) -> None:
    """Copy all of another GGUF's tokenizer as it is.

    Args:
        writer: of the GGUF.
        source: the other GGUF.

    Raises:
        InputError: it is damaged, or has no tokenizer.
    """
    read_header(source)
    try:
        fields = {key: field for key, field in gguf.GGUFReader(source).fields.items() if key.startswith(PREFIX)}
        if gguf.Keys.Tokenizer.LIST not in fields:
            raise InputError(f"{source} has no tokenizer", "start from the model's safetensors")
        for key, field in fields.items():
            if (value := _value(field)) != []:
                writer.add_key_value(key, value, field.types[0], field.types[-1] if len(field.types) > 1 else None)
    except (ValueError, IndexError, KeyError, OSError, OverflowError) as error:
        raise InputError(
            f"{source}: the gguf package cannot read its tokenizer: {first_line(error)}",
            "the tokenizer's files are damaged, or newer than the gguf package: pip install -U gguf",
        ) from error


def _value(field: Any) -> Any:
    """What a field holds; texts as bytes, which are UTF-8 in most files."""
    if gguf.GGUFValueType.STRING not in field.types:
        return field.contents()
    texts = [field.parts[place].tobytes() for place in field.data]
    return texts if field.types[0] == gguf.GGUFValueType.ARRAY else texts[0]
