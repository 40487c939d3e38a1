"""What a model benchmark is asked for, and what it reads before anything heavy: models, texts, prompts.

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
from moeify.benchmark.models.contenders import IMPLEMENTATIONS
from moeify.check.evaluate import DEFAULT_CONTEXT
from moeify.data.text import evaluation_tokens
from moeify.errors import InputError, UsageError
from moeify.models.dense import load_config, load_tokenizer, locate
from moeify.options import Track

SECTIONS = ("quality", "speed", "memory", "experts")
DENSE = "dense"
PROMPTS = (128, 512)


@dataclass(frozen=True)
class BenchOptions:
    """What is measured.

    Args:
        data: texts for quality and experts; prompts come from the first.
        tokens: at most so many of each text, in whole blocks.
        context: tokens of a block; None means 512, or as many as all models take.
        batch: sequences of a speed regime.
        prompt: tokens of each; none means 128 and 512, where all models take them.
        implementation: of experts; none means all that run here.
        seconds_per_row: how long one model on one implementation is timed on one phase of one regime.
        dtype: of the weights; auto keeps that of the dense checkpoint.
        device: auto, cpu, cuda, cuda:1.
        roofline: measure the machine and compare with it.
        skip: sections that are left out.
    """

    data: tuple[str, ...] = ("builtin-heldout",)
    tokens: int = 8192
    context: int | None = None
    batch: tuple[int, ...] = (1, 8)
    prompt: tuple[int, ...] = ()
    implementation: tuple[str, ...] = ()
    seconds_per_row: float = 2.0
    dtype: str = "auto"
    device: str = "auto"
    roofline: bool = False
    skip: tuple[str, ...] = ()

    # For pydantic, which validates this class inside a recipe.
    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012

    def __post_init__(self) -> None:
        if min((*self.batch, *self.prompt, self.tokens), default=1) < 1 or not self.batch:
            raise UsageError(
                f"batches {list(self.batch)}, prompts {list(self.prompt)} and {self.tokens} tokens are no sizes",
                "--batch, --prompt and --tokens take whole numbers from 1 on, such as --batch 1,8",
            )
        for option, names, known in (
            ("--skip", self.skip, SECTIONS),
            ("--implementation", self.implementation, IMPLEMENTATIONS),
        ):
            if unknown := [name for name in names if name not in known]:
                raise UsageError(f"{option} {unknown[0]} is unknown", f"there are {', '.join(known)}")
        if not self.data:
            raise UsageError("no text to measure on", "name one with --data")


@dataclass(frozen=True)
class Entrant:
    """One model before it is loaded."""

    name: str
    asked: str
    path: Path
    config: Any
    anatomy: Anatomy


def open_models(models: Sequence[str], against: Sequence[str], track: Track[Any]) -> list[Entrant]:
    """All models, the dense one first, with one name each.

    Raises:
        UsageError: nothing to measure or to compare with.
        InputError: a model is not there, is named twice, is of no use or has another vocabulary.
    """
    if not models:
        raise UsageError("no model to measure was named", "write moeify bench MOE --against DENSE")
    if not against:
        raise UsageError("what to compare with was not named", "--against takes the dense model they came from")
    words = [*against[:1], *models, *against[1:]]
    twice = [word for number, word in enumerate(words) if word in words[:number]]
    if twice:
        raise UsageError(f"{twice[0]} is named twice", "name each model once")
    paths = [locate(word, track) for word in words]
    configs = [load_config(path) for path in paths]
    short = [DENSE, *(Path(word).name for word in words[1:])]
    names = [name if short.count(name) == 1 else word for name, word in zip(short, words, strict=True)]
    names[0] = DENSE
    found = [
        Entrant(name, word, path, config, anatomy(config))
        for name, word, path, config in zip(names, words, paths, configs, strict=True)
    ]
    dense = found[0]
    if dense.anatomy.experts is not None:
        raise InputError(
            f"{dense.asked} has {dense.anatomy.experts.num_routed} experts a layer, a dense model is needed",
            "name the model that the others came from",
        )
    for one in found[1:]:
        if one.anatomy.vocab_size != dense.anatomy.vocab_size:
            raise InputError(
                f"{one.asked} has a vocabulary of {one.anatomy.vocab_size:,}, {dense.asked} one of "
                f"{dense.anatomy.vocab_size:,}",
                "their distributions do not compare: name the model that it came from",
            )
    return found


def dtype_of(name: str, config: Any, device: torch.device) -> torch.dtype:
    kept = getattr(config, "dtype", None)
    return kept if name == "auto" and isinstance(kept, torch.dtype) else dtype_by_name(name, device)


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
    def of(cls, asked: Sequence[Entrant], options: BenchOptions) -> "Texts":
        """Read what is asked for.

        Raises:
            InputError: a text is too short, blocks or prompts are too long, or models cut text differently.
        """
        limit = min(int(one.config.max_position_embeddings) for one in asked)
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
        tokenizers = [load_tokenizer(one.path) for one in asked]
        needed = max(batch * (length + 1) for batch, length in regimes)
        blocks = {source: _blocks(source, asked, tokenizers, options.tokens, context) for source in options.data}
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


def _blocks(source: str, asked: Sequence[Entrant], tokenizers: Sequence[Any], tokens: int, context: int) -> Tensor:
    """ids_BC: the first whole blocks of a text, for which all tokenizers agree."""
    streams = [evaluation_tokens(source, tokenizer, num_tokens=tokens) for tokenizer in tokenizers]
    for one, stream in zip(asked, streams, strict=True):
        if stream.provenance.sha256 != streams[0].provenance.sha256:
            raise InputError(
                f"{asked[0].asked} and {one.asked} cut {source} into different tokens",
                "they need the same tokenizer: name the model that it came from",
            )
    ids_T = streams[0].ids_T
    if len(ids_T) < 2 * context:
        raise InputError(
            f"{source} gives {len(ids_T):,} of {tokens:,} tokens, intervals need two blocks of {context}",
            "a longer text, more --tokens or a smaller --context",
        )
    return ids_T[: len(ids_T) // context * context].view(-1, context)
