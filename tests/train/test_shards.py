"""Laws of checkpoints in shards, in folders and in buckets: killed at any write, damaged anywhere, by several."""

import itertools
import json
import os
import random
import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.errors import UserError
from deepseek_jax.storage import Store, open_store
from deepseek_jax.train.checkpoint import grid, manifest, shards, writer
from deepseek_jax.train.checkpoint.checkpointer import Checkpointer
from deepseek_jax.train.checkpoint.grid import assigned, packed
from tests import buckets

ABSTRACT = {"w": jax.ShapeDtypeStruct((8, 16), jnp.float32), "step": jax.ShapeDtypeStruct((), jnp.int32)}


def state_of(step: int) -> dict:
    rng = np.random.default_rng(step)
    return {"w": jax.device_put(rng.normal(size=(8, 16)).astype(np.float32)), "step": jax.device_put(np.int32(step))}


def assert_is(state: dict, step: int) -> None:
    for name, leaf in state_of(step).items():
        assert np.asarray(state[name]).tobytes() == np.asarray(leaf).tobytes(), (name, step)


# ------------------------------------------------------------------------------------------------------- the division


def test_pieces_cover_what_is_held_once_and_the_work_is_even():
    whole, halves = ((0, 6), (0, 10)), [((0, 6), (0, 5)), ((0, 6), (5, 10))]
    held = {"all": {whole: range(4)}, "split": {halves[0]: [0], halves[1]: [1]}, "none": {((0, 0), (0, 3)): [2]}}
    held |= {"scalar": {(): range(4)}}
    pieces = assigned(held, dict.fromkeys(held, 4), limit=40)
    seen = {"all": np.zeros((6, 10), int), "split": np.zeros((6, 10), int), "scalar": np.zeros((), int)}
    for piece in pieces:
        assert piece.n_bytes == 4 * grid.count(piece.region) <= 40
        seen[piece.name][tuple(slice(*part) for part in piece.region)] += 1
        holders = [h for region, h in held[piece.name].items() if grid.overlap(region, piece.region) == piece.region]
        assert piece.process in holders[0] and piece.is_common == (len(holders[0]) > 1)
    assert all((counts == 1).all() for counts in seen.values())
    loads = [sum(piece.n_bytes for piece in pieces if piece.process == process) for process in range(4)]
    assert loads == [124, 120, 120, 120]  # the copies go to those that hold nothing else


def test_small_pieces_share_objects_and_common_ones_are_apart(monkeypatch):
    monkeypatch.setattr(grid, "ALONE_BYTES", 100)
    monkeypatch.setattr(grid, "PACK_BYTES", 150)
    made = [grid.Piece(f"{i}", ((0, n),), n, 0, common) for i, (n, common) in enumerate([(60, True), (120, False)] * 3)]
    made += [grid.Piece(f"own{i}", ((0, 50),), 50, 0, False) for i in range(4)]
    objects = packed(made)
    assert sorted(piece.name for one in objects for piece in one) == sorted(piece.name for piece in made)
    assert [len(one) for one in objects if one[0].n_bytes >= 100] == [1, 1, 1]
    assert all(len({piece.is_common for piece in one}) == 1 for one in objects)
    assert max(sum(piece.n_bytes for piece in one) for one in objects) <= 150 + 100


def test_any_division_is_read_as_any_other(tmp_path, monkeypatch):
    monkeypatch.setattr(grid, "ALONE_BYTES", 64)
    store, choose = open_store(tmp_path), random.Random(0)
    array = np.arange(7 * 5 * 3, dtype=np.int16).reshape(7, 5, 3)
    arrays = {"a": {"shape": [7, 5, 3], "dtype": "int16"}}
    pieces = assigned({"a": {((0, 7), (0, 5), (0, 3)): [0]}}, {"a": 2}, limit=50)
    parts = [(piece, array[tuple(slice(*part) for part in piece.region)]) for piece in pieces]
    written = shards.write(store, "shards/x", 0, parts)
    assert parts == [] and sum(shard.size for shard in written) == array.nbytes
    regions = {tuple(tuple(sorted(choose.sample(range(n + 1), 2))) for n in array.shape) for _ in range(20)}
    found = {}
    shards.read(store, written, arrays, {"a": regions}, lambda _, region, values: found.update({region: values}))
    for region in regions:
        assert found[region].tobytes() == array[tuple(slice(*part) for part in region)].tobytes()
    reader = shards.Reader(store, {"arrays": arrays, "objects": written}, 10**6)
    assert (reader("a", (3,)) == array[3]).all() and (reader("a", (6, 4, 2)) == array[6, 4, 2]).all()
    with pytest.raises(shards.ShardDamaged, match="a part of a is in none"):
        shards.read(store, written[1:], arrays, {"a": [((0, 7), (0, 5), (0, 3))]}, lambda *_: None)


