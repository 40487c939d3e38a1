"""Perplexity with a sliding window, and how fast the text went through, for one or several models side by side.

Legend: T tokens, B windows in a batch, C tokens in a window, V vocabulary.
"""

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

from moeify.data.text import TokenStream, evaluation_tokens
from moeify.errors import InputError
from moeify.kernels import register
from moeify.models.dense import load_config, locate
from moeify.options import EvalOptions, Track, untracked

DEFAULT_CONTEXT = 512
BATCH_TOKENS = 2048


@dataclass(frozen=True)
class EvalResult:
    """One model on one text.

    Args:
        model, data: what was measured on what.
        perplexity: exp of the mean negative log-likelihood of a token.
        num_tokens: tokens that were scored.
        tokens_per_second: tokens that went through the model, repeated context included.
        sha256: of the token ids.
    """

    model: str
    data: str
    perplexity: float
    num_tokens: int
    tokens_per_second: float
    sha256: str


@dataclass(frozen=True)
class Evaluation:
    """All models on all texts, in the order they were measured."""

    results: tuple[EvalResult, ...]


def load(model: str, *, dtype: str = "auto", device: str = "cpu", **arguments: Any) -> Any:
    """Load a dense or converted checkpoint with stock transformers, ready for inference.

    On CUDA devices and CPUs its experts run on moeify's kernels, unless `experts_implementation` says otherwise.

    Args:
        model: a folder, a .gguf file, a hub id or `builtin`.
        dtype: `auto` keeps the checkpoint's.
        device: where to put it.
        arguments: passed on to `from_pretrained`.
    """
    path = locate(model)
    load_config(path)
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, trust_remote_code=False, **arguments)
    except (OSError, ValueError) as error:
        raise InputError(f"transformers cannot load {model}: {str(error).splitlines()[0]}") from error
    loaded = loaded.to(device).eval()
    chosen = "experts_implementation" in arguments or not loaded._can_set_experts_implementation()
    if loaded.device.type in ("cuda", "cpu") and not chosen:
        register()
        loaded.set_experts_implementation("moeify")
    return loaded


def evaluate(
    models: Sequence[str],
    data: Sequence[str] = EvalOptions.data,
    *,
    tokens: int = EvalOptions.tokens,
    context: int | None = EvalOptions.context,
    stride: int | None = EvalOptions.stride,
    dtype: str = EvalOptions.dtype,
    device: str = EvalOptions.device,
    track: Track[Any] = untracked,
) -> list[EvalResult]:
    """Measure each model on each text.

    Args:
        models: checkpoints; the first is what the others are compared with.
        data: text sources.
        tokens: at most so many tokens of each text.
        context: tokens in a window; None means 512 or as many as all models take.
        stride: tokens the window moves by, each scored once with at least context - stride tokens before it (but for
            the first window); None means half a window.
        dtype: of the weights; `auto` keeps the checkpoint's.
        device: where it runs.
        track: wraps the loop over windows.

    Raises:
        InputError: a model or text cannot be read, or two models cut the text into different tokens.
    """
    paths = {model: locate(model, track) for model in models}
    limit = min(int(load_config(path).max_position_embeddings) for path in paths.values())
    context = context or min(DEFAULT_CONTEXT, limit)
    if context < 2:
        raise InputError(f"a context of {context} leaves nothing to predict", "--context takes 2 or more")
    if context > limit:
        raise InputError(f"context {context} is longer than the {limit} tokens that all models take")
    stride = stride or context // 2
    if not 1 <= stride <= context:
        raise InputError(f"stride {stride} does not fit a context of {context}", f"--stride takes 1 to {context}")
    texts = {(model, source): _stream(str(paths[model]), source, tokens) for model in models for source in data}
    for (model, source), text in texts.items():
        reference = texts[models[0], source]
        if text.provenance.sha256 != reference.provenance.sha256:
            raise InputError(
                f"{models[0]} and {model} cut {source} into different tokens", "their perplexities do not compare"
            )
    results = []
    for name in models:
        model = load(name, dtype=dtype, device=device)
        for source in data:
            results.append(
                _measure(model, name, source, texts[name, source], context=context, stride=stride, track=track)
            )
        del model
    return results


def _stream(path: str, source: str, tokens: int) -> TokenStream:
    return evaluation_tokens(source, AutoTokenizer.from_pretrained(path, trust_remote_code=False), num_tokens=tokens)


def _windows(num_tokens: int, context: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """(start, end, first position whose prediction counts) of each window.

    Each position counts once, but for those with nothing before them: the very first and, if windows do not overlap,
    the first of every window.
    """
    scored = 0
    for start in range(0, num_tokens, stride):
        end, first = min(start + context, num_tokens), max(scored, start + 1)
        if first < end:
            yield start, end, first
        scored = end


@torch.no_grad()
def _measure(
    model: Any, name: str, source: str, text: TokenStream, *, context: int, stride: int, track: Track[Any]
) -> EvalResult:
    ids_T = text.ids_T.to(model.device)
    windows = list(_windows(len(ids_T), context, stride))
    full = [window for window in windows if window[1] - window[0] == context]
    step = max(1, BATCH_TOKENS // context)
    batches = [full[i : i + step] for i in range(0, len(full), step)]
    batches += [[window] for window in windows if window[1] - window[0] < context]
    loss, count, processed = 0.0, 0, 0
    began = time.perf_counter()
    for batch in track(batches, f"evaluating {name} on {source}", len(batches)):
        ids_BC = torch.stack([ids_T[start:end] for start, end, _ in batch])
        logits_BCV = model(ids_BC, use_cache=False).logits
        for row, (start, _, scored) in enumerate(batch):
            first = scored - start
            loss += _loss(logits_BCV[row, first - 1 : -1], ids_BC[row, first:])
            count += ids_BC.shape[1] - first
        processed += ids_BC.numel()
    elapsed = time.perf_counter() - began
    perplexity = math.exp(loss / count) if math.isfinite(loss) else math.inf
    return EvalResult(name, source, perplexity, count, processed / elapsed, text.provenance.sha256)


def _loss(logits_CV: Tensor, ids_C: Tensor) -> float:
    return float(cross_entropy(logits_CV.float(), ids_C, reduction="sum"))
