"""Text in, tokens out: the one place where calibration, training and evaluation get their text.

What a SOURCE is stands at the top of documents.py.

Traps: .jsonl, .parquet and hub sets are shuffled in a bounded buffer, so of a very long one only the beginning is used.
Tokens depend on the tokenizer, so two models' hashes differ for the same text.

Shapes: B blocks, C tokens a block (context), T tokens of a stream, V vocabulary.
"""

import hashlib
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

from moeify.data.documents import KINDS, read_documents
from moeify.data.lines import break_some
from moeify.errors import InputError, UsageError, warn

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Tokenizers take more than linear time on one long string, and pieces are what a long document is spread by.
PIECE_CHARACTERS = 20_000
# At most 1,024 pieces of 20 kB wait to be drawn: 20 MB, whatever the size of the source.
SHUFFLE_PIECES = 1024
# One place in a document gives at most this many blocks in a row, while the source has other places to offer.
RUN_BLOCKS = 16
Item = TypeVar("Item")


@dataclass(frozen=True)
class Provenance:
    """Where tokens came from; stored in plans and reports so that they can be made again.

    `sha256` is of the int64 token ids in order, little-endian, or of the float32 numbers that images are prepared to.
    `context` and `seed` are 0 for an unbroken, unshuffled stream. An image is a document, and its tokens are those that
    the model makes of it.
    """

    source: str
    sha256: str
    num_tokens: int
    num_documents: int
    context: int
    seed: int


@dataclass(frozen=True)
class TokenBlocks:
    """B blocks of C consecutive tokens, int64."""

    ids_BC: Tensor
    provenance: Provenance

    @property
    def inputs(self) -> dict[str, Tensor]:
        """What a model is called with."""
        return {"input_ids": self.ids_BC}


@dataclass(frozen=True)
class TokenStream:
    """T tokens in reading order, int64."""

    ids_T: Tensor
    provenance: Provenance


def calibration_blocks(
    sources: Sequence[str],
    tokenizer: "PreTrainedTokenizerBase",
    *,
    num_tokens: int,
    context: int,
    seed: int,
    sample: Callable[[int, int, int], Tensor] | None = None,
) -> TokenBlocks:
    """Draw num_tokens // context blocks of varied text, the same number from every source (to within one block).

    A source that is too short gives all its blocks, with a warning, and the others more. Pieces of documents are drawn
    in random order and joined by EOS, if the tokenizer has one; then the blocks of all sources are mixed. Same text,
    seed and tokenizer: the same ids. At most a sixth of the text has its long lines broken, see lines.py.

    Args:
        sources: see documents.py.
        sample: (num_tokens, context, seed) -> ids_BC, the dense model's own text; only the source `self` needs it.

    Raises:
        UsageError: no source, one named twice, `self` without a model, or fewer blocks than sources.
        InputError: a source cannot be read or has no block, or all together are too short.
    """
    drawn = _draw(sources, tokenizer, num_tokens, context, seed)
    short = [f"{part.source} ({len(part.ids):,})" for part in drawn if part.is_all]
    found = sum(part.num_blocks for part in drawn) * context
    if found < num_tokens // context * context:
        names = ", ".join(part.source for part in drawn)
        raise InputError(f"{names} gives {found:,} tokens, {num_tokens:,} were asked for", f"--tokens {found}")
    if short:
        warn(f"{', '.join(short)} gives all its tokens, and the other sources give more")
    parts = []
    for part in drawn:
        needed = part.num_blocks * context
        if part.source == "self":
            parts.append(_own_text(sample, needed, context, seed))
        else:
            parts.append(torch.tensor(part.ids[:needed]).view(-1, context))
    blocks_BC = torch.cat(parts)
    order_B = torch.randperm(len(blocks_BC), generator=torch.Generator().manual_seed(seed))
    blocks_BC = blocks_BC[order_B].contiguous()
    num_documents = sum(part.num_documents for part in drawn)
    return TokenBlocks(blocks_BC, _provenance(" + ".join(sources), blocks_BC, num_documents, context, seed))


def longest_text(
    sources: Sequence[str], tokenizer: "PreTrainedTokenizerBase", *, num_tokens: int, context: int, seed: int
) -> int:
    """Tokens that `calibration_blocks` can draw from these sources, at most num_tokens.

    Raises:
        UsageError, InputError: as `calibration_blocks`.
    """
    found = sum(part.num_blocks for part in _draw(sources, tokenizer, num_tokens, context, seed)) * context
    return min(found, num_tokens)


@dataclass(frozen=True)
class _Part:
    """What one source gives: num_blocks blocks of `ids`; the model's own text is written later."""

    source: str
    num_blocks: int
    ids: Sequence[int] = ()
    num_documents: int = 0
    is_all: bool = False


def _draw(
    sources: Sequence[str], tokenizer: "PreTrainedTokenizerBase", num_tokens: int, context: int, seed: int
) -> list[_Part]:
    """One part a source, in their order; all have as many blocks but those that end before.

    Raises:
        InputError: a source has no block.
    """
    _check_sources(sources, num_tokens, context)
    left, parts, open_sources = num_tokens // context, dict[str, _Part](), list(sources)
    while open_sources:
        for place, source in enumerate(open_sources):
            share = left // len(open_sources) + (place < left % len(open_sources))
            if source == "self":
                parts[source] = _Part(source, share, num_documents=share)
                continue
            ids, used = _draw_tokens(source, tokenizer, share * context, context, seed)
            if len(ids) < context:
                raise InputError(
                    f"{source} gives {len(ids):,} tokens, one block has {context:,}", "give a longer text, or `builtin`"
                )
            has = len(ids) // context
            parts[source] = _Part(source, min(share, has), ids, used, is_all=has < share)
        short = [source for source in open_sources if parts[source].is_all]
        left -= sum(parts[source].num_blocks for source in short)
        open_sources = [source for source in open_sources if source not in short] if short else []
    return [parts[source] for source in sources]


