"""Checkpoints: each process writes and hashes its own part of the state; a damaged step falls back to the one before.

    with Checkpointer(workdir / "checkpoints", keep=3) as checkpoints:           # or storage.place("gs://bucket/a")
        if checkpoints.latest() is not None:
            step, state, meta = checkpoints.restore(abstract_state)   # ShapeDtypeStructs with shardings, on any mesh
        checkpoints.save(step, state, {"config": config})             # returns at once; state may be donated

Every byte is hashed from memory as it is written, and COMMIT comes last (`manifest.py`, `shards.py`), so that a step
either is bit for bit what was saved or is refused by name. A process reads and compares only what its own devices are
to hold; whoever finds damage says so, and all fall back together.

A failed save never stops the training: the reason goes to `warn`, once, at the next call. If it fails on one process,
all know (`votes.py`). Steps in format 1, written by older versions or by conversions, are read by Orbax after process 0
has compared their files.
"""

import atexit
import contextlib
import itertools
import json
import logging
import os
import secrets
import sys
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from deepseek_jax.errors import PassingError, UserError
from deepseek_jax.parallel.meeting import meet
from deepseek_jax.parallel.mesh import largest
from deepseek_jax.paths import check_local
from deepseek_jax.storage import Place, Remote, StorageError, answered, open_store, place, refusal
from deepseek_jax.train.checkpoint import grid, shards, tree
from deepseek_jax.train.checkpoint import manifest as files
from deepseek_jax.train.checkpoint.grid import Piece
from deepseek_jax.train.checkpoint.manifest import CheckpointDamaged
from deepseek_jax.train.checkpoint.tier import Tier
from deepseek_jax.train.checkpoint.votes import Ballot, reason
from deepseek_jax.train.checkpoint.writer import Lease, WriterLock, sole_writer

SAVE_TIMEOUT_S = 3600
_SKIP, _WRITE, _REFUSE, _FAIL = range(4)  # process 0's verdict on a save, broadcast to all
_GOOD, _DAMAGED, _UNREACHABLE, _FORBIDDEN = range(4)  # what became of reading a step
_COMMITTERS = 32  # lists of what processes have written that are read at a time
_openings = itertools.count()  # of Checkpointers that write; the same on all processes


def print_warning(message: str) -> None:
    """Prints a message about checkpoints to stderr; a disk so full that this cannot be done stops nothing."""
    with contextlib.suppress(OSError, ValueError):
        print(f"checkpoint: {message}", file=sys.stderr, flush=True)


