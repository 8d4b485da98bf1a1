"""One reader per file type: ``reader(file, text_key, name)`` yields the documents of an open file.

A file of prose or code is one document; the others hold one document per row.  A document may be empty: so are the rows
whose text is null.  ``name`` is what messages call the file.
"""

import codecs
import json
from collections.abc import Iterator
from typing import Any, BinaryIO

from deepseek_jax.errors import UserError

# The longer marks first: that of UTF-32 begins like that of UTF-16.
FOREIGN_MARKS = {
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}


def read_plain(file: BinaryIO, text_key: str, name: str) -> Iterator[str]:
    """Yields the whole file, line ends untouched."""
    yield decode(file.read(), name)


def read_jsonl(file: BinaryIO, text_key: str, name: str) -> Iterator[str]:
    """Yields the text of each line; blank lines are passed over."""
    for number, line in enumerate(file, start=1):
        where = f"{name}, line {number}"
        line = decode(line, where)
        if line.strip():
            yield row_text(parse(line, where), text_key, where)


def read_json(file: BinaryIO, text_key: str, name: str) -> Iterator[str]:
    """Yields the text of each element of a JSON array, or of an object by itself; lines of objects are read as well."""
    data = file.read()
    try:
        rows = json.loads(decode(data, name))
    except ValueError as error:
        if data.lstrip(codecs.BOM_UTF8 + b" \r\n\t")[:1] == b"{" and str(error).startswith("Extra data"):
            yield from read_jsonl(data.splitlines(keepends=True), text_key, name)
            return
        raise UserError(f"{name} is not JSON ({error}). Fix the file or leave it out.") from error
    for number, row in enumerate(rows if isinstance(rows, list) else [rows], start=1):
        yield row_text(row, text_key, f"{name}, element {number}")


def read_parquet(file: BinaryIO, text_key: str, name: str) -> Iterator[str]:
    """Yields the column ``text_key``."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(f"{name} is a parquet file, and pyarrow is not installed. Run: pip install pyarrow") from error
    try:
        table = pyarrow.parquet.ParquetFile(file)
        if text_key not in table.schema_arrow.names:
            raise UserError(
                f"{name} has columns {', '.join(table.schema_arrow.names)} and no {text_key!r}. Set data.text_key."
            )
        row = 0
        for batch in table.iter_batches(columns=[text_key]):
            for value in batch.column(0).to_pylist():
                row += 1
                yield field({text_key: value}, text_key, f"{name}, row {row}")
    except pyarrow.ArrowException as error:
        raise UserError(f"{name} is not a valid parquet file ({error}). Fix it or leave it out.") from error


def read_array_record(file: BinaryIO, text_key: str, name: str) -> Iterator[str]:
    """Yields each record: UTF-8 text, or ``text_key`` of a JSON object if the first record is one."""
    from grain.sources import ArrayRecordDataSource

    try:
        source = ArrayRecordDataSource(name)
        n_records = len(source)
    except Exception as error:  # the C++ reader raises errors of any class
        raise UserError(f"{name} is not a valid ArrayRecord file ({error}). Fix it or leave it out.") from error
    if not n_records:
        return
    rows_are_json = is_object(source[0])
    for row in range(n_records):
        where = f"{name}, record {row}"
        record = decode(source[row], where)
        yield row_text(parse(record, where), text_key, where) if rows_are_json else record


# By what a file holds; those of STREAMED may be compressed.
READERS = {
    ".txt": read_plain,
    ".py": read_plain,
    ".md": read_plain,
    ".jsonl": read_jsonl,
    ".json": read_json,
    ".parquet": read_parquet,
    ".array_record": read_array_record,
}
STREAMED = (".txt", ".py", ".md", ".jsonl", ".json")


def decode(data: bytes, where: str) -> str:
    """Returns UTF-8 bytes as text, without the byte-order mark that they may begin with."""
    try:
        return data.removeprefix(codecs.BOM_UTF8).decode()
    except UnicodeDecodeError as error:
        for mark, encoding in FOREIGN_MARKS.items():
            if data.startswith(mark):
                raise UserError(
                    f"{where} is {encoding} text (it begins with that byte-order mark), not UTF-8. "
                    f"Convert it: iconv -f {encoding} -t UTF-8 OLD > NEW"
                ) from error
        raise UserError(
            f"{where} is not UTF-8 text (byte 0x{error.object[error.start]:02x} at offset {error.start}). "
            "Convert it to UTF-8 (iconv -f LATIN1 -t UTF-8 OLD > NEW) or leave it out."
        ) from error


def is_object(record: bytes) -> bool:
    """Says whether a record is a JSON object."""
    try:
        return isinstance(json.loads(record), dict)
    except ValueError:
        return False


def parse(text: str, where: str) -> Any:
    """Returns the JSON value that ``text`` holds."""
    try:
        return json.loads(text)
    except ValueError as error:
        raise UserError(f"{where} is not JSON ({error}). Fix the line or leave the file out.") from error


def row_text(row: Any, text_key: str, where: str) -> str:
    """Returns the text of a row: of an object its field ``text_key``, of a string itself, of null nothing."""
    if isinstance(row, dict):
        return field(row, text_key, where)
    if row is None or isinstance(row, str):
        return field({text_key: row}, text_key, where)
    raise UserError(f"{where} is a JSON {type(row).__name__}, not an object with a field that holds the text.")


def field(row: dict, text_key: str, where: str) -> str:
    """Returns the text of a row, empty for null; a lone surrogate, which no UTF-8 text can hold, becomes ``?``."""
    if text_key not in row:
        raise UserError(f"{where} has fields {', '.join(row) or 'none'} and no {text_key!r}. Set data.text_key.")
    text = "" if row[text_key] is None else row[text_key]
    if not isinstance(text, str):
        raise UserError(f"{where} has a {type(text).__name__} in {text_key!r}, not text. Fix it or set data.text_key.")
    return text.encode("utf-8", "replace").decode()
