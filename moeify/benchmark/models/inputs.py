"""What a model benchmark reads before it loads a model: configurations, texts, prompts.

Legend: B blocks of C tokens, T tokens.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moeify.benchmark.machine import dtype_by_name
from moeify.benchmark.models.anatomy import Anatomy, anatomy
from moeify.benchmark.options import BenchOptions
from moeify.check.perplexity import DEFAULT_CONTEXT
from moeify.data.text import evaluation_tokens
from moeify.errors import InputError, UsageError
from moeify.models.config import load_config
from moeify.models.files import locate
from moeify.models.tokenizer import load_tokenizer
from moeify.options import Track

DENSE = "dense"
PROMPTS = (128, 512)


@dataclass(frozen=True)
class Entrant:
    """One model before it is loaded: its name in the result, where it is from, its folder here."""

    name: str
    source: str
    path: Path
    config: Any
    anatomy: Anatomy


def open_models(models: Sequence[str], against: Sequence[str], track: Track[Any]) -> list[Entrant]:
    """All models, the dense one first, with one name each.

    Raises:
        UsageError: nothing to measure or to compare with.
        InputError: a model is not there, is named twice, is of no use or has another vocabulary.
    """
    if not models or not against:
        raise UsageError("a converted and a dense model are needed", "write moeify bench MOE --against DENSE")
    words = [*against[:1], *models, *against[1:]]
    twice = [word for number, word in enumerate(words) if word in words[:number]]
    if twice:
        raise UsageError(f"{twice[0]} is named twice", "name each model once")
    paths = [locate(word, track) for word in words]
    configs = [load_config(path) for path in paths]
    short = [DENSE, *(Path(word).name for word in words[1:])]
    names = [name if short.count(name) == 1 else word for name, word in zip(short, words, strict=True)]
    names[0] = DENSE
    entrants = [
        Entrant(name, word, path, config, anatomy(config))
        for name, word, path, config in zip(names, words, paths, configs, strict=True)
    ]
    dense = entrants[0]
    if dense.anatomy.experts is not None:
        raise InputError(
            f"{dense.source} has {dense.anatomy.experts.num_routed} experts a layer, a dense model is needed",
            "name the model that the others came from",
        )
    for one in entrants[1:]:
        if one.anatomy.vocab_size != dense.anatomy.vocab_size:
            raise InputError(
                f"{one.source} has a vocabulary of {one.anatomy.vocab_size:,}, {dense.source} one of "
                f"{dense.anatomy.vocab_size:,}",
                "their distributions do not compare: name the model that it came from",
            )
    return entrants


def dtype_of(name: str, config: Any, device: torch.device) -> torch.dtype:
    stored = getattr(config, "dtype", None)
    return stored if name == "auto" and isinstance(stored, torch.dtype) else dtype_by_name(name, device)


@dataclass(frozen=True)
class Texts:
    """Text and speed regimes that all models take.

    Args:
        context: tokens of a block.
        blocks: ids_BC by name, for quality and experts.
        prompt_text_T: enough for the largest regime.
        regimes: (batch, prompt tokens).
        tokenizer: of the dense model.
    """

    context: int
    blocks: Mapping[str, Tensor]
    prompt_text_T: Tensor
    regimes: tuple[tuple[int, int], ...]
    tokenizer: Any

    @classmethod
    def of(cls, entrants: Sequence[Entrant], options: BenchOptions) -> "Texts":
        """Read texts, and settle context and prompts.

        Raises:
            InputError: a text is too short, blocks or prompts are too long, or models cut text differently.
        """
        limit = min(int(one.config.max_position_embeddings) for one in entrants)
        context = options.context or min(DEFAULT_CONTEXT, limit)
        # Decode adds one.
        lengths = options.prompt or tuple(length for length in PROMPTS if length < limit) or (max(1, limit // 2),)
        for option, length in (("--context", context), *(("--prompt", length + 1) for length in lengths)):
            if not 2 <= length <= limit:
                raise InputError(
                    f"{option} asks for {length} positions, all models take {limit}",
                    f"--context takes 2 to {limit}, --prompt 1 to {limit - 1}",
                )
        regimes = tuple((batch, length) for length in lengths for batch in options.batch)
        tokenizers = [load_tokenizer(one.path) for one in entrants]
        needed = max(batch * (length + 1) for batch, length in regimes)
        blocks = {source: _blocks(source, entrants, tokenizers, options.tokens, context) for source in options.data}
        text_T = evaluation_tokens(options.data[0], tokenizers[0], num_tokens=needed).ids_T
        if len(text_T) < needed:
            raise InputError(
                f"{options.data[0]} has {len(text_T):,} tokens, a batch of prompts needs {needed:,}",
                "smaller --batch or --prompt, or a longer text as the first --data",
            )
        return cls(context, blocks, text_T, regimes, tokenizers[0])

    @property
    def largest(self) -> tuple[int, int]:
        return max(self.regimes, key=lambda regime: regime[0] * regime[1])


def _blocks(source: str, entrants: Sequence[Entrant], tokenizers: Sequence[Any], tokens: int, context: int) -> Tensor:
    """ids_BC: the first whole blocks of a text, for which all tokenizers agree."""
    streams = [evaluation_tokens(source, tokenizer, num_tokens=tokens) for tokenizer in tokenizers]
    for one, stream in zip(entrants, streams, strict=True):
        if stream.provenance.sha256 != streams[0].provenance.sha256:
            raise InputError(
                f"{entrants[0].source} and {one.source} cut {source} into different tokens",
                "they need the same tokenizer: name the model that it came from",
            )
    ids_T = streams[0].ids_T
    if len(ids_T) < 2 * context:
        raise InputError(
            f"{source} gives {len(ids_T):,} of {tokens:,} tokens, intervals need two blocks of {context}",
            "a longer text, more --tokens or a smaller --context",
        )
    return ids_T[: len(ids_T) // context * context].view(-1, context)