def evaluation_tokens(
    source: str, tokenizer: "PreTrainedTokenizerBase", *, num_tokens: int | None = None
) -> TokenStream:
    """Return the source's tokens in reading order, documents joined by EOS if the tokenizer has one.

    Args:
        num_tokens: stop after this many; None, or more than there are: all of them.

    Raises:
        InputError: the source cannot be read, or gives fewer than two tokens (nothing to predict).
    """
    ids: list[int] = []
    num_documents = 0
    for document in read_documents(source):
        if num_tokens is not None and len(ids) >= num_tokens:
            break
        if ids and tokenizer.eos_token_id is not None:
            ids.append(int(tokenizer.eos_token_id))
        for piece in split_document(document):
            ids += _tokenize(piece, tokenizer)
            if num_tokens is not None and len(ids) >= num_tokens:
                break
        num_documents += 1
    ids_T = torch.tensor(ids[:num_tokens], dtype=torch.int64)
    if len(ids_T) < 2:
        raise InputError(
            f"{source} gives {len(ids_T)} tokens, at least 2 are needed", "give a longer text, or `builtin`"
        )
    return TokenStream(ids_T, _provenance(source, ids_T, num_documents, context=0, seed=0))


def _check_sources(sources: Sequence[str], num_tokens: int, context: int) -> None:
    """Raise UsageError unless each source is named once and can give a block."""
    if not sources:
        raise UsageError("no text source was given, at least one is needed", KINDS)
    for source in sources:
        if sources.count(source) > 1:
            raise UsageError(f"{source} is named {sources.count(source)} times as a source", "name each source once")
    num_blocks, num_sources = num_tokens // context, len(sources)
    if num_blocks < num_sources:
        raise UsageError(
            f"{num_tokens:,} tokens make {num_blocks} blocks of {context:,}, {num_sources} sources need one each",
            f"--tokens {num_sources * context}",
        )


def _own_text(sample: Callable[[int, int, int], Tensor] | None, needed: int, context: int, seed: int) -> Tensor:
    if sample is None:
        raise UsageError("the source self needs a model that writes the text, and none is loaded here", "name a text")
    ids_BC = sample(needed, context, seed).to(device="cpu", dtype=torch.int64)
    assert ids_BC.shape == (needed // context, context), ids_BC.shape
    return ids_BC


def _draw_tokens(
    source: str, tokenizer: "PreTrainedTokenizerBase", needed: int, context: int, seed: int
) -> tuple[list[int], int]:
    """Return at least `needed` token ids, or all there are, and from how many documents they come."""
    end = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
    ids: list[int] = []
    used: set[int] = set()
    # What follows the first run of a piece waits here and is used only if the source has nothing else.
    waiting: list[tuple[int, list[int]]] = []
    waiting_tokens = 0
    for number, piece in break_some(shuffled(_pieces(source), random.Random(seed))):
        piece_ids = _tokenize(piece, tokenizer)
        for start in range(0, len(piece_ids), RUN_BLOCKS * context):
            run = piece_ids[start : start + RUN_BLOCKS * context] + end
            if start == 0:
                ids += run
                used.add(number)
            elif waiting_tokens < needed:
                waiting.append((number, run))
                waiting_tokens += len(run)
        if len(ids) >= needed:
            return ids, len(used)
    random.Random(seed).shuffle(waiting)
    for number, run in waiting:
        if len(ids) >= needed:
            break
        ids += run
        used.add(number)
    return ids, len(used)


def _provenance(source: str, ids: Tensor, num_documents: int, context: int, seed: int) -> Provenance:
    digest = hashlib.sha256(ids.numpy().astype("<i8").tobytes()).hexdigest()
    return Provenance(source, digest, ids.numel(), num_documents, context, seed)


def _tokenize(text: str, tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    # verbose=False: no warning that a piece is longer than the model's context; it is cut into blocks later.
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def split_document(document: str) -> Iterator[str]:
    """Yield the document in pieces of at most PIECE_CHARACTERS, cut before white space where there is any."""
    start = 0
    while len(document) - start > PIECE_CHARACTERS:
        stop = start + PIECE_CHARACTERS
        cuts = (document.rfind(space, start + 1, stop) for space in ("\n\n", "\n", " "))
        stop = next((cut for cut in cuts if cut > start + PIECE_CHARACTERS // 2), stop)
        yield document[start:stop]
        start = stop
    yield document[start:]


def _pieces(source: str) -> Iterator[tuple[int, str]]:
    for number, document in enumerate(read_documents(source)):
        for piece in split_document(document):
            yield number, piece


def shuffled(items: Iterator[Item], generator: random.Random) -> Iterator[Item]:
    """Yield the items in random order, holding SHUFFLE_PIECES of them at a time."""
    held: list[Item] = []
    for item in items:
        if len(held) < SHUFFLE_PIECES:
            held.append(item)
            continue
        place = generator.randrange(SHUFFLE_PIECES)
        yield held[place]
        held[place] = item
    generator.shuffle(held)
    yield from held
