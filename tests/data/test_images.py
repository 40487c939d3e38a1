"""Images from everywhere: the same pixels, labels where there are any, the same order for the same seed."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_images import SIZE, make_model

from moeify.data.images import DIGITS, image_blocks, read_images
from moeify.data.labelled import is_labelled, open_labelled
from moeify.errors import InputError, UsageError
from moeify.models.image_processor import ImageProcessor

PIXELS = np.random.default_rng(0).integers(0, 256, (6, 10, 12, 3), dtype=np.uint8)
CLASSES = ["cat", "dog", "cat", "dog", "cat", "dog"]


@pytest.fixture(scope="module")
def processor(tmp_path_factory: pytest.TempPathFactory) -> ImageProcessor:
    return ImageProcessor(make_model(tmp_path_factory.mktemp("vit"), "vit", "ViTModel"))


def folder_of_classes(folder: Path) -> Path:
    for number, (pixels, label) in enumerate(zip(PIXELS, CLASSES, strict=True)):
        (folder / label).mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / label / f"{number}.png")
    return folder


def parquet(file: Path) -> Path:
    pyarrow = pytest.importorskip("pyarrow")
    encoded = [path.read_bytes() for path in sorted(folder_of_classes(file.parent / "encoded").rglob("*.png"))]
    table = pyarrow.table({"image": [{"bytes": one} for one in encoded], "label": [0, 0, 0, 1, 1, 1]})
    pytest.importorskip("pyarrow.parquet").write_table(table, file)
    return file


def as_arrays(source: str, seed: int | None = None) -> list[tuple[Any, str | None]]:
    return [(np.asarray(image), label) for image, label in read_images(source, seed)]


def test_every_kind_of_source_gives_the_same_pixels(tmp_path: Path) -> None:
    folder = folder_of_classes(tmp_path / "images")
    np.savez(tmp_path / "set.npz", images=PIXELS, labels=np.array(CLASSES))
    np.save(tmp_path / "plain.npy", PIXELS / 255)
    order = [0, 2, 4, 1, 3, 5]
    expected = {
        str(folder): [(PIXELS[place], CLASSES[place]) for place in order],
        str(tmp_path / "set.npz"): list(zip(PIXELS, CLASSES, strict=True)),
        str(tmp_path / "plain.npy"): [(pixels, None) for pixels in PIXELS],
        str(parquet(tmp_path / "set.parquet")): [
            (PIXELS[place], label) for place, label in zip(order, "000111", strict=True)
        ],
        str(folder / "cat" / "2.png"): [(PIXELS[2], None)],
    }
    for source, images in expected.items():
        found = as_arrays(source)
        assert [label for _, label in found] == [label for _, label in images], source
        assert all(np.array_equal(one, other) for (one, _), (other, _) in zip(found, images, strict=True)), source


def test_digits_are_in_two_parts(processor: ImageProcessor) -> None:
    train, heldout = (as_arrays(name) for name in DIGITS)
    assert (len(train), len(heldout)) == (1438, 359)
    assert {label for _, label in heldout} == set("0123456789")
    digits = open_labelled("digits")
    assert (len(digits.train), len(digits.test), digits.modality) == (1438, 359, "image")
    assert np.array_equal(digits.items[digits.test[0]], heldout[0][0])


def test_the_same_seed_draws_the_same_images(processor: ImageProcessor, tmp_path: Path) -> None:
    np.save(tmp_path / "more.npy", PIXELS)
    sources = ["digits", str(tmp_path / "more.npy")]

    def draw(seed: int) -> Any:
        return image_blocks(sources, processor, num_images=8, block_tokens=17, seed=seed)

    first, again, other = draw(0), draw(0), draw(1)
    pixels = first.inputs["pixel_values"]
    assert pixels.shape == (8, 3, SIZE, SIZE)
    assert torch.equal(pixels, again.inputs["pixel_values"])
    assert not torch.equal(pixels, other.inputs["pixel_values"])
    assert sorted(map(str, first.labels)).count("None") == 4
    assert (first.provenance.num_tokens, first.provenance.num_documents, first.provenance.context) == (136, 8, 17)
    assert first.provenance.sha256 == again.provenance.sha256 != other.provenance.sha256


def test_too_few_images_and_sources_twice_are_refused(processor: ImageProcessor, tmp_path: Path) -> None:
    np.save(tmp_path / "more.npy", PIXELS)
    with pytest.raises(InputError, match=r"has 6 images, 7 were asked for \(17 tokens each\)") as caught:
        image_blocks([str(tmp_path / "more.npy")], processor, num_images=7, block_tokens=17, seed=0)
    assert caught.value.hint == "--tokens 102"
    with pytest.raises(UsageError, match="each named once"):
        image_blocks(["digits", "digits"], processor, num_images=7, block_tokens=17, seed=0)
    with pytest.raises(UsageError, match="no source of images is named"):
        image_blocks([], processor, num_images=7, block_tokens=17, seed=0)
    with pytest.raises(UsageError, match="there are 0 for 1"):
        image_blocks(["digits"], processor, num_images=0, block_tokens=17, seed=0)


def test_what_is_no_image_is_refused(tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"no image")
    (tmp_path / "broken.npz").write_bytes(b"PK no archive")
    np.savez(tmp_path / "other.npz", weights=np.zeros(3))
    np.save(tmp_path / "large.npy", PIXELS.astype(np.float32))
    np.save(tmp_path / "pickled.npy", np.array([{}], dtype=object), allow_pickle=True)
    (tmp_path / "empty").mkdir()
    for name, message in {
        "broken.png": "is not a readable image",
        "broken.npz": "is not a readable file of arrays",
        "other.npz": r"holds weights \[3\], expected images",
        "large.npy": "images are float32 from 0.0 to 255.0, expected uint8",
        "pickled.npy": "is not a readable file of arrays",
        "empty": "holds no image",
        "digitz": "there is no source of images",
    }.items():
        with pytest.raises(InputError, match=message):
            list(read_images(str(tmp_path / name)))


def test_labelled_images_are_divided(tmp_path: Path) -> None:
    splits = ["train"] * 4 + ["test"] * 2
    np.savez(tmp_path / "set.npz", images=PIXELS, labels=np.array(CLASSES), splits=np.array(splits))
    found, name = open_labelled(str(tmp_path / "set.npz")), str(tmp_path / "plain.npz")
    assert is_labelled(name)
    assert (found.test, found.classes, found.modality) == ([4, 5], ("cat", "dog"), "image")
    np.savez(name, images=PIXELS)
    with pytest.raises(InputError, match="has no labels"):
        open_labelled(name)
    folder = open_labelled(str(folder_of_classes(tmp_path / "images")))
    assert (folder.modality, len(folder.items), len(folder.test)) == ("image", 6, 1)


def test_a_folder_that_does_not_say_how_images_are_prepared(tmp_path: Path) -> None:
    model = make_model(tmp_path, "vit", "ViTModel")
    (model / "preprocessor_config.json").write_text('{"image_processor_type": "NoSuch"}')
    with pytest.raises(InputError, match="transformers cannot prepare images as"):
        ImageProcessor(model)
    (model / "preprocessor_config.json").unlink()
    with pytest.raises(InputError, match=r"no preprocessor_config\.json in"):
        ImageProcessor(model)