class Checkpointer:
    """The checkpoints of one directory or place in a bucket, the newest `keep`; one writer, any number of readers.

    All processes of a run construct it and call its methods together; they share the file system or reach the bucket.
    A save fails unless all of them have written their parts within `deadline_s`. `warn` receives each message once, in
    the thread that calls; `committed` is called after each commit, in a thread of its own. `local`: a folder of the
    host's own disk for copies of what it writes, which a restore reads in place of the store (`Tier`).
    """

    def __init__(
        self,
        directory: str | os.PathLike | Remote,
        keep: int = 3,
        *,
        read_only: bool = False,
        warn: Callable[[str], None] = print_warning,
        deadline_s: float = SAVE_TIMEOUT_S,
        committed: Callable[[], None] = lambda: None,
        local: Path | None = None,
    ):
        self._messages: deque[str] = deque()
        where = place(directory)
        if isinstance(where, Path):
            check_local(where)
        if keep < 1:
            raise UserError(f"checkpoint.keep is {keep}: expected 1 or more.")
        self.directory: Place = Path(os.path.abspath(where)) if isinstance(where, Path) else where
        self.keep = keep
        self._store = open_store(self.directory)
        self._objects = Tier(self._store, local, self._messages.append) if local else self._store
        self._ballot = Ballot(deadline_s)
        self._warn, self._on_commit = warn, committed
        self._told: set[str] = set()
        self._given_up: set[int] = set()  # steps of failed saves, of which something may be left
        self._thread: threading.Thread | None = None
        self._last_save_good = True
        self._restored: int | None = None  # the step this run resumed from
        self._own: set[int] = set()  # committed steps known to lie on this run's path
        self._lock: WriterLock | Lease | None = None
        self._plan: tuple[dict, list[Piece]] = {}, []  # layout of the last state, and its pieces
        self._is_writable = not read_only
        if read_only:
            return
        failure = None
        if jax.process_index() == 0:
            try:
                if isinstance(self.directory, Path):
                    self.directory.mkdir(parents=True, exist_ok=True)
                self._lock = sole_writer(self._store)
            except UserError as error:
                failure = error
            except OSError as error:
                kind = type(refusal(error)) if isinstance(error, StorageError) else UserError
                failure = kind(f"cannot write checkpoints to {self.directory}: {error.strerror}.".replace("..", "."))
        # No collective may begin before all are here: process 0 watches the lease of a dead run for a while.
        if waited := self._ballot.decide(f"open/{next(_openings)}", "", "", lambda contents: None):
            raise PassingError(f"the processes did not all come to open {self.directory}: {waited}.")
        if code := _agree(failure.exit_code if failure else 0):
            raise failure or _of_code(code, f"process 0 cannot write to {self.directory}: see what it says.")
        atexit.register(self.report)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    # ---- writing

    def save(self, step: int, state: dict, meta: dict | None = None) -> None:
        """Starts to save a nested dict of jax arrays; waits only for the save before it and the copy to the host.

        `meta` is anything JSON holds; `meta["config"]` becomes a readable `config.json`. Saving a committed step
        again does nothing and says so. After a restore of an earlier step, later steps of the abandoned path are
        replaced, and deleted once a new one is committed. Raises UserError for a state or a step that cannot be
        saved; what goes wrong on the disk is reported through `warn` instead, and leaves the older steps as they were.
        """
        if not self._is_writable:
            raise UserError(f"{self.directory} was opened to read only (or is closed): nothing can be saved there.")
        arrays = tree.flatten(state)
        texts = files.of_meta(meta or {})
        step = int(step)
        if not 0 <= step < 2**31:
            raise UserError(f"checkpoint step {step}: expected 0 or more (and less than 2**31).")
        self.wait()
        token = _agree(secrets.randbits(31))
        if self._admit(step, token) != _WRITE:
            return
        failure, parts = "", []
        try:
            parts = tree.on_host(arrays, self._mine(arrays))
        except Exception as error:  # no memory for the copy; all processes meet in the vote
            failure = reason(error)
        shapes = {name: {"shape": list(array.shape), "dtype": str(array.dtype)} for name, array in arrays.items()}
        arguments = (step, token, parts, shapes, texts, failure)
        self._thread = threading.Thread(target=self._finish, args=arguments, name="checkpoint")
        self._thread.start()

    def report(self) -> None:
        """Hands waiting messages (a save that failed, a step not deleted) to `warn`; never blocks."""
        while self._messages:
            self._warn(self._messages.popleft())

    def wait(self) -> bool:
        """Waits until the last save is committed or given up; returns whether it (or a no-op) left its step good."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
            self._last_save_good = bool(_agree(self._last_save_good))
        self.report()
        return self._last_save_good

    def close(self) -> None:
        """Waits, reports what is left to report and releases the directory; may be called twice.

        Needed (or `with`): Python refuses new work to a save that is still running when the program ends.
        """
        try:
            self.wait()
        finally:
            atexit.unregister(self.report)
            self._is_writable = False
            if self._lock is not None:
                self._lock.release()
                self._lock = None

    # ---- reading

    def steps(self) -> list[int]:
        """Returns the committed steps, ascending, unverified."""
        return files.committed_steps(self.directory)

    def latest(self) -> int | None:
        """Returns the newest committed step that process 0 sees, unverified, or None; reads names only."""
        newest = self._agreed(lambda: max(self.steps(), default=-1) + 1) - 1
        return None if newest < 0 else newest

    def restore(
        self,
        abstract: dict,
        step: int | None = None,
        keys: tuple[str, ...] | None = None,
        *,
        optional: tuple[str, ...] = (),
        dtypes_as_saved: bool = False,
    ) -> tuple[int, dict, dict]:
        """Returns (step, state, meta) of the newest intact step, or of `step` alone.

        `abstract` is the tree of `jax.ShapeDtypeStruct` with the expected shardings (all of them, or none for the
        default device). Names, shapes and dtypes must equal the checkpoint's: nothing is cast or left out. With
        `keys` only these top-level entries are read, and `abstract` holds just them; those that are `optional` are read
        where both the checkpoint and `abstract` have them. With `dtypes_as_saved` the dtypes of `abstract` do not
        matter (published weights are bfloat16 for the most part). Each array comes back committed to its sharding and
        may be donated. Raises UserError that names the leaf, or the damaged files.
        """
        self.wait()
        refused: dict[int, str] = {}
        while True:
            candidate = self._agreed(lambda: self._candidate(step, refused))
            outcome, failure, damage = None, _GOOD, ""
            try:
                outcome = self._read(candidate, abstract, keys, optional, dtypes_as_saved)
            except CheckpointDamaged as error:
                failure, damage = _DAMAGED, str(error)
            except StorageError as error:  # which says nothing of the step: no reason to fall back
                failure = _UNREACHABLE if isinstance(refusal(error), PassingError) else _FORBIDDEN
                damage = str(error)
            worst = largest(failure)[0]
            if worst >= _UNREACHABLE:
                why = damage or f"another process could not read step {candidate} of {self.directory}."
                raise (PassingError if worst == _UNREACHABLE else UserError)(why)
            if worst == _GOOD:
                break
            refused[candidate] = damage or "another process has found damage in its part"
        for step_refused, why in refused.items():
            self._say_once(f"damaged, not used: step {step_refused}: {why}. Using step {candidate} instead.")
        self.report()
        assert outcome is not None
        if keys is None:
            self._restored = candidate
            self._own = {own for own in self._own if own < candidate} | {candidate}
        return candidate, *outcome

    def read_meta(self, step: int | None = None) -> tuple[int, dict]:
        """Returns (step, meta) of the newest step (or of `step`) whose metadata is intact; opens no array file."""
        step = self._agreed(lambda: self._search(step, only=(files.META, files.CONFIG)))
        with answered():
            return step, files.read_meta(files.step_dir(self.directory, step))

    def shapes(self, step: int | None = None) -> tuple[int, dict[str, jax.ShapeDtypeStruct]]:
        """Returns (step, {"params/…": shape and dtype}) from the manifest alone."""
        step = self._agreed(lambda: self._search(step, only=()))
        with answered():
            arrays = files.read_manifest(files.step_dir(self.directory, step), step)["arrays"]
        return step, {name: jax.ShapeDtypeStruct(a["shape"], jnp.dtype(a["dtype"])) for name, a in arrays.items()}

    # ---- how

    def _mine(self, arrays: dict[str, jax.Array]) -> list[Piece]:
        """The pieces of a state that this process writes; they are planned once for all states of a layout."""
        layout = {name: (array.shape, array.dtype, array.sharding) for name, array in arrays.items()}
        if self._plan[0] != layout:
            sizes = {name: array.dtype.itemsize for name, array in arrays.items()}
            pieces = grid.assigned(tree.held(arrays), sizes)
            self._plan = layout, [piece for piece in pieces if piece.process == jax.process_index()]
        return self._plan[1]

    def _admit(self, step: int, token: int) -> int:
        """Decides whether `step` may be written, and clears the ground for it; the same answer on all processes."""
        verdict, why, has_begun = _WRITE, "", False
        if jax.process_index() == 0:
            try:
                verdict, why = self._judged(step)
                if verdict == _WRITE:
                    has_begun = True
                    self._clean(also=step)
                    files.begin(self.directory, step, token, f"process {os.getpid()}")
            except OSError as error:
                verdict = _FAIL
                self._give_up(step, reason(error), has_begun)
        verdict = _agree(verdict)
        if verdict == _REFUSE:
            raise UserError(f"{why or 'newer steps exist'}. Restore before you save, or choose another directory.")
        self._last_save_good = verdict == _SKIP
        self.report()
        return verdict

    def _judged(self, step: int) -> tuple[int, str]:
        """What is to become of a request to save a step, and why it is refused."""
        if self._lock is not None and not self._lock.is_held():
            raise PermissionError(13, f"another run has taken over {self.directory}, or it has long not answered")
        committed = self.steps()
        newer = [other for other in committed if other > step and not self._is_abandoned(other)]
        if newer:
            return _REFUSE, f"{self.directory} already holds steps {newer}, newer than {step}"
        if step in committed and not self._is_abandoned(step) and self._is_intact(step):
            self._messages.append(f"step {step} is saved already; nothing was written.")
            return _SKIP, ""
        return _WRITE, ""

    def _is_abandoned(self, step: int) -> bool:
        return self._restored is not None and step > self._restored and step not in self._own

    def _is_intact(self, step: int) -> bool:
        try:
            files.verify(files.step_dir(self.directory, step), step)
        except CheckpointDamaged as damage:
            self._say_once(f"step {step} is damaged: {damage}. It is written anew.")
            return False
        return True

    def _clean(self, also: int) -> None:
        """Deletes what unfinished saves left behind, and whatever stands in the place of step `also`."""
        committed = set(self.steps()) - {also}
        for step in files.step_dirs(self.directory):
            if step not in committed:
                self._delete(step)

    def _delete(self, step: int, keep_begun: bool = False) -> None:
        try:
            files.remove(files.step_dir(self.directory, step), keep_begun)
        except OSError as error:
            self._say_once(f"step {step} could not be deleted: {error}.")

    def _finish(self, step: int, token: int, parts: list, shapes: dict, texts: dict[str, bytes], failure: str) -> None:
        """Runs in the background: writes this process's part, votes; process 0 commits, then deletes old steps."""
        folder, content = shards.folder_of(files.step_dir(self.directory, step).name, token), ""
        try:
            if not failure:
                listed = shards.part_of(shards.write(self._objects, folder, self._ballot.index, parts))
                self._store.write(shards.part_name(folder, self._ballot.index), listed)
                content = shards.sha256(listed)
        except BaseException as error:  # nobody would see it in this thread: it is reported at the next call
            failure = reason(error)
        verdict = self._ballot.decide(
            f"{step}/{token}", failure, content, lambda hashes: self._commit(step, folder, shapes, texts, hashes)
        )
        if verdict:
            self._give_up(step, verdict)
            return
        self._own.add(step)
        self._last_save_good = True
        try:
            if isinstance(self._objects, Tier):
                self._objects.prune(step)
            if jax.process_index() == 0:
                self._prune()
        except Exception as error:
            self._say_once(f"old steps could not be deleted: {error}.")
        with contextlib.suppress(Exception):  # who keeps other files says for himself what went wrong
            self._on_commit()

    def _commit(self, step: int, folder: str, shapes: dict, texts: dict[str, bytes], hashes: list[str]) -> None:
        """Process 0 makes a checkpoint of what all have written, each list of which has the hash it was voted for."""

        def of(process: int) -> list[shards.Shard]:
            name = shards.part_name(folder, process)
            listed = self._store.read(name)
            if shards.sha256(listed) != hashes[process]:
                raise CheckpointDamaged(f"{name} is not what was written")
            return shards.parsed(json.loads(listed), shapes)

        with ThreadPoolExecutor(_COMMITTERS, "commit") as pool:
            found = [shard for several in pool.map(of, range(len(hashes))) for shard in several]
        if self._lock is not None and not self._lock.is_held():
            raise PermissionError(13, f"another run has taken over {self.directory}, or it has long not answered")
        files.commit_shards(self.directory, step, shapes, texts, found)

    def _give_up(self, step: int, why: str, has_begun: bool = True) -> None:
        """Notes why a save failed and gives its space back; what other processes still write, the next save deletes."""
        good = None
        self._given_up.add(step)
        with contextlib.suppress(OSError):
            if has_begun and jax.process_index() == 0 and (self._lock is None or self._lock.is_held()):
                self._delete(step, keep_begun=self._ballot.count > 1)
            good = max(self.steps(), default=None)
        left = "there is no older checkpoint" if good is None else f"the newest good one is step {good}"
        self._messages.append(f"step {step} was NOT saved: {why}. Training continues; {left}.")

    def _prune(self) -> None:
        """Deletes abandoned steps and all but the newest `keep`, now that a new one is committed."""
        abandoned = [other for other in self.steps() if self._is_abandoned(other)]
        for other in abandoned:
            self._say_once(f"step {other} is deleted: the run went back to step {self._restored} and passed by anew.")
        path = [other for other in self.steps() if other not in abandoned]
        for other in abandoned + path[: -self.keep]:
            self._delete(other)

    def _agreed(self, find: Callable[[], int]) -> int:
        """Returns the step that process 0 finds, on all processes; raises what it raises, in its own words there."""
        found: int = -1
        why: UserError | None = None
        if jax.process_index() == 0:
            try:
                with answered():
                    found = find()
            except UserError as error:
                found, why = -error.exit_code, error
        found = _agree(found)
        if found < 0:
            raise why or _of_code(-found, f"process 0 found no intact checkpoint in {self.directory}.")
        return found

    def _committed(self, step: int | None) -> list[int]:
        """The committed steps, ascending, `step` alone if it is given. Raises UserError if there are none."""
        committed = self.steps()
        if not committed:
            litter = [f" (step {unfinished} is unfinished)" for unfinished in files.step_dirs(self.directory)]
            raise UserError(f"no checkpoint in {self.directory}{''.join(litter[-1:])}: expected one saved by a run.")
        if step is not None and step not in committed:
            raise UserError(f"no checkpoint of step {step} in {self.directory}: it holds steps {committed}.")
        return committed if step is None else [step]

    def _no_intact(self, step: int | None, refused: dict[int, str]) -> UserError:
        told = "; ".join(f"step {candidate}: {why}" for candidate, why in refused.items())
        return UserError(
            f"no intact checkpoint in {self.directory}: {told}. Bring the files back"
            + (", or choose another step." if step is not None else ", or move the directory away to start over.")
        )

    def _candidate(self, step: int | None, refused: dict[int, str]) -> int:
        """The newest step that was not refused, nor will be for what process 0 can see of it."""
        committed = self._committed(step)
        for unfinished in set(files.step_dirs(self.directory)) - set(self.steps()):
            is_news = unfinished > committed[-1] and unfinished not in self._given_up
            if is_news and step is None and self._lock is not None:
                self._say_once(f"step {unfinished} was never finished (it has no {files.COMMIT}); it is ignored.")
        for candidate in reversed(committed):
            path = files.step_dir(self.directory, candidate)
            try:
                if candidate not in refused:
                    is_first = files.read_manifest(path, candidate)["format"] == 1  # Orbax compares nothing
                    files.verify(path, candidate, None if is_first else (files.META, files.CONFIG))
                    return candidate
            except CheckpointDamaged as damage:
                refused[candidate] = str(damage)
        raise self._no_intact(step, refused)

    def _search(self, step: int | None, only: tuple[str, ...]) -> int:
        """The newest step, or `step`, of which the files `only` are intact."""
        refused: dict[int, str] = {}
        for candidate in reversed(self._committed(step)):
            try:
                files.verify(files.step_dir(self.directory, candidate), candidate, only)
            except CheckpointDamaged as damage:
                refused[candidate] = str(damage)
                continue
            for other, why in refused.items():
                self._say_once(f"damaged, not used: step {other}: {why}. Using step {candidate} instead.")
            self.report()
            return candidate
        raise self._no_intact(step, refused)

    def _read(self, step: int, abstract: dict, keys: Any, optional: tuple, dtypes_as_saved: bool) -> tuple[dict, dict]:
        """The state and the metadata of a step; raises CheckpointDamaged."""
        path = files.step_dir(self.directory, step)
        manifest = files.verify(path, step, (files.META, files.CONFIG))
        meta = files.read_meta(path)
        entries = {name.split("/")[0] for name in manifest["arrays"]}
        abstract = {key: sub for key, sub in abstract.items() if key not in optional or key in entries}
        entries -= {*optional} - {*abstract}
        entries = entries if keys is None else {*keys}
        saved = {name: a for name, a in manifest["arrays"].items() if name.split("/")[0] in entries}
        expected = tree.flatten(abstract, leaf_types=object)
        if dtypes_as_saved:
            expected |= {name: x.update(dtype=saved[name]["dtype"]) for name, x in expected.items() if name in saved}
        tree.compare(f"step {step} of {self.directory}", saved, expected)
        leaves = tree.with_shardings(expected) if expected else {}
        if manifest["format"] == 1:
            _quieten_orbax()
            arrays = tree.read_arrays(path / files.ARRAYS, leaves) if expected else {}
        else:
            arrays = tree.read_shards(self._objects, manifest, leaves)
        return tree.refill(abstract, (arrays[name] for name in expected)), meta

    def _say_once(self, message: str) -> None:
        if message not in self._told:
            self._told.add(message)
            self._messages.append(message)


def _agree(value: int) -> int:
    """Returns process 0's value on every process; also a barrier."""
    if jax.process_count() == 1:
        return int(value)
    meet("agree")
    return int(multihost_utils.broadcast_one_to_all(np.int32(value)))


def _of_code(code: int, why: str) -> UserError:
    """The error of this process where process 0 has met one with this exit code."""
    return (PassingError if code == PassingError.exit_code else UserError)(why)


def _quieten_orbax() -> None:
    """Drops what Orbax alone would print; everybody else's lines go their way."""
    logging.getLogger("absl").addFilter(_not_from_orbax)  # a filter that is there already is not added twice


def _not_from_orbax(record: logging.LogRecord) -> bool:
    return f"{os.sep}orbax{os.sep}" not in record.pathname
