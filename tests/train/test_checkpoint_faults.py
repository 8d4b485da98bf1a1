"""Faults of disks and processes: torn and flipped files, a full disk, SIGKILL.  Never a wrong number, never silence."""

import errno
import gc
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.errors import UserError
from deepseek_jax.storage import Store
from deepseek_jax.train.checkpoint import manifest, shards, tree
from deepseek_jax.train.checkpoint.checkpointer import Checkpointer

RNG = np.random.default_rng(0)


def make_state(step: int, size: int = 64) -> dict:
    """A state that is a function of its step; random, so that it does not compress."""
    rng = np.random.default_rng(step)
    return {
        "params": {
            "w": jax.device_put(np.asarray(rng.normal(size=size), jnp.float32)),
            "b": jax.device_put(np.asarray(rng.normal(size=8), jnp.bfloat16)),
        },
        "step": jnp.int32(step),
    }


def abstract(size: int = 64) -> dict:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), make_state(0, size))


def assert_is(state: dict, step: int, size: int = 64):
    same = jax.tree.map(lambda a, b: np.asarray(a).tobytes() == np.asarray(b).tobytes(), state, make_state(step, size))
    assert all(jax.tree.leaves(same)), f"the state is not that of step {step}"


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory):
    """A directory with intact steps 10 and 20, to be copied and damaged."""
    directory = tmp_path_factory.mktemp("intact")
    with Checkpointer(directory) as checkpoints:
        for step in (10, 20):
            checkpoints.save(step, make_state(step), {"config": {"n": step}, "note": step})
    return directory


def truncate(path: Path):
    os.truncate(path, RNG.integers(path.stat().st_size))


def flip_a_bit(path: Path):
    content = bytearray(path.read_bytes())
    content[RNG.integers(len(content))] ^= 1 << RNG.integers(8)
    path.write_bytes(content)


def overwrite(path: Path):
    path.write_bytes(RNG.bytes(path.stat().st_size))


def delete(path: Path):
    path.unlink()


@pytest.mark.parametrize("damage", [truncate, flip_a_bit, overwrite, delete])
def test_damage_to_any_file_is_named_and_the_step_before_is_used(two_steps, tmp_path, damage):
    names = [
        file.relative_to(two_steps).as_posix() for file in two_steps.glob("**/step_00000020/**/*") if file.is_file()
    ]
    kinds = {"COMMIT", "MANIFEST.json", "config.json", "meta.json", "00000_000000", "BEGUN", "00000.json"}
    assert kinds == {name.split("/")[-1] for name in names}
    for i, name in enumerate(sorted(names)):
        copy = tmp_path / str(i)
        shutil.copytree(two_steps, copy)
        damage(copy / name)
        told = []
        with Checkpointer(copy, warn=told.append) as checkpoints:
            step, state, meta = checkpoints.restore(abstract())
        assert_is(state, step)
        if name.endswith(("BEGUN", "00000.json")):  # nothing is read from them once the step is committed
            assert step == 20 and told == []
            continue
        assert step == 10 and meta == {"config": {"n": 10}, "note": 10}, name
        assert len(told) == 1 and "step 20" in told[0] and os.path.basename(name) in told[0], (name, told)


def test_the_complaint_says_what_is_wrong(two_steps, tmp_path):
    shutil.copytree(two_steps, tmp_path, dirs_exist_ok=True)
    told = []
    os.truncate(tmp_path / "step_00000020" / "meta.json", 3)
    checkpoints = Checkpointer(tmp_path, read_only=True, warn=told.append)
    assert checkpoints.latest() == 20
    assert checkpoints.read_meta() == (10, {"config": {"n": 10}, "note": 10})
    checkpoints.restore(abstract())
    assert told == ["damaged, not used: step 20: meta.json has 3 bytes, 17 were written. Using step 10 instead."]
    with pytest.raises(UserError, match="step 20: meta.json has 3 bytes, 17 were written.*choose another step"):
        checkpoints.restore(abstract(), step=20)


def test_no_intact_step_left_is_an_error_and_never_a_fresh_start(two_steps, tmp_path):
    shutil.copytree(two_steps, tmp_path, dirs_exist_ok=True)
    for step in (10, 20):
        flip_a_bit(next(tmp_path.glob(f"shards/step_{step:08d}/*/00000_000000")))
    checkpoints = Checkpointer(tmp_path, read_only=True)
    assert checkpoints.latest() == 20
    with pytest.raises(UserError, match="step 20: shards/.* has changed.*step 10: shards/.* has changed"):
        checkpoints.restore(abstract())


