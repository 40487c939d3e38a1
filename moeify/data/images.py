"""Images in, a model's inputs out. A SOURCE of images is one of

    folder/                 all images below it, sorted; the name of the folder that an image lies in is its label
    part.parquet            a column `image` (bytes, or {"bytes": ...}) and, if there is one, `label`
    set.npz, images.npy     an array of N images, H x W or H x W x channels, of bytes or of numbers from 0 to 1; in an
                            .npz it is called `images` or `x`, its labels `labels` or `y`
    photo.png, ...          one image
    org/name:config:split   a data set on the Hugging Face hub, streamed, with columns as in a .parquet
    digits, digits-heldout  scikit-learn's 1,797 handwritten digits of 8 x 8 pixels: four of five, and every fifth

A word above comes first, then the disk, then the hub.

Shapes: B images, C tokens that a model makes of one.
"""

import hashlib
import io
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor

from moeify.data.documents import HUB_SOURCE
from moeify.data.records import draw, hub_records, parquet_records
from moeify.data.text import Provenance, shuffled
from moeify.errors import InputError, first_line, nearest
from moeify.models.builtin_vit import LEVELS, digits
from moeify.models.image_processor import ImageProcessor

DIGITS = ("digits", "digits-heldout")
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
ARRAYS = (".npz", ".npy")
KINDS = "a folder of images, an image, a .parquet, .npz or .npy file, org/name on the hub, digits or digits-heldout"
# Images that are prepared at once.
BATCH = 64
# An image of pillow, and its label.
Labelled = tuple[Any, str | None]


@dataclass(frozen=True)
class ImageBlocks:
    """Inputs made of B images, each a block, and the images' labels."""

    inputs: dict[str, Tensor]
    labels: tuple[str | None, ...]
    provenance: Provenance


def image_blocks(
    sources: Sequence[str], processor: ImageProcessor, *, num_images: int, block_tokens: int, seed: int
) -> ImageBlocks:
    """Draw images at random, the same number from every source (to within one).

    Same images, seed and processor: the same inputs.

    Args:
        sources: see the top of this file.
        processor: the model's.
        num_images: B.
        block_tokens: C.
        seed: of the order.

    Raises:
        UsageError: no source, one named twice, or fewer images than sources.
        InputError: a source cannot be read or has too few images.
    """
    drawn = draw(
        sources,
        lambda source: read_images(source, seed),
        num_images,
        block_tokens=block_tokens,
        seed=seed,
        kind="images",
        items="images",
        hint=KINDS,
    )
    return prepared_blocks(drawn, processor, " + ".join(sources), block_tokens, seed)


def prepared_blocks(
    images: Sequence[Labelled], processor: ImageProcessor, source: str, block_tokens: int, seed: int = 0
) -> ImageBlocks:
    """Inputs of these images, in their order."""
    batches = [
        processor([image for image, _ in images[start : start + BATCH]]) for start in range(0, len(images), BATCH)
    ]
    sizes = {tuple(batch["pixel_values"].shape[1:]) for batch in batches}
    if len(sizes) > 1:
        raise InputError(
            f"the model's processor leaves images of {source} in {len(sizes)} sizes, such as {min(sizes)} and "
            f"{max(sizes)}",
            "inputs of one model have one size: crop the images",
        )
    inputs = {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}
    digest = hashlib.sha256(inputs["pixel_values"].numpy().astype("<f4").tobytes()).hexdigest()
    provenance = Provenance(source, digest, len(images) * block_tokens, len(images), block_tokens, seed)
    return ImageBlocks(inputs, tuple(label for _, label in images), provenance)


def read_images(source: str, seed: int | None = None) -> Iterator[Labelled]:
    """Yield the images of a source with their labels, one by one.

    Args:
        source: see the top of this file.
        seed: of a random order; None keeps the source's own.

    Raises:
        InputError: nothing is there, or it is no image; the file is named.
    """
    path = Path(source).expanduser()
    if source in DIGITS:
        return of_arrays(*digits(heldout=source == "digits-heldout"), seed)
    if path.is_dir():
        return _of_folder(path, seed)
    if path.suffix.lower() in ARRAYS and path.is_file():
        return of_arrays(*_images_in(path, _held(path)), seed)
    if path.suffix == ".parquet" and path.is_file():
        return _of_records(_in_order(parquet_records(path, _columns, BATCH), seed), source)
    if path.is_file():
        return iter([(opened_image(path), None)])
    hub = HUB_SOURCE.fullmatch(source)
    if hub is None or path.suffix in (*SUFFIXES, *ARRAYS, ".parquet") or path.parent.is_dir():
        near = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
        similar = nearest(path.name, [*near, *DIGITS])
        guess = f"did you mean {path.with_name(similar) if similar in near else similar}? " if similar else ""
        raise InputError(f"there is no source of images {source}", f"{guess}a source is {KINDS}")
    records = hub_records(
        source, hub["name"], hub["config"] or None, hub["split"] or "train", instead="local images, or `digits`"
    )
    return _of_records(_in_order(records, seed), source)