def test_a_reader_keeps_the_objects_used_last_whatever_their_size(tmp_path, monkeypatch):
    store, asked, read = open_store(tmp_path), [], Store.read
    for name, size in (("a", 40), ("b", 40), ("c", 30), ("huge", 101)):
        store.write(name, bytes(size))
    monkeypatch.setattr(Store, "read", lambda store, name: asked.append(name) or read(store, name))
    reader = shards.Reader(store, {"arrays": {}, "objects": []}, 100)
    for name in ("a", "b", "a", "c", "a", "c", "b", "a"):  # c takes the place of b, then b that of a
        assert len(reader.read(name)) == {"a": 40, "b": 40, "c": 30}[name]
    assert asked == ["a", "b", "c", "b", "a"]
    assert len(reader.read("huge")) == 101 and reader._left == 100 and not reader._kept


# --------------------------------------------------------------------------------------------------- kills and damage


class Killed(OSError):
    """Stands in for the end of the process."""


class Death:
    """Before the n-th change of a store the process dies: that one and all later ones never arrive."""

    def __init__(self, number: int, patch: pytest.MonkeyPatch):
        self.left, self.last = number, ""
        patch.setattr(Checkpointer, "_give_up", lambda *_: None)  # the dead do not clean up
        for name in ("write", "exchange", "delete", "delete_below"):
            patch.setattr(Store, name, self.before(getattr(Store, name)))

    def before(self, change):
        def call(store, key, *rest):
            if not key.endswith(writer.LEASE):
                self.left -= 1
                if self.left <= 0:
                    self.last = self.last or key
                    raise Killed
            return change(store, key, *rest)

        return call


@pytest.fixture(params=buckets.FOUND)
def where(request, tmp_path, monkeypatch):
    for name, seconds in (("RENEW_S", 0.2), ("DEAD_S", 3.0), ("LOOK_S", 0.05)):
        monkeypatch.setattr(writer, name, seconds)
    with buckets.fresh(request.param, tmp_path) as place:
        yield place


def two_steps(where: str) -> None:
    with Checkpointer(where, keep=2) as checkpoints:
        for step in (10, 20):
            checkpoints.save(step, state_of(step), {"config": {"n": step}})
        assert checkpoints.wait()


def test_killed_at_any_write_the_step_before_is_there(where):
    """And the next run saves where the dead one has left what it had written."""
    for number in itertools.count(1):
        place = f"{where}/{number}"
        two_steps(place)
        with pytest.MonkeyPatch.context() as patch, Checkpointer(place, keep=2, warn=lambda _: None) as dying:
            death = Death(number, patch)
            dying.save(30, state_of(30), {"config": {"n": 30}})
            dying.wait()
        with Checkpointer(place, keep=2, warn=lambda _: None) as checkpoints:
            step, state, meta = checkpoints.restore(ABSTRACT)
            assert step == (20 if number <= 7 else 30), death.last
            assert_is(state, step)
            assert meta == {"config": {"n": step}}
            if not death.last:
                break
            checkpoints.save(40, state_of(40), {"config": {"n": 40}})
            assert checkpoints.wait() and checkpoints.steps() == [step, 40]
            left = {name.split("/")[name.startswith("shards/")] for name in open_store(place).names()}
            assert left - {writer.LEASE} == {f"step_{kept:08d}" for kept in (step, 40)}, death.last
    assert number >= 8


