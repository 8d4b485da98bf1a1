"""Sections of a corpus hold each document once, in order, wherever the corpus is cut."""

import gzip
import itertools
import json

import numpy as np
import pytest

from deepseek_jax.data.corpus import open_corpus
from deepseek_jax.data.prepared.sections import Line
from deepseek_jax.data.readers import PARTS


def write_corpus(folder) -> list[str]:
    """Writes a file of every kind; returns the documents."""
    import pyarrow
    import pyarrow.parquet
    from array_record.python.array_record_module import ArrayRecordWriter

    rng, made = np.random.default_rng(0), iter(range(1000))

    def texts(count: int) -> list[str]:
        return [f"{next(made)} " + "é" * int(rng.integers(0, 30)) for _ in range(count)]

    kinds = [texts(30), texts(1), texts(20), texts(12), texts(17)]
    lines = ["", *(json.dumps({"text": text}, ensure_ascii=False) for text in kinds[0]), " ", ""]
    (folder / "a.jsonl").write_text("\n".join(lines), encoding="utf-8")
    (folder / "b.txt").write_text(kinds[1][0], encoding="utf-8")
    (folder / "c.jsonl.gz").write_bytes(gzip.compress("\n".join(json.dumps({"text": t}) for t in kinds[2]).encode()))
    pyarrow.parquet.write_table(pyarrow.table({"text": kinds[3]}), folder / "d.parquet", row_group_size=5)
    writer = ArrayRecordWriter(str(folder / "e.array_record"), "group_size:1")
    for text in kinds[4]:
        writer.write(text.encode())
    writer.close()
    (folder / "f.txt").write_text("")
    return [text for group in kinds for text in group]


def test_sections_hold_each_document_once_and_in_order(tmp_path):
    documents, corpus = write_corpus(tmp_path), open_corpus(str(tmp_path), "text")
    assert list(corpus.documents()) == documents
    line = Line(corpus)
    for count in (1, 2, 7, 300):
        cuts = line.cuts(count)
        assert cuts == sorted(set(cuts)) and cuts[0] == 0 and cuts[-1] == line.n_bytes and len(cuts) <= count + 1
        sections = [line.section(*ends) for ends in itertools.pairwise(cuts)]
        assert [text for section in sections for text in section.documents()] == documents
        assert sum(section.n_bytes() for section in sections) == line.n_bytes
    assert len(line.cuts(300)) > 40


@pytest.mark.parametrize("name", ["a.jsonl", "d.parquet", "e.array_record"])
def test_a_file_may_be_cut_anywhere(tmp_path, name):
    write_corpus(tmp_path)
    corpus, size = open_corpus(str(tmp_path / name), "text"), (tmp_path / name).stat().st_size
    documents, line = list(corpus.documents()), Line(corpus)
    for place in range(1, size, 11 if size < 2000 else 4999):
        halves = [line.section(0, place), line.section(place, size)]
        assert [text for half in halves for text in half.documents()] == documents


def test_files_of_a_listing_go_by_their_names_below_a_common_folder(tmp_path):
    def listing(folder: str, **files: str) -> str:
        (tmp_path / folder).mkdir()
        for name, text in files.items():
            (tmp_path / folder / f"{name}.txt").write_text(text)
        return Line(open_corpus(str(tmp_path / folder), "text")).listing()

    first = listing("a", x="123", y="4567")
    assert first == listing("b", x="abc", y="defg")
    assert len({first, listing("c", x="123", z="4567"), listing("d", x="12", y="34567")}) == 3


def test_what_can_be_cut_has_a_reader_of_parts():
    assert set(PARTS) == {".jsonl", ".parquet", ".array_record"}
