"""Small tokenizers of well-known kinds, trained in a moment on a text of many scripts."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import LlamaConfig, PreTrainedTokenizerFast

from moeify.models.builtin import builtin_documents
from moeify.models.pretokenizers import DIGIT, GPT2
from moeify.models.same_tokens import PIECES

SPECIAL = ("<unk>", "<s>", "</s>")
SPACE = "\u2581"
TEMPLATE = "{% for m in messages %}<s>{{ m['content'] }}</s>{% endfor %}"


def documents() -> list[str]:
    """Enough for some hundred merges in every script of the pieces."""
    return [*builtin_documents(heldout=True)[:20], *(piece for piece in PIECES for _ in range(8))]


def byte_level(stages: Sequence[str] = (GPT2,), *, ignore_merges: bool = False, size: int = 900, **more: Any) -> Any:
    """Byte-level BPE.

    Args:
        stages: expressions that cut a text before merges.
        ignore_merges: of the model.
        size: tokens.
        more: of the tokenizer.
    """
    bpe: Any = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    parts: list[Any] = []
    for stage in stages:
        if stage == DIGIT:
            parts.append(pre_tokenizers.Digits(individual_digits=True))
        elif stage != GPT2:
            parts.append(pre_tokenizers.Split(Regex(stage), "isolated"))
    parts.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=GPT2 in stages))
    bpe.pre_tokenizer = pre_tokenizers.Sequence(parts) if len(parts) > 1 else parts[0]
    bpe.decoder = decoders.ByteLevel()
    trainer: Any = trainers.BpeTrainer
    special = [*SPECIAL, "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        documents(),
        trainer(vocab_size=size, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    return _named(bpe, **more)


def sentencepiece(*, prefix: bool = True, size: int = 500, complete: bool = True, **more: Any) -> Any:
    """BPE on characters with tokens for bytes, as sentencepiece trains it and llama 2 has it.

    Args:
        prefix: a space is put before each text.
        size: tokens besides bytes.
        complete: every pair that makes a token is merged, as in sentencepiece.
        more: of the tokenizer.
    """
    trained: Any = Tokenizer(models.BPE())
    steps: list[Any] = [normalizers.Prepend(SPACE)] if prefix else []
    trained.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", SPACE)])
    trainer: Any = trainers.BpeTrainer
    trained.train_from_iterator(
        [word for text in documents() for word in text.replace(" ", f" {SPACE}").split(" ")],
        trainer(vocab_size=size, special_tokens=list(SPECIAL), limit_alphabet=80, show_progress=False),
    )
    tokens = sorted(trained.get_vocab(), key=trained.get_vocab().get)
    alphabet = [token for token in tokens if len(token) == 1]
    made = [token for token in tokens if len(token) > 1 and token not in SPECIAL]
    order = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), *made, *alphabet]
    vocab = {token: number for number, token in enumerate(order)}
    cuts = {token: [(token[:i], token[i:]) for i in range(1, len(token))] for token in made}
    merges = [pair for token in made for pair in cuts[token] if set(pair) <= vocab.keys()]
    if not complete:
        merges.pop()
    model: Any = models.BPE
    bpe: Any = Tokenizer(model(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    bpe.normalizer = trained.normalizer
    bpe.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    bpe.post_processor = TemplateProcessing(single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)])
    bpe.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    return _named(bpe, **more)


def _named(bpe: Any, **more: Any) -> Any:
    constructor: Any = PreTrainedTokenizerFast
    return constructor(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", unk_token="<unk>", **more)


def folder_of(tokenizer: Any, folder: Path, *, padding: int = 3, **values: Any) -> tuple[Path, Any]:
    """A folder with a tokenizer and a config, and that config.

    Args:
        tokenizer: saved there.
        folder: made anew.
        padding: rows of the embedding beyond the tokens.
        values: of the config.
    """
    tokenizer.save_pretrained(folder)
    size = len(tokenizer) + padding
    config = LlamaConfig(vocab_size=size, hidden_size=32, num_attention_heads=2, num_hidden_layers=1, **values)
    config.save_pretrained(folder)
    return folder, config