@pytest.mark.parametrize("next_step", [20, 30])
def test_after_the_fallback_the_damaged_step_is_replaced(two_steps, tmp_path, next_step):
    shutil.copytree(two_steps, tmp_path, dirs_exist_ok=True)
    flip_a_bit(tmp_path / "step_00000020" / "MANIFEST.json")
    with Checkpointer(tmp_path, warn=lambda _: None) as checkpoints:
        assert checkpoints.restore(abstract())[0] == 10
        checkpoints.save(next_step, make_state(next_step))
        assert checkpoints.wait() and checkpoints.steps() == [10, next_step]
        step, state, _ = checkpoints.restore(abstract())
        assert step == next_step
        assert_is(state, next_step)


def test_a_damaged_step_is_written_anew_where_it_stands_in_the_way(two_steps, tmp_path):
    shutil.copytree(two_steps, tmp_path, dirs_exist_ok=True)
    flip_a_bit(tmp_path / "step_00000020" / "meta.json")
    told = []
    with Checkpointer(tmp_path, warn=told.append) as checkpoints:
        checkpoints.save(20, make_state(20))
        assert checkpoints.wait() and "step 20 is damaged: meta.json has changed" in told[0]
        assert_is(checkpoints.restore(abstract())[1], 20)


def test_odd_names_are_not_steps(two_steps, tmp_path):
    shutil.copytree(two_steps, tmp_path, dirs_exist_ok=True)
    for name in (
        "007",
        "step_7",
        "step_abc",
        "step_٠٠٠٠٠٠٣٠",
        "step_00000040.orbax-checkpoint-tmp",
        b"\xff\xfe".decode(errors="surrogateescape"),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "COMMIT").touch()
    os.symlink("loop", tmp_path / "loop")
    (tmp_path / "step_00000060" / "COMMIT").mkdir(parents=True)
    os.symlink(tmp_path / "step_00000050", tmp_path / "step_00000050")
    with Checkpointer(tmp_path, warn=lambda _: None) as checkpoints:
        assert checkpoints.steps() == [10, 20, 60] and checkpoints.restore(abstract())[0] == 20
        checkpoints.save(30, make_state(30))
        assert checkpoints.wait() and checkpoints.steps() == [10, 20, 30] and (tmp_path / "007").exists()


# ---- the disk


@pytest.fixture
def small_disk():
    """A file system of 3 MB where mounting is permitted, else None."""
    path = tempfile.mkdtemp()
    mounted = (
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", path], capture_output=True).returncode == 0
    )
    yield Path(path) if mounted else None
    if mounted:
        subprocess.run(["umount", path], check=True)
    os.rmdir(path)


def test_a_full_disk_costs_one_message_and_no_checkpoint(small_disk, capfd, caplog):
    if small_disk is None:
        pytest.skip("mounting a file system is not permitted; the injected fault below stands for it")
    size, told = 250_000, []  # 1 MB a step
    with Checkpointer(small_disk, keep=3, warn=told.append) as checkpoints:
        checkpoints.save(10, make_state(10, size))
        assert checkpoints.wait()
        (small_disk / "ballast").write_bytes(bytes(1_500_000))
        free = shutil.disk_usage(small_disk).free
        for step in (20, 30):
            checkpoints.save(step, make_state(step, size))
            assert not checkpoints.wait()
            checkpoints.report()
        assert told == [
            f"step {step} was NOT saved: no space left on the disk. Training continues; the newest good one is step 10."
            for step in (20, 30)
        ]
        assert shutil.disk_usage(small_disk).free == free and checkpoints.steps() == [10]
        assert_is(checkpoints.restore(abstract(size), step=10)[1], 10, size)
        (small_disk / "ballast").unlink()
        checkpoints.save(30, make_state(30, size))
        assert checkpoints.wait() and len(told) == 2
        assert_is(checkpoints.restore(abstract(size))[1], 30, size)
    gc.collect()
    assert capfd.readouterr() == ("", "") and caplog.records == []


def no_space(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize(
    "owner, name",
    [(Store, "write"), (Store, "write_if_absent"), (shards, "write"), (tree, "on_host"), (manifest, "begin")],
)
def test_no_space_at_any_stage_of_a_save(tmp_path, monkeypatch, owner, name):
    told = []
    with Checkpointer(tmp_path, warn=told.append) as checkpoints:
        checkpoints.save(10, make_state(10))
        checkpoints.wait()
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, no_space)
            checkpoints.save(20, make_state(20))
            assert not checkpoints.wait()
        assert len(told) == 1 and "step 20 was NOT saved: no space left on the disk" in told[0]
        assert sorted(os.listdir(tmp_path)) == [".writer", "shards", "step_00000010"]
        assert os.listdir(tmp_path / "shards") == ["step_00000010"]
        checkpoints.save(20, make_state(20))
        assert checkpoints.wait() and checkpoints.steps() == [10, 20] and len(told) == 1


