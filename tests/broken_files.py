"""What can be wrong with the files of a model, as tables: changes of config.json and texts of the files beside it."""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HUGE = 10**12
NAN, INFINITY = float("nan"), float("inf")
NO_NUMBER: tuple[Any, ...] = ("x", "4", [], {}, True)
SIZE = (*NO_NUMBER, 1.5, NAN, -1, 0, HUGE)
FLOAT = (*NO_NUMBER, NAN, INFINITY, -1.0, -1e40, 1e300)
BOOL = ("no", 2, [], {}, NAN, "true")
TOKEN = ("x", 1.5, -7, 99_999, {}, NAN, HUGE, True)
KERNELS = ("kernels-community/flash-attn", "flash_attention_2", "nope", "paged|nope", "org/repo@main:layer")
DTYPE = ("nope", 1, [], {}, "int8", "Tensor", "complex64", "load", "", "nn")
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
LONG = {"rope_type": "longrope", "rope_theta": 10000.0, "factor": 2.0, "original_max_position_embeddings": 128}
FACTORS = [1.0] * 16
RATIOS = ("x", [], {}, True, NAN, INFINITY, 0, -1.0)

# Changes of the config of a llama of 4 layers, hidden size 128, 4 heads and 1,024 tokens that no load can survive.
REFUSED: Mapping[str, tuple[Any, ...]] = {
    "vocab_size": (*SIZE, None, 512, 2048),
    "hidden_size": (*SIZE, None, 127, 64, 2**31),
    "intermediate_size": (*SIZE, None, 8, 2**40),
    "num_hidden_layers": (*SIZE, None, 10**9, -(10**9), 5, 3),
    "num_attention_heads": (*SIZE, None, 3, 2**20),
    "num_key_value_heads": (*SIZE, 3, 8),
    "head_dim": (*SIZE, 31, 10**9),
    "max_position_embeddings": (*SIZE, None),
    "rms_norm_eps": (*FLOAT, None, 0.0),
    "attention_dropout": (*FLOAT, 1.5),
    "initializer_range": (*FLOAT, None, 2.0),
    "attention_bias": (*BOOL, None, True),
    "mlp_bias": (*BOOL, None, True),
    "tie_word_embeddings": (*BOOL, None),
    "use_cache": (*BOOL, None),
    "return_dict": BOOL,
    "is_encoder_decoder": BOOL,
    "pad_token_id": (*TOKEN, [1], []),
    "bos_token_id": ("x", 1.5, {}, NAN, True, [1]),
    "eos_token_id": ("x", 1.5, {}, NAN, True, ["x"], [1.5], [[]]),
    "hidden_act": (None, "nope", 1, [], {}, "", "silu ", "Silu", NAN),
    "model_type": (None, "", 1, [], {}, "nope", "../llama", "bert", "t5", "llava", "gpt2", "mistral3"),
    "dtype": DTYPE,
    "torch_dtype": DTYPE,
    "rope_parameters": (
        *("x", 1, ["default"], True, NAN),
        *({**ROPE, "rope_type": name} for name in ("nope", 1, None, [], "", "linear", "dynamic", "yarn")),
        *({**ROPE, "rope_type": name} for name in ("longrope", "llama3", "__init__")),
        *({**ROPE, "rope_theta": value} for value in (*RATIOS, None, "1e4", 1e400, -10000.0)),
        *({**ROPE, "rope_type": kind, "factor": value} for kind in ("linear", "dynamic") for value in (*RATIOS, None)),
        *({**ROPE, "partial_rotary_factor": value} for value in (*RATIOS, 2.0)),
        *({**YARN, name: "x"} for name in ("beta_fast", "beta_slow", "attention_factor", "mscale", "factor")),
        *({**YARN, "original_max_position_embeddings": value} for value in (0, -1, "x", NAN, [])),
        *({**LONG, "short_factor": value, "long_factor": FACTORS} for value in ("x", 1, [], [1.0], ["x"] * 16)),
        *({**LONG, "short_factor": FACTORS, "long_factor": value} for value in ([NAN] * 16, [0] * 16, [1.0], None)),
        *({**LLAMA3, name: value} for name in ("low_freq_factor", "high_freq_factor") for value in ("x", 0, NAN, None)),
        {**LLAMA3, "low_freq_factor": 4.0, "high_freq_factor": 4.0},
        {**LLAMA3, "original_max_position_embeddings": "x"},
        {"full_attention": ROPE, "nope": 1},
    ),
    "rope_scaling": ("x", 1, ["linear"], {"type": "nope"}, {"type": "linear"}, {"type": "linear", "factor": "2"}),
    "layer_types": ("x", 1, {}, ["full_attention"], ["nope"] * 4, [1] * 4, [[]] * 4, ["conv"] * 3, "full"),
    "architectures": ("x", 1, [1], {}, NAN, [None]),
    "attn_implementation": (1, [], {}),
    "_attn_implementation": (1, [], {}),
    "experts_implementation": (1, [], {}),
    "quantization_config": ("x", 1, {}, {"quant_method": "nope"}, {"quant_method": 1}, True, [1], {"bits": 4}),
    "id2label": ("x", 1, {"a": "b"}, {"0": 1}, True),
    "label2id": ("x", 1, [1]),
    "num_labels": ("x", -1, 10**9, 1.5, [], NAN),
    "problem_type": ("x", 1, []),
    "per_layer_config": ("x", 1, [1], {"99": {"hidden_size": 1}}, {"0": {"intermediate_size": 64}}),
    "chunk_size_feed_forward": ("x", 1.5, [], None),
    "pretraining_tp": ("x", 1.5, [], 0),
    "output_attentions": ("x", 1),
    "output_hidden_states": ("x", [], 2),
    "transformers_version": (1, [], {}),
    "auto_map": ("x", 1, ["AutoConfig"]),
}
# Changes that stock transformers lives with, and so does moeify; code that a config names is never run.
ACCEPTED: Mapping[str, tuple[Any, ...]] = {
    "bos_token_id": (None, -1, 99_999),
    "eos_token_id": (None, -1, [0, 1], 99_999),
    "pad_token_id": (None, -1, 0),
    "rope_parameters": (None, {}, YARN, LLAMA3, {**LONG, "short_factor": FACTORS, "long_factor": FACTORS}),
    "rope_scaling": (None, {"type": "linear", "factor": 2.0}),
    "attn_implementation": (None, "eager", "sdpa", *KERNELS),
    "_attn_implementation": KERNELS,
    "experts_implementation": KERNELS,
    "auto_map": ({}, {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"}, {"AutoConfig": "a/b--evil.E"}),
    "architectures": (None, []),
    "unknown": (None, 1, "x", [[]], {"a": NAN}),
    "output_attentions": (None, True),
    "transformers_version": ("99.0", None),
    "quantization_config": (None,),
}
# Whole files.
TEXTS: Mapping[str, bytes] = {
    "empty": b"",
    "blank": b" \n",
    "null": b"null",
    "list": b"[]",
    "number": b"1",
    "string": b'"llama"',
    "cut": b'{"model_type": "lla',
    "text": b"model_type: llama",
    "UTF-16": '{"model_type": "llama"}'.encode("utf-16"),
    "latin-1": '{"model_type": "llam\xe4"}'.encode("latin-1"),
    "zeros": b"\0" * 64,
    "deep": b'{"model_type": ' + b"[" * 200_000,
    "deep and closed": b'{"model_type": ' + b"[" * 5_000 + b"]" * 5_000 + b"}",
    "a number of 5,000 digits": b'{"model_type": "llama", "vocab_size": ' + b"9" * 5_000 + b"}",
    "no model_type": b"{}",
    "a pickle": b"\x80\x04\x95\x0b\x00\x00\x00\x00\x00\x00\x00\x8c\x07",
    "a page": b"<html><body>404</body></html>",
    "a pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
}


def changes(table: Mapping[str, tuple[Any, ...]]) -> list[tuple[str, Any]]:
    """Field and value of each change."""
    return [(name, value) for name, values in table.items() for value in values]


def change_config(folder: Path, name: str, value: Any) -> None:
    """Write one field of a model's config.json; a copy of the file, where it was a link."""
    file = folder / "config.json"
    text = json.dumps({**json.loads(file.read_text()), name: value})
    file.unlink()
    file.write_text(text)


@dataclass(frozen=True)
class Companion:
    """A broken file beside the weights.

    Args:
        file: its name.
        kind: what is wrong with it.
        change: from the text that was there, or nothing, to its bytes.
    """

    file: str
    kind: str
    change: Callable[[str], bytes]

    def __str__(self) -> str:
        return f"{self.file}: {self.kind}"

    def apply(self, folder: Path) -> None:
        """Write it into a model's folder."""
        file = folder / self.file
        content = self.change(file.read_text() if file.exists() else "{}")
        file.unlink(missing_ok=True)
        file.write_bytes(content)


def _whole(file: str, *kinds: str) -> Iterator[Companion]:
    for kind in kinds or TEXTS:
        yield Companion(file, kind, lambda _, content=TEXTS[kind]: content)  # type: ignore[misc]


def _changed(file: str, kind: str, change: Callable[[dict[str, Any]], Any]) -> Companion:
    """A JSON file of which something was changed in place."""

    def changed(text: str) -> bytes:
        values = json.loads(text)
        change(values)
        return json.dumps(values).encode()

    return Companion(file, kind, changed)


def _set(file: str, name: str, *values: Any) -> Iterator[Companion]:
    for value in values:
        yield _changed(file, f"{name} {value!r:.40}", lambda old, value=value: old.update({name: value}))  # type: ignore[misc]


def _vocabulary(kind: str, change: Callable[[dict[str, int]], Any]) -> Companion:
    return _changed("tokenizer.json", kind, lambda values: change(values["model"]["vocab"]))


def _shift(vocabulary: dict[str, int]) -> None:
    vocabulary.update({token: number + 5_000 for token, number in vocabulary.items()})


SOME = ("empty", "null", "list", "number", "cut", "latin-1", "deep", "a pickle", "a page")
TOKENIZER, SETTINGS, GENERATION = "tokenizer.json", "tokenizer_config.json", "generation_config.json"
# Files that stock transformers cannot load the tokenizer with, and tokenizers that are of no use.
NEEDED: tuple[Companion, ...] = (
    *_whole(TOKENIZER),
    _changed(TOKENIZER, "no model", lambda old: old.pop("model")),
    *_set(TOKENIZER, "model", None, "x", {}, {"type": "nope"}, {"type": "BPE", "vocab": {}, "merges": []}),
    *_set(TOKENIZER, "pre_tokenizer", "x", {"type": "nope"}),
    *_set(TOKENIZER, "decoder", {"type": "nope"}),
    *_set(TOKENIZER, "added_tokens", "x", [1]),
    *_set(TOKENIZER, "version", 9, "9.9"),
    _vocabulary("no token left", lambda vocabulary: vocabulary.clear()),
    _vocabulary("huge ids", lambda vocabulary: vocabulary.update(dict.fromkeys(vocabulary, HUGE))),
    _vocabulary("negative ids", lambda vocabulary: vocabulary.update(dict.fromkeys(vocabulary, -1))),
    _vocabulary("ids that are texts", lambda vocabulary: vocabulary.update(dict.fromkeys(vocabulary, "1"))),  # type: ignore[arg-type]
    _vocabulary("ids beyond the model's", _shift),
    *_whole(SETTINGS, *(kind for kind in TEXTS if kind != "no model_type")),
    *_whole("special_tokens_map.json", *SOME),
    *_whole("added_tokens.json", *SOME),
)
# Files and values that stock transformers lives with, or that only chats and generation need.
UNNEEDED: tuple[Companion, ...] = (
    *_whole("vocab.json", "empty", "cut", "list"),
    *_whole("merges.txt", "empty", "latin-1", "a page"),
    *_whole("chat_template.json", "empty", "cut", "list", "latin-1"),
    *_whole("tokenizer.model", "empty", "text", "a page"),
    *_whole(GENERATION),
    *_set(GENERATION, "temperature", "x", NAN, -1, [], None),
    *_set(GENERATION, "do_sample", "x", [], 2),
    *_set(GENERATION, "eos_token_id", "x", HUGE, [], ["x"], -5),
    *_set(GENERATION, "max_length", "x", -1, NAN, []),
    *_set(GENERATION, "num_beams", "x", 0, HUGE),
    *_set(GENERATION, "top_k", "x", -1, NAN),
    *_set(GENERATION, "cache_implementation", "nope", 1),
    *_set(GENERATION, "watermarking_config", "x", 1, {"x": 1}),
    *_set(GENERATION, "compile_config", "x", {"x": 1}),
    *_set(GENERATION, "to_dict", 1),
    *_set(GENERATION, "transformers_version", 1, "99"),
    *(
        Companion("chat_template.jinja", kind, lambda _, text=text: text.encode())  # type: ignore[misc]
        for kind, text in {
            "an open tag": "{% if messages",
            "an open value": "{{ messages",
            "an unknown tag": "{% nope %}",
            "nested deeply": "{{ " + "(" * 5_000,
            "a bomb": "{{ 'x' * 100000000000 }}",
            "code": "{{ ''.__class__.__mro__ }}",
        }.items()
    ),
)
# Settings of a tokenizer: loaded or refused, whatever transformers makes of them.
EITHER: tuple[Companion, ...] = (
    *_set(SETTINGS, "tokenizer_class", "Nope", 1, [], {}, "../x", "GPT2Tokenizer", "LlamaTokenizer", "BertTokenizer"),
    *_set(SETTINGS, "model_max_length", "x", -1, 0, NAN, 10**30, []),
    *_set(SETTINGS, "bos_token", 1, [], {}, {"content": 1}, {"content": "<s>", "__type": "AddedToken"}, True),
    *_set(SETTINGS, "eos_token", 1, [], {}, "new", ["</s>"]),
    *_set(SETTINGS, "added_tokens_decoder", "x", [], {"x": {}}, {"0": 1}, {"0": {}}, {str(HUGE): {"content": "y"}}),
    *_set(SETTINGS, "extra_special_tokens", "x", 1, ["a", 1], {"a": 1}),
    *_set(SETTINGS, "chat_template", "{% if", 1, [], {}, [{"name": 1}], [{"name": "a", "template": "{%"}]),
    *_set(SETTINGS, "auto_map", "x", 1, [], {"AutoTokenizer": ["evil.Evil", None]}, {"AutoTokenizer": 1}),
    *_set(SETTINGS, "padding_side", "up", 1),
    *_set(SETTINGS, "backend", "nope", 1),
    *_set(SETTINGS, "add_bos_token", "x", []),
    *_set(SETTINGS, "vocab_file", "/etc/passwd", 1),
    *_set(SETTINGS, "_tokenizer", 1),
    *_set(SETTINGS, "encode", 1),
    *_set("special_tokens_map.json", "bos_token", 1, []),
    *_set("added_tokens.json", "x", "y", -1, HUGE),
    Companion("chat_template.jinja", "latin-1", lambda _: b"\xe4"),
)
