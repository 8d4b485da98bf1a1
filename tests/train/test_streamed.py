"""Written in pieces, killed at any instant, resumed: what is restored is what was given, or nothing is."""

import errno
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax.traverse_util import unflatten_dict
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from deepseek_jax.errors import UserError
from deepseek_jax.train.checkpoint import manifest, streamed
from deepseek_jax.train.checkpoint.checkpointer import Checkpointer
from deepseek_jax.train.checkpoint.streamed import StepReader, StreamedStep
from deepseek_jax.train.checkpoint.tree import flatten
from tests.train.format_1 import write_format_1

# (shape, dtype, axes that an index names); blocks of 200 bytes cut the embedding unevenly.
ARRAYS = {
    "params/embedding/table_VD": ((37, 8), "bfloat16", 0),
    "params/moe_blocks/experts/gate_XDF": ((2, 4, 8, 6), "bfloat16", 2),
    "params/moe_blocks/attention/norm/gain": ((2, 8), "float32", 1),
    "params/mtp/0/join_YD": ((16, 8), "float16", 0),
    "params/mtp/0/codes": ((9, 16), "float8_e4m3fn", 0),
    "params/scale": ((), "float32", 0),
    "router_bias/moe_blocks/experts/router/bias_E": ((2, 4), "float32", 1),
    "router_bias/zeros": ((2, 4), "int32", 1),
}
DESCRIBED = {name: (shape, dtype) for name, (shape, dtype, _) in ARRAYS.items()}


def content(name: str) -> np.ndarray:
    """Any bits, those of a NaN or a negative zero as well; all zeros for the last array."""
    shape, dtype, _ = ARRAYS[name]
    rng = np.random.default_rng(list(name.encode()))
    n_bytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
    return np.frombuffer(rng.bytes(n_bytes) if "zeros" not in name else bytes(n_bytes), dtype).reshape(shape)


def pieces():
    for name, (shape, _, lead) in ARRAYS.items():
        for index in np.ndindex(*shape[:lead]):
            yield name, index, np.asarray(content(name)[index])


def write_all(directory: Path, stop_after: int | None = None) -> int:
    """Writes what is not done, `stop_after` pieces at most; returns how many it wrote."""
    written = 0
    with StreamedStep(directory, 0, DESCRIBED, "test") as step:
        for name, index, piece in pieces():
            if step.is_done(name, index):
                continue
            if written == stop_after:
                return written
            step.write(name, index, piece)
            written += 1
        step.commit({"config": {"n": 1}, "note": "two"})
    return written


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(streamed, "CHUNK_BYTES", 200)
    monkeypatch.setattr(streamed, "STRIP", 3)


@pytest.fixture
def written(tmp_path):
    write_all(tmp_path / "checkpoints")
    return tmp_path / "checkpoints"


def restore(directory: Path, placed=lambda name: None) -> dict[str, jax.Array]:
    expected = {
        name: jax.ShapeDtypeStruct(shape, dtype, sharding=placed(name)) for name, (shape, dtype) in DESCRIBED.items()
    }
    with Checkpointer(directory, read_only=True) as checkpoints:
        step, state, meta = checkpoints.restore(unflatten_dict(expected, sep="/"))
    assert (step, meta) == (0, {"config": {"n": 1}, "note": "two"})
    return flatten(state)


def assert_exact(arrays: dict):
    assert arrays.keys() == ARRAYS.keys()
    for name, array in arrays.items():
        assert array.dtype == content(name).dtype and array.shape == content(name).shape
        assert np.asarray(array).tobytes() == content(name).tobytes(), name


def test_restored_is_what_was_written(written):
    assert_exact(restore(written))


