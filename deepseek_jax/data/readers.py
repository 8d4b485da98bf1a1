"""One reader per file type: ``reader(path, text_key)`` yields the documents of a file, some of which may be empty.

A file of prose or code is one document; the others hold one document a row.
"""

import json
from collections.abc import Iterator
from pathlib import Path

from deepseek_jax.errors import UserError


def read_plain(path: Path, text_key: str) -> Iterator[str]:
    """Yields the whole file, line ends untouched."""
    yield decode(path.read_bytes(), str(path))


def read_jsonl(path: Path, text_key: str) -> Iterator[str]:
    """Yields ``text_key`` of each line; blank lines are passed over."""
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            where = f"{path}, line {number}"
            line = decode(line, where)
            if line.strip():
                yield field(parse_object(line, where), text_key, where)


def read_parquet(path: Path, text_key: str) -> Iterator[str]:
    """Yields the column ``text_key``."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(f"{path} is a parquet file, and pyarrow is not installed. Run: pip install pyarrow") from error
    try:
        file = pyarrow.parquet.ParquetFile(path)
        if text_key not in file.schema_arrow.names:
            raise UserError(
                f"{path} has columns {', '.join(file.schema_arrow.names)} and no {text_key!r}. Set data.text_key."
            )
        row = 0
        for batch in file.iter_batches(columns=[text_key]):
            for value in batch.column(0).to_pylist():
                row += 1
                yield field({text_key: value}, text_key, f"{path}, row {row}")
    except pyarrow.ArrowException as error:
        raise UserError(f"{path} is not a sound parquet file ({error}). Mend it or leave it out.") from error


def read_array_record(path: Path, text_key: str) -> Iterator[str]:
    """Yields each record: UTF-8 text, or ``text_key`` of a JSON object if the first record is one."""
    from grain.sources import ArrayRecordDataSource

    try:
        source = ArrayRecordDataSource(str(path))
        n_records = len(source)
    except Exception as error:  # the C++ reader raises whatever it likes
        raise UserError(f"{path} is not a sound ArrayRecord file ({error}). Mend it or leave it out.") from error
    if not n_records:
        return
    rows_are_json = is_object(source[0])
    for row in range(n_records):
        where = f"{path}, record {row}"
        record = decode(source[row], where)
        yield field(parse_object(record, where), text_key, where) if rows_are_json else record


READERS = {
    ".txt": read_plain,
    ".py": read_plain,
    ".md": read_plain,
    ".jsonl": read_jsonl,
    ".parquet": read_parquet,
    ".array_record": read_array_record,
}


def decode(data: bytes, where: str) -> str:
    """Returns UTF-8 bytes as text."""
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise UserError(
            f"{where} is not UTF-8 text (byte 0x{data[error.start]:02x} at offset {error.start}). "
            "Convert it to UTF-8 or leave it out."
        ) from error


def is_object(record: bytes) -> bool:
    """Says whether a record is a JSON object."""
    try:
        return isinstance(json.loads(record), dict)
    except ValueError:
        return False


def parse_object(text: str, where: str) -> dict:
    """Returns the JSON object that ``text`` holds."""
    try:
        row = json.loads(text)
    except ValueError as error:
        raise UserError(f"{where} is not JSON ({error}). Mend the line or leave the file out.") from error
    if not isinstance(row, dict):
        raise UserError(f"{where} is a JSON {type(row).__name__}, not an object with a field that holds the text.")
    return row


def field(row: dict, text_key: str, where: str) -> str:
    """Returns the text of a row; a lone surrogate, which no UTF-8 text can hold, becomes ``?``."""
    if text_key not in row:
        raise UserError(f"{where} has fields {', '.join(row) or 'none'} and no {text_key!r}. Set data.text_key.")
    text = row[text_key]
    if not isinstance(text, str):
        raise UserError(f"{where} has a {type(text).__name__} in {text_key!r}, not text. Mend it or set data.text_key.")
    return text.encode("utf-8", "replace").decode()
