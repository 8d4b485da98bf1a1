"""A source names files; each reader yields documents or says which line of which file is wrong."""

import json
import sys

import pytest

from deepseek_jax.data import corpus as corpus_module
from deepseek_jax.data.corpus import file_fingerprint, open_corpus
from deepseek_jax.errors import UserError


def documents(source, text_key="text"):
    return list(open_corpus(str(source), text_key).documents())


def write(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


def test_stdlib_is_real_code_without_tests():
    corpus = open_corpus("stdlib", "text")
    names = {path.name for path in corpus.files}
    assert {"argparse.py", "dataclasses.py"} <= names
    assert 300 < len(names) < 2000
    assert not any({"test", "site-packages"} & set(path.parts[-3:-1]) for path in corpus.files)
    assert not any(name.startswith("_sysconfigdata") for name in names)


def test_glob_is_sorted_and_recursive_and_keeps_line_ends(tmp_path):
    write(tmp_path / "b" / "2.md", "two\r\n")
    write(tmp_path / "a.txt", "one é")
    write(tmp_path / "b" / "empty.py", "")
    assert documents(tmp_path / "**" / "*.*") == ["one é", "two\r\n"]


def test_jsonl(tmp_path):
    rows = [json.dumps({"body": "first\n"}), "", json.dumps({"body": ""}), json.dumps({"body": "\ud800x", "other": 1})]
    write(tmp_path / "a.jsonl", "\n".join(rows) + "\n")
    assert documents(tmp_path / "*.jsonl", "body") == ["first\n", "?x"]


def test_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    table = pyarrow.table({"text": ["one", "two"], "n": [1, 2]})
    parquet.write_table(table, tmp_path / "a.parquet")
    assert documents(tmp_path / "*.parquet") == ["one", "two"]
    with pytest.raises(UserError, match=r"a\.parquet has columns text, n and no 'body'"):
        documents(tmp_path / "*.parquet", "body")
    with pytest.raises(UserError, match=r"a\.parquet, row 1 has a int in 'n'"):
        documents(tmp_path / "*.parquet", "n")
    write(tmp_path / "b.parquet", "not parquet")
    with pytest.raises(UserError, match=r"b\.parquet is not a sound parquet file"):
        documents(tmp_path / "b.parquet")


def test_parquet_without_pyarrow_names_the_package(tmp_path, monkeypatch):
    write(tmp_path / "a.parquet", "")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match="pip install pyarrow"):
        documents(tmp_path / "a.parquet")


def test_array_record_of_text_and_of_json(tmp_path):
    record = pytest.importorskip("array_record.python.array_record_module")
    for name, rows in (
        ("text", [b"one", "zwölf".encode()]),
        ("json", [b'{"text": "one"}', b'{"text": "two"}']),
        ("bad", [b'{"text": "one"}', b'{"body": "two"}']),
    ):
        writer = record.ArrayRecordWriter(str(tmp_path / f"{name}.array_record"), "group_size:1")
        for row in rows:
            writer.write(row)
        writer.close()
    assert documents(tmp_path / "text.array_record") == ["one", "zwölf"]
    assert documents(tmp_path / "json.array_record") == ["one", "two"]
    with pytest.raises(UserError, match=r"bad\.array_record, record 1 has fields body and no 'text'"):
        documents(tmp_path / "bad.array_record")


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.jsonl", '{"text": "fine"}\n{"text": oops}\n', r"a\.jsonl, line 2 is not JSON"),
        ("a.jsonl", '{"body": "x"}\n', r"a\.jsonl, line 1 has fields body and no 'text'"),
        ("a.jsonl", "[1]\n", r"a\.jsonl, line 1 is a JSON list"),
        ("a.jsonl", '{"text": null}\n', r"a\.jsonl, line 1 has a NoneType in 'text'"),
        ("a.txt", b"ab\xff", r"a\.txt is not UTF-8 text \(byte 0xff at offset 2\)"),
        ("a.csv", "x", r"a\.csv is not of a type"),
    ],
)
def test_errors_name_file_and_line(tmp_path, name, data, message):
    with pytest.raises(UserError, match=message):
        documents(write(tmp_path / name, data))


def test_no_match_folder_and_vanished_file(tmp_path):
    with pytest.raises(UserError, match="matches no file"):
        open_corpus(str(tmp_path / "*.txt"), "text")
    with pytest.raises(UserError, match="is a folder"):
        open_corpus(str(tmp_path), "text")
    path = write(tmp_path / "a.txt", "x")
    corpus = open_corpus(str(path), "text")
    path.unlink()
    for read in (corpus.fingerprint, lambda: list(corpus.documents())):
        with pytest.raises(UserError, match=r"a\.txt cannot be read"):
            read()


def test_fingerprint_follows_content_and_not_place(tmp_path):
    here, there = write(tmp_path / "x" / "a.txt", "same"), write(tmp_path / "y" / "b.txt", "same")
    first, second = (open_corpus(str(path), "text") for path in (here, there))
    assert first.fingerprint() == second.fingerprint()
    write(there, "Same")
    assert first.fingerprint() != second.fingerprint()


def test_fingerprint_of_a_long_file_samples_it(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus_module, "WHOLE_FILE_BYTES", 4)
    path = write(tmp_path / "a.txt", b"x" * (3 << 20))
    first = file_fingerprint(path)
    assert first == file_fingerprint(path)
    write(path, b"x" * (3 << 20) + b"y")
    assert first != file_fingerprint(path)
