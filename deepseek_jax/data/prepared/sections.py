"""A corpus in sections of about equal size, each read by itself: shard i is made from section i.

The files stand one after the other in a line of bytes, as they are stored. A section is a stretch of that line, and a
document belongs to the section in which it begins. JSONL, parquet and ArrayRecord files are cut anywhere; other files,
and compressed ones, belong to the section in which they begin.
"""

import hashlib
import os
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from itertools import accumulate
from pathlib import Path

from deepseek_jax.data.compression import ENDINGS, content_type
from deepseek_jax.data.corpus import Corpus, Portion
from deepseek_jax.data.readers import PARTS

Part = tuple[int, int] | None  # bytes of a file between which documents begin; None: the whole file


@dataclass(frozen=True)
class Section(Corpus):
    """Some files of a corpus, or parts of them."""

    parts: tuple[Part, ...] = ()  # of each file

    def portions(self) -> Iterator[Portion]:
        """Yields each non-empty document."""
        for path, part in zip(self.files, self.parts, strict=True):
            yield from self.read(path, part)

    def n_bytes(self) -> int:
        """Returns the size of these parts, as stored."""
        sized = zip(self.files, self.parts, strict=True)
        return sum(path.stat().st_size if part is None else part[1] - part[0] for path, part in sized)


class Line:
    """The files of a corpus as a line of bytes.

    Attributes:
        n_bytes: its length.
    """

    def __init__(self, corpus: Corpus):
        self._corpus = corpus
        self._sizes = [path.stat().st_size for path in corpus.files]
        self._starts = [0, *accumulate(self._sizes)]
        self.n_bytes = self._starts[-1]

    def listing(self) -> str:
        """Returns a hash of the files' names below their common folder, and of their sizes."""
        top = os.path.commonpath([path.absolute().parent for path in self._corpus.files])
        rows = zip(self._corpus.files, self._sizes, strict=True)
        lines = (f"{os.path.relpath(path.absolute(), top)} {size}\n" for path, size in rows)
        return hashlib.blake2b("".join(lines).encode(errors="surrogateescape"), digest_size=12).hexdigest()

    def cuts(self, count: int) -> list[int]:
        """Returns the ends of at most `count` sections, with 0 at the start; fewer where files cannot be cut.

        As many sections as were found may be asked for again, and other ones come: a caller keeps `count`.
        """
        found, file = [0], 0
        for number in range(1, count):
            place = number * self.n_bytes // count
            while self._starts[file + 1] <= place:
                file += 1
            if place > self._starts[file] and not _is_divisible(self._corpus.files[file]):
                place = self._starts[file + 1]
            if found[-1] < place < self.n_bytes:
                found.append(place)
        return [*found, self.n_bytes]

    def section(self, start: int, stop: int) -> Section:
        """Returns what begins between two bytes of the line."""
        chosen: list[tuple[Path, Part]] = []
        for file in range(bisect_right(self._starts, start) - 1, bisect_left(self._starts, stop)):
            path, begin, end = self._corpus.files[file], self._starts[file], self._starts[file + 1]
            low, high = max(start, begin), min(stop, end)
            if low == high:  # an empty file
                continue
            if (low, high) == (begin, end) or not _is_divisible(path):
                chosen += [(path, None)] if low == begin else []
            else:
                chosen.append((path, (low - begin, high - begin)))
        return _with(self._corpus, chosen)


def _with(corpus: Corpus, chosen: Sequence[tuple[Path, Part]]) -> Section:
    values = {field.name: getattr(corpus, field.name) for field in fields(Corpus)}
    files, parts = tuple(path for path, _ in chosen), tuple(part for _, part in chosen)
    return Section(**{**values, "files": files, "passed_over": (), "parts": parts})


def _is_divisible(path: Path) -> bool:
    return content_type(path) in PARTS and path.suffix.lower() not in ENDINGS
