"""Which tokens make sample n of an epoch: an index computed from (seed, epoch), without a queue.

An epoch concatenates its documents, each ended by <eos>, in its own order:

    stream    =  d₁ <eos> d₂ <eos> d₃ …          (a document chosen for FIM is rearranged; if the tokenizer's files
                                                  ask for it, <bos> comes before each document)
    sample n  =  stream[nT : nT+T],  its targets  stream[nT+1 : nT+T+1]

so every token except the first of the stream is a target once. Training drops the tail that is shorter than a window:
at most T-1 tokens, different ones in each epoch. Evaluation pads it instead, so that all held-out text counts.
Documents are cut where a window ends and not padded, as in V3 section 4.1; T is `seq_len`.

The cost is O(documents) per epoch and O(log documents + T) per sample.
"""

import hashlib
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from deepseek_jax.data import fim
from deepseek_jax.data.blocks import Numbers
from deepseek_jax.data.holdout import Pieces, divide
from deepseek_jax.data.noise import ORDER, noise
from deepseek_jax.data.store import TokenStore
from deepseek_jax.data.tokenizer import Tokenizer
from deepseek_jax.errors import UserError

IGNORED = -1  # target of a position without a prediction


class Window(NamedTuple):
    """T+1 tokens of a stream, and the number of their documents within the window: 1, 2, …; 0 is padding."""

    tokens: np.ndarray
    numbers: np.ndarray


class Epoch(NamedTuple):
    """An epoch's stream: its documents in order, their ends, and which of them are FIM."""

    order: np.ndarray
    ends: np.ndarray
    is_fim: np.ndarray


