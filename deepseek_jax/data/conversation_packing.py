"""Which examples of conversations make sample n: whole ones, as many as fit, side by side in a window.

    window  =  | example 4 | example 17 | padding |      each a segment with positions from 0

Windows are filled once, by best fit: the longest examples first, each into the fullest window with enough space. The
contents of a window do not depend on the epoch; the order of the windows does. Attention stays inside an example and
the loss is a mean over all targets of a batch, so neighbours do not matter. An example longer than a window is cut at
its end; one without any answer before the cut is left out.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import numpy as np

from deepseek_jax.data.conversations import FLAGS, LEARNT, STARTS, Example, unflatten
from deepseek_jax.data.holdout import held_out
from deepseek_jax.data.packing import IGNORED, Sample
from deepseek_jax.data.store import TokenStore
from deepseek_jax.data.tokenizer import Tokenizer
from deepseek_jax.data.watch import Watch, unwatched
from deepseek_jax.errors import UserError

CHUNK_TOKENS = 1 << 20  # measured at a time
SHOWN_BYTES = 32 << 20  # of tokens: measuring fewer takes about a second and is not shown


class Table(NamedTuple):
    """One entry per example, all int64."""

    document: np.ndarray  # its document in the store
    start: np.ndarray  # its first token in that document
    n_targets: np.ndarray  # its targets, at most the length of a window
    n_learnt: np.ndarray  # how many of those are learnt
    n_bytes: np.ndarray  # bytes of text of the learnt ones

    def rows(self, chosen: np.ndarray) -> "Table":
        """Returns the chosen rows."""
        return Table(*(column[chosen] for column in self))


class Counts(NamedTuple):
    """Examples that are longer than a window."""

    cut: int
    left_out: int  # because they have no answer before the cut


@dataclass(frozen=True, eq=False)
class ConversationPacking:
    """The index of a split of conversations; created by `sides`."""

    store: TokenStore  # conversations as `conversations.flatten` writes them
    documents: np.ndarray  # positions in `store` of the conversations of this split
    seq_len: int  # tokens per window
    pad_id: int  # id that fills a window up
    # seed, shuffle: seed of the order of the windows in an epoch, and whether they are shuffled
    seed: int
    shuffle: bool
    table: Table  # the examples, window by window
    ends: np.ndarray  # end of each window in the table
    counts: Counts  # numbers of examples too long for a window
    kind: str  # fingerprint of the encoder that turned the text into tokens
    has_whole_documents: ClassVar[bool] = True

    @property
    def n_samples(self) -> int:
        """The windows per epoch."""
        return len(self.ends)

    @property
    def n_tokens(self) -> int:
        """The tokens per epoch, without padding."""
        return int(self.table.n_targets.sum())

    @property
    def n_documents(self) -> int:
        """The number of conversations."""
        return len(self.documents)

    @property
    def bytes_per_token(self) -> float:
        """The mean number of bytes of text per learnt token."""
        return float(self.table.n_bytes.sum() / max(self.table.n_learnt.sum(), 1))

    @property
    def shortage(self) -> str:
        """What to do if there is no sample."""
        given = f"data.seq_len = {self.seq_len}"
        return f"no answer begins within {given} tokens. Give more conversations, or raise data.seq_len."

    def fingerprint(self) -> str:
        """Returns a hash of the conversations and of how they are encoded and cut."""
        table = (self.store.hashes[self.documents], self.store.lengths[self.documents])
        digest = hashlib.blake2b(np.stack(table).astype(np.uint64).tobytes(), digest_size=12)
        digest.update(self.kind.encode())
        return digest.hexdigest()

    def summary(self) -> str:
        """Returns a description of what the windows hold."""
        share = self.table.n_learnt.sum() / max(self.n_tokens, 1)
        text = f"{self.n_documents:,} conversations in {self.n_samples:,} windows, {share:.0%} of the tokens are learnt"
        too_long = {"cut at data.seq_len": self.counts.cut, "with no answer before it left out": self.counts.left_out}
        return ", ".join([text, *(f"{n:,} {what}" for what, n in too_long.items() if n)])

    def sample(self, epoch: int, n: int) -> Sample:
        """Returns window `n`, which is the same in every epoch."""
        ids, targets, segments, positions = np.zeros((4, self.seq_len), np.int32)
        weights = np.zeros(self.seq_len, np.float32)
        ids[:], targets[:], filled = self.pad_id, IGNORED, 0
        for segment, row in enumerate(range(self.ends[n - 1] if n else 0, self.ends[n]), start=1):
            example = self._example(row)
            here = slice(filled, filled + self.table.n_targets[row])
            filled = here.stop
            ids[here], targets[here], weights[here] = example.ids[:-1], example.ids[1:], example.is_learnt[1:]
            segments[here], positions[here] = segment, np.arange(len(example.ids) - 1)
        return Sample(ids, targets, segments, positions, weights)

    def _example(self, row: int) -> Example:
        """Returns the example of a row of the table, cut to a window; reads those tokens only."""
        start = self.table.start[row]
        stored = self.store.document(self.table.document[row])[start : start + self.table.n_targets[row] + 1]
        return unflatten(stored)[0]


def sides(
    store: TokenStore,
    tokenizer: Tokenizer,
    kind: str,
    holdout_rate: float,
    *,
    seq_len: int,
    seed: int,
    watch: Watch = unwatched,
) -> tuple[ConversationPacking, ConversationPacking | None]:
    """Returns the training and the held-out side of a corpus; the second is None if nothing is held out.

    `holdout_rate` is the share of the conversations to hold out, each whole; at least one unless it is 0. `watch` shows
    how much of a large corpus is measured. Raises UserError if no conversation is left to train on.
    """
    by_hash = np.argsort(store.hashes, kind="stable")
    chosen = held_out(store.hashes, holdout_rate)[by_hash]
    if chosen.all():
        raise UserError(
            f"data.holdout_rate = {holdout_rate} holds out every conversation (there are {len(by_hash)}, and equal "
            "ones count as one). Give more, or set data.holdout_rate to 0 to train without evaluation."
        )
    pad_id = next(i for i in (tokenizer.pad_id, tokenizer.eos_id, 0) if i is not None)
    measured = measure(store, seq_len, tokenizer.byte_lengths(), watch)

    def side(documents: np.ndarray, training: bool) -> ConversationPacking:
        table, counts = select(*measured, documents)
        windows = best_fit(table.n_targets, seq_len)
        table = table.rows(np.argsort(windows, kind="stable"))
        ends = np.cumsum(np.bincount(windows)) if len(windows) else windows
        return ConversationPacking(store, documents, seq_len, pad_id, seed, training, table, ends, counts, kind)

    return side(by_hash[~chosen], True), side(by_hash[chosen], False) if holdout_rate else None


def measure(
    store: TokenStore, seq_len: int, byte_lengths_V: np.ndarray, watch: Watch = unwatched
) -> tuple[Table, np.ndarray]:
    """Returns every example of a store, in its order, and which of them are longer than a window (bool).

    Reads the tokens once, in chunks of whole documents.
    """
    itemsize, parts = store.tokens.dtype.itemsize, []
    n_bytes = len(store.tokens) * itemsize
    with (watch if n_bytes >= SHOWN_BYTES else unwatched)("measure the conversations", n_bytes) as counter:
        for start, stop in _chunks(store):
            parts.append(_measured(np.asarray(store.tokens[start:stop]), start, store.offsets, seq_len, byte_lengths_V))
            counter.advance((stop - start) * itemsize)
    *columns, is_cut = np.concatenate(parts, axis=1)
    return Table(*columns), is_cut.astype(bool)


def _chunks(store: TokenStore) -> Iterator[tuple[int, int]]:
    """Yields (first token, end) of chunks of whole documents, each about `CHUNK_TOKENS` or a single document."""
    stops, first = store.offsets + store.lengths, 0
    while first < len(stops):
        last = max(first + 1, int(np.searchsorted(stops, store.offsets[first] + CHUNK_TOKENS, "right")))
        yield int(store.offsets[first]), int(stops[last - 1])
        first = last


def _measured(
    tokens: np.ndarray, base: int, offsets: np.ndarray, seq_len: int, byte_lengths_V: np.ndarray
) -> np.ndarray:
    """Returns the columns of `Table` and whether an example is cut, int64 [6, examples].

    Args:
        tokens: whole documents, as `conversations.flatten` writes them.
        base, offsets: position of the first of them, and start of each document, among all tokens.
        seq_len, byte_lengths_V: tokens per window; bytes of text per id.
    """
    starts = np.flatnonzero(tokens & STARTS)
    n_targets = np.diff(starts, append=len(tokens)) - 1
    place = np.arange(len(tokens)) - np.repeat(starts, n_targets + 1)  # of a token in its example
    is_learnt = (tokens & LEARNT).astype(bool) & (place >= 1) & (place <= seq_len)
    n_bytes = np.where(is_learnt, byte_lengths_V[tokens // FLAGS], 0)
    document = np.searchsorted(offsets, starts + base, "right") - 1
    learnt, learnt_bytes = (np.add.reduceat(counted, starts, dtype=np.int64) for counted in (is_learnt, n_bytes))
    within, is_cut = np.minimum(n_targets, seq_len), n_targets > seq_len
    return np.stack([document, starts + base - offsets[document], within, learnt, learnt_bytes, is_cut])


def select(table: Table, is_cut: np.ndarray, documents: np.ndarray) -> tuple[Table, Counts]:
    """Returns the examples of some documents with something to learn, in the documents' order, and their counts."""
    rank = np.full(max(table.document.max(), documents.max(initial=0)) + 1, -1)
    rank[documents] = np.arange(len(documents))
    rows = np.flatnonzero(rank[table.document] >= 0)
    rows = rows[np.argsort(rank[table.document[rows]], kind="stable")]
    has_answer = table.n_learnt[rows] > 0
    counts = Counts(cut=int(is_cut[rows[has_answer]].sum()), left_out=int((~has_answer).sum()))
    return table.rows(rows[has_answer]), counts


def best_fit(lengths: np.ndarray, size: int) -> np.ndarray:
    """Returns the window, int64, of each item; a window has space for `size`, an item takes its length.

    Longest first, ties in their order; each into the fullest window with enough space.
    """
    windows = np.zeros(len(lengths), np.int64)
    with_space: list[list[int]] = [[] for _ in range(size + 1)]  # windows by the space left in them
    spaces = 0  # bit n: some window has space for n
    n_windows = 0
    for item in np.argsort(-lengths, kind="stable"):
        length = int(lengths[item])
        fitting = spaces >> length
        if fitting:
            space = length + (fitting & -fitting).bit_length() - 1
            window = with_space[space].pop()
            spaces ^= (not with_space[space]) << space
        else:
            space, window, n_windows = size, n_windows, n_windows + 1
        windows[item] = window
        with_space[space - length].append(window)
        spaces |= 1 << (space - length)
    _, first = np.unique(windows, return_index=True)
    return np.argsort(np.argsort(first))[windows]  # numbered in the items' order, which mixes long and short ones
