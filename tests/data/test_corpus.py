"""A source names files; each reader yields documents or names the invalid line."""

import gzip
import json
import sys

import pytest

from deepseek_jax.data.corpus import open_corpus
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
    with pytest.raises(UserError, match=r"b\.parquet is not a valid parquet file"):
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
        ("a.jsonl", '{"text": 1.5}\n', r"a\.jsonl, line 1 has a float in 'text'"),
        ("a.json", '[{"text": "fine"}, [1]]', r"a\.json, element 2 is a JSON list"),
        ("a.json", '[{"text": "fine"}, {"body": "x"}]', r"a\.json, element 2 has fields body and no 'text'"),
        ("a.json", "[oops]", r"a\.json is not JSON"),
        ("a.json", '{"text": "fine"}\n{"text": oops}\n', r"a\.json, line 2 is not JSON"),
        ("a.txt", b"ab\xff", r"a\.txt is not UTF-8 text \(byte 0xff at offset 2\)"),
        ("a.txt", "words".encode("utf-16"), r"a\.txt is UTF-16 text .*iconv -f UTF-16 -t UTF-8"),
        ("a.jsonl", '{"text": "x"}\n'.encode("utf-32"), r"a\.jsonl, line 1 is UTF-32 text"),
        ("a.txt.gz", b"no gzip", r"a\.txt\.gz is damaged or truncated"),
        ("a.csv", "x", r"a\.csv is not of a type"),
        ("a.parquet.gz", "x", r"a\.parquet\.gz is not of a type"),
        ("a.gz", "x", r"a\.gz: the name does not say what the file contains. Rename it, for example to a\.jsonl\.gz"),
    ],
)
def test_errors_name_file_and_line(tmp_path, name, data, message):
    with pytest.raises(UserError, match=message):
        documents(write(tmp_path / name, data))


MARK = b"\xef\xbb\xbf"
ROWS = b'{"text": "one"}\n{"text": null}\n{"text": ""}\n{"text": "two"}\n'


@pytest.mark.parametrize("mark", [b"", MARK])
@pytest.mark.parametrize(
    ("name", "data", "expected"),
    [
        ("a.txt", "zwölf".encode(), ["zwölf"]),
        ("a.TXT", b"one", ["one"]),
        ("a.py", b"x = 1\n", ["x = 1\n"]),
        ("a.jsonl", ROWS, ["one", "two"]),
        ("a.jsonl", b'"one"\nnull\n"two"\n', ["one", "two"]),
        ("a.jsonl", b'{"text": "one"}\n' + MARK + b'{"text": "\\ufefftwo"}', ["one", "two"]),  # two files joined
        ("a.json", b'[{"text": "one"}, null, {"text": null}, "two"]', ["one", "two"]),
        ("a.json", b'{"text": "one"}', ["one"]),
        ("a.json", ROWS, ["one", "two"]),  # lines, in spite of the name
        ("a.txt", b"", []),
    ],
)
@pytest.mark.parametrize("ending", ["", ".gz", ".zst"])
def test_marks_nulls_and_compression_change_no_text(tmp_path, mark, name, data, expected, ending):
    path = write(tmp_path / f"{name}{ending}", packed(mark + data, ending))
    assert documents(path) == expected
    corpus = open_corpus(str(path), "text")
    assert sum(portion.n_file_bytes for portion in corpus.portions()) == (corpus.n_bytes() if expected else 0)


def packed(data, ending):
    """The bytes in two frames, as compressors with several cores write them."""
    parts = data[: len(data) // 2], data[len(data) // 2 :]
    if ending == ".gz":
        return b"".join(map(gzip.compress, parts))
    if ending == ".zst":
        return b"".join(map(pytest.importorskip("zstandard").compress, parts))
    return data


@pytest.mark.parametrize("ending", [".gz", ".zst"])
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.json"])
def test_a_compressed_file_cut_anywhere_is_no_shorter_text(tmp_path, ending, name):
    row = json.dumps({"text": "words and more of them"}).encode()
    data = b"[" + row + b"]" if name == "a.json" else row
    whole = gzip.compress(data) if ending == ".gz" else pytest.importorskip("zstandard").compress(data)
    assert len(documents(write(tmp_path / f"{name}{ending}", whole))) == 1
    for length in range(1, len(whole)):
        with pytest.raises(UserError, match="is damaged or truncated"):
            documents(write(tmp_path / f"{name}{ending}", whole[:length]))


def test_a_text_longer_than_a_block_is_decompressed_whole(tmp_path):
    text = "".join(f"{i * 7919 % 100_003} " for i in range(100_000))
    for ending in (".gz", ".zst"):
        assert documents(write(tmp_path / f"a.txt{ending}", packed(text.encode(), ending))) == [text]


def test_zstandard_that_is_not_installed_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(UserError, match="pip install zstandard"):
        documents(write(tmp_path / "a.jsonl.zst", b""))


@pytest.mark.parametrize("name", ["a [1].txt", "what?.txt", "a*b.txt", "[ab]/c.txt"])
def test_a_path_that_exists_is_no_pattern(tmp_path, name):
    path = write(tmp_path / name, "words")
    write(tmp_path / "a 1.txt", "other")
    assert documents(path) == documents(path.parent if "/" in name else path) == ["words"]


def test_a_folder_is_all_that_can_be_read_below_it(tmp_path):
    write(tmp_path / "b" / "2.jsonl", '{"text": "two"}')
    write(tmp_path / "a.txt", "one")
    write(tmp_path / ".git" / "x.txt", "hidden")
    picture = write(tmp_path / "b" / "1.png", b"\xff")
    assert documents(tmp_path) == ["one", "two"]
    assert open_corpus(str(tmp_path), "text").passed_over == (picture,)
    picture.with_name("2.jsonl").unlink()
    with pytest.raises(UserError, match="is a folder without a file of"):
        open_corpus(str(picture.parent), "text")


def test_no_match_and_vanished_file(tmp_path):
    with pytest.raises(UserError, match="matches no file"):
        open_corpus(str(tmp_path / "*.txt"), "text")
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
