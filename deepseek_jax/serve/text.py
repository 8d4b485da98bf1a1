"""Ids to text as they arrive, without parts of characters.

A token may end in the middle of a character's UTF-8 bytes; decoded alone it gives U+FFFD. So text is held back while
it ends in U+FFFD, which may still become a character, and is decoded together with the preceding text, since some
tokenizers drop the blank at the start of a text.
"""

from collections.abc import Callable, Sequence

HALF = "\ufffd"  # decoders return it for bytes that are not a character (yet)
PENDING_BYTES = 3  # of a character without its last byte; some decoders return one HALF for each
LONGEST = 32  # ids that are decoded again in a run of ids that give no characters


class TextStream:
    """Converts ids to pieces of text that, joined, are the text of all ids; `decode` is the tokenizer's."""

    def __init__(self, decode: Callable[[Sequence[int]], str]):
        self._decode = decode
        self._context: list[int] = []  # ids of the last piece that ended with a whole character
        self._new: list[int] = []  # ids after those
        self._shown = 0  # characters of both that were returned

    def push(self, token: int) -> str:
        """Returns the text that has become final; "" in the middle of a character."""
        self._new.append(token)
        text = self._decode(self._context + self._new)
        n_halves = len(text) - len(text.rstrip(HALF))
        if n_halves and len(self._new) <= PENDING_BYTES:  # some decoders also give up whole characters before it
            return ""
        pending = min(n_halves, PENDING_BYTES)
        piece = text[self._shown : len(text) - pending]
        self._shown += len(piece)
        if piece and not pending:
            self._context, self._new = self._new, []
            self._shown = len(self._decode(self._context))
        elif pending and len(self._new) > LONGEST:
            n_held = len(text) - self._shown
            self._context, self._new = self._new[PENDING_BYTES:-PENDING_BYTES], self._new[-PENDING_BYTES:]
            self._shown = len(self._decode(self._context + self._new)) - n_held
        elif len(self._new) > LONGEST:  # special tokens and ids beyond the vocabulary, which have no text
            self._new = self._new[-PENDING_BYTES:]
            self._shown = len(self._decode(self._context + self._new))
        return piece

    def finish(self) -> str:
        """Returns the remaining text."""
        return self._decode(self._context + self._new)[self._shown :]
