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
from moeify.benchmark.models.anatomy import Anatomy, anatomy, writes_text
from moeify.benchmark.models.results import Kind, Model
from moeify.benchmark.models.sizes import active_share, parts_of
from moeify.benchmark.options import BenchOptions
from moeify.check.calibrated import calibrated_on
from moeify.check.perplexity import DEFAULT_CONTEXT, whole_blocks
from moeify.data.text import evaluation_tokens
from moeify.errors import InputError, UsageError
from moeify.models.config import load_config
from moeify.models.files import find_shards, locate
from moeify.models.heads import modality_of
from moeify.models.inputs import Inputs
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
    named = name_models(models, against)
    entrants = [open_entrant(name, word, track) for name, word in named]
    experts = entrants[0].anatomy.experts
    check_kinds(entrants)
    check_dense(entrants[0].source, experts.num_routed if experts else None)
    check_vocabularies([(one.source, one.anatomy.vocab_size) for one in entrants])
    return entrants


def name_models(models: Sequence[str], against: Sequence[str]) -> list[tuple[str, str]]:
    """Name in the result and word on the command line of each model, the dense one first.

    Raises:
        UsageError: nothing to measure or to compare with.
        InputError: a model is named twice.
    """
    if not models or not against:
        raise UsageError("a converted and a dense model are needed", "write moeify bench MOE --against DENSE")
    words = [*against[:1], *models, *against[1:]]
    twice = [word for number, word in enumerate(words) if word in words[:number]]
    if twice:
        raise UsageError(f"{twice[0]} is named twice", "name each model once")
    short = [DENSE, *(Path(word).name for word in words[1:])]
    names = [name if short.count(name) == 1 else word for name, word in zip(short, words, strict=True)]
    return [(DENSE, words[0]), *zip(names[1:], words[1:], strict=True)]


def open_entrant(name: str, word: str, track: Track[Any]) -> Entrant:
    """Raise InputError for a model that is not there or is of no use."""
    path = locate(word, track)
    config = load_config(path)
    return Entrant(name, word, path, config, anatomy(config))


def model_of(one: Entrant, dense_ffn: int, *, context: int, element_bytes: int) -> Model:
    """Sizes of one model.

    Args:
        one: the model.
        dense_ffn: parameters of the dense model's FFNs.
        context: positions that a token sees.
        element_bytes: of a weight.
    """
    experts, share = one.anatomy.experts, active_share(one.anatomy, dense_ffn)
    kind: Kind = "moe" if experts else "dense" if share == 1 else "static"
    return Model(
        name=one.name,
        path=one.source,
        kind=kind,
        model_type=one.config.model_type,
        num_layers=one.anatomy.num_layers,
        num_experts=experts.num_routed + experts.num_shared if experts else None,
        num_shared=experts.num_shared if experts else None,
        num_active=experts.num_chosen + experts.num_shared if experts else None,
        mean_active=experts.mean_chosen + experts.num_shared if experts and experts.mean_chosen is not None else None,
        active_share=share,
        parts=parts_of(one.anatomy, context=context, element_bytes=element_bytes),
        bytes_on_disk=sum(file.stat().st_size for file in set(find_shards(one.path).values())),
        calibrated_on=calibrated_on(one.path),
    )


def check_kinds(entrants: Sequence[Entrant]) -> None:
    """Raise InputError unless all models do the same job."""
    kinds = {one.source: (modality_of(one.config), writes_text(one.config)) for one in entrants}
    (dense, kind), *others = kinds.items()
    for source, other in others:
        if other != kind:
            raise InputError(f"{source} and {dense} do not the same job", "name the model that it came from")


def check_dense(source: str, num_experts: int | None) -> None:
    """Raise InputError for a model with experts in the place of the dense one."""
    if num_experts is not None:
        raise InputError(
            f"{source} has {num_experts} experts a layer, a dense model is needed",
            "name the model that the others came from",
        )


def check_vocabularies(sizes: Sequence[tuple[str, int]]) -> None:
    """Raise InputError unless all models have the first one's.

    Args:
        sizes: model and size of its vocabulary.
    """
    (dense, num_words), *others = sizes
    for source, size in others:
        if size != num_words:
            raise InputError(
                f"{source} has a vocabulary of {size:,}, {dense} one of {num_words:,}",
                "their distributions do not compare: name the model that it came from",
            )


def dtype_of(name: str, config: Any, device: torch.device) -> torch.dtype:
    stored = getattr(config, "dtype", None)
    return stored if name == "auto" and isinstance(stored, torch.dtype) else dtype_by_name(name, device)


@dataclass(frozen=True)
class Texts:
    """Text and speed regimes that all models take.

    Args:
        context: tokens of a block.
        longest: tokens that all models take.
        blocks: ids_BC by name, for quality and experts.
        prompt_text_T: enough for the largest regime.
        regimes: (batch, prompt tokens).
        tokenizer: of the dense model.
    """

    context: int
    longest: int
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
        limit = min(int(one.config.get_text_config().max_position_embeddings) for one in entrants)
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
        return cls(context, limit, blocks, text_T, regimes, tokenizers[0])

    @property
    def cases(self) -> dict[tuple[int, int], Inputs]:
        """Prompts with the token that comes next, by regime."""
        return {regime: {"input_ids": prompts(self.prompt_text_T, *regime)} for regime in self.regimes}

    @property
    def largest(self) -> Inputs:
        """The prompts with the most tokens."""
        regime = max(self.regimes, key=lambda regime: regime[0] * regime[1])
        return {"input_ids": prompts(self.prompt_text_T, *regime)[:, :-1]}


def prompts(text_T: Tensor, batch: int, prompt: int) -> Tensor:
    """ids_BP of consecutive pieces of the text, each with the token that comes next: (batch, prompt + 1)."""
    return text_T[: batch * (prompt + 1)].view(batch, prompt + 1)


def _blocks(source: str, entrants: Sequence[Entrant], tokenizers: Sequence[Any], tokens: int, context: int) -> Tensor:
    """ids_BC: the first whole blocks of a text, for which all tokenizers agree."""
    streams = [evaluation_tokens(source, tokenizer, num_tokens=tokens) for tokenizer in tokenizers]
    for one, stream in zip(entrants, streams, strict=True):
        if stream.provenance.sha256 != streams[0].provenance.sha256:
            raise InputError(
                f"{entrants[0].source} and {one.source} cut {source} into different tokens",
                "they need the same tokenizer: name the model that it came from",
            )
    # An interval needs two.
    return whole_blocks(source, streams[0].ids_T, context, least=2)
