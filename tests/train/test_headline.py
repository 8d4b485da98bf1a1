"""What a run says of its text before it trains, without training."""

import pytest

from deepseek_jax.data.pipeline import open_splits, settled
from deepseek_jax.launch import _beginning, _options
from deepseek_jax.launch._headline import about_text

TEXT = "words of a book, one after another, until the end\n"


def said(tmp_path, source, *overrides):
    """The lines on the text of `train --config.data.source=...`, and the share of documents that become FIM."""
    words = [f"--config.data.source={source}", f"--config.data.cache_dir={tmp_path / 'cache'}", *overrides]
    options = _options.parse(words, "tiny_v3")
    _beginning.leave_own_text(options.config, options.overrides)
    options.config.data.update(settled(options.config.data))
    sides = open_splits(seed=0, **options.config.data)
    return "\n".join(about_text(options.config, *sides)), options.config.data.fim_rate


def test_the_users_own_text_is_not_rearranged_unless_asked(tmp_path):
    book = tmp_path / "book.txt"
    book.write_text(TEXT * 600)
    lines, rate = said(tmp_path, book)
    assert rate == 0 and "fill-in-the-middle: off (--config.data.fim_rate=0.1" in lines
    lines, rate = said(tmp_path, book, "--config.data.fim_rate=0.3")
    assert rate == 0.3 and "fill-in-the-middle: 30% of the documents" in lines


def test_the_standard_library_keeps_the_recipe(tmp_path):
    lines, rate = said(tmp_path, "stdlib")
    assert rate == 0.1 and "fill-in-the-middle" not in lines
    assert "10." in lines and "M tokens per epoch" in lines and "held out to evaluate on: " in lines


@pytest.mark.parametrize(
    ("n_books", "documents", "end"),
    [(1, "1 document", "the end of the document"), (3, "3 documents", "the end of each long document")],
)
def test_what_is_held_out_and_how_often_the_text_is_read_is_said(tmp_path, n_books, documents, end):
    for number in range(n_books):
        (tmp_path / f"{number}.txt").write_text(TEXT * (500 + number))
    (tmp_path / "cover.png").write_bytes(b"\xff")
    lines, _ = said(tmp_path / "elsewhere", tmp_path, "--config.batch.size=8", "--config.loop.steps=420")
    times = 420 * 8 * 256 / (0.98 * sum(len(TEXT) * (500 + number) for number in range(n_books)))
    assert f"tokens per epoch, {documents}, read {times:.0f} times\nheld out to evaluate on: {end}, " in lines
    assert "files passed over: 1 of other types (.png)" in lines
