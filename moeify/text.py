"""Text in, tokens out: the one place where calibration, training and evaluation get their text.

A SOURCE is one of

    book.txt, notes.md, ...   UTF-8 text; one document a file, or one a page where form feeds separate pages
    chat.jsonl                one object a line: {"text": "..."} or {"messages": [{"content": "..."}, ...]}
    chat.json                 an array of such objects (or, as .jsonl, one a line)
    part.parquet              a column `text` or `messages`
    folder/                   all .txt, .md, .jsonl, .json and .parquet files below it, sorted; hidden ones are left out
    org/name:config:split     a data set on the Hugging Face hub, streamed; `org/name` is its default config's `train`
    builtin, builtin-heldout  Python's reference, in two parts that share no paragraph (see builtin.py)
    self                      what the dense model writes by itself, for calibration without any text

A word above comes first, then the disk, then the hub: `./builtin` is a file of that name.

Traps: .jsonl, .parquet and hub sets are shuffled in a bounded buffer, so of a very long one only the beginning is used.
Tokens depend on the tokenizer, so two models' hashes differ for the same text.

Shapes: B blocks, C tokens a block (context), T tokens of a stream, V vocabulary.
"""

import difflib
import hashlib
import json
import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from moeify.builtin import builtin_documents
from moeify.errors import InputError, MoeifyError, UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

FOLDER_SUFFIXES = (".txt", ".md", ".jsonl", ".json", ".parquet")
KINDS = (
    "a text, .jsonl, .json or .parquet file, a folder of them, org/name on the hub, builtin, builtin-heldout or self"
)
HUB_SOURCE = re.compile(r"(?P<name>\w[\w.-]*/\w[\w.-]*)(:(?P<config>[^:/]*))?(:(?P<split>[^:/]*))?")
RECORD_HINT = 'every record needs "text": "..." or "messages": [{"content": "..."}]'
# Tokenizers take more than linear time on one long string, and pieces are what a long document is spread by.
PIECE_CHARACTERS = 20_000
# At most 1,024 pieces of 20 kB wait to be drawn: 20 MB, whatever the size of the source.
SHUFFLE_PIECES = 1024
# One place in a document gives at most this many blocks in a row, while the source has other places to offer.
RUN_BLOCKS = 16
SAMPLE_BATCH = 32
Item = TypeVar("Item")


@dataclass(frozen=True)
class Provenance:
    """Where tokens came from; stored in plans and reports so that they can be made again.

    `sha256` is of the int64 token ids in order, little-endian. `context` and `seed` are 0 for an unbroken, unshuffled
    stream.
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

    Pieces of documents are drawn in random order and joined by EOS, if the tokenizer has one; then the blocks of all
    sources are mixed. Same text, seed and tokenizer: the same ids.

    Args:
        sources: see the top of this file.
        sample: (num_tokens, context, seed) -> ids_BC, the dense model's own text; only the source `self` needs it.

    Raises:
        UsageError: no source, one named twice, `self` without a model, or fewer blocks than sources.
        InputError: a source cannot be read or is too short.
    """
    shares = _shares(sources, num_tokens, context)
    drawn, num_documents = [], 0
    too_short: list[tuple[str, int, int]] = []
    for source, num_blocks in zip(sources, shares, strict=True):
        needed = num_blocks * context
        if source == "self":
            ids_BC, used = _own_text(sample, needed, context, seed), num_blocks
        else:
            ids, used = _draw_tokens(source, tokenizer, needed, context, seed)
            if len(ids) < needed:
                too_short.append((source, len(ids), needed))
                continue
            ids_BC = torch.tensor(ids[:needed]).view(-1, context)
        drawn.append(ids_BC)
        num_documents += used
    if too_short:
        raise _too_short_error(too_short, len(sources), context)
    blocks_BC = torch.cat(drawn)
    order_B = torch.randperm(len(blocks_BC), generator=torch.Generator().manual_seed(seed))
    blocks_BC = blocks_BC[order_B].contiguous()
    return TokenBlocks(blocks_BC, _provenance(" + ".join(sources), blocks_BC, num_documents, context, seed))


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


