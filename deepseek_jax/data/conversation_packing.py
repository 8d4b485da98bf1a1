"""Which examples of conversations make sample n: whole ones, as many as fit, side by side in a window.

    window  =  | example 4 | example 17 | padding |      each a segment with positions from 0

Windows are filled once, by best fit: the longest examples first, each into the fullest window that has room for it.
What shares a window does not depend on the epoch; the order of the windows does.  Attention stays inside an example and
the loss is a mean over all targets of a batch, so that neighbours do not matter.  An example longer than a window is
cut at its end; one without any answer before the cut is left out.
"""

import hashlib
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from deepseek_jax.data.conversations import Example, unflatten
from deepseek_jax.data.holdout import held_out
from deepseek_jax.data.packing import IGNORED, Sample
from deepseek_jax.data.store import TokenStore
from deepseek_jax.data.tokenizer import Tokenizer
from deepseek_jax.errors import UserError


class Table(NamedTuple):
    """Of each example, int64: its document in the store and number in there, its targets, those learnt, their bytes."""

    document: np.ndarray
    number: np.ndarray
    n_targets: np.ndarray
    n_learnt: np.ndarray
    n_bytes: np.ndarray


class Counts(NamedTuple):
    """How many examples are longer than a window: those cut, and those with no answer before the cut, left out."""

    cut: int
    left_out: int


@dataclass(frozen=True, eq=False)
class ConversationPacking:
    """The index of a split of conversations; made by ``sides``.

    Attributes:
      store: conversations as ``conversations.flatten`` writes them.
      documents: places in ``store`` of those in this split.
      seq_len: tokens of a window.
      pad_id: what fills a window up.
      seed, shuffle: of the order of the windows in an epoch.
      table: the examples, window after window.
      ends: where each window ends in the table.
      counts: of examples too long for a window.
      kind: fingerprint of what made tokens of the text.
    """

    store: TokenStore
    documents: np.ndarray
    seq_len: int
    pad_id: int
    seed: int
    shuffle: bool
    table: Table
    ends: np.ndarray
    counts: Counts
    kind: str

    @property
    def n_samples(self) -> int:
        """Windows of an epoch."""
        return len(self.ends)

    @property
    def n_tokens(self) -> int:
        """Tokens that an epoch's windows hold, padding left out."""
        return int(self.table.n_targets.sum())

    @property
    def n_documents(self) -> int:
        """Conversations."""
        return len(self.documents)

    @property
    def bytes_per_token(self) -> float:
        """Bytes of text that a token that is learnt stands for, on average."""
        return float(self.table.n_bytes.sum() / max(self.table.n_learnt.sum(), 1))

    @property
    def has_whole_documents(self) -> bool:
        """Whether none of them is a part."""
        return True

    @property
    def shortage(self) -> str:
        """What to do where there is no sample."""
        return f"no answer begins within data.seq_len = {self.seq_len} tokens. Give more, or raise data.seq_len."

    def fingerprint(self) -> str:
        """Returns a hash of the conversations and of how they are written and cut."""
        table = (self.store.hashes[self.documents], self.store.lengths[self.documents])
        digest = hashlib.blake2b(np.stack(table).astype(np.uint64).tobytes(), digest_size=12)
        digest.update(self.kind.encode())
        return digest.hexdigest()

    def summary(self) -> str:
        """Returns what the windows hold, in words."""
        share = self.table.n_learnt.sum() / max(self.n_tokens, 1)
        said = f"{self.n_documents:,} conversations in {self.n_samples:,} windows, {share:.0%} of the tokens are learnt"
        too_long = {"cut at data.seq_len": self.counts.cut, "with no answer before it left out": self.counts.left_out}
        return ", ".join([said, *(f"{n:,} {what}" for what, n in too_long.items() if n)])

    def sample(self, epoch: int, n: int) -> Sample:
        """Returns window ``n``, which is the same in every epoch."""
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
        """Returns the example of a row of the table, as long as a window has room for."""
        example = unflatten(self.store.document(self.table.document[row]))[self.table.number[row]]
        return Example(*(array[: self.table.n_targets[row] + 1] for array in example))


def sides(
    store: TokenStore, tokenizer: Tokenizer, kind: str, holdout_rate: float, *, seq_len: int, seed: int
) -> tuple[ConversationPacking, ConversationPacking | None]:
    """Returns the training and the held-out side of a corpus; the second is None if nothing is held out.

    Args:
      store: conversations as ``conversations.flatten`` writes them.
      tokenizer: of their text.
      kind: fingerprint of what made tokens of it.
      holdout_rate: share of the conversations to hold out, each whole; at least one unless it is 0.

    Raises:
      UserError: no conversation is left to train on.
    """
    by_hash = np.argsort(store.hashes, kind="stable")
    chosen = held_out(store.hashes, holdout_rate)[by_hash]
    if chosen.all():
        raise UserError(
            f"data.holdout_rate = {holdout_rate} holds out every conversation (there are {len(by_hash)}, and equal "
            "ones count as one). Give more, or set data.holdout_rate to 0 to train without evaluation."
        )
    pad_id = next(i for i in (tokenizer.pad_id, tokenizer.eos_id, 0) if i is not None)
    byte_lengths_V = tokenizer.byte_lengths()

    def side(documents: np.ndarray, training: bool) -> ConversationPacking:
        table, counts = measure(store, documents, seq_len, byte_lengths_V)
        windows = best_fit(table.n_targets, seq_len)
        order = np.argsort(windows, kind="stable")
        table = Table(*(column[order] for column in table))
        ends = np.cumsum(np.bincount(windows)) if len(windows) else windows
        return ConversationPacking(store, documents, seq_len, pad_id, seed, training, table, ends, counts, kind)

    return side(by_hash[~chosen], True), side(by_hash[chosen], False) if holdout_rate else None


def measure(store: TokenStore, documents: np.ndarray, seq_len: int, byte_lengths_V: np.ndarray) -> tuple[Table, Counts]:
    """Returns the examples of the documents that have something to learn in a window, and how many are too long."""
    rows, cut, left_out = [], 0, 0
    for document in documents:
        for number, (ids, is_learnt) in enumerate(unflatten(store.document(document))):
            targets = ids[1 : seq_len + 1][is_learnt[1 : seq_len + 1]]
            if len(targets):
                n_targets = min(len(ids) - 1, seq_len)
                rows.append((document, number, n_targets, len(targets), byte_lengths_V[targets].sum()))
                cut += len(ids) - 1 > seq_len
            else:
                left_out += 1
    return Table(*np.array(rows, np.int64).reshape(-1, 5).T), Counts(cut, left_out)


def best_fit(lengths: np.ndarray, size: int) -> np.ndarray:
    """Returns the window, int64, of each item: a window has room for ``size``, an item takes its length.

    Longest first, ties in their order; each into the fullest window that has room for it.
    """
    windows = np.zeros(len(lengths), np.int64)
    with_room: list[list[int]] = [[] for _ in range(size + 1)]  # windows by the room left in them
    rooms = 0  # bit r: some window has room r
    n_windows = 0
    for item in np.argsort(-lengths, kind="stable"):
        length = int(lengths[item])
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            window = with_room[room].pop()
            rooms ^= (not with_room[room]) << room
        else:
            room, window, n_windows = size, n_windows, n_windows + 1
        windows[item] = window
        with_room[room - length].append(window)
        rooms |= 1 << (room - length)
    _, first = np.unique(windows, return_index=True)
    return np.argsort(np.argsort(first))[windows]  # numbered as items come, so that long and short ones are mixed
