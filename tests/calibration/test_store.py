"""Arrays as long as the text: the same in memory and on a disk but for rounding, nothing left there, no room said."""

import os
from pathlib import Path

import pytest
import torch
from conftest import MakeDense

from moeify.calibration.store import IN_MEMORY, Store, stretches, widened
from moeify.calibration.stream import HiddenStream
from moeify.errors import DiskError
from moeify.models.dense import open_dense


def pieces() -> list[torch.Tensor]:
    return list(torch.randn(70, 6, generator=torch.Generator().manual_seed(0)).split(32))


def test_pieces_follow_one_another_in_memory_and_on_a_disk(tmp_path: Path) -> None:
    expected_TX, store = torch.cat(pieces()), Store(tmp_path)
    assert torch.equal(IN_MEMORY.collect(iter(pieces()), 70), expected_TX)
    rounded_TX = store.collect(iter(pieces()), 70)
    assert torch.equal(rounded_TX, expected_TX.bfloat16())
    assert torch.equal(store.collect(iter(pieces()), 70, exact=True), expected_TX)
    part_TX = widened(rounded_TX, slice(3, 9))
    assert part_TX.dtype == torch.float32
    assert torch.equal(part_TX, expected_TX.bfloat16()[3:9].float())


def test_a_file_has_no_name_and_takes_its_room_at_once(tmp_path: Path) -> None:
    held_TX = Store(tmp_path).collect(iter([torch.ones(1000, 1000)]), 1000)
    assert list(tmp_path.iterdir()) == []
    mapped = [line for line in Path("/proc/self/maps").read_text().splitlines() if str(tmp_path) in line]
    assert len(mapped) == 1
    assert held_TX.sum() == 1_000_000
    del held_TX
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()


def test_a_full_disk_is_said_before_it_is_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: int) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(DiskError, match="is full"):
        Store(tmp_path).collect(iter(pieces()), 70)
    assert list(tmp_path.iterdir()) == []


def test_stretches_cover_all_rows_once() -> None:
    assert [(rows.start, rows.stop) for rows in stretches(7, 3)] == [(0, 3), (3, 6), (6, 7)]
    assert list(stretches(0)) == []


# A norm behind the FFN has the block run again.
@pytest.mark.parametrize("family", ["llama", "olmo2"])
def test_a_stream_on_a_disk_is_close_to_one_in_memory(family: str, make_dense: MakeDense, tmp_path: Path) -> None:
    dense = open_dense(str(make_dense(family)))
    ids_BC = torch.randint(384, (4, 32), generator=torch.Generator().manual_seed(0))
    streams = [HiddenStream(dense, {"input_ids": ids_BC}, store=store) for store in (IN_MEMORY, Store(tmp_path))]
    for layer in range(dense.num_layers):
        for stream in streams:
            stream.advance(dense.ffn(layer)(widened(stream.attend(layer), slice(None))))
    memory_TD, disk_TD = (stream.residual() for stream in streams)
    assert disk_TD.dtype == torch.bfloat16
    difference = (memory_TD - disk_TD.float()).norm() / memory_TD.norm()
    assert 0 < difference < 0.01