def _in_order(records: Iterator[Any], seed: int | None) -> Iterator[Any]:
    return records if seed is None else shuffled(records, random.Random(seed))


def labelled_arrays(path: Path) -> tuple[Any, Any, Any]:
    """Images, labels and, or None, splits of a file of numpy.

    Raises:
        InputError: it cannot be read, or has no labels.
    """
    held = _held(path)
    images, labels = _images_in(path, held)
    if labels is None:
        raise InputError(f"{path} has no labels [{len(images)}], expected an array of that name", "write it again")
    splits = held.get("splits")
    if splits is not None and splits.shape != labels.shape:
        raise InputError(f"{path}: splits are {list(splits.shape)}, labels {list(labels.shape)}", "one for each image")
    return images, labels, splits


def _held(path: Path) -> dict[str, Any]:
    """The arrays of a file of numpy; nothing in it is unpickled."""
    try:
        loaded = np.load(path, allow_pickle=False)
        return {name: loaded[name] for name in loaded.files} if path.suffix.lower() == ".npz" else {"images": loaded}
    except (OSError, ValueError, EOFError, BadZipFile) as error:
        raise InputError(f"{path} is not a readable file of arrays: {first_line(error)}", "write it again") from error


def _images_in(path: Path, held: dict[str, Any]) -> tuple[Any, Any]:
    """Images and labels, or None, of arrays by their names."""
    images = next((held[name] for name in ("images", "x") if name in held), None)
    labels = next((held[name] for name in ("labels", "y") if name in held), None)
    if images is None or images.ndim not in (3, 4) or not (labels is None or labels.shape == images.shape[:1]):
        found = ", ".join(f"{name} {list(array.shape)}" for name, array in held.items())
        raise InputError(
            f"{path} holds {found or 'nothing'}, expected images [N, H, W] or [N, H, W, channels] and labels [N]",
            "call the arrays images and labels",
        )
    if images.dtype != np.uint8 and not (images.dtype.kind == "f" and images.min() >= 0 and images.max() <= 1):
        raise InputError(
            f"{path}: images are {images.dtype} from {images.min()} to {images.max()}, expected uint8, or floats from "
            "0 to 1",
            "scale them",
        )
    return images, labels


def of_arrays(images: Any, labels: Any, seed: int | None) -> Iterator[Labelled]:
    order = np.arange(len(images)) if seed is None else np.random.default_rng(seed).permutation(len(images))
    for place in order:
        yield image_of(images[place]), None if labels is None else str(labels[place])


def image_of(item: Any) -> Any:
    """An image of pillow from a file's path, or from an array of pixels.

    Raises:
        InputError: it cannot be read.
    """
    if isinstance(item, Path):
        return opened_image(item)
    from PIL import Image

    pixels = item if item.dtype == np.uint8 else np.rint(item * LEVELS).astype(np.uint8)
    return Image.fromarray(pixels[..., 0] if pixels.ndim == 3 and pixels.shape[-1] == 1 else pixels)


def _of_folder(folder: Path, seed: int | None) -> Iterator[Labelled]:
    paths = [
        path
        for path in sorted(folder.rglob("*"))
        if path.suffix.lower() in SUFFIXES
        and path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    ]
    if not paths:
        raise InputError(f"{folder} holds no image", f"a folder is searched for {', '.join(SUFFIXES)}")
    if seed is not None:
        random.Random(seed).shuffle(paths)
    return ((opened_image(path), None if path.parent == folder else path.parent.name) for path in paths)


def opened_image(file: Any, name: str = "") -> Any:
    """An image, read whole.

    Raises:
        InputError: it is none.
    """
    from PIL import Image

    try:
        image = Image.open(file)
        image.load()
    except Exception as error:
        # Its decoders raise many unrelated types.
        raise InputError(
            f"{name or file} is not a readable image: {first_line(error)}", f"a source is {KINDS}"
        ) from error
    return image


def _columns(names: Sequence[str]) -> list[str]:
    return [name for name in ("image", "label") if name in names]


def _of_records(records: Iterator[Any], source: str) -> Iterator[Labelled]:
    for number, record in enumerate(records, start=1):
        image, label = record.get("image"), record.get("label")
        image = image.get("bytes") if isinstance(image, dict) else image
        if isinstance(image, bytes):
            image = opened_image(io.BytesIO(image), f"{source}, image {number}")
        if not hasattr(image, "convert"):
            raise InputError(
                f"{source}, record {number}: there is no image, but {', '.join(map(str, record)) or 'nothing'}",
                'a record needs "image": bytes, and "label" if labels are needed',
            )
        yield image, None if label is None else str(label)
