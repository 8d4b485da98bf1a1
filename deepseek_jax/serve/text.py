"""Ids to text as they come, without halves of characters.

A token may end in the middle of a character's UTF-8 bytes; decoded alone it gives U+FFFD.  So text is held back while
it ends in U+FFFD, which may yet become a character, and is decoded together with what came just before, since some
tokenizers drop the blank at the start of a text.
"""

from collections.abc import Callable, Sequence

HALF = "\ufffd"  # what decoders give for bytes that are no character (yet)
PENDING_BYTES = 3  # of a character that lacks its last one; some decoders give one HALF for each


class TextStream:
    """Turns ids into pieces of text that, joined, are the text of all ids.

    Args:
        decode: the tokenizer's `decode`.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str]):
        self._decode = decode
        self._context: list[int] = []  # ids of the last piece that ended with a whole character
        self._new: list[int] = []  # ids since
        self._shown = 0  # characters of both that have been given out

    def push(self, token: int) -> str:
        """Returns the text that is certain now and was not before; "" in the middle of a character."""
        self._new.append(token)
        text = self._decode(self._context + self._new)
        n_halves = len(text) - len(text.rstrip(HALF))
        if n_halves and len(self._new) <= PENDING_BYTES:  # some decoders give up whole characters before it, too
            return ""
        pending = min(n_halves, PENDING_BYTES)
        piece = text[self._shown : len(text) - pending]
        self._shown += len(piece)
        if piece and not pending:
            self._context, self._new = self._new, []
            self._shown = len(self._decode(self._context))
        return piece

    def finish(self) -> str:
        """Returns what was held back."""
        return self._decode(self._context + self._new)[self._shown :]
