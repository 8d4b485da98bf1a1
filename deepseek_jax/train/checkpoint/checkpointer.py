"""Checkpoints: Orbax writes the arrays, a manifest verifies them; a corrupted step falls back to the previous one.

    with Checkpointer(workdir / "checkpoints", keep=3) as checkpoints:
        if checkpoints.latest() is not None:
            step, state, meta = checkpoints.restore(abstract_state)   # ShapeDtypeStructs with shardings, on any mesh
        checkpoints.save(step, state, {"config": config})             # returns at once; state may be donated

Orbax alone restores wrong numbers after one flipped bit, silently casts dtypes, reports a full disk late or never,
and ignores a save to a step that exists. Here every file is hashed and COMMIT comes last (`manifest.py`), so that a
step either is bit for bit what was saved or is refused by name. The price: a save is done only after a second pass
over its bytes (in the background), and a restore reads them twice.

A failed save never stops the training: the reason goes to `warn`, once, at the next call.
"""

import atexit
import contextlib
import logging
import os
import sys
import threading
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from flax.traverse_util import unflatten_dict
from jax.experimental import multihost_utils

from deepseek_jax.errors import UserError
from deepseek_jax.paths import check_local
from deepseek_jax.train.checkpoint import manifest as files
from deepseek_jax.train.checkpoint import tree
from deepseek_jax.train.checkpoint.manifest import CheckpointDamaged

SAVE_TIMEOUT_S = 3600
_SKIP, _WRITE, _REFUSE, _FAIL = range(4)  # process 0's verdict on a save, broadcast to all


def print_warning(message: str) -> None:
    """Prints a message about checkpoints to stderr; a disk so full that this cannot be done stops nothing."""
    with contextlib.suppress(OSError, ValueError):
        print(f"checkpoint: {message}", file=sys.stderr, flush=True)


