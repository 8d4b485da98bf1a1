"""Shards made by several processes of this machine: each takes the next one, and none outlives the one that started it.

A process tokenises with one thread, so that as many processes as cores use all cores. A single one does it in this
process, and the tokenizer's own threads use the cores.
"""

import contextlib
import multiprocessing
import os
import signal
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from deepseek_jax.data import reader_processes
from deepseek_jax.data.prepared.plan import Plan
from deepseek_jax.data.prepared.shards import clear_partial, make_shard
from deepseek_jax.data.tokenizer import Tokenizer, open_tokenizer
from deepseek_jax.data.watch import Counter
from deepseek_jax.errors import UserError

POLL_S = 0.5
_here: dict[str, Any] = {}  # of a worker process: its plan, tokenizer and counter


def n_cores() -> int:
    """Returns the cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def make_shards(plan: Plan, numbers: Sequence[int], tokenizer: Tokenizer, n_workers: int, counter: Counter) -> float:
    """Makes these shards; returns the seconds of CPU time that it took.

    Raises UserError for what is wrong with the corpus, or if a worker process dies.
    """
    clear_partial(plan)
    if min(n_workers, len(numbers)) <= 1:
        begin = time.process_time()
        for number in numbers:
            make_shard(plan, number, tokenizer, counter)
        return time.process_time() - begin
    context = multiprocessing.get_context("spawn")
    done = context.Value("q", 0)
    pool = ProcessPoolExecutor(
        min(n_workers, len(numbers)), context, _begin, (plan, done, reader_processes.init_of_readers())
    )
    with _ended(pool), _one_thread_each():
        return _collect([pool.submit(_make, number) for number in numbers], done, counter)


def _collect(waiting: list[Future], done: Any, counter: Counter) -> float:
    """Waits for all shards and counts their bytes; returns the CPU time of the workers."""
    left, seconds, counted = set(waiting), 0.0, 0
    while left:
        finished, left = wait(left, POLL_S, FIRST_COMPLETED)
        if (now := done.value) > counted:
            counter.advance(now - counted)
            counted = now
        for future in finished:
            try:
                seconds += future.result()
            except BrokenProcessPool as error:
                raise UserError(
                    "a worker process was killed; it may need more memory than there is. Start again to continue, with "
                    "fewer --workers."
                ) from error
    return seconds


@contextlib.contextmanager
def _ended(pool: ProcessPoolExecutor) -> Iterator[None]:
    """Kills the workers at the end: what they have finished is complete, and the rest is made again."""
    try:
        yield
    finally:
        processes = list((pool._processes or {}).values())
        pool.shutdown(wait=False, cancel_futures=True)
        for process in processes:
            process.kill()


@contextlib.contextmanager
def _one_thread_each() -> Iterator[None]:
    """Gives the processes that start meanwhile a tokenizer of one thread."""
    before = {name: os.environ.get(name) for name in ("TOKENIZERS_PARALLELISM", "RAYON_NUM_THREADS")}
    os.environ.update(TOKENIZERS_PARALLELISM="false", RAYON_NUM_THREADS="1")
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value


class _Shared:
    """Counts in a number that the process that started this one reads."""

    def __init__(self, done: Any):
        self._done = done

    def advance(self, n_bytes: int) -> None:
        with self._done.get_lock():
            self._done.value += n_bytes


def _begin(plan: Plan, done: Any, watch_parent: Any) -> None:
    """First call in a worker. Ctrl-C reaches all processes of a terminal, and is the parent's to answer."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    watch_parent(0, 1)
    _here.update(plan=plan, tokenizer=open_tokenizer(plan.tokenizer), counter=_Shared(done))


def _make(number: int) -> float:
    """Makes a shard in a worker; returns its CPU time."""
    begin = time.process_time()
    make_shard(_here["plan"], number, _here["tokenizer"], _here["counter"])
    return time.process_time() - begin