@dataclass(frozen=True, eq=False)
class Packing:
    """The index of a split.

    `pieces` are the documents of `store`, or parts of them, in this split; each counts as a document here. `shuffle`
    gives each epoch its own order; `pad_tail` keeps the last, short window; `marks` may be None if `fim_rate` is 0;
    `bos_id` is None if documents start without <bos>; `mask_documents` is as for `sample`.
    """

    store: TokenStore
    pieces: Pieces
    seq_len: int
    bos_id: int | None
    eos_id: int
    pad_id: int
    marks: fim.FimTokens | None
    fim_rate: float
    seed: int
    shuffle: bool
    pad_tail: bool
    mask_documents: bool

    @property
    def n_tokens(self) -> int:
        """The length of an epoch's stream, the same for every epoch."""
        text = int(self.pieces.lengths.sum() + self._has_bos.sum())
        n_fim = fim.n_chosen(self.n_documents, self.fim_rate)
        return text + self.n_documents + fim.EXTRA_TOKENS * n_fim

    @property
    def n_samples(self) -> int:
        """The windows per epoch."""
        n_targets = max(self.n_tokens - 1, 0)
        return -(-n_targets // self.seq_len) if self.pad_tail else n_targets // self.seq_len

    @property
    def n_documents(self) -> int:
        """The number of documents; a part counts as one."""
        return len(self.pieces.documents)

    @property
    def has_whole_documents(self) -> bool:
        """Whether every document is whole."""
        return np.array_equal(self.pieces.lengths, self.store.lengths[self.pieces.documents])

    @property
    def bytes_per_token(self) -> float:
        """The mean number of bytes of text per token."""
        of_documents = self.store.n_bytes[self.pieces.documents]
        n_bytes = of_documents * (self.pieces.lengths / self.store.lengths[self.pieces.documents])
        return float(n_bytes.sum() / self.n_tokens)

    def fingerprint(self) -> str:
        """Returns a hash of the documents' text and of their lengths in tokens: the same text, cut the same way."""
        table = (self.store.hashes[self.pieces.documents], self.pieces.lengths + self._has_bos)
        return hashlib.blake2b(np.stack(table).astype(np.uint64).tobytes(), digest_size=12).hexdigest()

    @property
    def shortage(self) -> str:
        """What to do if there is no sample."""
        return f"a sample takes {self.seq_len + 1}. Give more text or lower data.seq_len."

    def summary(self) -> str:
        """Returns a description of what the windows hold."""
        return f"{self.n_documents:,} document{'' if self.n_documents == 1 else 's'}"

    def sample(self, epoch: int, n: int) -> "Sample":
        """Returns sample `n` of an epoch."""
        return sample(self.window(epoch, n), self.mask_documents)

    @property
    def _has_bos(self) -> np.ndarray:
        """Which pieces start with <bos>: those at the start of a document, if documents have it."""
        return (self.pieces.starts == 0) & (self.bos_id is not None)

    def _parts(self, epoch: int, place: int, is_fim: bool) -> list[np.ndarray | Numbers]:
        """Returns a document as in the stream, in parts."""
        document, start, stop = (column[place] for column in self.pieces)
        tokens = self.store.document(document)[start:stop]
        parts = [tokens]
        if is_fim:
            if self.marks is None:
                raise ValueError("fim_rate above 0: expected marks")
            parts = fim.rearrange(tokens, self.marks, self.seed, epoch, place)
        begin = [np.array([self.bos_id])] if start == 0 and self.bos_id is not None else []
        return [*begin, *parts, np.array([self.eos_id])]

    def stream(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns all tokens of an epoch, in the dtype of the store, and the end of each document among them."""
        order, ends, is_fim = lay_out(self, epoch)
        parts = [np.asarray(part) for place in order for part in self._parts(epoch, place, is_fim[place])]
        return np.concatenate(parts, dtype=self.store.tokens.dtype, casting="unsafe"), ends

    def window(self, epoch: int, n: int) -> Window:
        """Returns sample `n` of an epoch with the token that follows it."""
        order, ends, is_fim = lay_out(self, epoch)
        start = n * self.seq_len
        stop = min(start + self.seq_len + 1, int(ends[-1]))
        tokens = np.full(self.seq_len + 1, self.pad_id, np.int32)
        numbers = np.zeros(self.seq_len + 1, np.int32)
        first = int(np.searchsorted(ends, start, side="right"))
        filled, i = 0, first
        while start + filled < stop:
            place = order[i]
            parts = self._parts(epoch, place, is_fim[place])
            begin = int(ends[i]) - sum(map(len, parts))
            piece = _slice(parts, start + filled - begin, stop - begin)
            tokens[filled : filled + len(piece)] = piece
            numbers[filled : filled + len(piece)] = i - first + 1
            filled += len(piece)
            i += 1
        return Window(tokens, numbers)


@lru_cache(maxsize=4)  # two splits, and prefetching on both sides of an epoch's end
def lay_out(packing: Packing, epoch: int) -> Epoch:
    """Returns the stream of an epoch."""
    places = np.arange(len(packing.pieces.documents))
    is_fim = fim.choose(len(places), packing.fim_rate, packing.seed, epoch)
    order = places
    if packing.shuffle:
        order = np.argsort(noise(packing.seed, epoch, ORDER, at=places), kind="stable")
    lengths = packing.pieces.lengths + packing._has_bos + 1 + fim.EXTRA_TOKENS * is_fim
    return Epoch(order, np.cumsum(lengths[order]), is_fim)


def _slice(parts: list[np.ndarray | Numbers], start: int, stop: int) -> np.ndarray:
    """Returns `concatenate(parts)[start:stop]` without building a long document as a whole."""
    pieces = []
    for part in parts:
        pieces.append(part[max(start, 0) : max(stop, 0)])
        start, stop = start - len(part), stop - len(part)
    return np.concatenate(pieces)


class Sample(NamedTuple):
    """One row of a batch."""

    ids_T: np.ndarray
    targets_T: np.ndarray
    segments_T: np.ndarray
    positions_T: np.ndarray
    weights_T: np.ndarray


def sample(window: Window, mask_documents: bool) -> Sample:
    """Returns inputs and targets of a window.

    Tokens attend to each other only within a segment; segment 0 is padding. Without `mask_documents` the whole window
    is segment 1 and positions run 0…T-1. With it each document (or the part of it in this window) is a segment whose
    positions start at 0, and <eos> does not predict the next document's first token.
    """
    segments = window.numbers if mask_documents else np.minimum(window.numbers, 1)
    places = np.arange(len(segments), dtype=np.int32)
    starts = np.diff(segments, prepend=segments[:1]) != 0
    positions = places - np.maximum.accumulate(np.where(starts, places, 0))
    predicts = (segments[1:] == segments[:-1]) & (segments[1:] > 0)
    targets = np.where(predicts, window.tokens[1:], IGNORED)
    numbers = (window.tokens[:-1], targets, segments[:-1], positions[:-1])
    ids, targets, segments, positions = (x.astype(np.int32) for x in numbers)
    return Sample(ids, targets, segments, positions, predicts.astype(np.float32))


def sides(
    store: TokenStore,
    tokenizer: Tokenizer,
    eos_id: int,
    holdout_rate: float,
    *,
    seq_len: int,
    fim_rate: float,
    mask_documents: bool,
    add_bos: bool,
    seed: int,
) -> tuple[Packing, Packing | None]:
    """Returns the training and the held-out side of a corpus of texts; the second is None if nothing is held out.

    Only training text becomes FIM and is shuffled in each epoch. With `add_bos` documents start with <bos> if the
    tokenizer's files ask for it.
    """
    options: dict[str, Any] = {"seq_len": seq_len, "mask_documents": mask_documents, "add_bos": add_bos, "seed": seed}
    training, held_out = divide(store.hashes, store.lengths, store.n_bytes, holdout_rate)
    return (
        side(store, training, tokenizer, eos_id, fim_rate=fim_rate, training=True, **options),
        side(store, held_out, tokenizer, eos_id, fim_rate=0.0, training=False, **options) if holdout_rate else None,
    )


def side(
    store: TokenStore,
    pieces: Pieces,
    tokenizer: Tokenizer,
    eos_id: int,
    *,
    training: bool,
    seq_len: int,
    fim_rate: float,
    mask_documents: bool,
    add_bos: bool,
    seed: int,
) -> Packing:
    """Returns the packing of one side: training text is shuffled, of held-out text the last window is padded."""
    return Packing(
        store=store,
        pieces=pieces,
        seq_len=seq_len,
        bos_id=tokenizer.bos_id if add_bos and tokenizer.add_bos else None,
        eos_id=eos_id,
        pad_id=eos_id if tokenizer.pad_id is None else tokenizer.pad_id,
        marks=tokenizer.fim,
        fim_rate=fim_rate,
        seed=seed,
        shuffle=training,
        pad_tail=not training,
        mask_documents=mask_documents,
    )


def check_marks(tokenizer: Tokenizer, fim_rate: float) -> int:
    """Returns the id of <eos>. Raises UserError if a corpus of texts needs special tokens that the tokenizer misses."""
    if tokenizer.eos_id is None:
        raise UserError("data.tokenizer has no end-of-text token. Name it in the tokenizer_config.json beside it.")
    if fim_rate > 0 and tokenizer.fim is None:
        raise UserError("data.tokenizer has no fill-in-the-middle tokens. Set data.fim_rate to 0.")
    return tokenizer.eos_id
