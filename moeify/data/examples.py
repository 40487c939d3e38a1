"""Single examples as inputs of a model, and batches of them: what is measured on features and labels reads them so.

Examples of one shape go through a model together, so that nothing is padded and no mask is needed.

Legend: B examples in a batch, C tokens of one.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from moeify import families
from moeify.data.audio import all_sound
from moeify.data.images import image_of, prepared_blocks, read_images
from moeify.data.pairs import text_pairs
from moeify.data.text import evaluation_tokens
from moeify.errors import InputError
from moeify.families import Modality
from moeify.models.config import load_config
from moeify.models.heads import decoder_start, dense_type
from moeify.models.image_processor import ImageProcessor
from moeify.models.inputs import Inputs, some_blocks
from moeify.models.sound_processor import SoundProcessor
from moeify.models.tokenizer import load_tokenizer

# One example -> inputs of B = 1.
Reader = Callable[[Any], Inputs]
DEFAULT_CONTEXT = 128
BATCH_TOKENS = 2048
BATCH_EXAMPLES = 64


def text_reader(path: Path, context: int | None) -> Reader:
    """Reads a text, or a file of one, as the tokenizer in a model's folder does; what is longer is cut off."""
    tokenizer = load_tokenizer(path)
    before, after = special_ids(tokenizer)
    limit = context or min(DEFAULT_CONTEXT, context_limit(path))

    def read(item: Any) -> Inputs:
        text = item.read_text("utf-8", errors="replace") if isinstance(item, Path) else str(item)
        # A token is rarely more than ten letters: no long text is cut into tokens for its beginning.
        ids = tokenizer(text[: 50 * limit], add_special_tokens=False, verbose=False)["input_ids"]
        kept = ids[: limit - len(before) - len(after)]
        return {"input_ids": torch.tensor([[*before, *kept, *after] or [0]])}

    return read


def image_reader(path: Path, _: int | None) -> Reader:
    """Reads an image, a file of one or an array, as the preprocessor in a model's folder does."""
    processor = ImageProcessor(path)
    return lambda item: processor([image_of(item)])


# Opens a reader: folder of the model, and tokens of an example, where it has tokens (None: as many as are usual).
READERS: dict[Modality, Callable[[Path, int | None], Reader]] = {"text": text_reader, "image": image_reader}


def text_examples(path: Path, source: str, tokens: int, context: int | None) -> tuple[list[Inputs], str]:
    """Pieces of a text, and its hash.

    Args:
        path: folder of the model.
        source: see documents.py.
        tokens: at most so many of the text.
        context: tokens in a piece, special ones among them.

    Raises:
        InputError: it cannot be read, or is shorter than a piece.
    """
    tokenizer = load_tokenizer(path)
    config = load_config(path)
    # Pairs have theirs already.
    around = ([], []) if config.is_encoder_decoder else special_ids(tokenizer)
    before, after = (torch.tensor(ids, dtype=torch.int64) for ids in around)
    size = (context or min(DEFAULT_CONTEXT, context_limit(path))) - len(before) - len(after)
    if size < 1:
        raise InputError("a context of special tokens alone leaves nothing to read", "--context takes more")
    text = evaluation_tokens(source, tokenizer, num_tokens=tokens)
    pieces = [piece for piece in text.ids_T.split(size) if len(piece) == size] or [text.ids_T]
    examples = [torch.cat([before, piece, after])[None] for piece in pieces]
    if config.is_encoder_decoder:
        start = decoder_start(config)
        return [text_pairs(ids_1C, tokenizer, start) for ids_1C in examples], text.provenance.sha256
    return [{"input_ids": ids_1C} for ids_1C in examples], text.provenance.sha256


def image_examples(path: Path, source: str, tokens: int, _: int | None) -> tuple[list[Inputs], str]:
    """Images of a source, in its order, and the hash of what the model sees of them.

    Args:
        path: folder of the model.
        source: see images.py.
        tokens: at most so many patches of images.

    Raises:
        InputError: it cannot be read.
    """
    processor, images = ImageProcessor(path), read_images(source)
    first = next(images)
    side = processor([first[0]])["pixel_values"].shape[-1] // int(load_config(path).patch_size)
    rest = islice(images, max(1, tokens // side**2) - 1)
    blocks = prepared_blocks([first, *rest], processor, source, side**2)
    return [{"pixel_values": one} for one in blocks.inputs["pixel_values"].split(1)], blocks.provenance.sha256


def sound_examples(path: Path, source: str, tokens: int, _: int | None) -> tuple[list[Inputs], str]:
    """Pieces of the recordings of a source, and the hash of what the model sees of them.

    Args:
        path: folder of the model.
        source: see audio.py.
        tokens: at most so many positions of sound.

    Raises:
        InputError: it cannot be read.
    """
    positions = int(load_config(path).max_source_positions)
    blocks = all_sound(source, SoundProcessor(path), max(1, tokens // positions), positions)
    pieces = len(blocks.inputs["input_features"])
    return [some_blocks(blocks.inputs, slice(place, place + 1)) for place in range(pieces)], blocks.provenance.sha256


# Examples without labels: folder of the model, source, number of tokens, tokens of one -> examples and their hash.
EXAMPLES: dict[Modality, Callable[[Path, str, int, int | None], tuple[list[Inputs], str]]] = {
    "text": text_examples,
    "image": image_examples,
    "audio": sound_examples,
}


def special_ids(tokenizer: Any) -> tuple[list[int], list[int]]:
    """Tokens that a tokenizer puts before a text and behind it."""
    plain: list[int] = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole: list[int] = tokenizer("a", add_special_tokens=True)["input_ids"]
    for start in range(len(whole) - len(plain) + 1):
        if whole[start : start + len(plain)] == plain:
            return whole[:start], whole[start + len(plain) :]
    return [], []


def context_limit(path: Path) -> int:
    """Tokens of the longest text that a model takes, special ones among them."""
    config = load_config(path)
    limit = int(getattr(config.get_text_config(), "max_position_embeddings", None) or DEFAULT_CONTEXT)
    name = dense_type(config)
    return limit - (families.find(name).reserved(config) if name in families.names() else 0)


def batches(examples: Iterable[Inputs]) -> Iterator[tuple[list[int], Inputs]]:
    """Examples of one shape together, and their numbers; no more than fit a batch are held of each shape."""
    waiting: dict[tuple[Any, ...], list[tuple[int, Inputs]]] = {}
    for number, example in enumerate(examples):
        shape = tuple((name, *tensor.shape) for name, tensor in sorted(example.items()))
        waiting.setdefault(shape, []).append((number, example))
        if len(waiting[shape]) == _batch_size(example):
            yield _joined(waiting.pop(shape))
    for group in waiting.values():
        yield _joined(group)


def _batch_size(example: Inputs) -> int:
    ids = example.get("input_ids")
    return BATCH_EXAMPLES if ids is None else max(1, min(BATCH_EXAMPLES, BATCH_TOKENS // ids.shape[1]))


def _joined(group: Sequence[tuple[int, Inputs]]) -> tuple[list[int], Inputs]:
    names = group[0][1]
    return [number for number, _ in group], {name: torch.cat([one[name] for _, one in group]) for name in names}
