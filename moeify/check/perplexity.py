"""Perplexity on blocks of text or with a sliding window, and how fast the text went through.

By default `eval`, `compare` and `bench` measure one number: the same tokens in the same blocks, see `whole_blocks`.

Legend: T tokens, B windows in a batch, C tokens in a window, V vocabulary.
"""

import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from moeify.check.active import ActiveShare
from moeify.data.text import TokenStream, evaluation_tokens
from moeify.errors import InputError, warn
from moeify.models.config import load_config
from moeify.models.tokenizer import load_tokenizer
from moeify.options import EvalOptions, Track
from moeify.readable import Readable

DEFAULT_CONTEXT = 512
BATCH_TOKENS = 2048
# From one stretch of builtin-heldout to the next the perplexity changes by a factor of 1.13 (builtin) and 1.28
# (SmolLM2-135M-Instruct) with 1,000 tokens, of 1.6 and 1.8 with 100: standard deviation of its logarithm, 8,160 tokens.
FEW_TOKENS = 1000


@dataclass(frozen=True, repr=False)
class EvalResult(Readable):
    """One model on one text.

    Args:
        model, data: what was measured on what.
        perplexity: exp of the mean negative log-likelihood of a token.
        num_tokens: tokens that were scored.
        tokens_per_second: tokens that went through the model, repeated context included.
        sha256: of the token ids.
        context, stride: tokens in a window, and how far it moves; None in results of versions that did not say.
        active_share: of the FFNs that are cut, measured in the mean over tokens; None if it is the same for all.
        calibrated_on: the texts that the model was calibrated or trained on by moeify; none if it was not.
        measure: perplexity, pseudo-perplexity of a model that guesses masked tokens, or target perplexity of one that
            reads a text and writes another.
    """

    model: str
    data: str
    perplexity: float
    num_tokens: int
    tokens_per_second: float
    sha256: str
    context: int | None = None
    stride: int | None = None
    active_share: float | None = None
    calibrated_on: tuple[str, ...] = ()
    measure: str = "perplexity"


def whole_blocks(source: str, ids_T: Tensor, context: int, *, least: int = 1) -> Tensor:
    """ids_BC: the first whole blocks of a text; a perplexity counts every token but the first of each.

    Args:
        source: the text's name.
        ids_T: its tokens.
        context: C.
        least: number of blocks that are needed.

    Raises:
        InputError: there are fewer.
    """
    if len(ids_T) < least * context:
        blocks = "a block" if least == 1 else f"{least} blocks"
        raise InputError(
            f"{source} gives {len(ids_T):,} tokens, less than {blocks} of {context:,}",
            "name a longer text, or more tokens or a smaller context",
        )
    return ids_T[: len(ids_T) // context * context].view(-1, context)


def warn_of_few(source: str, num_tokens: int) -> None:
    """Warn of a perplexity that chance decides; `num_tokens` are those that count."""
    if num_tokens < FEW_TOKENS:
        warn(f"{num_tokens:,} tokens of {source} give a rough perplexity: take {FEW_TOKENS:,} tokens or more")


@dataclass(frozen=True)
class Perplexity:
    """The measure of causal language models.

    Args:
        texts: the tokens of every model and source.
        context: tokens in a window.
        stride: tokens the window moves by.
    """

    texts: Mapping[tuple[str, str], TokenStream]
    context: int
    stride: int

    @classmethod
    def open(cls, paths: Mapping[str, Path], options: EvalOptions) -> Self:
        """Settle windows and read the texts.

        Raises:
            InputError: a window does not fit, a text cannot be read, or two models cut it into different tokens.
        """
        configs = {name: load_config(path) for name, path in paths.items()}
        limit = min(int(config.get_text_config().max_position_embeddings) for config in configs.values())
        context = options.context or min(DEFAULT_CONTEXT, limit)
        if context < 2:
            raise InputError(f"a context of {context} leaves nothing to predict", "--context takes 2 or more")
        if context > limit:
            raise InputError(
                f"context {context} is longer than the {limit} tokens that all models take",
                f"--context takes up to {limit} for these models",
            )
        stride = options.stride or context
        if not 1 <= stride <= context:
            raise InputError(f"stride {stride} does not fit a context of {context}", f"--stride takes 1 to {context}")
        tokenizers = {name: load_tokenizer(path) for name, path in paths.items()}
        texts = {
            (name, source): evaluation_tokens(source, tokenizer, num_tokens=options.tokens)
            for name, tokenizer in tokenizers.items()
            for source in options.data
        }
        first = next(iter(paths))
        for (name, source), text in texts.items():
            if text.provenance.sha256 != texts[first, source].provenance.sha256:
                raise InputError(
                    f"{first} and {name} cut {source} into different tokens", "their perplexities do not compare"
                )
        for source in options.data:
            num_tokens = len(texts[first, source].ids_T)
            warn_of_few(source, sum(end - scored for _, end, scored in _windows(num_tokens, context, stride)))
        return cls(texts, context, stride)

    @torch.no_grad()
    def __call__(self, model: Any, name: str, source: str, track: Track[Any]) -> EvalResult:
        """Score every token of a text once, with at least context - stride tokens before it but at the beginning.

        Of blocks that only touch, the first token has nothing before it, and a last one that is not whole is left out.
        """
        text = self.texts[name, source]
        ids_T = text.ids_T.to(model.device)
        loss, count, processed = 0.0, 0, 0
        began = time.perf_counter()
        batches = list(self._batches(len(ids_T)))
        active = ActiveShare(model)
        for batch in track(batches, f"evaluating {name} on {source}", len(batches)):
            ids_BC = torch.stack([ids_T[start:end] for start, end, _ in batch])
            with active:
                logits_BCV = model(ids_BC, use_cache=False).logits
            for row, (start, _, scored) in enumerate(batch):
                first = scored - start
                loss += _loss(logits_BCV[row, first - 1 : -1], ids_BC[row, first:])
                count += ids_BC.shape[1] - first
            processed += ids_BC.numel()
        elapsed = time.perf_counter() - began
        perplexity = math.exp(loss / count) if math.isfinite(loss) else math.inf
        sha256, rate = text.provenance.sha256, processed / elapsed
        return EvalResult(
            name, source, perplexity, count, rate, sha256, self.context, self.stride, active_share=active.share
        )

    def _batches(self, num_tokens: int) -> Iterator[list[tuple[int, int, int]]]:
        """Windows of full length together, shorter ones alone."""
        windows = list(_windows(num_tokens, self.context, self.stride))
        full = [window for window in windows if window[1] - window[0] == self.context]
        step = max(1, BATCH_TOKENS // self.context)
        yield from (full[i : i + step] for i in range(0, len(full), step))
        yield from ([window] for window in windows if window[1] - window[0] < self.context)


def _windows(num_tokens: int, context: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """(start, end, first position whose prediction counts) of each window.

    Each position counts once, but for those with nothing before them: the very first and, if windows do not overlap,
    the first of every window. Windows that do not overlap are whole, if one is.
    """
    if stride == context <= num_tokens:
        num_tokens -= num_tokens % context
    scored = 0
    for start in range(0, num_tokens, stride):
        end, first = min(start + context, num_tokens), max(scored, start + 1)
        if first < end:
            yield start, end, first
        scored = end


def _loss(logits_CV: Tensor, ids_C: Tensor) -> float:
    return float(cross_entropy(logits_CV.float(), ids_C, reduction="sum"))