def test_restored_on_a_mesh_is_what_was_written(written):
    mesh = jax.make_mesh((2, 4), ("data", "expert"), axis_types=(AxisType.Auto,) * 2)
    split = {
        "params/moe_blocks/experts/gate_XDF": P(None, "expert", "data"),
        "params/mtp/0/join_YD": P(("data", "expert")),
        "router_bias/zeros": P("data", "expert"),
    }
    arrays = restore(written, lambda name: NamedSharding(mesh, split.get(name, P())))
    assert_exact(arrays)
    for name, spec in split.items():
        assert arrays[name].sharding == NamedSharding(mesh, spec)


def test_a_reader_takes_pieces_from_files_of_every_format(written, tmp_path):
    state = unflatten_dict({name: jnp.asarray(content(name)) for name in ARRAYS}, sep="/")
    write_format_1(tmp_path / "orbax", 0, state, {})
    with Checkpointer(tmp_path / "shards") as checkpoints:
        checkpoints.save(0, state)
    for directory in (written, tmp_path / "orbax", tmp_path / "shards"):
        reader = StepReader(directory, 0)
        assert reader.arrays == {name: (shape, np.dtype(dtype)) for name, (shape, dtype) in DESCRIBED.items()}
        assert_exact({name: reader(name) for name in reader.arrays})
        for name, index, piece in pieces():
            assert reader(name, index).tobytes() == piece.tobytes()


def test_pieces_may_be_views_in_any_order(tmp_path):
    with StreamedStep(tmp_path, 3, {"a": ((4, 30, 5), "bfloat16"), "b": ((0 + 7, 3), "float32")}, "test") as step:
        a = np.arange(600, dtype=ml_dtypes.bfloat16).reshape(5, 30, 4).T
        b = np.arange(42, dtype=np.float32).reshape(7, 6)[:, ::2]
        for layer in (2, 0, 3, 1):
            step.write("a", (layer,), a[layer])
        step.write("b", (), b)
        step.commit({})
    reader = StepReader(tmp_path, 3)
    assert (reader("a") == a).all() and (reader("b") == b).all()


def test_hashes_guard_every_file(written):
    manifest.verify(written / "step_00000000", 0)
    file = written / "step_00000000/arrays/params.moe_blocks.experts.gate_XDF/1.2.0.0"
    file.write_bytes(bytes(file.stat().st_size))
    with pytest.raises(UserError, match="1.2.0.0 has changed"):
        restore(written)


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from deepseek_jax.train.checkpoint import manifest, streamed
streamed.CHUNK_BYTES = 200
moment = sys.argv[3]
def die(*_, **__): os.kill(os.getpid(), signal.SIGKILL)
if moment == "hashing":
    manifest.digest = die
elif moment in ("MANIFEST.json", "COMMIT"):
    write = manifest.write_atomically
    manifest.write_atomically = lambda path, text: die() if path.name == moment else write(path, text)
elif moment == "committed":
    manifest_commit = manifest.commit
    manifest.commit = lambda *given: (manifest_commit(*given), die())