@torch.no_grad()
def sample_from_model(model: "PreTrainedModel", *, num_tokens: int, context: int, seed: int) -> Tensor:
    """Let the model write num_tokens // context blocks, each from its BOS token on, at temperature 1.

    Not `model.generate`: it fills in sampling settings from the model's generation_config (top-p, repetition penalty,
    stop tokens), and calibration wants the model's own distribution. After EOS the model goes on, as in packed text.

    A model without BOS starts from EOS, which stood before every document in training; one with neither starts every
    block from a random token, so that the blocks differ from the first token on (LLM-QAT, https://arxiv.org/abs/2305.17888).

    Returns:
        ids_BC, int64 on the CPU; the same for the same seed on the same machine.
    """
    generator = torch.Generator().manual_seed(seed)
    training = model.training
    model.train(False)
    blocks = []
    for first_B1 in torch.split(_first_tokens(model, num_tokens // context, generator), SAMPLE_BATCH):
        columns, cache = [first_B1], None
        for _ in range(context - 1):
            out = model(input_ids=columns[-1].to(model.device), past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            # On the CPU, where one seed means one sequence whatever the device.
            chances_BV = out.logits[:, -1].float().cpu().softmax(-1)
            columns.append(torch.multinomial(chances_BV, 1, generator=generator))
        blocks.append(torch.cat(columns, dim=1))
    model.train(training)
    return torch.cat(blocks)


def _first_tokens(model: "PreTrainedModel", num_blocks: int, generator: torch.Generator) -> Tensor:
    config = model.config.get_text_config()
    for name in ("bos_token_id", "eos_token_id"):
        token = getattr(config, name, None)
        # Some families list several end tokens; the first is the end of text.
        token = token[0] if isinstance(token, list) and token else token
        if isinstance(token, int) and 0 <= token < config.vocab_size:
            return torch.full((num_blocks, 1), token)
    return torch.randint(config.vocab_size, (num_blocks, 1), generator=generator)


def _shares(sources: Sequence[str], num_tokens: int, context: int) -> list[int]:
    """Return how many blocks each source gives."""
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
    return [num_blocks // num_sources + (place < num_blocks % num_sources) for place in range(num_sources)]


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
    for number, piece in _shuffle(_pieces(source), random.Random(seed)):
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


def _too_short_error(too_short: list[tuple[str, int, int]], num_sources: int, context: int) -> InputError:
    source, found, needed = min(too_short, key=lambda entry: entry[1])
    works = found // context * context * num_sources
    hint = f"--tokens {works}" if works else f"one block needs {context:,} tokens: give a longer text, or `builtin`"
    return InputError(f"{source} gives {found:,} tokens, {needed:,} were asked for", hint)


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


def _shuffle(items: Iterator[Item], generator: random.Random) -> Iterator[Item]:
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


def read_documents(source: str) -> Iterator[str]:
    """Yield the documents of a source one by one, without blank ones.

    Raises:
        UsageError: the source is `self`, which is sampled and not read.
        InputError: nothing is there, or it is not text; the file and the line or byte are named.
    """
    if source in ("builtin", "builtin-heldout"):
        return iter(builtin_documents(heldout=source == "builtin-heldout"))
    if source == "self":
        raise UsageError("the source self can only calibrate, it is not a text to read", "name a text, or `builtin`")
    path = Path(source).expanduser()
    if path.is_dir():
        texts = _read_folder(path)
    elif path.is_file():
        texts = _read_file(path)
    else:
        hub = HUB_SOURCE.fullmatch(source)
        # data/train.txt and existing/folder look like org/name, but are meant to be on the disk.
        if hub is None or path.suffix in FOLDER_SUFFIXES or path.parent.is_dir():
            raise _missing_error(source, path)
        texts = _read_hub(source, hub["name"], hub["config"] or None, hub["split"] or "train")
    return (text for text in texts if text.strip())


def _missing_error(source: str, path: Path) -> InputError:
    near = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    close = difflib.get_close_matches(path.name, [*near, "builtin", "builtin-heldout", "self"], n=1)
    guess = f"did you mean {path.with_name(close[0]) if close[0] in near else close[0]}? " if close else ""
    return InputError(f"there is no text source {source}", f"{guess}A source is {KINDS}")


def _read_folder(folder: Path) -> Iterator[str]:
    paths = [
        path
        for path in sorted(folder.rglob("*"))
        if path.suffix in FOLDER_SUFFIXES
        and path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    ]
    if not paths:
        raise InputError(f"{folder} holds no text file", f"a folder is searched for {', '.join(FOLDER_SUFFIXES)}")
    return (text for path in paths for text in _read_file(path))


def _read_file(path: Path) -> Iterator[str]:
    try:
        if path.suffix == ".parquet":
            yield from _read_parquet(path)
        elif path.suffix == ".json" and path.read_bytes().lstrip(b"\xef\xbb\xbf \t\r\n")[:1] == b"[":
            yield from _read_json_array(path)
        elif path.suffix in (".json", ".jsonl"):
            yield from _read_json_lines(path)
        else:
            yield from _decode(path.read_bytes(), path, 0).split("\f")
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}", "is it readable?") from error


def _decode(data: bytes, path: Path, offset: int) -> str:
    """Decode UTF-8 that starts at byte `offset` of the file."""
    hint = "a source is UTF-8 text; `iconv -t UTF-8` converts other encodings"
    nul = data.find(b"\0")
    if nul >= 0:
        raise InputError(f"{path} is not text: byte {offset + nul:,} is NUL", hint)
    try:
        return data.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        found = f"byte {offset + error.start:,} is 0x{data[error.start]:02x}"
        raise InputError(f"{path} is not UTF-8 text: {found}", hint) from error


def _read_json_lines(path: Path) -> Iterator[str]:
    offset = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            text = _decode(line, path, offset).strip()
            offset += len(line)
            if text:
                yield _record_text(_parse(text, f"{path}, line {number}"), f"{path}, line {number}")


def _read_json_array(path: Path) -> Iterator[str]:
    records = _parse(_decode(path.read_bytes(), path, 0), str(path))
    for number, record in enumerate(records, start=1):
        yield _record_text(record, f"{path}, item {number}")


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(f"{where} is not JSON: {error.msg} (column {error.colno})", RECORD_HINT) from error


def _read_parquet(path: Path) -> Iterator[str]:
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            columns = [name for name in ("text", "messages") if name in file.schema_arrow.names][:1]
            if not columns:
                found = ", ".join(file.schema_arrow.names)
                raise InputError(f"{path} has no column text or messages, only {found}", RECORD_HINT)
            for batch in file.iter_batches(batch_size=256, columns=columns):
                for record in batch.to_pylist():
                    yield _record_text(record, f"{path}, column {columns[0]}")
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"{path} is not a readable parquet file: {error}", "download or write it again") from error


def _read_hub(source: str, name: str, config: str | None, split: str) -> Iterator[str]:
    from datasets import load_dataset

    # Offline, unknown name, unknown config, gated, script-based: the libraries below raise many unrelated types.
    try:
        records = load_dataset(name, config, split=split, streaming=True)
        for number, record in enumerate(records, start=1):
            yield _record_text(record, f"{source}, row {number}")
    except MoeifyError:
        raise
    except Exception as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        hint = "check the network, the name and org/name:config:split; or name a local text, or `builtin`"
        raise InputError(f"cannot load {source} from the hub: {reason}", hint) from error


def _record_text(record: Any, where: str) -> str:
    """Return the text of one record; an empty string if the record has the key but nothing in it."""
    if isinstance(record, dict):
        if isinstance(record.get("text"), str):
            return str(record["text"])
        if isinstance(record.get("messages"), list):
            return "\n\n".join(_message_text(message, where) for message in record["messages"])
        if any(key in record and record[key] is None for key in ("text", "messages")):
            return ""
    found = f"keys {', '.join(map(str, record)) or 'none'}" if isinstance(record, dict) else type(record).__name__
    raise InputError(f'{where} has no "text" and no "messages", but {found}', RECORD_HINT)


def _message_text(message: Any, where: str) -> str:
    content = message.get("content", "") if isinstance(message, dict) else message
    if isinstance(content, list):
        return "\n".join(
            part["text"] for part in content if isinstance(part, dict) and isinstance(part.get("text"), str)
        )
    if content is None:
        # A message that only calls a tool.
        return ""
    if not isinstance(content, str):
        raise InputError(f"{where} has a message whose content is {type(content).__name__}", RECORD_HINT)
    return content
