"""Which pages of cache memory hold which tokens: counts and names, no memory.

The cache of all sequences is one pool of pages, `page_size` tokens each. A sequence has a table: its pages in the order
of its tokens. A table only grows at its end, and a page that is full is not written again, so any number of sequences
may share it. Page 0, `NULL`, belongs to nobody: tables are padded with it, and what is written to it is lost.

    held      by one or more tables, counted
    free      by none; taken again in the order in which they became free, the least recently used first

A full page gets a name: the SHA-256 digest of the name of the page before it and of its own tokens. The first page of a
sequence follows a root, which stands for the weights and for whoever may share pages (`root`). A free page keeps its
name until it is taken again, so a later prompt with the same beginning finds it. The tokens are compared as well: a
digest alone never decides what a sequence looks at.

With `look_ahead` n, a page's name covers n tokens after it too: multi-token prediction caches, with a token, something
of the next one (n = 1), so pages are equal only where those are.

Source of the idea: Kwon et al., "Efficient Memory Management for Large Language Model Serving with PagedAttention",
arXiv 2309.06180.
"""

import hashlib
import secrets
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from deepseek_jax.errors import UserError

NULL = 0  # the page of padding
PAGE_SIZE = 64  # tokens per page, as the published kernels for latent attention expect


class _Name(NamedTuple):
    """What a full page holds: its digest, that of the page before it, and the tokens that the digest covers."""

    digest: bytes
    before: bytes
    covered: bytes


@dataclass
class Table:
    """The pages of one sequence, in the order of its tokens."""

    last: bytes  # digest of the last page that was named; the root before that
    pages: list[int] = field(default_factory=list)
    n_named: int = 0  # pages at the beginning whose names are settled


def root(weights: bytes, salt: bytes = b"") -> bytes:
    """Returns what the first pages of sequences follow; sequences with different roots share nothing.

    `weights` identifies the weights that the cache was computed with, `salt` those who may share pages.
    """
    return hashlib.sha256(len(weights).to_bytes(8, "little") + weights + salt).digest()


class PagePool:
    """The pages 1 to `n_pages - 1`: who holds them, and what they are named."""

    def __init__(self, n_pages: int, page_size: int = PAGE_SIZE, look_ahead: int = 0):
        if n_pages < 2 or page_size < 1 or look_ahead < 0:
            raise UserError(
                f"a pool of {n_pages} pages of {page_size} tokens: expected 2 pages or more, of which the first is "
                "padding, and 1 token per page or more."
            )
        self.n_pages, self.page_size, self.look_ahead = n_pages, page_size, look_ahead
        self._n_holders = [0] * n_pages
        self._free = OrderedDict.fromkeys(range(1, n_pages))  # the next to be taken first
        self._name: dict[int, _Name] = {}
        self._page: dict[bytes, int] = {}  # by digest

    @property
    def n_free(self) -> int:
        """Pages that can be taken."""
        return len(self._free)

    def open(self, root: bytes, tokens: Sequence[int]) -> Table:
        """Returns a table with the pages in memory that hold the beginning of `tokens`.

        At least one token stays outside: the next one is drawn from the last one's output, which no page keeps.
        """
        table = Table(root)
        for covered in self._covered(tokens if self.look_ahead else tokens[:-1]):
            digest = _digest(table.last, covered)
            page = self._page.get(digest)
            if page is None or self._name[page] != (digest, table.last, covered):
                break
            self._n_holders[page] += 1
            self._free.pop(page, None)
            table.pages.append(page)
            table.last = digest
        table.n_named = len(table.pages)
        return table

    def extend(self, table: Table, n_tokens: int) -> bool:
        """Adds pages until the table holds `n_tokens`; returns False, and adds none, if too few are free."""
        n_new = max(0, -(-n_tokens // self.page_size) - len(table.pages))
        if n_new > len(self._free):
            return False
        for _ in range(n_new):
            page, _ = self._free.popitem(last=False)
            self._forget(page)
            self._n_holders[page] = 1
            table.pages.append(page)
        return True

    def name(self, table: Table, tokens: Sequence[int], n_tokens: int | None = None) -> None:
        """Names the table's full pages.

        The first `n_tokens` (None: all) of `tokens` are in memory, or on their way there before any later step.

        A page gets no name if another page has it: tables only grow, so none is replaced by its equal.
        """
        start, end = table.n_named * self.page_size, len(tokens) if n_tokens is None else min(n_tokens, len(tokens))
        if end < start + self.page_size + self.look_ahead:
            return
        for page, covered in zip(table.pages[table.n_named :], self._covered(tokens[start:end]), strict=False):
            digest = _digest(table.last, covered)
            if digest not in self._page:
                self._page[digest] = page
                self._name[page] = _Name(digest, table.last, covered)
            table.last = digest
            table.n_named += 1

    def names_after(self, table: Table, tokens: Sequence[int]) -> Iterator[tuple[bytes, bytes]]:
        """Yields (digest, tokens that it covers) of the pages of `tokens` after those of a table that is all named."""
        last = table.last
        covered = self._covered(tokens if self.look_ahead else tokens[:-1])
        for one in covered[table.n_named :]:
            last = _digest(last, one)
            yield last, one

    def named(self, table: Table) -> list[tuple[int, bytes, bytes]]:
        """Returns (page, digest, tokens that it covers) of the table's pages that have names."""
        names = ((page, self._name.get(page)) for page in table.pages[: table.n_named])
        return [(page, name.digest, name.covered) for page, name in names if name]

    def close(self, table: Table) -> None:
        """Empties the table.

        Of the pages that become free, the last ones are taken again first: more prompts begin with the first ones.
        """
        while table.pages:
            page = table.pages.pop()
            self._n_holders[page] -= 1
            if not self._n_holders[page]:
                self._free[page] = None
                self._free.move_to_end(page, last=page in self._name)  # one without a name is of no further use
        table.n_named = 0

    def forget(self, tables: Iterable[Table] = ()) -> None:
        """Removes all names: the weights have changed.

        What is written to these tables from here on follows pages of the old weights, so it is found by nobody.
        """
        self._name.clear()
        self._page.clear()
        for table in tables:
            table.last = secrets.token_bytes(32)

    def check(self, tables: Iterable[Table]) -> None:
        """Raises AssertionError unless exactly these tables hold pages, and the rest is free."""
        n_holders = [0] * self.n_pages
        for table in tables:
            for page in table.pages:
                n_holders[page] += 1
        assert n_holders == self._n_holders, "the counts of holders differ from the tables"
        assert {page for page in range(1, self.n_pages) if not n_holders[page]} == set(self._free), "free pages"
        assert not n_holders[NULL], "the page of padding is held"
        assert {name.digest: page for page, name in self._name.items()} == self._page, "names and pages differ"

    def _covered(self, tokens: Sequence[int]) -> list[bytes]:
        """The tokens that the name of each full page covers."""
        size, ahead = self.page_size, self.look_ahead
        array = np.asarray(tokens, np.int32)
        return [array[end - size : end + ahead].tobytes() for end in range(size, len(array) - ahead + 1, size)]

    def _forget(self, page: int) -> None:
        name = self._name.pop(page, None)
        if name:
            del self._page[name.digest]


def _digest(before: bytes, covered: bytes) -> bytes:
    return hashlib.sha256(before + covered).digest()
