"""Where text comes from: one SOURCE word in, documents out, read lazily.

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
"""

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from moeify.data.records import hub_records, parquet_records
from moeify.errors import InputError, UsageError, nearest
from moeify.models.builtin import builtin_documents

FOLDER_SUFFIXES = (".txt", ".md", ".jsonl", ".json", ".parquet")
# Python's reference, in two parts: one kind of text.
BUILTIN = ("builtin", "builtin-heldout")
KINDS = (
    "a text, .jsonl, .json or .parquet file, a folder of them, org/name on the hub, builtin, builtin-heldout or self"
)
HUB_SOURCE = re.compile(r"(?P<name>\w[\w.-]*/\w[\w.-]*)(:(?P<config>[^:/]*))?(:(?P<split>[^:/]*))?")
PARQUET_ROWS = 256
RECORD_HINT = 'every record needs "text": "..." or "messages": [{"content": "..."}]'


def read_documents(source: str) -> Iterator[str]:
    """Yield the documents of a source one by one, without blank ones.

    Raises:
        UsageError: the source is `self`, which is sampled and not read.
        InputError: nothing is there, or it is not text; the file and the line or byte are named.
    """
    if source in BUILTIN:
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
    if path.exists():
        return InputError(f"{source} is neither a file nor a folder", f"A source is {KINDS}")
    near = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    similar = nearest(path.name, [*near, *BUILTIN, "self"])
    guess = f"did you mean {path.with_name(similar) if similar in near else similar}? " if similar else ""
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
    def columns(names: Sequence[str]) -> list[str]:
        known = [name for name in ("text", "messages") if name in names][:1]
        if not known:
            raise InputError(f"{path} has no column text or messages, only {', '.join(names)}", RECORD_HINT)
        return known

    for record in parquet_records(path, columns, PARQUET_ROWS):
        yield _record_text(record, f"{path}, column {next(iter(record))}")


def _read_hub(source: str, name: str, config: str | None, split: str) -> Iterator[str]:
    records = hub_records(source, name, config, split, instead="a local text, or `builtin`")
    for number, record in enumerate(records, start=1):
        yield _record_text(record, f"{source}, row {number}")


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
