"""At least 200 faults at random places: each ends in the right numbers or a message, never in wrong numbers or silence.

Files are flipped, cut, lengthened, overwritten and removed; signals come in every order; streams fail in every way.
The seed is part of each test's name. `DEEPSEEK_JAX_FAULTS=10 pytest tests/faults` injects ten times as many.
"""

import errno
import io
import itertools
import os
import random
import shutil
import signal
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import unflatten_dict

from deepseek_jax.data import blocks, store
from deepseek_jax.data.blocks import DamagedFile
from deepseek_jax.data.corpus import open_corpus
from deepseek_jax.data.store import open_store
from deepseek_jax.data.tokenizer import ByteTokenizer
from deepseek_jax.errors import UserError
from deepseek_jax.streams import Forgiving
from deepseek_jax.train import stop as stop_module
from deepseek_jax.train.checkpoint import streamed
from deepseek_jax.train.checkpoint.checkpointer import Checkpointer
from deepseek_jax.train.checkpoint.streamed import StreamedStep
from deepseek_jax.train.checkpoint.tree import flatten
from deepseek_jax.train.stop import StopRequest

pytestmark = pytest.mark.slow

TIMES = int(os.environ.get("DEEPSEEK_JAX_FAULTS", "1"))
AT_LEAST = 200
injected = {"cache": 0, "checkpoint": 0, "conversion": 0, "signals": 0, "streams": 0}


def damage(path: Path, choose: random.Random) -> str:
    """Damages a file in some way, and returns which."""
    content = bytearray(path.read_bytes())
    how = choose.choice(["flip", "cut", "longer", "overwritten", "gone"] if content else ["longer", "gone"])
    if how == "gone":
        path.unlink()
        return how
    place = choose.randrange(len(content)) if content else 0
    if how == "flip":
        content[place] ^= 1 << choose.randrange(8)
    elif how == "overwritten":
        content[place:] = bytes(byte ^ 0x5A for byte in content[place:])
    path.write_bytes({"cut": content[:place], "longer": content + b"\0"}.get(how, content))
    return how


def files_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


# ------------------------------------------------------------------------------------------------------ token caches


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    """(open the cache of a small corpus in a folder, its documents as they are)."""
    folder = tmp_path_factory.mktemp("corpus")
    for number in range(12):
        (folder / f"{number:02}.txt").write_text(f"document {number} " * (5 + 7 * number))
    corpus = open_corpus(str(folder / "*.txt"), "text")

    def open_in(cache: Path) -> store.TokenStore:
        return open_store(corpus, ByteTokenizer(), str(cache))

    return open_in, [list(text.encode()) for text in corpus.documents()]


def documents(found: store.TokenStore) -> list[list[int]]:
    return [np.asarray(found.document(i)).tolist() for i in range(len(found))]


@pytest.mark.parametrize("seed", range(70 * TIMES))
def test_a_token_cache(tokens, tmp_path, monkeypatch, seed):
    """Damaged before it is opened, or while it is open: the same tokens, or the file is named and built again."""
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 64)
    choose, (open_in, right) = random.Random(seed), tokens
    monkeypatch.setattr(store, "WHOLE_FILE_BYTES", choose.choice([0, 1 << 30]))
    open_in(tmp_path)
    (entry,) = tmp_path.glob("tokens-*/")
    is_open = choose.random() < 0.5
    found = open_in(tmp_path) if is_open else None
    damage(choose.choice(files_in(entry)), choose)
    injected["cache"] += 1
    with warnings.catch_warnings(record=True):
        warnings.simplefilter("always")
        try:
            assert documents(found or open_in(tmp_path)) == right
        except DamagedFile as error:
            assert "Start again" in str(error)
        assert documents(open_in(tmp_path)) == right


# ------------------------------------------------------------------------------------------------------- checkpoints


def state_of(step: int) -> dict:
    rng = np.random.default_rng(step)
    return {"params": {"w": jax.device_put(np.asarray(rng.normal(size=64), jnp.float32))}, "step": jnp.int32(step)}


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("intact")
    with Checkpointer(directory) as checkpoints:
        for step in (10, 20):
            checkpoints.save(step, state_of(step), {"config": {"n": step}})
    return directory


@pytest.mark.parametrize("seed", range(60 * TIMES))
def test_a_checkpoint(two_steps, tmp_path, seed):
    """The newest step is damaged, sometimes in several files, sometimes both steps are: one that is whole, or none."""
    choose, copy = random.Random(seed), tmp_path / "copy"
    shutil.copytree(two_steps, copy)
    is_hopeless = choose.random() < 0.2
    for step in (20, 10) if is_hopeless else (20,):
        name, unread = f"step_{step:08d}", ("BEGUN", "00000.json")
        files = [file for folder in (copy, copy / "shards") for file in files_in(folder / name)]
        for path in choose.sample([file for file in files if file.name not in unread], choose.choice([1, 1, 3])):
            damage(path, choose)
    is_unfinished = not (copy / "step_00000020/COMMIT").exists()  # as if it had been killed: no step, so no damage
    injected["checkpoint"] += 1
    complaints = []
    with Checkpointer(copy, read_only=True, warn=complaints.append) as checkpoints:
        try:
            expected = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state_of(0))
            step, state, meta = checkpoints.restore(expected)
        except UserError as error:
            assert is_hopeless and "step" in str(error)
            return
    assert not is_hopeless and (step, meta) == (10, {"config": {"n": 10}})
    assert np.asarray(state["params"]["w"]).tobytes() == np.asarray(state_of(10)["params"]["w"]).tobytes()
    assert is_unfinished or (len(complaints) == 1 and "step 20" in complaints[0])


