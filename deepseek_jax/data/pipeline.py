"""Batches by number: sample i is the same for any number of processes, workers or devices.

    grain:  source(windows of an epoch) → shuffle → repeat → map(window → sample) → batch

Every stage is a function of the index alone, so the number of the next sample is the whole state of the data path, and
a run resumes by asking for that sample. Process p of n reads its share of a batch with
`rows(start + p*count//n, count//n)`.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import grain
import numpy as np
from absl import flags

from deepseek_jax.bounds import LARGEST, number, whole
from deepseek_jax.data import conversation_packing, packing, reader_processes
from deepseek_jax.data.conversation_packing import ConversationPacking
from deepseek_jax.data.conversations import Encoder, template_name
from deepseek_jax.data.corpus import open_corpus
from deepseek_jax.data.marked_text import MarkReader
from deepseek_jax.data.noise import WINDOWS, noise
from deepseek_jax.data.packing import Packing, Sample
from deepseek_jax.data.prepared.mixture import Mixture, open_sides, settled_by
from deepseek_jax.data.prepared.reading import PreparedSide
from deepseek_jax.data.prepared.source import sources
from deepseek_jax.data.store import open_store
from deepseek_jax.data.tokenizer import Tokenizer, open_tokenizer
from deepseek_jax.data.watch import Watch, unwatched
from deepseek_jax.errors import UserError

READ_AHEAD = 4  # batches made in advance
BOUNDS = {
    "seq_len": whole(1, LARGEST),
    "fim_rate": number(0, 1),
    "holdout_rate": number(0, 1, below=True),
    "workers": whole(0, 1024),
}


Array = Any  # of numpy on the host, of jax on the devices
One = Packing | ConversationPacking | PreparedSide  # training or held-out
Side = One | Mixture


class Batch(NamedTuple):
    """Rows of tokens and their targets; int32 arrays, and float32 weights."""

    ids_BT: Array  # tokens
    targets_BT: Array  # next tokens; -1 if there is none
    segments_BT: Array  # tokens attend to each other within a segment; segment 0 is padding
    positions_BT: Array  # positions for the rotary angles
    # weight of each target in the loss: 1 in pre-training; 0 for context only, and without a target
    weights_BT: Array

    @classmethod
    def of_windows(cls, windows: np.ndarray) -> "Batch":
        """Returns windows, int [B, T + 1], as rows without padding, a document each; every target has weight 1."""
        ids_BT, targets_BT = windows[:, :-1].astype(np.int32), windows[:, 1:].astype(np.int32)
        positions_BT = np.broadcast_to(np.arange(ids_BT.shape[1], dtype=np.int32), ids_BT.shape)
        ones_BT = np.ones_like(ids_BT)
        return cls(ids_BT, targets_BT, ones_BT, positions_BT, ones_BT.astype(np.float32))


class Samples:
    """The endless sequence of samples of a split, as a grain dataset; it is sent to reader processes."""

    def __init__(self, packing: One):
        self.packing = packing
        self.n_samples = packing.n_samples
        # The windows are shuffled too: a batch mixes documents and is not one section of the stream.
        seed = noise(packing.seed, WINDOWS, at=np.zeros(1))[0] >> np.uint64(32) if packing.shuffle else 0
        windows = grain.MapDataset.source(range(self.n_samples)).shuffle(seed=int(seed))
        self.dataset = windows.repeat(reseed_each_epoch=packing.shuffle).map_with_index(self.sample)

    def sample(self, i: int, window: int) -> Sample:
        """Returns sample `i` of the run, which is the given window of its epoch."""
        epoch = i // self.n_samples if self.packing.shuffle else 0
        return self.packing.sample(epoch, window)

    def rows(self, start: int, count: int) -> Batch:
        """Returns samples `start` to `start + count`."""
        return self.dataset[int(start) : int(start) + int(count)].batch(int(count), batch_fn=_stack)[0]

    def batch(self, bounds: tuple[int, int]) -> Batch:
        """Returns `rows` of a (start, count) pair."""
        return self.rows(*bounds)


class MixedSamples:
    """The endless sequence of samples of a mixture, each corpus in the order that it has alone."""

    def __init__(self, packing: Mixture):
        self.packing, self.n_samples = packing, packing.n_samples
        self._corpora = [Samples(side) for side in packing.sides]

    def rows(self, start: int, count: int) -> Batch:
        """Returns samples `start` to `start + count`."""
        places = (self.packing.shares.place(i) for i in range(int(start), int(start) + int(count)))
        return _stack([self._corpora[corpus].dataset[number] for corpus, number in places])

    def batch(self, bounds: tuple[int, int]) -> Batch:
        """Returns `rows` of a (start, count) pair."""
        return self.rows(*bounds)


def _stack(samples: list[Sample]) -> Batch:
    return Batch(*map(np.stack, zip(*samples, strict=True)))


class Split:
    """One side of a corpus, training or held-out, as an endless sequence of samples."""

    def __init__(
        self, samples: Samples | MixedSamples, tokenizer: Tokenizer, workers: int, passed_over: tuple[Path, ...] = ()
    ):
        self._samples = samples
        self._workers = workers
        self.tokenizer = tokenizer
        self.passed_over = passed_over  # files of a folder whose type cannot be read
        self.vocab_size = tokenizer.vocab_size
        side = samples.packing
        self.seq_len = side.seq_len
        self.n_samples = samples.n_samples  # samples per epoch
        self.n_documents = side.n_documents
        self.has_whole_documents = side.has_whole_documents
        self.n_tokens = side.n_tokens  # tokens per epoch, special tokens included
        self.bytes_per_token = side.bytes_per_token  # of the learnt tokens
        self.summary = side.summary()

    def fingerprint(self) -> str:
        """Returns a hash of the text and of how it is cut into tokens."""
        return self._samples.packing.fingerprint()

    def rows(self, start: int, count: int) -> Batch:
        """Returns samples `start` to `start + count`: a pure function, which can be called in any order."""
        return self._samples.rows(start, count)

    def batches(self, ranges: Iterable[tuple[int, int]]) -> Iterator[Batch]:
        """Yields `rows(start, count)` for each range of a sequence, which is read as needed.

        Batches are made in advance, by threads of this process or by `workers` processes (which take seconds to start,
        and need the usual `if __name__ == "__main__"` in a script). They are the same in both cases, and after a reader
        process dies. Close the iterator, or exhaust it, to stop the workers.
        """
        bounds = ranges if isinstance(ranges, Sequence) else tuple(ranges)
        if self._workers:

            def open_at(done: int) -> grain.DatasetIterator:
                return self._opened(bounds[done:])

            for batch in reader_processes.watched(open_at, len(bounds), self._workers):
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


def open_split(split: str, **settings: Any) -> Split:
    """Returns the `train` or the `holdout` side of a corpus; the settings are those of `open_splits`.

    Raises UserError as that does, or if the side does not exist or holds no text.
    """
    if split not in ("train", "holdout"):
        raise UserError(f"split {split!r}: expected 'train' or 'holdout'.")
    training, held_out = open_splits(**settings)
    if split == "train":
        return training
    if held_out is None:
        raise UserError("data.holdout_rate = 0 holds out no text for evaluation. Set it above 0.")
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
    """Returns the training and the held-out side of a corpus; the second is None if `holdout_rate` is 0.

    Training text is shuffled in each epoch and partly FIM. Held-out text is unchanged and its last window is padded, so
    `n_samples` rows are all of it; its order is fixed and mixes documents, so the first few rows are a fair sample.
    Conversations are whole, and `fim_rate` and `mask_documents` do not apply to them: there is no FIM, and they are
    always masked (see `settled`). Raises UserError if an argument is invalid, files are unreadable, or there is too
    little text.

    Args:
        source, ...: keys of `config.data`; `tokenizer` may be an open tokenizer. Defaults are as in `configs/base.py`.
            Of prepared text, `fim_rate`, `holdout_rate`, `add_bos` and `special_tokens` have been decided before.
        watch: shows the progress of tokenising.
    """
    for name, value in (
        ("seq_len", seq_len),
        ("fim_rate", fim_rate),
        ("holdout_rate", holdout_rate),
        ("workers", workers),
    ):
        BOUNDS[name].check(f"data.{name}", value)
    opened = open_tokenizer(tokenizer) if isinstance(tokenizer, str) else tokenizer
    if found := sources(source):
        of_text(format, source)
        prepared = open_sides(found, opened, seq_len=seq_len, mask_documents=mask_documents, seed=seed)
        return _splits(prepared, source, opened, workers)
    corpus = open_corpus(source, text_key, format)
    sides: tuple[Side, Side | None]
    if corpus.format == "conversations":
        encoder = Encoder(opened, template_name(chat_template, tokenizer), train_on)
        store = open_store(corpus, encoder, cache_dir, watch)
        options: dict[str, Any] = {"seq_len": seq_len, "seed": seed, "watch": watch}
        sides = conversation_packing.sides(store, opened, encoder.fingerprint, holdout_rate, **options)
    else:
        eos_id = packing.check_marks(opened, fim_rate)
        store = open_store(corpus, MarkReader(opened) if special_tokens else opened, cache_dir, watch)
        options = {"fim_rate": fim_rate, "mask_documents": mask_documents, "add_bos": add_bos}
        sides = packing.sides(store, opened, eos_id, holdout_rate, seq_len=seq_len, seed=seed, **options)
    return _splits(sides, source, opened, workers, corpus.passed_over)


def _splits(
    sides: tuple[Side, Side | None],
    source: str,
    tokenizer: Tokenizer,
    workers: int,
    passed_over: tuple[Path, ...] = (),
) -> tuple[Split, Split | None]:
    """Returns both sides as sequences of samples. Raises UserError if one has no sample."""
    for name, side in zip(("train", "holdout"), sides, strict=True):
        if side is not None and side.n_samples == 0:
            raise UserError(f"data.source = {source!r} has {side.n_tokens} {name} tokens and {side.shortage}")

    def split(side: Side) -> Split:
        samples = MixedSamples(side) if isinstance(side, Mixture) else Samples(side)
        return Split(samples, tokenizer, workers, passed_over)

    training, held_out = sides
    return split(training), None if held_out is None else split(held_out)


def settled(data: Mapping) -> dict:
    """Returns the keys of `config.data` that the corpus determines: its format, and what follows from it.

    Raises UserError if there is no file, or no chat template for conversations.
    """
    if found := sources(data["source"]):
        return {"format": of_text(data["format"], data["source"]), **settled_by(found)}
    corpus = open_corpus(data["source"], data["text_key"], data["format"])
    if corpus.format != "conversations":
        return {"format": corpus.format}
    template = template_name(data["chat_template"], data["tokenizer"])
    return {"format": corpus.format, "chat_template": template, "mask_documents": True, "fim_rate": 0.0}


def of_text(format: str, source: str) -> str:
    """Returns the format of prepared text. Raises UserError if conversations are expected."""
    if format == "conversations":
        raise UserError(f"data.source = {source!r} is prepared text, not conversations. Give files of conversations.")
    return "text"
