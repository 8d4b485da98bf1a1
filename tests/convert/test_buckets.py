"""Published weights in a bucket: read and written as on a disk, a tensor at a time; what is not whole is noticed."""

import json
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from deepseek_jax import storage
from deepseek_jax.convert import fetched, hf, safetensors
from deepseek_jax.convert.safetensors import write
from deepseek_jax.errors import UserError
from deepseek_jax.launch import convert, export
from deepseek_jax.train.checkpoint.streamed import StepReader
from deepseek_jax.weights import open_weights
from tests import buckets
from tests.convert.test_convert_verb import TINY, TOKENIZER, synthetic

MB = 2**20


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> Path:
    """A directory as V3 is published, in several shards."""
    directory = tmp_path_factory.mktemp("published") / "TinyV3"
    synthetic.write(directory, TINY, shard_bytes=400_000)
    (directory / "tokenizer.json").write_text(json.dumps(TOKENIZER))
    (directory / "generation_config.json").write_text(json.dumps({"temperature": 0.6}))
    return directory


@pytest.fixture(params=buckets.FOUND)
def bucket(request, tmp_path, monkeypatch) -> storage.Remote:
    """A place in a bucket where nothing is yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    if request.param == "folder":
        buckets.on_disk(tmp_path / "buckets", monkeypatch)
        return storage.place("gs://b/place")
    for variable, value in buckets.variables(request.param).items():
        monkeypatch.setenv(variable, value)
    return storage.place(buckets.new_place(request.param, tmp_path))


def uploaded(directory: Path, where: storage.Remote) -> storage.Remote:
    for file in directory.iterdir():
        storage.open_store(where).write(file.name, file.read_bytes())
    fetched.fetch.cache_clear()
    return where


def contents(tensors: safetensors.Tensors) -> dict[str, bytes]:
    return {name: tensors.read(name).tobytes() for name in tensors.names()}


def test_convert_and_export_do_as_with_a_disk(bucket, published, tmp_path):
    """The checkpoint, the exported tensors and the files beside them are the same, whatever they come from."""
    source = uploaded(published, bucket / "TinyV3")
    workdirs = [tmp_path / "there", tmp_path / "here"]
    for where, workdir in zip((source, published), workdirs, strict=True):
        assert convert.main([f"--from={where}", f"--workdir={workdir}"]) == 0
    there, here = (StepReader(workdir / "checkpoints", 0) for workdir in workdirs)
    assert there.arrays == here.arrays
    assert all(there(name).tobytes() == here(name).tobytes() for name in here.arrays)
    assert (tmp_path / "there/tokenizer.json").read_bytes() == (published / "tokenizer.json").read_bytes()
    assert open_weights(str(source)).config.model == open_weights(published).config.model

    targets = [bucket / "exported", tmp_path / "exported"]
    for target in targets:
        assert export.main([f"--workdir={workdirs[0]}", f"--to={target}", "--dtype=fp8"]) == 0
    fetched.fetch.cache_clear()
    sent, written = hf.open_published(targets[0]), hf.open_published(targets[1])
    assert contents(sent.tensors) == contents(written.tensors) and sent.config == written.config
    small = {file.name for file in targets[1].iterdir() if file.suffix != ".safetensors"}
    assert {name for name in storage.open_store(targets[0]).names() if not name.endswith(".safetensors")} == small
    with pytest.raises(UserError, match="not empty .config.json"):
        export.main([f"--workdir={workdirs[0]}", f"--to={targets[0]}"])


def test_an_export_that_was_killed_is_noticed_and_done_again(bucket, monkeypatch):
    store, entry = storage.open_store(bucket), safetensors.Entry("a", (2,), "F32", lambda: np.ones(2, np.float32))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(write, "_send_file", lambda store, name, *_: (_ for _ in ()).throw(KeyboardInterrupt))
        hf.write.__globals__["_send"](store, [entry], MB, {})
    store.write("model-00001-of-00002.safetensors", b"half")
    fetched.fetch.cache_clear()
    with pytest.raises(UserError, match="an export to this place is under way, or was not finished"):
        hf.open_published(bucket)
    assert fetched.is_published(bucket)  # a verb that reads weights says the same, and nothing of checkpoints
    export.check_empty(bucket)
    hf.write.__globals__["_send"](store, [entry], MB, {"config.json": b"{}"})
    assert store.names() == ["config.json", "model.safetensors"]
    with pytest.raises(UserError, match="not empty"):
        export.check_empty(bucket)


@pytest.fixture
def place(tmp_path, monkeypatch) -> storage.Remote:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    buckets.on_disk(tmp_path / "buckets", monkeypatch)
    return storage.place("gs://b/place")


def test_processes_of_a_host_share_the_folder_of_small_files(place, tmp_path, monkeypatch):
    """What another one is writing stays, what it deletes raises nothing; a cache that cannot be written is named."""
    store = storage.open_store(place)
    store.write("config.json", b"{")
    with pytest.raises(UserError, match="^gs://b/place/config.json: "):  # not the copy that is read
        hf.open_published(place)
    store.write("config.json", b"{}")
    fetched.fetch.cache_clear()
    folder = fetched.fetch(place)
    (folder / "config.json.1.partial").write_bytes(b"")
    (folder / "old.json").write_bytes(b"")
    unlink = Path.unlink
    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", lambda file, **words: (unlink(file), unlink(file, **words)))
        fetched.fetch.cache_clear()
        assert fetched.fetch(place) == folder
    assert {file.name for file in folder.iterdir()} == {"config.json", "config.json.1.partial"}
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    fetched.fetch.cache_clear()
    with pytest.raises(UserError, match="small files of gs://b/place cannot be kept there .*Set XDG_CACHE_HOME"):
        fetched.fetch(place)


def test_an_export_deletes_nothing_but_what_an_export_has_left(place):
    store = storage.open_store(place)
    for name in (fetched.UNFINISHED, "model-00001-of-00002.safetensors", "config.json", "tokenizer.model"):
        store.write(name, b"left")
    export.check_empty(place)
    others = ["notes.txt", "runs/a/config.json", "runs/a/model.safetensors"]
    for name in others:
        store.write(name, b"mine")
    with pytest.raises(UserError, match="not empty .notes.txt, runs/a/config.json"):
        export.check_empty(place)
    hf.write.__globals__["_send"](store, [safetensors.Entry("a", (1,), "F32", lambda: np.ones(1, np.float32))], MB, {})
    assert store.names() == ["model.safetensors", *others]
    with pytest.raises(UserError, match="already holds"):
        hf.write.__globals__["_send"](store, [], MB, {})
    assert store.names() == ["model.safetensors", *others]  # it does not count as unfinished


@pytest.mark.parametrize("is_over", [False, True])
def test_two_exports_to_one_place_do_not_mix_unnoticed(place, is_over):
    """The second begins, and may end, while the first one writes."""
    store = storage.open_store(place)

    def second() -> np.ndarray:
        store.write(fetched.UNFINISHED, b"another")
        if is_over:
            store.delete(fetched.UNFINISHED)
        return np.ones(1, np.float32)

    with pytest.raises(UserError, match="another export to this place has begun meanwhile"):
        hf.write.__globals__["_send"](store, [safetensors.Entry("a", (1,), "F32", second)], MB, {"config.json": b"{}"})
    fetched.fetch.cache_clear()
    with pytest.raises(UserError, match="was not finished"):
        fetched.fetch(place)


def test_what_is_cut_or_replaced_is_noticed(bucket, tmp_path):
    safetensors.write_directory(bucket, [safetensors.Entry("a", (9,), "F32", lambda: np.arange(9, dtype=np.float32))])
    store, name = storage.open_store(bucket), "model.safetensors"
    tensors, whole = safetensors.open_directory(tmp_path, bucket), store.read(name)
    store.write(name, whole[:-4] + b"\1\1\1\1")
    with pytest.raises(UserError, match="was replaced or changed"):
        tensors.read("a")
    for content, error in ((whole[:-1], "truncated"), (whole + b"\0", "longer"), (whole[:5], "too few")):
        store.write(name, content)
        with pytest.raises(UserError, match=error):
            safetensors.open_directory(tmp_path, bucket)
    with pytest.raises(UserError, match="already holds 'model.safetensors'"):
        safetensors.write_directory(bucket, [])


def test_memory_holds_one_tensor_or_one_shard(tmp_path, monkeypatch):
    """Bytes held by Python and NumPy at most, while 24 MiB go to a bucket and come back in tensors of 2 MiB."""
    buckets.on_disk(tmp_path, monkeypatch)
    monkeypatch.setattr(storage, "PART_BYTES", MB // 8)
    monkeypatch.setattr(write, "SENT_SHARD_BYTES", 2 * MB)
    entries = [
        safetensors.Entry(f"t{n}", (MB // 2,), "F32", lambda n=n: np.full(MB // 2, n, np.float32)) for n in range(12)
    ]
    where = storage.place("gs://b/model")

    def peak(work) -> float:
        tracemalloc.start()
        try:
            work()
            return tracemalloc.get_traced_memory()[1] / MB
        finally:
            tracemalloc.stop()

    def read() -> None:
        tensors = safetensors.open_directory(folder, where)
        for n, name in enumerate(tensors.names()):
            assert tensors.read(name)[-1] == int(name[1:]), n

    sent = peak(lambda: safetensors.write_directory(where, entries))
    folder = tmp_path / "index"
    folder.mkdir()
    (folder / safetensors.INDEX).write_bytes(storage.open_store(where).read(safetensors.INDEX))
    assert sent < 2 + 2 + 0.5  # a tensor and its shard
    assert peak(read) < 2 * 2 + 4 / 8 + 0.5  # a tensor, the one before it, and the parts under way
