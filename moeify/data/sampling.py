"""Text that a model writes itself: the source `self`.

Shapes: B blocks, C tokens a block (context), V vocabulary.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from moeify.data.conversations import Conversations, leads
from moeify.errors import InputError
from moeify.models.chat import Turns
from moeify.models.generation import ends_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Blocks that are written at once: reading the weights costs as much for one as for many.
SAMPLE_BATCH = 64


@torch.no_grad()
def sample_from_model(
    model: "PreTrainedModel", *, num_tokens: int, context: int, seed: int, turns: Turns | None = None
) -> Tensor:
    """Let the model write num_tokens // context blocks, each from its BOS token on, at temperature 1.

    Not `model.generate`: it fills in sampling settings from the model's generation_config (top-p, repetition penalty,
    stop tokens), and calibration wants the model's own distribution. After EOS the model goes on, as in packed text.

    A model without BOS starts from EOS, which stood before every document in training; one with neither starts every
    block from a random token, so that the blocks differ from the first token on (LLM-QAT, https://arxiv.org/abs/2305.17888).

    Args:
        model: on its device.
        num_tokens, context, seed: how much, in blocks of how many tokens.
        turns: of a model for chats; every second block is then a conversation with itself.

    Returns:
        ids_BC, int64 on the CPU; the same for the same seed on the same machine.
    """
    generator = torch.Generator().manual_seed(seed)
    training = model.training
    model.train(False)
    blocks = []
    ends = ends_of(model)
    for first_B1 in torch.split(_first_tokens(model, num_tokens // context, generator), SAMPLE_BATCH):
        chats = Conversations(turns, ends, len(first_B1)) if turns and leads(turns, context) else None
        columns, cache = [chats.follow(first_B1) if chats else first_B1], None
        for _ in range(context - 1):
            out = model(input_ids=columns[-1].to(model.device), past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            # On the CPU, where one seed means one sequence whatever the device.
            logits_BV = out.logits[:, -1].float().cpu()
            if not logits_BV.isfinite().all():
                raise InputError(
                    f"the model cannot write a text: its logits after {len(columns):,} tokens are not finite",
                    "its weights or its config.json are damaged: see what transformers itself computes with it",
                )
            drawn_B1 = _drawn(chats.temper(logits_BV) if chats else logits_BV, generator)
            columns.append(chats.follow(drawn_B1) if chats else drawn_B1)
        blocks.append(torch.cat(columns, dim=1))
    model.train(training)
    return torch.cat(blocks)


def _drawn(logits_BV: Tensor, generator: torch.Generator) -> Tensor:
    """ids_B1: where one random number a block falls among the summed chances; `multinomial` draws V of them."""
    sums_BV = logits_BV.softmax(-1).cumsum(-1, dtype=torch.float64)
    # From (0, 1], so that a token without a chance is never met.
    points_B1 = 1 - torch.rand(len(sums_BV), 1, dtype=torch.float64, generator=generator)
    return torch.searchsorted(sums_BV, points_B1 * sums_BV[:, -1:])


def _first_tokens(model: "PreTrainedModel", num_blocks: int, generator: torch.Generator) -> Tensor:
    config = model.config.get_text_config()
    for name in ("bos_token_id", "eos_token_id"):
        token = getattr(config, name, None)
        # Some families list several end tokens; the first is the end of text.
        token = token[0] if isinstance(token, list) and token else token
        if isinstance(token, int) and 0 <= token < config.vocab_size:
            return torch.full((num_blocks, 1), token)
    return torch.randint(config.vocab_size, (num_blocks, 1), generator=generator)
