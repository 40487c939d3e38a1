"""Target perplexity of models that read a text and write another: how well the decoder predicts what was hidden.

What is hidden is settled by data/pairs.py, the same for every model with the same tokens.

Legend: B pairs in a batch, C tokens of text that a pair is made of, L of what is written.
"""

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from moeify import families
from moeify.check.active import ActiveShare
from moeify.check.perplexity import BATCH_TOKENS, DEFAULT_CONTEXT, EvalResult, warn_of_few, whole_blocks
from moeify.data.pairs import text_pairs
from moeify.data.text import evaluation_tokens
from moeify.errors import InputError
from moeify.models.config import load_config
from moeify.models.heads import decoder_start, dense_type
from moeify.models.inputs import num_blocks, some_blocks
from moeify.models.tokenizer import load_tokenizer
from moeify.options import EvalOptions, Track

TARGET_PERPLEXITY = "target perplexity"


@dataclass(frozen=True)
class TargetPerplexity:
    """The measure of models that read a text and write another.

    Args:
        pairs: what every model reads and writes of every source, and a hash of the text.
        context: C.
    """

    pairs: Mapping[tuple[str, str], tuple[Mapping[str, Tensor], str]]
    context: int

    @classmethod
    def open(cls, paths: Mapping[str, Path], options: EvalOptions) -> Self:
        """Read the texts.

        Raises:
            InputError: a text cannot be read or is too short, or two models cut it into different tokens.
        """
        configs = {name: load_config(path) for name, path in paths.items()}
        limit = min(families.find(dense_type(config)).context_of(config) for config in configs.values())
        context, pairs = options.context or min(DEFAULT_CONTEXT, limit), {}
        if not 16 <= context <= limit:
            raise InputError(
                f"a context of {context} does not fit these models", f"--context takes 16 to {limit} for them"
            )
        for name, path in paths.items():
            tokenizer, start = load_tokenizer(path), decoder_start(configs[name])
            for source in options.data:
                text = evaluation_tokens(source, tokenizer, num_tokens=options.tokens)
                blocks_BC = whole_blocks(source, text.ids_T, context)
                made = text_pairs(blocks_BC, tokenizer, start)
                pairs[name, source] = made, text.provenance.sha256
        first = next(iter(paths))
        for (name, source), (made, _) in pairs.items():
            if any(not torch.equal(ids, pairs[first, source][0][key]) for key, ids in made.items()):
                raise InputError(
                    f"{first} and {name} cut {source} into different tokens", "their perplexities do not compare"
                )
        for source in options.data:
            warn_of_few(source, _count(pairs[first, source][0]))
        return cls(pairs, context)

    @torch.no_grad()
    def __call__(self, model: Any, name: str, source: str, track: Track[Any]) -> EvalResult:
        """Predict every token that the decoder writes but the first."""
        pairs, sha256 = self.pairs[name, source]
        size, active = max(1, BATCH_TOKENS // self.context), ActiveShare(model)
        loss, began = 0.0, time.perf_counter()
        starts = range(0, num_blocks(pairs), size)
        for start in track(starts, f"evaluating {name} on {source}", len(starts)):
            some = {key: ids.to(model.device) for key, ids in some_blocks(pairs, slice(start, start + size)).items()}
            with active:
                logits_BLV = model(**some, use_cache=False).logits
            written_BL = some["decoder_input_ids"]
            loss += float(
                cross_entropy(logits_BLV[:, :-1].flatten(0, 1).float(), written_BL[:, 1:].flatten(), reduction="sum")
            )
        elapsed = time.perf_counter() - began
        perplexity = math.exp(loss / _count(pairs)) if math.isfinite(loss) else math.inf
        speed = sum(ids.numel() for ids in pairs.values()) / elapsed
        return EvalResult(
            name,
            source,
            perplexity,
            _count(pairs),
            speed,
            sha256,
            self.context,
            None,
            active_share=active.share,
            measure=TARGET_PERPLEXITY,
        )


def _count(pairs: Mapping[str, Tensor]) -> int:
    """Tokens that are predicted."""
    written_BL = pairs["decoder_input_ids"]
    return written_BL.numel() - len(written_BL)