import test_streamed
test_streamed.write_all(Path(sys.argv[2]), int(moment) if moment.isdigit() else None)
die()
"""


def killed(directory: Path, moment: str) -> None:
    """A process that writes the step and is killed, after so many pieces or at a named moment of the commit."""
    command = [sys.executable, "-c", KILLED, str(Path(__file__).parent), str(directory), moment]
    assert subprocess.run(command, timeout=120).returncode == -signal.SIGKILL


def test_killed_half_way_it_goes_on_and_ends_the_same(written, tmp_path):
    undisturbed = manifest.read_manifest(written / "step_00000000", 0)
    directory = tmp_path / "killed"
    total = sum(1 for _ in pieces())
    left = total
    for more in (1, 4, 9):
        left -= write_all(directory, more)
        with pytest.raises(UserError, match="step 0 is unfinished"):
            restore(directory)
    killed(directory, "3")
    with StreamedStep(directory, 0, DESCRIBED, "test") as step:
        assert step.resumed and 0 < step.n_bytes_done < step.n_bytes
    assert left - 3 <= write_all(directory) <= left  # what the journal did not reach is written again
    assert_exact(restore(directory))
    assert manifest.read_manifest(directory / "step_00000000", 0) == undisturbed
    assert not list(directory.glob("*.journal"))


@pytest.mark.parametrize("moment", ["hashing", "MANIFEST.json", "COMMIT", "committed"])
def test_killed_while_it_commits(written, tmp_path, moment):
    directory = tmp_path / "killed"
    killed(directory, moment)
    if moment == "committed":
        assert_exact(restore(directory))
        with pytest.raises(UserError, match="finished checkpoint"):
            StreamedStep(directory, 0, DESCRIBED, "test")
        assert not list(directory.glob("*.journal"))
        return
    with pytest.raises(UserError, match="step 0 is unfinished"):
        restore(directory)
    assert write_all(directory) == 0
    steps = [manifest.read_manifest(path / "step_00000000", 0) for path in (directory, written)]
    assert steps[0] == steps[1]


def test_a_journal_is_not_believed_over_the_files(tmp_path):
    write_all(tmp_path, 12)
    folder = tmp_path / "step_00000000/arrays/params.moe_blocks.experts.gate_XDF"
    (folder / "0.1.0.0").unlink()
    os.truncate(folder / "1.0.0.0", 5)
    journal = tmp_path / "step_00000000.journal"
    journal.write_bytes(journal.read_bytes() + b'["params/scale", [')  # torn
    with StreamedStep(tmp_path, 0, DESCRIBED, "test") as step:
        done = [index for name, index, _ in pieces() if "gate_XDF" in name and step.is_done(name, index)]
        assert not step.is_done("params/scale")
    assert (0, 0) in done and (0, 1) not in done and (1, 0) not in done
    write_all(tmp_path)
    assert_exact(restore(tmp_path))


def chunks(directory: Path) -> list[Path]:
    """The files of weights, in a fixed order."""
    return sorted(f for f in (directory / "step_00000000/arrays").rglob("*") if f.is_file() and f.name[0].isdigit())


def damage(file: Path, how: str) -> None:
    content = bytearray(file.read_bytes())
    if how == "gone":
        return file.unlink()
    if how == "flipped":
        content[len(content) // 2] ^= 1
    file.write_bytes({"cut": content[:-1], "longer": content + b"x", "zeros": bytes(len(content))}.get(how, content))


@pytest.mark.parametrize("how", ["flipped", "cut", "longer", "zeros", "gone"])
def test_pieces_that_were_damaged_between_two_starts_are_written_again(written, tmp_path, how):
    write_all(tmp_path / "run", 15)
    files = [file for file in chunks(tmp_path / "run") if any(file.read_bytes())]
    for number in (0, len(files) // 2, -1):
        damage(files[number], how)
    with StreamedStep(tmp_path / "run", 0, DESCRIBED, "test") as step:
        assert step.n_damaged == 3
    write_all(tmp_path / "run")
    assert_exact(restore(tmp_path / "run"))
    steps = [manifest.read_manifest(path / "step_00000000", 0) for path in (tmp_path / "run", written)]
    assert steps[0] == steps[1]


def test_a_damaged_journal_costs_time_at_most(tmp_path):
    """Any byte of it changed: the step ends the same, or its start is refused with a message."""
    write_all(tmp_path / "run", 15)
    journal = "step_00000000.journal"
    text = (tmp_path / "run" / journal).read_bytes()
    rng = np.random.default_rng(0)
    refused = 0
    for position in sorted({*rng.integers(0, len(text), 30), 0, len(text) - 1}):
        shutil.rmtree(tmp_path / "again", ignore_errors=True)
        shutil.copytree(tmp_path / "run", tmp_path / "again")
        changed = bytearray(text)
        changed[position] ^= 1 << int(rng.integers(7))
        (tmp_path / "again" / journal).write_bytes(changed)
        try:
            with StreamedStep(tmp_path / "again", 0, DESCRIBED, "test") as step:
                for name, index, piece in pieces():
                    if step.is_done(name, index):
                        held = [f.read_bytes() for f in files_of(step, name, index)]
                        assert b"".join(held)[: piece.nbytes] == np.ascontiguousarray(piece).tobytes()
        except UserError as error:
            refused += 1
            assert "was begun with" in str(error) and position <= text.index(b"\n")
    assert 0 < refused < 20


def files_of(step: StreamedStep, name: str, index: tuple) -> list[Path]:
    keys = streamed._chunk_files(*step._arrays[name], index)
    return [step._folder(name) / streamed._file_name(key) for key, _ in keys]


def test_what_is_written_is_not_read_again(tmp_path, monkeypatch):
    read, digest = [], manifest.digest
    monkeypatch.setattr(manifest, "digest", lambda path, flush=False: (read.append(path.name), digest(path, flush))[1])
    write_all(tmp_path)
    assert read and {name for name in read if name[0].isdigit()} == set()
    manifest.verify(tmp_path / "step_00000000", 0)  # and the hashes are right


def test_a_chunk_that_vanishes_before_the_end_is_missed(tmp_path):
    with StreamedStep(tmp_path, 0, DESCRIBED, "test") as step:
        for name, index, piece in pieces():
            step.write(name, index, piece)
        step.flush()
        chunks(tmp_path)[3].unlink()
        with pytest.raises(UserError, match="is missing or cut short since it was written. Start the same"):
            step.commit({})
    assert write_all(tmp_path) == 1
    assert_exact(restore(tmp_path))


def test_litter_of_a_save_is_cleared(tmp_path):
    (tmp_path / "step_00000000/arrays/foreign").mkdir(parents=True)
    write_all(tmp_path)
    assert_exact(restore(tmp_path))
    assert not (tmp_path / "step_00000000/arrays/foreign").exists()


def test_what_others_began_or_finished_is_refused(tmp_path):
    write_all(tmp_path, 3)
    with pytest.raises(UserError, match="was begun with test and is not finished; now given: another"):
        StreamedStep(tmp_path, 0, DESCRIBED, "another")
    with pytest.raises(UserError, match="another version of this program or other arrays"):
        StreamedStep(tmp_path, 0, {**DESCRIBED, "params/scale": ((1,), "float32")}, "test")
    with StreamedStep(tmp_path, 0, DESCRIBED, "test"), pytest.raises(UserError, match="another run"):
        StreamedStep(tmp_path, 0, DESCRIBED, "test")
    write_all(tmp_path)
    with pytest.raises(UserError, match="finished checkpoint"):
        StreamedStep(tmp_path, 0, DESCRIBED, "test")


def test_wrong_pieces_and_missing_ones_are_named(tmp_path):
    with StreamedStep(tmp_path, 0, {"a": ((2, 3), "float32")}, "test") as step:
        for index, piece in [((), np.zeros((2, 3))), ((0,), np.zeros(4, np.float32)), ((2,), np.zeros(3, np.float32))]:
            with pytest.raises(ValueError, match="a"):
                step.write("a", index, piece)
        step.write("a", (1,), np.zeros(3, np.float32))
        with pytest.raises(ValueError, match=r"a\[0\] was never written"):
            step.commit({})


def test_a_full_disk_is_told_and_gone_on_from(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(streamed.os, "fsync", full)
        patch.setattr(streamed.files, "write_atomically", lambda path, text: path.write_bytes(text))
        with pytest.raises(UserError, match="No space left on device"):
            write_all(tmp_path)
    with StreamedStep(tmp_path, 0, DESCRIBED, "test") as step:
        assert not step.resumed  # nothing was on the disk for certain
    with monkeypatch.context() as patch:
        patch.setattr(streamed.files, "commit", full)
        with pytest.raises(UserError, match="No space left on device"):
            write_all(tmp_path)
    assert write_all(tmp_path) == 0
    assert_exact(restore(tmp_path))
