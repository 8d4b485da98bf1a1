"""One reader per file type: `reader(file, columns, name)` yields the rows of an open file, each with its place.

A file of prose or code is one row, its text; the rows of other files are JSON values. Only the given `columns` of a
table are read, of which the first is required; None reads all. `name` is the file in messages; a place is a row in
messages.

A reader of `PARTS` takes two byte offsets more and yields the rows that begin between them, so that several processes
share a file. The rows of a table lie in groups, each of which begins at its share of the file's bytes.
"""

import codecs
import io
import json
import os
from collections.abc import Iterable, Iterator
from typing import Any

from deepseek_jax.errors import UserError

Columns = tuple[str, ...] | None
Rows = Iterator[tuple[Any, str]]

# The longer marks come first: that of UTF-32 starts like that of UTF-16.
FOREIGN_MARKS = {
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}


def read_plain(file: io.BufferedIOBase, columns: Columns, name: str) -> Rows:
    """Yields the whole file, with its line breaks unchanged."""
    yield decode(file.read(), name), name


def read_jsonl(file: Iterable[bytes], columns: Columns, name: str) -> Rows:
    """Yields each line that is not blank."""
    for number, line in enumerate(file, start=1):
        where = f"{name}, line {number}"
        text = decode(line, where)
        if text.strip():
            yield parse(text, where), where


def read_jsonl_part(file: io.BufferedIOBase, columns: Columns, name: str, start: int, stop: int) -> Rows:
    """Yields each line that is not blank and begins between two bytes of the file."""
    if start:
        file.seek(start - 1)
        file.readline()  # the end of a line that began before
    at = file.tell()
    while at < stop and (line := file.readline()):
        where = f"{name}, the line at byte {at:,}"
        text = decode(line, where)
        if text.strip():
            yield parse(text, where), where
        at += len(line)


def _groups(n_groups: int, n_bytes: int, start: int, stop: int | None) -> range:
    """Returns which of the groups of rows of a file begin between two of its bytes."""
    if stop is None:
        return range(n_groups)
    return range(-(-start * n_groups // n_bytes), -(-min(stop, n_bytes) * n_groups // n_bytes))


def read_json(file: io.BufferedIOBase, columns: Columns, name: str) -> Rows:
    """Yields each element of a JSON array, or a single object; lines of objects are read as well."""
    data = file.read()
    try:
        rows = json.loads(decode(data, name))
    except ValueError as error:
        if data.lstrip(codecs.BOM_UTF8 + b" \r\n\t")[:1] == b"{" and str(error).startswith("Extra data"):
            yield from read_jsonl(data.splitlines(keepends=True), columns, name)
            return
        raise UserError(f"{name} is not JSON ({error}). Fix or remove the file.") from error
    for number, row in enumerate(rows if isinstance(rows, list) else [rows], start=1):
        yield row, f"{name}, element {number}"


def read_parquet(file: io.BufferedIOBase, columns: Columns, name: str, start: int = 0, stop: int | None = None) -> Rows:
    """Yields the rows of a table as dicts."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(f"{name} is a parquet file, and pyarrow is not installed. Run: pip install pyarrow") from error
    try:
        table = pyarrow.parquet.ParquetFile(file)
        there = table.schema_arrow.names
        columns = there if columns is None else columns
        if columns[0] not in there:
            raise UserError(f"{name} has columns {', '.join(there)} and no {columns[0]!r}. Set data.text_key.")
        groups = _groups(table.num_row_groups, os.fstat(file.fileno()).st_size, start, stop)
        number = sum(table.metadata.row_group(group).num_rows for group in range(groups.start))
        names = [column for column in columns if column in there]
        for batch in table.iter_batches(row_groups=list(groups), columns=names) if groups else ():
            for row in batch.to_pylist():
                number += 1
                yield row, f"{name}, row {number}"
    except pyarrow.ArrowException as error:
        raise UserError(f"{name} is not a valid parquet file ({error}). Fix or remove it.") from error


def read_array_record(
    file: io.BufferedIOBase, columns: Columns, name: str, start: int = 0, stop: int | None = None
) -> Rows:
    """Yields each record: UTF-8 text, or a JSON object if the first record is one."""
    from grain.sources import ArrayRecordDataSource

    try:
        source = ArrayRecordDataSource(name)
        n_records = len(source)
    except Exception as error:  # the C++ reader raises errors of any class
        raise UserError(f"{name} is not a valid ArrayRecord file ({error}). Fix or remove it.") from error
    if not n_records:
        return
    rows_are_json = is_object(source[0])
    for row in _groups(n_records, os.fstat(file.fileno()).st_size, start, stop):
        where = f"{name}, record {row}"
        record = decode(source[row], where)
        yield (parse(record, where) if rows_are_json else record), where


# By file type; PLAIN files are nothing but text, STREAMED files may be compressed.
READERS = {
    ".txt": read_plain,
    ".py": read_plain,
    ".md": read_plain,
    ".jsonl": read_jsonl,
    ".json": read_json,
    ".parquet": read_parquet,
    ".array_record": read_array_record,
}
PARTS = {".jsonl": read_jsonl_part, ".parquet": read_parquet, ".array_record": read_array_record}
PLAIN = (".txt", ".py", ".md")
STREAMED = (*PLAIN, ".jsonl", ".json")


def decode(data: bytes, where: str) -> str:
    """Returns UTF-8 bytes as text, without a byte-order mark at the start."""
    try:
        return data.removeprefix(codecs.BOM_UTF8).decode()
    except UnicodeDecodeError as error:
        for mark, encoding in FOREIGN_MARKS.items():
            if data.startswith(mark):
                raise UserError(
                    f"{where} is {encoding} text (it starts with that byte-order mark), not UTF-8. "
                    f"Convert it: iconv -f {encoding} -t UTF-8 OLD > NEW"
                ) from error
        raise UserError(
            f"{where} is not UTF-8 text (byte 0x{error.object[error.start]:02x} at offset {error.start}). "
            "Convert it to UTF-8 (iconv -f LATIN1 -t UTF-8 OLD > NEW) or remove it."
        ) from error


def is_object(record: bytes) -> bool:
    """Returns whether a record is a JSON object."""
    try:
        return isinstance(json.loads(record), dict)
    except ValueError:
        return False


def parse(text: str, where: str) -> Any:
    """Returns the JSON value in `text`."""
    try:
        return json.loads(text)
    except ValueError as error:
        raise UserError(f"{where} is not JSON ({error}). Fix the line or remove the file.") from error
