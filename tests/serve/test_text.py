"""Pieces of streamed text join to the whole, and none contains part of a character."""

import pytest

from deepseek_jax.data.tokenizer import ByteTokenizer
from deepseek_jax.serve.text import TextStream


def pieces(ids, decode):
    stream = TextStream(decode)
    return [*(stream.push(i) for i in ids), stream.finish()]


@pytest.mark.parametrize("text", ["", "plain", "é", "naïve 😀 日本語\n", "😀😀"])
def test_a_byte_at_a_time_no_character_is_cut(text):
    tokenizer = ByteTokenizer()
    found = pieces(tokenizer.encode(text).tolist(), tokenizer.decode)
    assert "".join(found) == text
    assert all(len(piece) <= 1 for piece in found)


@pytest.mark.parametrize(
    "ids", [[0x80] * 9, [*"a\ufffdb".encode()], [0xE2, 65], [0xF0, 0x9F, 0x98], [65, 0xC3, 0xC3, 0xA9, 257, 66]]
)
def test_bytes_that_are_no_text_come_out_as_the_tokenizer_says(ids):
    tokenizer = ByteTokenizer()
    assert "".join(pieces(ids, tokenizer.decode)) == tokenizer.decode(ids)


def test_a_tokenizer_that_drops_the_first_blank_keeps_those_between():
    words = ["▁def", "▁main", "(", "▁x"]
    assert pieces(range(4), lambda ids: "".join(words[i] for i in ids).replace("▁", " ").lstrip(" ")) == [
        *("def", " main", "(", " x", "")
    ]


def test_a_tokenizer_that_gives_a_mark_for_every_missing_byte():
    def decode(ids):
        raw = bytes(ids)
        try:
            return raw.decode()
        except UnicodeDecodeError:  # like the byte fallback of SentencePiece: the whole run is replaced
            return "\ufffd" * len(raw)

    assert "".join(pieces("é€😀".encode(), decode)) == "é€😀"


@pytest.mark.parametrize("end", [[], [*"é".encode()], [0xE6, 0x97], [*"a日".encode()]])
@pytest.mark.parametrize("idle", [0x80, 258, 999], ids=["no character", "padding", "beyond the vocabulary"])
def test_of_a_long_run_of_ids_that_are_no_text_only_the_end_is_decoded_again(idle, end):
    tokenizer, lengths = ByteTokenizer(), []
    ids = [65, *[idle] * 300, *end]

    def decode(ids):
        lengths.append(len(ids))
        return tokenizer.decode(ids)

    assert "".join(pieces(ids, decode)) == tokenizer.decode(ids)
    assert max(lengths) < 100
