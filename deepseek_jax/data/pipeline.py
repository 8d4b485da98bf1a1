"""Batches by number: sample i is the same for any number of processes, reader workers or devices.

    grain:  source(windows of an epoch) → shuffle → repeat → map(window → sample) → batch

Every stage is a function of the index alone, so the whole state of the data path is the number of the next sample; to
resume is to ask for it.  Process p of n asks for its share of a batch with ``rows(start + p*count//n, count//n)``.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import grain
import numpy as np
from absl import flags

from deepseek_jax.data import conversation_packing, packing, reader_processes
from deepseek_jax.data.conversation_packing import ConversationPacking
from deepseek_jax.data.conversations import Encoder, template_name
from deepseek_jax.data.corpus import open_corpus
from deepseek_jax.data.marked_text import MarkReader
from deepseek_jax.data.noise import WINDOWS, noise
from deepseek_jax.data.packing import Packing, Sample
from deepseek_jax.data.store import open_store
from deepseek_jax.data.tokenizer import Tokenizer, open_tokenizer
from deepseek_jax.data.watch import Watch, unwatched
from deepseek_jax.errors import UserError

READ_AHEAD = 4  # batches made before they are asked for


class Batch(NamedTuple):
    """Rows of tokens and what to learn of each; int32 arrays, and float32 weights.

    Attributes:
      ids_BT: tokens.
      targets_BT: the token that follows each one; -1 where none does.
      segments_BT: tokens see each other within a segment; segment 0 is padding.
      positions_BT: for the rotary angles.
      weights_BT: of each target in the loss: 1 in pre-training; 0 for what is read and not learnt, and for no target.
    """

    ids_BT: np.ndarray
    targets_BT: np.ndarray
    segments_BT: np.ndarray
    positions_BT: np.ndarray
    weights_BT: np.ndarray

    @classmethod
    def of_windows(cls, windows: np.ndarray) -> "Batch":
        """Returns whole windows as rows without padding, a document each.

        Args:
          windows: int [B, T + 1]; the last T tokens are the targets, each with weight 1.
        """
        ids_BT, targets_BT = windows[:, :-1].astype(np.int32), windows[:, 1:].astype(np.int32)
        positions_BT = np.broadcast_to(np.arange(ids_BT.shape[1], dtype=np.int32), ids_BT.shape)
        ones_BT = np.ones_like(ids_BT)
        return cls(ids_BT, targets_BT, ones_BT, positions_BT, ones_BT.astype(np.float32))


class Samples:
    """The endless sequence of samples of a split, as a grain dataset; what a reader process receives."""

    def __init__(self, packing: Packing | ConversationPacking):
        self.packing = packing
        self.n_samples = packing.n_samples
        # The windows are shuffled too: a batch is a mixture of documents, not one run of the stream.
        seed = noise(packing.seed, WINDOWS, at=np.zeros(1))[0] >> np.uint64(32) if packing.shuffle else 0
        windows = grain.MapDataset.source(range(self.n_samples)).shuffle(seed=int(seed))
        self.dataset = windows.repeat(reseed_each_epoch=packing.shuffle).map_with_index(self.sample)

    def sample(self, i: int, window: int) -> Sample:
        """Returns sample ``i`` of the run, which is the given window of its epoch."""
        epoch = i // self.n_samples if self.packing.shuffle else 0
        return self.packing.sample(epoch, window)

    def rows(self, start: int, count: int) -> Batch:
        """Returns samples ``start`` to ``start + count``."""
        return self.dataset[int(start) : int(start) + int(count)].batch(int(count), batch_fn=_stack)[0]

    def batch(self, bounds: tuple[int, int]) -> Batch:
        """Returns ``rows`` of a (start, count) pair."""
        return self.rows(*bounds)


def _stack(samples: list[Sample]) -> Batch:
    return Batch(*map(np.stack, zip(*samples, strict=True)))


class Split:
    """One side of a corpus, training or held-out, as samples with numbers 0, 1, 2, … without end."""

    def __init__(self, samples: Samples, tokenizer: Tokenizer, workers: int, passed_over: tuple[Path, ...] = ()):
        self._samples = samples
        self._workers = workers
        self.tokenizer = tokenizer
        self.passed_over = passed_over  # files of a folder that hold no text
        self.vocab_size = tokenizer.vocab_size
        side = samples.packing
        self.seq_len = side.seq_len
        self.n_samples = samples.n_samples  # samples of an epoch
        self.n_documents = side.n_documents
        self.has_whole_documents = side.has_whole_documents
        self.n_tokens = side.n_tokens  # tokens of an epoch, with all marks
        self.bytes_per_token = side.bytes_per_token  # of those that are learnt
        self.summary = side.summary()

    def fingerprint(self) -> str:
        """Returns a hash of what is read and of how it is cut into tokens."""
        return self._samples.packing.fingerprint()

    def rows(self, start: int, count: int) -> Batch:
        """Returns samples ``start`` to ``start + count``: a pure function, to be called in any order."""
        return self._samples.rows(start, count)

    def batches(self, ranges: Iterable[tuple[int, int]]) -> Iterator[Batch]:
        """Yields ``rows(start, count)`` for each range of a sequence, which is read as needed, made ahead of time.

        Threads of this process make them, or ``workers`` processes (which take seconds to start, and need the usual
        ``if __name__ == "__main__"`` in a script).  The batches are the same either way, and if a reader process dies.
        Close the iterator, or let it end, to stop the workers.
        """
        bounds = ranges if isinstance(ranges, Sequence) else tuple(ranges)
        if self._workers:
            for batch in reader_processes.watched(lambda done: self._opened(bounds[done:]), len(bounds)):
                yield Batch(*map(np.array, batch))  # a copy frees the shared memory
            return
        iterator = self._opened(bounds)
        try:
            yield from iterator
        finally:
            iterator.close()

    def _opened(self, bounds: Sequence[tuple[int, int]]) -> grain.DatasetIterator:
        """Returns an iterator over the batches of these ranges; its threads or processes start with the first one."""
        n_threads = 1 if self._workers else 2
        options = grain.ReadOptions(num_threads=n_threads, prefetch_buffer_size=READ_AHEAD)
        dataset = grain.MapDataset.source(bounds).map(self._samples.batch).to_iter_dataset(options)
        if self._workers:
            if not flags.FLAGS.is_parsed():  # grain reads a flag of its own, which fails outside absl.app
                flags.FLAGS.mark_as_parsed()
            readers = grain.MultiprocessingOptions(num_workers=self._workers)
            dataset = dataset.mp_prefetch(readers, worker_init_fn=reader_processes.init_of_readers())
        return iter(dataset)


def open_split(split: str, **settings) -> Split:
    """Returns the ``train`` or the ``holdout`` side of a corpus; the settings are those of ``open_splits``.

    Raises:
      UserError: as ``open_splits``; the side does not exist or holds no text.
    """
    if split not in ("train", "holdout"):
        raise UserError(f"split {split!r} does not exist. Ask for 'train' or 'holdout'.")
    training, held_out = open_splits(**settings)
    if split == "train":
        return training
    if held_out is None:
        raise UserError("data.holdout_rate = 0 holds no text out to evaluate on. Set it above 0.")
    return held_out


def open_splits(
    *,
    source: str,
    text_key: str,
    tokenizer: str | Tokenizer,
    seq_len: int,
    fim_rate: float,
    mask_documents: bool,
    holdout_rate: float,
    workers: int,
    cache_dir: str,
    seed: int,
    format: str = "auto",
    chat_template: str = "",
    train_on: str = "answers",
    special_tokens: bool = False,
    add_bos: bool = True,
    watch: Watch = unwatched,
) -> tuple[Split, Split | None]:
    """Returns the training and the held-out side of a corpus; the second is None if ``holdout_rate`` is 0.

    Training text comes in an order of its own each epoch and partly as FIM.  Held-out text comes as it is, its last
    window padded, so that ``n_samples`` rows are all of it; its order is fixed and mixes documents, so that the first
    few rows are a fair sample.  Conversations come whole, and neither ``fim_rate`` nor ``mask_documents`` concerns
    them: there is no FIM, and they are always masked (see ``settled``).

    Args:
      source, ...: the keys of ``config.data``; ``tokenizer`` may be one that is open already.  What is left out is as
        in ``configs/base.py``.
      watch: shown how far the tokenising is.

    Raises:
      UserError: a wrong argument, unreadable files, or too little text.
    """
    _check(seq_len, fim_rate, holdout_rate, workers)
    words = open_tokenizer(tokenizer) if isinstance(tokenizer, str) else tokenizer
    corpus = open_corpus(source, text_key, format)
    if corpus.format == "conversations":
        encoder = Encoder(words, template_name(chat_template, tokenizer), train_on)
        store = open_store(corpus, encoder, cache_dir, watch)
        sides = conversation_packing.sides(store, words, encoder.fingerprint, holdout_rate, seq_len=seq_len, seed=seed)
    else:
        check_marks(words, fim_rate)
        store = open_store(corpus, MarkReader(words) if special_tokens else words, cache_dir, watch)
        options = {"fim_rate": fim_rate, "mask_documents": mask_documents, "add_bos": add_bos}
        sides = packing.sides(store, words, holdout_rate, seq_len=seq_len, seed=seed, **options)
    for name, side in zip(("train", "holdout"), sides, strict=True):
        if side is not None and side.n_samples == 0:
            raise UserError(f"data.source = {source!r} has {side.n_tokens} {name} tokens and {side.shortage}")
    training, held_out = (side and Split(Samples(side), words, workers, corpus.passed_over) for side in sides)
    return training, held_out


def settled(data: Mapping) -> dict:
    """Returns those keys of ``config.data`` that the corpus decides: its format, and what follows from that.

    Raises:
      UserError: no file, or no chat template for conversations.
    """
    corpus = open_corpus(data["source"], data["text_key"], data["format"])
    if corpus.format != "conversations":
        return {"format": corpus.format}
    template = template_name(data["chat_template"], data["tokenizer"])
    return {"format": corpus.format, "chat_template": template, "mask_documents": True, "fim_rate": 0.0}


def check_marks(words: Tokenizer, fim_rate: float) -> None:
    """Raises UserError if a corpus of texts needs a mark that the tokenizer does not have."""
    if words.eos_id is None:
        raise UserError("data.tokenizer has no end-of-text mark. Name it in the tokenizer_config.json beside it.")
    if fim_rate > 0 and words.fim is None:
        raise UserError("data.tokenizer has no fill-in-the-middle marks. Set data.fim_rate to 0.")


def _check(seq_len: int, fim_rate: float, holdout_rate: float, workers: int) -> None:
    if seq_len < 1:
        raise UserError(f"data.seq_len = {seq_len}: a sample needs at least 1 token.")
    if not 0 <= fim_rate <= 1:
        raise UserError(f"data.fim_rate = {fim_rate} is a share of the documents: give 0 to 1.")
    if not 0 <= holdout_rate < 1:
        raise UserError(f"data.holdout_rate = {holdout_rate} is a share of the documents: give 0 to less than 1.")
    if workers < 0:
        raise UserError(f"data.workers = {workers}: give 0 for threads, or a number of processes.")
