"""Safetensors: files are read back as written, here and by the published library; doubtful files are rejected."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
import tracemalloc

import ml_dtypes
import numpy as np
import pytest
import safetensors as library
import safetensors.numpy

from deepseek_jax.convert.safetensors import (
    DTYPES,
    INDEX,
    SINGLE,
    Entry,
    open_directory,
    read_json,
    write_directory,
)
from deepseek_jax.errors import UserError

E4M3, E5M2, E8M0 = (np.dtype(t) for t in (ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2, ml_dtypes.float8_e8m0fnu))


def entries(arrays: dict[str, np.ndarray]) -> list[Entry]:
    return [Entry(name, array.shape, array.dtype, lambda array=array: array) for name, array in arrays.items()]


def one_of_each() -> dict[str, np.ndarray]:
    """Each dtype with an odd number of items, the wide ones where they would be misaligned; a scalar, an empty one."""
    rng = np.random.default_rng(0)
    arrays = {f"b.{name}": rng.integers(0, 2, (3, 5)).astype(DTYPES[name]) for name in reversed(DTYPES)}
    return arrays | {"a.scalar": np.array(3, np.float32), "c.empty": np.zeros((0, 4), np.float16)}


def equal(a: np.ndarray, b: np.ndarray) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


# -- there and back --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("max_shard_bytes", "count"), [(10**9, 1), (150, 6), (1, 18)])
def test_what_is_written_is_read(tmp_path, max_shard_bytes, count):
    arrays = one_of_each()
    write_directory(tmp_path, entries(arrays), max_shard_bytes)
    files = sorted(os.listdir(tmp_path))
    if count == 1:
        assert files == [SINGLE]
    else:
        assert files == [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)] + [INDEX]
        index = json.loads((tmp_path / INDEX).read_text())
        assert list(index["weight_map"]) == list(arrays)
        assert index["metadata"] == {"total_size": sum(array.nbytes for array in arrays.values())}
    tensors = open_directory(tmp_path)
    assert set(tensors.names()) == set(arrays)
    for name, array in arrays.items():
        assert tensors.info(name) == (next(k for k, v in DTYPES.items() if v == array.dtype), array.shape)
        assert "F8_E" in name or equal(tensors.read_dequantized(name), array)
        assert equal(tensors.read(name), array)
        assert not array.size or tensors.read(name).ctypes.data % 64 == 0


def test_of_a_transposed_array_no_second_copy_exists_whole(tmp_path, monkeypatch):
    monkeypatch.setattr("deepseek_jax.convert.safetensors.write.COPIED_BYTES", 100_000)
    array = np.random.default_rng(0).normal(size=(1000, 700)).astype(np.float32)
    views = {"a": array.T, "b": array[::2], "c": array.reshape(10, 100, 700).transpose(2, 0, 1)}
    write_directory(tmp_path / "first", entries(views))  # imports
    tracemalloc.start()
    write_directory(tmp_path / "out", entries(views))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < array.nbytes / 4
    tensors = open_directory(tmp_path / "out")
    assert all(equal(tensors.read(name), view) for name, view in views.items())


def test_equal_tensors_are_told_from_others(tmp_path, monkeypatch):
    monkeypatch.setattr("deepseek_jax.convert.safetensors.read.COMPARED_BYTES", 7)
    array = np.arange(24, dtype=np.int16).reshape(4, 6)
    last = array.copy()
    last[-1, -1] += 1
    arrays = {"a": array, "b": array.copy(), "last": last, "flat": array.reshape(-1), "other": array.view(np.uint16)}
    write_directory(tmp_path, entries(arrays), max_shard_bytes=64)
    tensors = open_directory(tmp_path)
    assert {name for name in arrays if tensors.is_same("a", name)} == {"a", "b"}


def test_pickled_weights_are_told_what_to_do_with(tmp_path):
    (tmp_path / "pytorch_model-00001-of-00002.bin").touch()
    with pytest.raises(UserError, match=r"pytorch_model-00001-of-00002.bin.*transformers"):
        open_directory(tmp_path)


@pytest.mark.parametrize("max_shard_bytes", [10**9, 150])
def test_the_published_library_reads_what_is_written(tmp_path, max_shard_bytes):
    arrays = one_of_each()
    write_directory(tmp_path, entries(arrays), max_shard_bytes)
    seen = set()
    for path in tmp_path.glob("*.safetensors"):
        for name, tensor in library.deserialize(path.read_bytes()):
            assert (tensor["shape"], bytes(tensor["data"])) == ([*arrays[name].shape], arrays[name].tobytes())
            assert DTYPES[tensor["dtype"]] == arrays[name].dtype
            seen.add(name)
        with library.safe_open(path, "numpy") as file:
            assert file.metadata() == {"format": "pt"}
            for name in file.keys():  # noqa: SIM118 - it is not a dict
                if "F8" not in name:  # the library cannot return it to numpy
                    assert equal(file.get_tensor(name), arrays[name])
    assert seen == set(arrays)


def test_what_the_published_library_writes_is_read(tmp_path):
    arrays = {name: array for name, array in one_of_each().items() if "F8" not in name}
    safetensors.numpy.save_file(arrays, tmp_path / SINGLE, {"format": "np"})
    tensors = open_directory(tmp_path)
    assert all(equal(tensors.read(name), array) for name, array in arrays.items())


def test_wide_items_are_aligned_in_the_file(tmp_path):
    write_directory(tmp_path, entries({"odd": np.zeros(3, np.uint8), "wide": np.zeros(2, np.float64)}))
    raw = (tmp_path / SINGLE).read_bytes()
    length = int.from_bytes(raw[:8], "little")
    assert length % 8 == 0 and json.loads(raw[8 : 8 + length])["wide"]["data_offsets"] == [0, 16]


def test_tensors_are_made_one_at_a_time_in_order(tmp_path):
    alive, most, made = 0, 0, []

    class Counted(np.ndarray):
        def __del__(self):
            nonlocal alive
            alive -= self.base is None

    def make(i: int) -> np.ndarray:
        nonlocal alive, most
        alive += 1
        most = max(most, alive)
        made.append(i)
        return Counted((4,), np.float32)

    write_directory(tmp_path, [Entry(f"{i}", (4,), np.float32, lambda i=i: make(i)) for i in range(6)], 40)
    assert made == [*range(6)] and most == 1


def test_links_may_lead_out_of_the_directory_as_in_a_download_cache(tmp_path):
    write_directory(tmp_path / "blobs", entries({"w": np.arange(3)}))
    (tmp_path / "snapshot").mkdir()
    (tmp_path / "snapshot" / SINGLE).symlink_to(f"../blobs/{SINGLE}")
    assert equal(open_directory(tmp_path / "snapshot").read("w"), np.arange(3))


def test_many_shards_need_few_open_files(tmp_path):
    arrays = {f"{i:03d}": np.full(2, i, np.int32) for i in range(80)}
    write_directory(tmp_path, entries(arrays), 1)
    tensors = open_directory(tmp_path)
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    assert all(equal(tensors.read(name), arrays[name]) for name in [*arrays, *arrays])
    if before:
        assert len(os.listdir("/proc/self/fd")) <= before + 32


def test_reading_from_several_threads(tmp_path):
    arrays = {f"{i:03d}": np.full(1000, i, np.int32) for i in range(50)}
    write_directory(tmp_path, entries(arrays), 4000)
    tensors, wrong = open_directory(tmp_path), []

    def read() -> None:
        for name in arrays:
            if not equal(tensors.read(name), arrays[name]):
                wrong.append(name)

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


# -- 8-bit weights ---------------------------------------------------------------------------------------------------


def quantized(shape: tuple[int, ...], block: tuple[int, int], code=E4M3, scale=np.float32) -> dict[str, np.ndarray]:
    """Every finite code, and scales of any exponent that a weight may have."""
    rng = np.random.default_rng(0)
    finite = 0x7F if code == E4M3 else 0x7C
    codes = (rng.integers(0, finite, shape) | rng.integers(0, 2, shape) << 7).astype(np.uint8).view(code)
    blocks = (*shape[:-2], *(-(-n // b) for n, b in zip(shape[-2:], block, strict=True)))
    scales = (rng.uniform(1, 2, blocks) * 2.0 ** rng.integers(-20, 5, blocks)).astype(np.float32)
    return {"w": codes, "w_scale_inv": 2.0 ** np.floor(np.log2(scales)) if scale == E8M0 else scales} | (
        {"w_scale_inv": (2.0 ** np.floor(np.log2(scales))).astype(E8M0)} if scale == E8M0 else {}
    )


def by_definition(w: np.ndarray, scale_inv: np.ndarray, block: tuple[int, int], dtype) -> np.ndarray:
    spread = scale_inv.astype(np.float32).repeat(block[0], -2).repeat(block[1], -1)[..., : w.shape[-2], : w.shape[-1]]
    return (w.astype(np.float32) * spread).astype(dtype)


@pytest.mark.parametrize("dtype", [None, np.float32])
@pytest.mark.parametrize("code", [E4M3, E5M2])
@pytest.mark.parametrize("scale", [np.float32, E8M0])
@pytest.mark.parametrize(
    ("shape", "block"),
    [((300, 200), (128, 128)), ((128, 256), (128, 128)), ((1, 1), (128, 128)), ((2, 5, 7), (2, 3)), ((0, 5), (2, 2))],
)
def test_8_bit_weights_equal_the_definition_to_the_last_bit(tmp_path, shape, block, scale, code, dtype):
    arrays = quantized(shape, block, code, scale)
    write_directory(tmp_path, entries(arrays))
    found = open_directory(tmp_path).read_dequantized("w", dtype, block)
    assert equal(found, by_definition(arrays["w"], arrays["w_scale_inv"], block, dtype or ml_dtypes.bfloat16))
    assert not found.size or found.ctypes.data % 64 == 0


def test_dequantising_takes_little_more_memory_than_the_result(tmp_path):
    arrays = quantized((4096, 1024), (128, 128))
    write_directory(tmp_path, entries(arrays))
    tensors = open_directory(tmp_path)
    tracemalloc.start()
    result = tensors.read_dequantized("w")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < result.nbytes + 8 * 4e6


def with_item(array: np.ndarray, value: float) -> np.ndarray:
    array = array.copy()
    array[-1, -1] = value
    return array


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda a: a.pop("w_scale_inv"), "'w': 8-bit weights, but their scales 'w_scale_inv' are missing"),
        (
            lambda a: a.update(w_scale_inv=a["w_scale_inv"].T),
            r"\[2, 3\]: expected \[3, 2\], .* \[5, 4\]",
        ),
        (lambda a: a.update(w=a["w"][0]), "expected two axes or more"),
        (lambda a: a.update(w_scale_inv=a["w_scale_inv"].astype(np.int32)), "dtype I32: expected scales in F32 or"),
        (lambda a: a.update(w_scale_inv=with_item(a["w_scale_inv"], np.nan)), r"nan at \[2, 1\] is not a valid scale"),
        (lambda a: a.update(w_scale_inv=with_item(a["w_scale_inv"], np.inf)), r"inf at \[2, 1\] is not a valid scale"),
        (lambda a: a.update(w_scale_inv=with_item(a["w_scale_inv"], -1)), r"-1.0 at \[2, 1\] is not a valid scale"),
        (
            lambda a: a.update(w_scale_inv=with_item(a["w_scale_inv"], 1e38)),
            "1e38|e.37 at .* scale for bfloat16",
        ),
        (lambda a: a.update(w_scale_inv=with_item(a["w_scale_inv"].astype(E8M0), np.nan)), "nan at"),
        (lambda a: a.update(w=with_item(a["w"], np.nan)), "'w': NaN or infinity in row 4, column 3"),
        (lambda a: a.update(w=with_item(a["w"].astype(E5M2), np.inf)), "'w': NaN or infinity in row 4, column 3"),
    ],
)
def test_8_bit_weights_that_make_no_sense_are_refused(tmp_path, change, words):
    arrays = quantized((5, 4), (2, 2))
    change(arrays)
    write_directory(tmp_path, entries(arrays))
    with pytest.raises(UserError, match=words):
        open_directory(tmp_path).read_dequantized("w", block=(2, 2))


# -- refusals --------------------------------------------------------------------------------------------------------


def raw_file(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def tensor(dtype: object = "F32", shape: object = (2,), offsets: object = (0, 8)) -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (b"", "0 bytes, too few"),
        (b"\2\0\0", "3 bytes, too few"),
        (raw_file({}, length=3), "a header of 3 bytes in a file of 10"),
        (raw_file({}, length=2**64 - 1), "a header of 18446744073709551615 bytes"),
        (raw_file(b"x" * 10), "does not start with a brace"),
        (raw_file(b" {}"), "does not start with a brace"),
        (raw_file(b'{"a": \xff}'), "invalid JSON .*utf-8"),
        (raw_file(b'{"a": }'), "invalid JSON"),
        (raw_file(b'{"a": ' + b"9" * 5000 + b"}"), "invalid JSON"),
        (raw_file(b'{"a":' * 10000 + b"1" + b"}" * 10000), "nested too deeply"),
        (raw_file(b'{"a":[' + b"1," * 500_000 + b"1]}"), "more than 250000 values"),
        (raw_file(b'{"a": {"dtype": "F32", "dtype": "F32"}}'), "the key 'dtype' occurs twice"),
        (raw_file(b'{"a":1,"a":1}'), "the key 'a' occurs twice"),
        (raw_file({"": tensor()}, bytes(8)), "invalid name"),
        (raw_file({"a\n": tensor()}, bytes(8)), r"'a\\n': invalid name"),
        (raw_file(b'{"\\ud800": 1}'), r"'\\ud800': invalid name"),
        (raw_file({"a": []}), "expected dtype, shape and data_offsets"),
        (raw_file({"a": tensor() | {"more": 1}}, bytes(8)), "and nothing else"),
        (raw_file({"a": tensor("F99")}, bytes(8)), "dtype 'F99' is unknown: expected one of F64,"),
        (raw_file({"a": tensor([])}, bytes(8)), r"dtype \[\] is unknown"),
        (raw_file({"a": tensor(shape=2)}, bytes(8)), "shape 2: expected a list"),
        (raw_file({"a": tensor(shape=[-1, -2])}, bytes(8)), r"shape \[-1, -2\]: expected a list"),
        (raw_file({"a": tensor(shape=[2.0])}, bytes(8)), r"shape \[2.0\]: expected a list"),
        (raw_file({"a": tensor(shape=[True, 2])}, bytes(8)), r"shape \[True, 2\]: expected a list"),
        (raw_file({"a": tensor(shape=[1] * 33)}, bytes(8)), "shape .*: expected a list of up to 32"),
        (raw_file({"a": tensor(shape=[2**64])}, bytes(8)), "expected a list"),
        (raw_file({"a": tensor(shape=[2**32, 2**31])}, bytes(8)), "which takes 36893488147419103232"),
        (raw_file({"a": tensor(shape=[2**62, 2**62, 0], offsets=(0, 0))}), "exceeds any memory"),
        (raw_file({"a": tensor(shape=[3])}, bytes(8)), "8 bytes for F32 of shape .3., which takes 12"),
        (raw_file({"a": tensor(offsets=[8, 0])}, bytes(8)), "-8 bytes for F32"),
        (raw_file({"a": tensor(offsets=[-8, 0])}, bytes(8)), "expected two positions"),
        (raw_file({"a": tensor(offsets=[0, 4, 8])}, bytes(8)), "expected two positions"),
        (raw_file({"a": tensor(offsets=[0, "8"])}, bytes(8)), "expected two positions"),
        (raw_file({"a": tensor(offsets=[4, 12])}, bytes(12)), "'a' leaves 4 bytes before it unused"),
        (raw_file({"a": tensor(), "b": tensor(offsets=[4, 12])}, bytes(12)), "'b' overlaps"),
        (raw_file({"a": tensor(), "b": tensor()}, bytes(8)), "'b' overlaps"),
        (raw_file({"a": tensor()}, bytes(7)), "truncated: .* bytes, expected .*"),
        (raw_file({"a": tensor()}, bytes(9)), "longer than its header says"),
        (raw_file({"a": tensor(offsets=[2**60, 2**60 + 8])}, bytes(8)), "unused"),
        (raw_file({"__metadata__": {"a": 1}}), "__metadata__: expected a map"),
    ],
)
def test_a_doubtful_file_is_refused(tmp_path, raw, words):
    (tmp_path / SINGLE).write_bytes(raw)
    with pytest.raises(UserError, match=words) as caught:
        open_directory(tmp_path)
    assert str(tmp_path / SINGLE) in str(caught.value) and str(caught.value).count("\n") <= 1


def test_a_header_beyond_all_measure_is_not_read(tmp_path):
    with open(tmp_path / SINGLE, "wb") as file:
        file.write((10**9).to_bytes(8, "little") + b"{")
        file.truncate(2 * 10**9)  # takes no space
    with pytest.raises(UserError, match="1000000000 bytes of JSON; at most"):
        open_directory(tmp_path)


def two_shards(path) -> dict:
    """Writes a in shard 1 and b in shard 2; returns the index."""
    write_directory(path, entries({"a": np.zeros(2, np.float32), "b": np.ones(2, np.float32)}), 8)
    return json.loads((path / INDEX).read_text())


SHARD_1, SHARD_2 = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda i: i.clear(), "no weight_map"),
        (lambda i: i.update(weight_map=[]), "no weight_map"),
        (lambda i: i.update(weight_map={}), "no weight_map"),
        (lambda i: i["weight_map"].update(a=1), "places 'a' in 1: expected the plain name"),
        (lambda i: i["weight_map"].update(a=f"../{SHARD_1}"), "expected the plain name"),
        (lambda i: i["weight_map"].update(a=f"/tmp/{SHARD_1}"), "expected the plain name"),
        (lambda i: i["weight_map"].update(a=f"./{SHARD_1}"), "expected the plain name"),
        (lambda i: i["weight_map"].update(a=f"{SHARD_1}\0"), "expected the plain name"),
        (lambda i: i["weight_map"].update(a=".."), "expected the plain name"),
        (lambda i: i["weight_map"].update(a=""), "expected the plain name"),
        (lambda i: i["weight_map"].update(a="other.safetensors"), "other.safetensors: missing .1 of 2"),
        (lambda i: i["weight_map"].update(c=SHARD_1), f"{SHARD_1}: does not hold 'c'"),
        (lambda i: i["weight_map"].pop("b"), None),
        (lambda i: i["weight_map"].update(a=SHARD_2), f"{SHARD_2}: does not hold 'a'"),
        (lambda i: i["weight_map"].update(a=SHARD_2, b=SHARD_1), "does not hold"),
    ],
)
def test_an_index_that_does_not_fit_is_refused(tmp_path, change, words):
    index = two_shards(tmp_path)
    change(index)
    (tmp_path / INDEX).write_text(json.dumps(index))
    if words is None:  # a file that the index does not name is not read
        assert open_directory(tmp_path).names() == ["a"]
        return
    with pytest.raises(UserError, match=words):
        open_directory(tmp_path)


def test_a_tensor_that_the_index_lacks_is_refused(tmp_path):
    write_directory(tmp_path, entries({name: np.zeros(2, np.float32) for name in "abc"}), 16)
    index = json.loads((tmp_path / INDEX).read_text())
    del index["weight_map"]["a"]
    (tmp_path / INDEX).write_text(json.dumps(index))
    with pytest.raises(UserError, match=f"{SHARD_1}: holds 'a', which .* does not place"):
        open_directory(tmp_path)


def test_what_is_no_directory_of_weights_is_refused(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        open_directory(tmp_path / "nowhere")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="is not a directory"):
        open_directory(tmp_path / "file")
    with pytest.raises(UserError, match=f"no {SINGLE} and no {INDEX}.$"):
        open_directory(tmp_path)
    two_shards(tmp_path / "shards")
    (tmp_path / "shards" / INDEX).unlink()
    with pytest.raises(UserError, match=f"It holds '{SHARD_1}', '{SHARD_2}': an unfinished"):
        open_directory(tmp_path / "shards")
    two_shards(tmp_path / "both")
    (tmp_path / "both" / SINGLE).touch()
    with pytest.raises(UserError, match="has both"):
        open_directory(tmp_path / "both")


def test_pipes_directories_and_dead_links_are_refused_at_once(tmp_path):
    for name, make in {
        "pipe": os.mkfifo,
        "directory": os.mkdir,
        "dead link": lambda path: os.symlink("nowhere", path),
        "loop": lambda path: os.symlink(SINGLE, path),
        "device": lambda path: os.symlink("/dev/zero", path),
    }.items():
        (tmp_path / name).mkdir()
        make(tmp_path / name / SINGLE)
        with pytest.raises(UserError, match="not a regular file|cannot be read"):
            open_directory(tmp_path / name)


def test_a_file_without_permission_is_refused(tmp_path):
    two_shards(tmp_path)
    (tmp_path / SHARD_2).chmod(0)
    if os.access(tmp_path / SHARD_2, os.R_OK):
        pytest.skip("root may read anything")
    with pytest.raises(UserError, match="cannot be read .Permission denied"):
        open_directory(tmp_path)


def test_a_file_that_shrinks_after_opening_and_a_lying_bool_are_refused(tmp_path):
    write_directory(tmp_path, entries({"a": np.zeros(100, np.float32), "b": np.ones(1, np.bool_)}))
    tensors = open_directory(tmp_path)
    raw = (tmp_path / SINGLE).read_bytes()
    (tmp_path / SINGLE).write_bytes(raw[:-1] + b"\2")
    with pytest.raises(UserError, match="'b': a BOOL holds a byte other"):
        open_directory(tmp_path).read("b")
    os.truncate(tmp_path / SINGLE, 300)
    with pytest.raises(UserError, match="was replaced or changed"):
        tensors.read("a")
    with pytest.raises(UserError, match="no tensor 'c'"):
        tensors.read("c")


@pytest.mark.parametrize("text", ["[1]", "", "{", '{"a": 1, "a": 2}', "\ufeff{}"])
def test_json_files_hold_one_object(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match="config.json: "):
        read_json(tmp_path / "config.json")
    (tmp_path / "config.json").write_text(' {"a": [1.5, null, "ü"]}\n')
    assert read_json(tmp_path / "config.json") == {"a": [1.5, None, "ü"]}


# -- writing ---------------------------------------------------------------------------------------------------------


def test_weights_that_are_there_are_not_written_over(tmp_path):
    two_shards(tmp_path)
    with pytest.raises(UserError, match="already holds"):
        write_directory(tmp_path, entries({"a": np.zeros(1)}))


def test_a_failure_leaves_nothing_that_looks_finished(tmp_path):
    def fail() -> np.ndarray:
        raise RuntimeError("no array")

    zeros = entries({"a": np.zeros(2, np.float32)})
    for bad in (fail, lambda: np.zeros(3, np.float32), lambda: np.zeros(2, np.float64)):
        with pytest.raises((RuntimeError, ValueError)):
            write_directory(tmp_path, [*zeros, Entry("b", (2,), np.float32, bad)], 8)
        assert os.listdir(tmp_path) == []
    with pytest.raises(ValueError, match="unique"):
        write_directory(tmp_path, zeros * 2)
    with pytest.raises(UserError, match="GB to write"):
        write_directory(tmp_path, [Entry("a", (2**58,), np.float64, fail)])
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written .(Not a directory|File exists)"):
        write_directory(tmp_path / "file", zeros)


KILLED = """
import sys, time, numpy as np
from deepseek_jax.convert.safetensors import write_directory
def slow():
    print("begun", flush=True)
    time.sleep(60)
write_directory(sys.argv[1], [("a", (2,), "F32", lambda: np.zeros(2, np.float32)), ("b", (2,), "F32", slow)], 8)
"""


def test_a_killed_export_does_not_look_finished_and_can_be_begun_again(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", KILLED, tmp_path], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"begun\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert all(name.endswith(".partial") for name in os.listdir(tmp_path))
    with pytest.raises(UserError, match="unfinished"):
        open_directory(tmp_path)
    two_shards(tmp_path)
    assert sorted(os.listdir(tmp_path)) == [SHARD_1, SHARD_2, INDEX]
    assert open_directory(tmp_path).names() == ["a", "b"]


def test_hostile_headers_are_refused_quickly_and_in_little_memory(tmp_path):
    """The margin in time is wide here; the fuzz script measures it."""
    for text in (b'{"' + b"a" * 23_000_000 + b'\\ud83d\\ude00":1}', b'{"a":[' + b'{"a":1},' * 190_000 + b"1]}"):
        (tmp_path / SINGLE).write_bytes(raw_file(text))
        begin = time.monotonic()
        tracemalloc.start()
        with pytest.raises(UserError):
            open_directory(tmp_path)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 200e6 and time.monotonic() - begin < 30
