"""Records of parquet files and of data sets of the hub, one at a time; items drawn from several sources alike."""

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import torch

from moeify.errors import InputError, MoeifyError, UsageError

EXTRA = "pip install 'moeify[data]'; text, .jsonl and .json files need nothing"
Item = TypeVar("Item")


def parquet_records(path: Path, columns: Callable[[Sequence[str]], list[str]], batch: int) -> Iterator[Any]:
    """Records of a file, so many read at once.

    Args:
        path: of the file.
        columns: chooses among those that there are.
        batch: records that are in memory.

    Raises:
        InputError: it is no such file, or pyarrow is not there.
    """
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise InputError(f"reading {path} needs the pyarrow package", EXTRA) from error
    try:
        with parquet.ParquetFile(path) as file:
            for rows in file.iter_batches(batch_size=batch, columns=columns(file.schema_arrow.names)):
                yield from rows.to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"{path} is not a readable parquet file: {error}", "download or write it again") from error


def hub_records(source: str, name: str, config: str | None, split: str, *, instead: str) -> Iterator[Any]:
    """Records of a data set of the hub.

    Args:
        source: as the user named it.
        name, config, split: of it.
        instead: what else can be named, for a hint.

    Raises:
        InputError: it cannot be loaded, or datasets is not there.
    """
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise InputError(f"reading {source} from the hub needs the datasets package", EXTRA) from error
    # Offline, unknown name, unknown config, gated, script-based: the libraries below raise many unrelated types.
    try:
        yield from load_dataset(name, config, split=split, streaming=True)
    except MoeifyError:
        raise
    except Exception as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        hint = f"check the network, the name and org/name:config:split; or name {instead}"
        raise InputError(f"cannot load {source} from the hub: {reason}", hint) from error


def draw(
    sources: Sequence[str],
    items_of: Callable[[str], Iterator[Item]],
    number: int,
    *,
    block_tokens: int,
    seed: int,
    kind: str,
    items: str,
    hint: str,
) -> list[Item]:
    """The same number of items from every source (to within one), mixed.

    Args:
        sources: names.
        items_of: opens one, in random order.
        number: of items in all.
        block_tokens: what each of them becomes.
        seed: of the mixture.
        kind: of what a source holds: `images`, `sound`.
        items: what is drawn of it, in the plural.
        hint: what a source is.

    Raises:
        UsageError: no source, one named twice, or fewer items than sources.
        InputError: a source has too few.
    """
    if not sources:
        raise UsageError(f"no source of {kind} is named, and none is built in", hint)
    if len(set(sources)) < len(sources):
        raise UsageError(f"{len(sources)} sources of {kind}, expected one or more, each named once", hint)
    if number < len(sources):
        raise UsageError(
            f"{items} of {block_tokens:,} tokens: there are {number} for {len(sources)} sources",
            f"--tokens {block_tokens * len(sources)}",
        )
    drawn: list[Item] = []
    for place, source in enumerate(sources):
        count = number // len(sources) + (place < number % len(sources))
        some = list(islice(items_of(source), count))
        if len(some) < count:
            raise InputError(
                f"{source} has {len(some):,} {items}, {count:,} were asked for ({block_tokens:,} tokens each)",
                f"--tokens {max(1, len(some)) * len(sources) * block_tokens}",
            )
        drawn += some
    order = torch.randperm(len(drawn), generator=torch.Generator().manual_seed(seed)).tolist()
    return [drawn[place] for place in order]