def test_any_object_damaged_gives_no_wrong_number(where):
    two_steps(where)
    store = open_store(where)
    names = [name for name in store.names() if "step_00000020" in name]
    assert len(names) == 7
    for name, how in itertools.product(names, ("flip", "cut", "gone")):
        content = store.read(name)
        damaged = {"flip": bytes([content[0] ^ 4]) + content[1:], "cut": content[: len(content) // 2], "gone": b""}
        store.delete(name) if how == "gone" else store.write(name, damaged[how])
        told = []
        with Checkpointer(where, read_only=True, warn=told.append) as checkpoints:
            step, state, meta = checkpoints.restore(ABSTRACT)
        assert_is(state, step)
        assert meta == {"config": {"n": step}}
        assert step == (20 if name.endswith(("BEGUN", "00000.json")) else 10), (name, how)
        assert (step == 20 or (name.endswith("COMMIT") and how == "gone")) == (told == []), (name, how, told)
        store.write(name, content)


def test_a_second_writer_is_refused_and_a_dead_one_replaced(where, monkeypatch):
    with Checkpointer(where) as first:
        with pytest.raises(UserError, match=f"being written by another run .pid {os.getpid()} on"):
            Checkpointer(where)
        first.save(1, state_of(1))
        assert first.wait()
    if not str(where).startswith("s3:"):
        return
    dead = writer.Lease(open_store(where))
    dead._over.set()  # as if its process had stopped
    dead._thread.join()
    told: list[str] = []
    slow = Checkpointer(where, warn=told.append)  # waits until it counts as dead
    slow._lock._generation = None  # as if another one had taken it meanwhile
    slow.save(2, state_of(2))
    assert not slow.wait() and "another run has taken over" in told[0] and slow.steps() == [1]
    slow.close()


# -------------------------------------------------------------------------------------------------- several processes

PROCESS = """
import json, os, sys, time
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from deepseek_jax.compat import start_processes
from deepseek_jax.storage import Store, open_store
from deepseek_jax.train.checkpoint import grid, shards
from deepseek_jax.train.checkpoint.checkpointer import Checkpointer

start_processes()
grid.ALONE_BYTES, grid.PIECE_BYTES = 1024, 8192
where, index = sys.argv[1], jax.process_index()
count = {"written": 0, "hashed": 0, "read": 0}
write, read, sha256 = Store.write, Store.read, shards.sha256

def counted_write(store, name, content):
    count["written"] += len(content) if name.startswith("shards/") else 0
    if "step_00000030" in name and index == 2:
        raise OSError(28, "No space left on device")
    if "step_00000030" in name and index == 3:
        time.sleep(1)  # writes after process 0 has given up and deleted
    write(store, name, content)

def counted_read(store, name, *part):
    content = read(store, name, *part)
    count["read"] += len(content) if name.startswith("shards/") else 0
    return content

def counted_hash(content):
    count["hashed"] += len(content)
    return sha256(content)

Store.write, Store.read, shards.sha256 = counted_write, counted_read, counted_hash
mesh = jax.make_mesh((4, 2), ("a", "b"))
values = {"w": np.arange(64 * 512, dtype=np.float32).reshape(64, 512), "common": np.arange(8192, dtype=np.int32)}
values |= {"step": np.int32(7)}
specs = {"w": P("a", "b"), "common": P(), "step": P()}
def put(specs):
    def array(name, spec):
        return jax.make_array_from_callback(values[name].shape, NamedSharding(mesh, spec), lambda i: values[name][i])
    return {name: array(name, spec) for name, spec in specs.items()}
state, said = put(specs), []
with Checkpointer(where, warn=said.append, deadline_s=60) as checkpoints:
    checkpoints.save(10, state, {"config": {}})
    assert checkpoints.wait()
    saved = dict(count)
    checkpoints.save(20, state, {"config": {}})
    good = checkpoints.wait()
    checkpoints.save(30, state, {"config": {}})
    failed = not checkpoints.wait()
    for name in count: count[name] = 0
    def shapes(specs):
        here = {name: NamedSharding(mesh, spec) for name, spec in specs.items()}
        return {name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here[name]) for name, x in state.items()}
    step, found, _ = checkpoints.restore(shapes(specs))
    restored = dict(count)
    other = {"w": P(None, "a"), "common": P("b"), "step": P()}
    moved = checkpoints.restore(shapes(other), step=20)[1]
    for arrays in (found, moved):
        for name, array in arrays.items():
            for shard in array.addressable_shards:
                assert np.asarray(shard.data).tobytes() == values[name][shard.index].tobytes(), name
    left = sorted(open_store(where).names("shards/step_00000030/"))
    checkpoints.save(40, state, {"config": {}})
    assert checkpoints.wait()
    gone = not [name for name in open_store(where).names() if "step_00000030" in name]
outcome = {"saved": saved, "restored": restored, "good": good, "failed": failed, "step": step, "said": said}
print(json.dumps(outcome | {"left": left, "gone": gone}))
"""


@pytest.mark.slow
def test_four_processes_write_and_read_their_shares_and_hear_of_a_failure(tmp_path):
    """Nobody writes, hashes or reads more than its share, what all hold in common, and lists of objects."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    flags = "--xla_force_host_platform_device_count=2"
    common = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "4", "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    common["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[2]), *sys.path])
    command = [sys.executable, "-W", "ignore", "-c", PROCESS, str(tmp_path / "run")]
    started = [
        subprocess.Popen(
            command,
            env=os.environ | common | {"JAX_PROCESS_ID": str(index)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(4)
    ]
    answers = [process.communicate(timeout=300) for process in started]
    assert [process.returncode for process in started] == [0] * 4, answers
    told = [json.loads(out.splitlines()[-1]) for out, _ in answers]
    own, shared, lists = 64 * 512 * 4 // 4, 8192 * 4, 4096  # bytes
    for answer in told:
        assert answer["saved"]["written"] <= own + shared // 4 + lists
        assert answer["saved"]["hashed"] <= own + shared // 4 + 4 * lists
        assert answer["restored"]["read"] <= own + shared + lists
        assert answer["good"] and answer["failed"] and answer["step"] == 20
        assert answer["gone"] and len(answer["said"]) == 1
        assert "step 30 was NOT saved: process 2: no space left on the disk. Training continues" in answer["said"][0]
    assert sum(answer["saved"]["written"] for answer in told) <= 4 * own + shared + 4 * lists
    assert any("/00003" in name for name in told[0]["left"])  # written after the save had failed
    assert manifest.committed_steps(tmp_path / "run") == [10, 20, 40]