class Checkpointer:
    """The checkpoints of one directory, the newest `keep` of them; one writer, any number of readers.

    All processes of a run construct it and call its methods together; process 0 alone hashes, commits and deletes, on a
    file system that all of them share. `warn` receives each message once, in the thread that calls.
    """

    def __init__(
        self,
        directory: str | os.PathLike,
        keep: int = 3,
        *,
        read_only: bool = False,
        warn: Callable[[str], None] = print_warning,
    ):
        check_local(directory)
        if keep < 1:
            raise UserError(f"checkpoint.keep is {keep}: expected 1 or more.")
        self.directory = Path(os.path.abspath(directory))
        self.keep = keep
        self._warn = warn
        self._messages: deque[str] = deque()
        self._told: set[str] = set()
        self._thread: threading.Thread | None = None
        self._last_save_good = True
        self._restored: int | None = None  # the step this run resumed from
        self._own: set[int] = set()  # committed steps known to lie on this run's path
        self._lock: files.WriterLock | None = None
        self._orbax: Any = None
        _quieten_orbax()
        if read_only:
            return
        failure = None
        if jax.process_index() == 0:
            try:
                self.directory.mkdir(parents=True, exist_ok=True)
                self._lock = files.WriterLock(self.directory)
            except UserError as error:
                failure = error
            except OSError as error:
                failure = UserError(f"cannot write checkpoints to {self.directory}: {error.strerror}.")
        if not _agree(failure is None):
            raise failure or UserError(f"process 0 cannot write to {self.directory}: see what it says.")
        self._orbax = ocp.AsyncCheckpointer(ocp.PyTreeCheckpointHandler(), timeout_secs=SAVE_TIMEOUT_S)
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
        if self._orbax is None:
            raise UserError(f"{self.directory} was opened to read only (or is closed): nothing can be saved there.")
        arrays = tree.flatten(state)
        texts = files.of_meta(meta or {})
        step = int(step)
        if not 0 <= step < 2**31:
            raise UserError(f"checkpoint step {step}: expected 0 or more (and less than 2**31).")
        self.wait()
        if self._admit(step) != _WRITE:
            return
        path = files.step_dir(self.directory, step)
        failure = None
        try:
            self._orbax.save(path / files.ARRAYS, args=ocp.args.PyTreeSave(unflatten_dict(arrays, sep="/")))
        except Exception as error:
            failure = error
        shapes = {name: {"shape": list(array.shape), "dtype": str(array.dtype)} for name, array in arrays.items()}
        # Also after a failure, so that all processes meet in wait().
        arguments = (step, path, shapes, texts, failure)
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
            orbax, self._orbax = self._orbax, None
            if orbax is not None:
                orbax.close()
            if self._lock is not None:
                self._lock.release()
                self._lock = None

    # ---- reading

    def steps(self) -> list[int]:
        """Returns the committed steps, ascending, unverified."""
        return files.committed_steps(self.directory)

    def latest(self) -> int | None:
        """Returns the newest committed step that process 0 sees, unverified, or None; reads names only."""
        newest = _agree(max(self.steps(), default=-1))
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
        step = self._choose(step, only=None)
        path = files.step_dir(self.directory, step)
        manifest, meta = files.read_manifest(path, step), files.read_meta(path)
        entries = {name.split("/")[0] for name in manifest["arrays"]}
        abstract = {key: sub for key, sub in abstract.items() if key not in optional or key in entries}
        entries -= {*optional} - {*abstract}
        entries = entries if keys is None else {*keys}
        saved = {name: a for name, a in manifest["arrays"].items() if name.split("/")[0] in entries}
        expected = tree.flatten(abstract, leaf_types=object)
        if dtypes_as_saved:
            expected |= {name: x.update(dtype=saved[name]["dtype"]) for name, x in expected.items() if name in saved}
        tree.compare(f"step {step} of {self.directory}", saved, expected)
        arrays = tree.read_arrays(path / files.ARRAYS, tree.with_shardings(expected)) if expected else {}
        if keys is None:
            self._restored = step
            self._own = {own for own in self._own if own < step} | {step}
        return step, tree.refill(abstract, (arrays[name] for name in expected)), meta

    def read_meta(self, step: int | None = None) -> tuple[int, dict]:
        """Returns (step, meta) of the newest step (or of `step`) whose metadata is intact; opens no array file."""
        step = self._choose(step, only=(files.META, files.CONFIG))
        return step, files.read_meta(files.step_dir(self.directory, step))

    def shapes(self, step: int | None = None) -> tuple[int, dict[str, jax.ShapeDtypeStruct]]:
        """Returns (step, {"params/…": shape and dtype}) from the manifest alone."""
        step = self._choose(step, only=())
        arrays = files.read_manifest(files.step_dir(self.directory, step), step)["arrays"]
        return step, {name: jax.ShapeDtypeStruct(a["shape"], jnp.dtype(a["dtype"])) for name, a in arrays.items()}

    # ---- how

    def _admit(self, step: int) -> int:
        """Decides whether `step` may be written, and clears the ground for it; the same answer on all processes."""
        verdict, reason = _WRITE, ""
        if jax.process_index() == 0:
            committed = self.steps()
            newer = [other for other in committed if other > step and not self._is_abandoned(other)]
            if newer:
                verdict, reason = _REFUSE, f"{self.directory} already holds steps {newer}, newer than {step}"
            elif step in committed and not self._is_abandoned(step) and self._is_intact(step):
                verdict = _SKIP
                self._messages.append(f"step {step} is saved already; nothing was written.")
            else:
                self._clean(also=step)
                try:
                    files.step_dir(self.directory, step).mkdir(parents=True)
                except OSError as error:
                    verdict = _FAIL
                    self._give_up(step, error)
        verdict = _agree(verdict)
        if verdict == _REFUSE:
            raise UserError(f"{reason or 'newer steps exist'}. Restore before you save, or choose another directory.")
        self._last_save_good = verdict == _SKIP
        self.report()
        return verdict

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

    def _delete(self, step: int) -> None:
        try:
            files.remove(files.step_dir(self.directory, step))
        except OSError as error:
            self._say_once(f"step {step} could not be deleted: {error}.")

    def _finish(self, step: int, path: Path, shapes: dict, texts: dict[str, bytes], failure: Exception | None) -> None:
        """Runs in the background: waits for Orbax on all hosts, hashes, commits, then deletes old steps."""
        try:
            if failure is not None:
                raise failure
            self._orbax.wait_until_finished()
            if jax.process_index() == 0:
                for name, text in texts.items():
                    files.write_atomically(path / name, text)
                files.commit(path, step, shapes)
        except BaseException as error:  # nobody would see it in this thread: it is reported at the next call
            self._give_up(step, error)
            return
        self._own.add(step)
        self._last_save_good = True
        try:
            if jax.process_index() == 0:
                self._prune()
        except Exception as error:
            self._say_once(f"old steps could not be deleted: {error}.")

    def _give_up(self, step: int, error: BaseException) -> None:
        """Notes why a save failed and gives its space back."""
        if jax.process_index() == 0:
            self._delete(step)
        good = max(self.steps(), default=None)
        left = "there is no older checkpoint" if good is None else f"the newest good one is step {good}"
        self._messages.append(f"step {step} was NOT saved: {_first_line(error)}. Training continues; {left}.")

    def _prune(self) -> None:
        """Deletes abandoned steps and all but the newest `keep`, now that a new one is committed."""
        abandoned = [other for other in self.steps() if self._is_abandoned(other)]
        for other in abandoned:
            self._say_once(f"step {other} is deleted: the run went back to step {self._restored} and passed by anew.")
        path = [other for other in self.steps() if other not in abandoned]
        for other in abandoned + path[: -self.keep]:
            self._delete(other)

    def _choose(self, step: int | None, only: tuple[str, ...] | None) -> int:
        """Returns the step to read, verified by process 0 (`only` these files), the same on all processes."""
        found, reason = -1, UserError(f"process 0 found no intact checkpoint in {self.directory}.")
        if jax.process_index() == 0:
            try:
                found = self._search(step, only)
            except UserError as error:
                reason = error
        found = _agree(found)
        if found < 0:
            raise reason
        return found

    def _search(self, step: int | None, only: tuple[str, ...] | None) -> int:
        committed = self.steps()
        if not committed:
            litter = [f" (step {unfinished} is unfinished)" for unfinished in files.step_dirs(self.directory)]
            raise UserError(f"no checkpoint in {self.directory}{''.join(litter[-1:])}: expected one saved by a run.")
        if step is not None and step not in committed:
            raise UserError(f"no checkpoint of step {step} in {self.directory}: it holds steps {committed}.")
        for unfinished in set(files.step_dirs(self.directory)) - set(committed):
            if unfinished > committed[-1] and only is None and self._lock is not None:
                self._say_once(f"step {unfinished} was never finished (it has no {files.COMMIT}); it is ignored.")
        refused = []
        for candidate in [step] if step is not None else reversed(committed):
            try:
                files.verify(files.step_dir(self.directory, candidate), candidate, only)
            except CheckpointDamaged as damage:
                refused.append(f"step {candidate}: {damage}")
                continue
            for text in refused:
                self._say_once(f"damaged, not used: {text}. Using step {candidate} instead.")
            self.report()
            return candidate
        raise UserError(
            f"no intact checkpoint in {self.directory}: {'; '.join(refused)}. Bring the files back"
            + (", or choose another step." if step is not None else ", or move the directory away to start over.")
        )

    def _say_once(self, message: str) -> None:
        if message not in self._told:
            self._told.add(message)
            self._messages.append(message)


