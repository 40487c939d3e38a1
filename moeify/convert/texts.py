"""Which text a split is calibrated on, and its tokens."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from moeify.data.documents import BUILTIN
from moeify.data.sampling import sample_from_model
from moeify.data.text import TokenBlocks, calibration_blocks
from moeify.errors import InputError, warn
from moeify.models import stock
from moeify.models.dense import DenseModel
from moeify.models.device import halves_are_fast
from moeify.options import SplitOptions

if TYPE_CHECKING:
    from moeify.convert.prepare import Prepared

DEFAULT_CONTEXT = 512
# One source of fewer documents is text of one kind.
FEW_DOCUMENTS = 8
# The one model that has no other text than Python's reference.
EMBEDDED = "builtin"
# Larger models do not write text of their own unless they are told to: all of a model is in memory then, and 8,192
# tokens take SmolLM2-135M half a minute on 2 cores.
OWN_TEXT_PARAMETERS = 500_000_000


def default_texts(dense: DenseModel, options: SplitOptions) -> tuple[str, ...]:
    """What a split is calibrated on where nobody says: half of it text that the model itself writes.

    Measured: perplexity over dense of SmolLM2-135M in 24 experts, 75 % active, on builtin-heldout, Moby-Dick and
    Wikipedia (8,176 tokens each): calibrated on builtin 1.12, 1.87 and 2.05, on self and builtin 1.16, 1.45 and 1.58
    (2 cores of an Intel Xeon, 2026-11-26; 88 s and 142 s).
    """
    context = options.context or min(DEFAULT_CONTEXT, int(dense.text_config.max_position_embeddings))
    if dense.name == EMBEDDED or dense.num_parameters > OWN_TEXT_PARAMETERS or options.tokens < 2 * context:
        return BUILTIN[:1]
    return ("self", *BUILTIN[:1])


def calibration_text(prepared: "Prepared") -> TokenBlocks:
    """The calibration tokens, checked against the model's vocabulary."""
    options, dense = prepared.options, prepared.dense
    if set(options.calibration) <= set(BUILTIN) and dense.name != EMBEDDED:
        warn(
            f"{dense.name} is calibrated on Python's reference alone, and loses more on other text: "
            "--calibration takes text like yours, several texts, and self"
        )

    def sample(num_tokens: int, context: int, seed: int) -> Tensor:
        # Without conversations, which fine-tuning has: with them SmolLM2-135M-Instruct (24 of 32 experts, 16,384
        # tokens) had perplexity 75.6 and 23.0 on Moby-Dick and Wikipedia, without them 72.3 and 22.8.
        dtype = torch.bfloat16 if halves_are_fast(options.device) else torch.float32
        model: Any = stock.load(dense.path, dtype=dtype)
        return sample_from_model(model.to(options.device), num_tokens=num_tokens, context=context, seed=seed)

    assert options.context is not None
    blocks = calibration_blocks(
        options.calibration,
        dense.tokenizer(),
        num_tokens=options.tokens,
        context=options.context,
        seed=options.seed,
        sample=sample,
    )
    _warn_of_one_kind(options.calibration, blocks)
    largest = int(blocks.ids_BC.max())
    if largest >= dense.text_config.vocab_size:
        raise InputError(
            f"the tokenizer gives token id {largest}, the model has {dense.text_config.vocab_size} tokens",
            "tokenizer and weights are not of the same model",
        )
    return blocks


def _warn_of_one_kind(sources: Sequence[str], blocks: TokenBlocks) -> None:
    """Of one source with few documents; that the embedded text is of one kind is said in other words."""
    few = blocks.provenance.num_documents < FEW_DOCUMENTS
    if len(sources) == 1 and few and not set(sources) <= {*BUILTIN, "self"}:
        warn(
            f"the calibration text is of one kind, documents in {sources[0]}: {blocks.provenance.num_documents}; "
            "--calibration takes several texts, and self"
        )