# ------------------------------------------------------------------------------------------------------- conversions

ARRAYS = {
    "params/gate": ((3, 4, 8), "float32"),
    "params/gain": ((8,), "float32"),
    "params/table": ((21, 8), "bfloat16"),
}


def content(name: str) -> np.ndarray:
    shape, dtype = ARRAYS[name]
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    return np.frombuffer(random.Random(name).randbytes(size), dtype).reshape(shape)


def convert(directory: Path, stop_after: int | None = None) -> None:
    """Writes what is not there yet; with `stop_after`, so many pieces, as when it is killed."""
    written = 0
    with StreamedStep(directory, 0, ARRAYS, "test") as step:
        for name in ARRAYS:
            for i in range(ARRAYS[name][0][0]):
                index = (i,) if name == "params/gate" else ()
                if step.is_done(name, index):
                    continue
                if written == stop_after:
                    return
                step.write(name, index, content(name)[index])
                written += 1
        step.commit({"config": {}})


@pytest.mark.parametrize("seed", range(40 * TIMES))
def test_a_conversion(tmp_path, monkeypatch, seed):
    """Killed, then damaged in the journal or in what was written: it ends with the right weights, or says why not."""
    monkeypatch.setattr(streamed, "CHUNK_BYTES", 100)
    choose = random.Random(seed)
    convert(tmp_path, choose.randrange(1, 5))
    damage(choose.choice(files_in(tmp_path)), choose)
    injected["conversion"] += 1
    try:
        convert(tmp_path)
    except UserError as error:
        assert str(tmp_path) in str(error)
        shutil.rmtree(tmp_path)  # what the message asks for, or another workdir
        convert(tmp_path)
    expected = unflatten_dict({name: jax.ShapeDtypeStruct(*described) for name, described in ARRAYS.items()}, sep="/")
    with Checkpointer(tmp_path, read_only=True) as checkpoints:
        _, state, _ = checkpoints.restore(expected)
    for name, array in flatten(state).items():
        assert np.asarray(array).tobytes() == content(name).tobytes()


# ------------------------------------------------------------------------------------------------ signals and streams

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
SEQUENCES = [sequence for length in (1, 2, 3) for sequence in itertools.product(SIGNALS, repeat=length)]


class Ended(BaseException):
    """Stands in for the end of the process."""


def end(code: int):
    raise Ended(code)


@pytest.mark.parametrize("is_running", [False, True])
@pytest.mark.parametrize("sequence", SEQUENCES, ids=lambda signals: "-".join(number.name[3:] for number in signals))
def test_signals_in_any_order(monkeypatch, sequence, is_running):
    """Each one asks, breaks off, or ends the process; only Ctrl-C insists; the handlers come back."""
    monkeypatch.setattr(stop_module, "SAME_CTRL_C_S", 0.0)
    monkeypatch.setattr(os, "_exit", end)
    before, happened = [signal.getsignal(number) for number in SIGNALS], []
    with StopRequest() as stop:
        if is_running:
            stop.begin()
        for number in sequence:
            try:
                os.kill(os.getpid(), number)
                happened.append("asked")
            except KeyboardInterrupt:
                happened.append("broken off")
            except Ended:
                happened.append("ended")
    injected["signals"] += 1
    assert stop.signal == sequence[0]
    assert [signal.getsignal(number) for number in SIGNALS] == before
    if not is_running:
        assert happened == ["broken off"] * len(sequence)
        return
    n_ctrl_c = [sequence[: i + 1].count(signal.SIGINT) for i in range(len(sequence))]
    for i, number in enumerate(sequence):
        insists = number == signal.SIGINT and i > 0
        assert happened[i] == ("asked" if not insists else "ended" if n_ctrl_c[i] > 2 else "broken off")


@pytest.mark.parametrize("call", ["write", "flush"])
@pytest.mark.parametrize("number", [errno.EPIPE, errno.EIO, errno.ENOSPC, errno.EBADF, errno.EDQUOT, errno.ENXIO])
def test_streams_that_fail(call, number):
    class Failing(io.StringIO):
        def write(self, text):
            raise OSError(number, os.strerror(number))

        def flush(self):
            raise OSError(number, os.strerror(number))

    stream = Forgiving(Failing())
    injected["streams"] += 1
    assert stream.write("a line\n") == 7 if call == "write" else stream.flush() is None


def test_there_were_enough():
    if injected["streams"] and min(injected.values()):  # not where some were picked out
        assert sum(injected.values()) >= AT_LEAST
        print(injected, sum(injected.values()))
