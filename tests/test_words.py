"""Sizes are read as they are written."""

import pytest

from moeify.words import parse_size, size

SIZES = {
    "6GB": 6_000_000_000,
    "5.8GiB": 6_227_702_579,
    " 512 mb ": 512_000_000,
    "1TiB": 1 << 40,
    "0": 0,
    "0.0": 0,
    "0GB": 0,
    "1.5kB": 1500,
}
WRONG = [
    "6",
    "6G",
    "GB",
    "-6GB",
    "nan",
    "nanGB",
    "inf",
    "1e9GB",
    "6 GB GB",
    "6,5GB",
    "٦GB",
    "",
    "9999999999GB",
    "6gb/s",
]


@pytest.mark.parametrize(("text", "num_bytes"), SIZES.items())
def test_a_size_is_read(text: str, num_bytes: int) -> None:
    assert parse_size(text) == num_bytes


@pytest.mark.parametrize("num_bytes", [1500, 800_000_000, 6_000_000_000, 12_300_000_000_000])
def test_a_size_that_is_written_is_read_back(num_bytes: int) -> None:
    assert parse_size(size(num_bytes)) == num_bytes


@pytest.mark.parametrize("text", WRONG)
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="expected a size with its unit, such as 6GB"):
        parse_size(text)