def _agree(value: int) -> int:
    """Returns process 0's value on every process; also a barrier."""
    if jax.process_count() == 1:
        return int(value)
    return int(multihost_utils.broadcast_one_to_all(np.int32(value)))


def _first_line(error: BaseException) -> str:
    text = str(error)
    if getattr(error, "errno", None) == 28 or "ENOSPC" in text or "No space left" in text:
        return "no space left on the disk"
    if "cannot schedule new futures after" in text:  # Python is shutting down
        return "the program ended without closing its Checkpointer"
    return f"{type(error).__name__}: {text.splitlines()[0] if text else ''}"[:300]


def _quieten_orbax() -> None:
    """Drops what Orbax alone would print (each failure is reported here, once); everybody else's lines go their way."""
    logging.getLogger("absl").addFilter(_not_from_orbax)  # a filter that is there already is not added twice
    logging.getLogger("asyncio").addFilter(_not_from_orbax)
    if getattr(sys.unraisablehook, "__name__", "") != "_pass_unraisable":
        following = sys.unraisablehook

        def _pass_unraisable(report: Any) -> None:
            # After a failed write TensorStore calls back into the event loop that Orbax has closed by then.
            if not (report.object is None and str(report.exc_value) == "Event loop is closed"):
                following(report)

        sys.unraisablehook = _pass_unraisable


def _not_from_orbax(record: logging.LogRecord) -> bool:
    # asyncio's record is a write that failed beside the one reported; it bears the name of Orbax's directory.
    return f"{os.sep}orbax{os.sep}" not in record.pathname and ".orbax-checkpoint-tmp" not in record.getMessage()
