"""What is trained on where it is no text: images, and sound with what is said in it."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from functools import reduce
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from moeify.convert.texts import tokens_of_image
from moeify.data.audio import KINDS, Part, SoundBlocks, all_sound, pieces, sound_blocks
from moeify.data.images import DIGITS, image_blocks, prepared_blocks, read_images
from moeify.data.pairs import dictation
from moeify.data.text import longest_text
from moeify.errors import InputError, UsageError
from moeify.models import stock
from moeify.models.dense import DenseModel
from moeify.models.heads import class_of
from moeify.models.image_processor import ImageProcessor
from moeify.models.inputs import Inputs, one_behind_other, some_blocks
from moeify.models.sound_processor import SoundProcessor
from moeify.models.tokenizer import load_tokenizer
from moeify.training.options import FinetuneOptions

DEFAULT_CONTEXT = 512
# To train on, held out, tokens of a block, and where both are from.
Examples = tuple[Inputs, Inputs, int, dict[str, Any]]


def block_tokens(dense: DenseModel, options: FinetuneOptions) -> int:
    """Tokens of a block: positions of a piece of sound, of an image, else of text."""
    if dense.family.modality == "audio":
        return int(dense.config.max_source_positions)
    if dense.family.modality == "image":
        return tokens_of_image(dense)
    return options.context or min(DEFAULT_CONTEXT, dense.family.context_of(dense.text_config))


def most_tokens(dense: DenseModel, options: FinetuneOptions, num_tokens: int) -> int:
    """Tokens that the sources have to train on, at most so many.

    Raises:
        UsageError: nobody named a source.
        InputError: one cannot be read, or has nothing.
    """
    length, sources = block_tokens(dense, options), options.data
    if dense.family.modality == "text":
        tokenizer = dense.tokenizer()
        return longest_text(sources, tokenizer, num_tokens=num_tokens, context=length, seed=options.seed)
    # Of each source as many are drawn.
    share = -(-num_tokens // (length * max(1, len(sources))))
    if dense.family.modality == "audio":
        check_named(options)
        processor, part = SoundProcessor(dense.path), _part(options)
        counts = [_count(pieces(source, processor, part=part), share) for source in sources]
    else:
        counts = [_count(read_images(source), share) for source in _images(options)]
    return min(num_tokens, max(1, min(counts)) * len(counts) * length)


def _count(items: Iterable[Any], most: int) -> int:
    return sum(1 for _ in islice(items, most))


def _images(options: FinetuneOptions) -> tuple[str, ...]:
    return DIGITS[:1] if options.data == FinetuneOptions.data else options.data


def image_inputs(name: str, path: Path, dense: DenseModel, options: FinetuneOptions) -> Examples:
    """Images for training and held out, tokens of one, and where they are from.

    Raises:
        InputError: they cannot be read, or the models see them differently.
    """
    held = DIGITS[1:] if options.eval_data == FinetuneOptions.eval_data else options.eval_data
    processor, context = ImageProcessor(dense.path), tokens_of_image(dense)
    blocks = image_blocks(
        _images(options), processor, num_images=options.tokens // context, block_tokens=context, seed=options.seed
    )
    images = [list(islice(read_images(source), max(1, options.eval_tokens // context))) for source in held]
    evaluated = [prepared_blocks(some, processor, source, context) for some, source in zip(images, held, strict=True)]
    its = prepared_blocks(images[0][:1], ImageProcessor(path), held[0], context).inputs
    if not all(torch.equal(its[key], tensor[:1]) for key, tensor in evaluated[0].inputs.items()):
        raise InputError(
            f"{name} and {dense.name} prepare images differently", "the teacher must be the dense model itself"
        )
    held_out = {key: torch.cat([some.inputs[key] for some in evaluated]) for key in blocks.inputs}
    provenance = {"data": asdict(blocks.provenance), "eval": [asdict(some.provenance) for some in evaluated]}
    return blocks.inputs, held_out, context, provenance


def sound_inputs(name: str, path: Path, dense: DenseModel, options: FinetuneOptions) -> Examples:
    """Sound for training and held out, positions of a piece.

    What nobody wrote down the dense model does, if it writes. Where --eval-data names no recordings, every tenth piece
    of --data is held out.

    Raises:
        UsageError: nobody named a recording.
        InputError: they cannot be read, or the models hear or write them differently.
    """
    check_named(options)
    is_apart = _part(options) != "all"
    processor, context = SoundProcessor(dense.path), int(dense.config.max_source_positions)
    train = sound_blocks(
        options.data,
        processor,
        num_pieces=options.tokens // context,
        block_tokens=context,
        seed=options.seed,
        part=_part(options),
    )
    most = max(1, options.eval_tokens // context)
    held_out = [
        all_sound(source, processor, most, context, part="held out" if is_apart else "all")
        for source in (options.data if is_apart else options.eval_data)
    ]
    its, expected = (all_sound(options.data[0], one, 1, context).inputs for one in (SoundProcessor(path), processor))
    alike = all(torch.equal(its[key], tensor) for key, tensor in expected.items())
    if not alike or load_tokenizer(path).get_vocab() != dense.tokenizer().get_vocab():
        raise InputError(
            f"{name} and {dense.name} hear or write differently", "the teacher must be the dense model itself"
        )
    provenance = {"data": asdict(train.provenance), "eval": [asdict(some.provenance) for some in held_out]}
    number, whole = len(train.texts), _dictated([train, *held_out], dense, options.device)
    return some_blocks(whole, slice(number)), some_blocks(whole, slice(number, None)), context, provenance


def check_named(options: FinetuneOptions) -> None:
    """Raise UsageError if nobody named a recording."""
    if options.data == FinetuneOptions.data:
        raise UsageError("there is no recording in moeify to train on", f"--data takes {KINDS}")


def _part(options: FinetuneOptions) -> Part:
    """Of a source: all of it, unless something has to be held out."""
    return "trained on" if options.eval_data == FinetuneOptions.eval_data else "all"


def _dictated(blocks: Sequence[SoundBlocks], dense: DenseModel, device: str) -> Inputs:
    """One behind the other, with what a decoder has to write."""
    inputs: Inputs = reduce(one_behind_other, (some.inputs for some in blocks))
    if not class_of(dense.config).can_generate():
        return inputs
    model: Any = stock.load(dense.path, dtype=torch.float32).to(device).eval()
    return dictation(model, inputs, [text for some in blocks for text in some.texts], dense.tokenizer())