def test_a_delete_that_fails_is_told_once_and_survived(tmp_path, monkeypatch):
    def busy(path, *_, **__):
        raise OSError(errno.EBUSY, "busy", str(path))

    told = []
    with Checkpointer(tmp_path, keep=1, warn=told.append) as checkpoints:
        with monkeypatch.context() as patch:
            patch.setattr(manifest.shutil, "rmtree", busy)
            patch.setattr(manifest.time, "sleep", lambda _: None)
            for step in (10, 20, 30):
                checkpoints.save(step, make_state(step))
            assert checkpoints.wait() and checkpoints.steps() == [30]
        assert [message.split(" could")[0] for message in told] == ["step 10", "step 20"]
        assert checkpoints.restore(abstract())[0] == 30
        checkpoints.save(40, make_state(40))
        checkpoints.wait()
        assert sorted(os.listdir(tmp_path)) == [".writer", "shards", "step_00000040"]
        assert os.listdir(tmp_path / "shards") == ["step_00000040"]


def test_a_save_that_the_end_of_the_program_cut_off_is_told(tmp_path):
    code = (
        "import sys; from test_checkpoint_faults import *; Checkpointer(sys.argv[1]).save(1, make_state(1, 3_000_000))"
    )
    done = run_python(code, tmp_path)
    saved = Checkpointer(tmp_path, read_only=True).latest() == 1  # where Python let the save finish
    assert saved or "step 1 was NOT saved: the program ended without closing" in done.stderr, done.stderr
    assert "Traceback" not in done.stderr


# ---- SIGKILL


def run_python(code: str, *arguments) -> subprocess.CompletedProcess:
    """Runs a program in a process of its own, which may import this file."""
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    command = [sys.executable, "-W", "ignore", "-c", code, *map(str, arguments)]
    return subprocess.run(
        command, env=os.environ | {"PYTHONPATH": path, "XLA_FLAGS": ""}, capture_output=True, text=True
    )


KILLED = """
import os, shutil, signal, sys, threading
from pathlib import Path
import jax, numpy as np
from deepseek_jax.storage import Store
from deepseek_jax.train.checkpoint import manifest
from deepseek_jax.train.checkpoint.checkpointer import Checkpointer
from test_checkpoint_faults import make_state

def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

def die_at(owner, name, call):
    '''The process dies when it enters `name` for the call-th time from now on.'''
    inner, calls = getattr(owner, name), iter(range(1, 10**6))
    def entered(*args, **kwargs):
        if next(calls) == call:
            die()
        return inner(*args, **kwargs)
    setattr(owner, name, entered)

owners = {"write": Store, "write_if_absent": Store, "rmtree": shutil}
root = Path(sys.argv[1])
for case in sys.argv[2:]:
    child = os.fork()
    if not child:
        with Checkpointer(root / case, keep=2) as checkpoints:
            for step in range(1, 1000):
                checkpoints.save(step, make_state(step), {"config": {"n": step}})
                (root / case / f"begun_{step:04d}").touch()
                if step == 2:
                    checkpoints.wait()
                    where, number = case.split(":")
                    if where == "after":
                        threading.Timer(float(number), die).start()
                    else:
                        die_at(owners.get(where, manifest), where, int(number))
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
"""


@pytest.mark.slow
def test_sigkill_at_any_moment_leaves_a_good_step(tmp_path):
    """Killed at each write of the third save, at the deletion after it, and at odd times."""
    stages = [f"write:{number}" for number in range(1, 6)]  # BEGUN, an object, the list of it, meta.json, config.json
    stages += ["write_if_absent:1", "write_if_absent:2", "rmtree:1", "rmtree:2"]  # MANIFEST.json, COMMIT
    cases = stages + [f"after:{seconds:.6f}" for seconds in RNG.uniform(0, 0.4, size=2)]
    done = run_python(KILLED, tmp_path, *cases)
    assert done.returncode == 0, done.stderr
    for case in cases:
        told = []
        with Checkpointer(tmp_path / case, keep=2, warn=told.append) as checkpoints:
            begun = len(list((tmp_path / case).glob("begun_*")))
            step, state, meta = checkpoints.restore(abstract())
            assert step >= begun - 1 and meta == {"config": {"n": step}}, case
            assert_is(state, step)
            assert all("never finished" in message for message in told), (case, told)
            checkpoints.save(step + 1, make_state(step + 1))
            assert checkpoints.wait() and checkpoints.steps()[-2:] == [step, step + 1]
        for folder in (tmp_path / case, tmp_path / case / "shards"):
            left = {name for name in os.listdir(folder) if name.startswith("step_")}
            assert left == {f"step_{step:08d}", f"step_{step + 1:08d}"}, case
