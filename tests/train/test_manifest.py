"""A manifest that COMMIT vouches for and that is wrong all the same: refused by name, and the step before is used."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.errors import UserError
from deepseek_jax.train.checkpoint import manifest
from deepseek_jax.train.checkpoint.checkpointer import Checkpointer
from deepseek_jax.train.checkpoint.streamed import StreamedStep

ARRAYS = {"params/w": ((4,), "float32"), "step": ((), "int32")}
ABSTRACT = {"params": {"w": jax.ShapeDtypeStruct((4,), jnp.float32)}, "step": jax.ShapeDtypeStruct((), jnp.int32)}


@pytest.fixture(scope="module")
def intact(tmp_path_factory):
    """A directory with steps 1 and 2."""
    directory = tmp_path_factory.mktemp("intact")
    for step in (1, 2):
        with StreamedStep(directory, step, ARRAYS, source="a test") as writer:
            writer.write("params/w", (), np.full(4, step, np.float32))
            writer.write("step", (), np.int32(step))
            writer.commit({"config": {"n": step}})
    return directory


@pytest.fixture
def run(intact, tmp_path):
    """A copy of it, to be damaged."""
    return shutil.copytree(intact, tmp_path, dirs_exist_ok=True)


def poison(path, content: bytes):
    """Replaces the manifest of step 2 and the marker that proves it."""
    (path / manifest.MANIFEST).write_bytes(content)
    (path / manifest.COMMIT).write_bytes(manifest._marker(2, content))


def restored(run) -> tuple[int, list[str]]:
    messages = []
    checkpoints = Checkpointer(run, read_only=True, warn=messages.append)
    step, state, meta = checkpoints.restore(ABSTRACT)
    assert float(state["params"]["w"][0]) == int(state["step"]) == meta["config"]["n"] == step
    return step, messages


def file_named(name: str, entry: object = None):
    return lambda m: m["files"].update({name: {"size": 0, "sha256": ""} if entry is None else entry})


def array(**entry: object):
    return lambda m: m["arrays"]["params/w"].update(entry)


CASES = {
    "no files": (lambda m: m.update(files={}), "lists no file meta.json"),
    "files as a list": (lambda m: m.update(files=[]), "has no table of files"),
    "files absent": (lambda m: m.pop("files"), "has no table of files"),
    "arrays absent": (lambda m: m.pop("arrays"), "has no table of arrays"),
    "arrays as a list": (lambda m: m.update(arrays=[]), "has no table of arrays"),
    "format absent": (lambda m: m.pop("format"), "has format None, expected 1 or 2"),
    "format as text": (lambda m: m.update(format="1"), "has format '1', expected 1 or 2"),
    "format true": (lambda m: m.update(format=True), "has format True, expected 1 or 2"),
    "a later format": (lambda m: m.update(format=3), "has format 3, expected 1 or 2"),
    "another step": (lambda m: m.update(step=1), "has step 1, expected 2"),
    "an absolute path": (file_named("/etc/passwd"), "lists '/etc/passwd': expected a path inside the step"),
    "a path upwards": (file_named("../step_00000001/meta.json"), "expected a path inside the step"),
    "a path that turns back": (file_named("arrays/../../x"), "expected a path inside the step"),
    "an empty path": (file_named(""), "lists '': expected a path inside the step"),
    "a path with a NUL": (file_named("a\0b"), "expected a path inside the step"),
    "a lone surrogate": (file_named("a\ud800"), "is not a file's name"),
    "a folder": (file_named("arrays"), "arrays cannot be read"),
    "an entry of another type": (file_named("meta.json", []), "lists 'meta.json' without a valid size and sha256"),
    "a negative size": (file_named("meta.json", {"size": -1, "sha256": ""}), "without a valid size"),
    "a size that is true": (file_named("meta.json", {"size": True, "sha256": ""}), "without a valid size"),
    "no hash": (file_named("meta.json", {"size": 3}), "without a valid size and sha256"),
    "an array without a table": (
        lambda m: m["arrays"].update({"step": None}),
        "lists array 'step' without a valid shape",
    ),
    "a shape that is text": (array(shape="4"), "lists array 'params/w' without a valid shape"),
    "a negative shape": (array(shape=[-4]), "without a valid shape and dtype"),
    "an unknown dtype": (array(dtype="float33"), "without a valid shape and dtype"),
    "no dtype": (lambda m: m["arrays"]["step"].pop("dtype"), "without a valid shape and dtype"),
    "a file left out": (lambda m: m["files"].pop("config.json"), "config.json is not listed"),
    "no metadata": (lambda m: m["files"].pop("meta.json"), "lists no file meta.json"),
    "a chunk left out": (lambda m: m["files"].pop("arrays/params.w/0"), "arrays/params.w/0 is not listed"),
}


@pytest.mark.parametrize("case", CASES)
def test_a_poisoned_manifest_is_refused_and_the_step_before_is_used(run, case):
    change, reason = CASES[case]
    path = manifest.step_dir(run, 2)
    content = json.loads((path / manifest.MANIFEST).read_bytes())
    change(content)
    poison(path, json.dumps(content).encode())
    step, messages = restored(run)
    assert step == 1 and len(messages) == 1
    assert messages[0].startswith("damaged, not used: step 2: ") and reason in messages[0]
    with pytest.raises(UserError, match="step 2: .* or choose another step"):
        Checkpointer(run, read_only=True).restore(ABSTRACT, step=2)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "is not JSON"),
        (b"{", "is not JSON"),
        (b"\xff\xfe", "is not JSON"),
        (b"[" * 100_000, "is not JSON"),
        (b"[]", "holds a list, expected an object"),
        (b"null", "holds a NoneType, expected an object"),
    ],
    ids=["empty", "torn", "not text", "very deep", "a list", "null"],
)
def test_a_manifest_that_is_no_object(run, content, reason):
    poison(manifest.step_dir(run, 2), content)
    step, messages = restored(run)
    assert step == 1 and reason in messages[0]


def test_the_manifest_as_written_is_accepted(run):
    path = manifest.step_dir(run, 2)
    poison(path, json.dumps(json.loads((path / manifest.MANIFEST).read_bytes())).encode())
    assert restored(run) == (2, [])
