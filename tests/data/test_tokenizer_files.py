"""The files of a built-in tokenizer open as the same tokenizer, here and in other libraries."""

import random

import pytest

from deepseek_jax.data.tokenizer import BYTE_SPECIALS, ByteTokenizer, open_tokenizer
from deepseek_jax.data.tokenizer_files import PATTERNS, byte_alphabet, files_of


def written(name: str, folder) -> str:
    for file, content in files_of(name).items():
        (folder / file).write_bytes(content if isinstance(content, bytes) else content.read_bytes())
    return str(folder)


def texts(n: int = 200):
    """Text of every kind: all planes, controls, special tokens spelled out, halves of surrogate pairs."""
    rng = random.Random(0)
    alphabet = [chr(rng.randrange(0x110000)) for _ in range(400)] + [chr(i) for i in range(128)] + [*BYTE_SPECIALS]
    yield from ("", " ", "\x00", "a\r\n", "  two  ", "e\u0301", "\ufeff", "\ud800", "".join(BYTE_SPECIALS))
    yield from ("".join(rng.choices(alphabet, k=rng.randrange(40))) for _ in range(n))


@pytest.mark.parametrize("name", ["bytes", pytest.param("deepseek", marks=pytest.mark.slow)])
def test_written_and_opened_again_it_is_the_same_tokenizer(name, tmp_path):
    before, after = open_tokenizer(name), open_tokenizer(written(name, tmp_path))
    for key in ("vocab_size", "bos_id", "eos_id", "pad_id", "add_bos", "fim"):
        assert getattr(before, key) == getattr(after, key), key
    assert before.byte_lengths().tolist() == after.byte_lengths().tolist()
    rng = random.Random(1)
    for text in texts():
        assert before.encode(text).tolist() == after.encode(text).tolist(), text
        assert before.encode(text, specials=True).tolist() == after.encode(text, specials=True).tolist(), text
        ids = [rng.randrange(before.vocab_size + 5) for _ in range(rng.randrange(30))]
        for specials in (False, True):
            assert before.decode(ids, specials) == after.decode(ids, specials), ids


@pytest.mark.slow
def test_transformers_reads_bytes_the_same(tmp_path):
    transformers = pytest.importorskip("transformers")
    ours, theirs = ByteTokenizer(), transformers.AutoTokenizer.from_pretrained(written("bytes", tmp_path))
    assert len(theirs) == ours.vocab_size
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (256, 257, 258)
    for text in ("def main():\n\treturn 'é城😀'", "<think>so</think>", "  a  <｜User｜>b"):
        assert theirs.encode(text) == ours.encode(text, specials=True).tolist()
        assert theirs.decode(ours.encode(text)) == text


def test_the_alphabet_is_that_of_the_library():
    tokenizers = pytest.importorskip("tokenizers")
    assert sorted(byte_alphabet()) == sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    assert byte_alphabet()[ord(" ")] == "Ġ" and byte_alphabet()[ord("a")] == "a"


def test_a_tokenizer_of_any_file_name_takes_its_neighbours_along(tmp_path):
    (tmp_path / "mine.json").write_text("{}")
    (tmp_path / "vocab.json").write_text("[]")
    (tmp_path / "tokenizer.json").write_text("another")
    found = files_of(str(tmp_path / "mine.json"))
    assert found == {"tokenizer.json": tmp_path / "mine.json", "vocab.json": tmp_path / "vocab.json"}
    assert files_of("none") == {} and PATTERNS[0] == "tokenizer.json"
