"""The verbs convert and export: the output equals the input, also after a kill, from FP8 or from a trained run."""

import importlib.util
import io
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from flax.traverse_util import unflatten_dict
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import deepseek_jax
from deepseek_jax.abstract_model import abstract_weights
from deepseek_jax.convert import hf, safetensors
from deepseek_jax.convert.safetensors.files import OpenFile
from deepseek_jax.errors import UserError
from deepseek_jax.launch import _conversion, _progress, convert, export
from deepseek_jax.saved_config import to_json
from deepseek_jax.train.checkpoint import manifest, streamed
from deepseek_jax.train.checkpoint.checkpointer import Checkpointer
from deepseek_jax.train.checkpoint.tree import flatten
from deepseek_jax.weights import published_config

GOLDEN = Path(__file__).parent.parent / "golden"
_spec = importlib.util.spec_from_file_location("make_synthetic", Path(__file__).with_name("make_synthetic.py"))
synthetic = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(synthetic)

# V3 with blocks of 128 x 128 that are cut at the edges, in several shards.
TINY = synthetic.V3 | {
    "hidden_size": 160,
    "intermediate_size": 200,
    "kv_lora_rank": 48,
    "moe_intermediate_size": 72,
    "n_group": 2,
    "n_routed_experts": 8,
    "num_attention_heads": 2,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 3,
    "num_key_value_heads": 2,
    "q_lora_rank": 56,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "topk_group": 1,
    "v_head_dim": 24,
    "vocab_size": 320,
}
TENSORS = synthetic.tensors(TINY)
TOKENIZER = {"version": "1.0", "added_tokens": [], "model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}}


@pytest.fixture(scope="module")
def fp8(tmp_path_factory):
    """A directory as V3 is published: FP8, shards, MTP, tokenizer."""
    directory = tmp_path_factory.mktemp("published") / "TinyV3"
    synthetic.write(directory, TINY, shard_bytes=400_000)
    (directory / "tokenizer.json").write_text(json.dumps(TOKENIZER))
    (directory / "tokenizer_config.json").write_text(json.dumps({"eos_token": "a"}))
    (directory / "generation_config.json").write_text(json.dumps({"temperature": 0.6}))
    assert len(list(directory.glob("*.safetensors"))) >= 4
    return directory


@pytest.fixture(scope="module")
def converted(fp8, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "tiny"
    assert convert.main([f"--from={fp8}", f"--workdir={workdir}"]) == 0
    return workdir


def expected(name: str) -> np.ndarray:
    """A published tensor, multiplied with its scales, in bfloat16 or float32: from the definition."""
    dtype, shape = TENSORS[name]
    raw = synthetic.content(name, dtype, shape)
    if dtype != "F8_E4M3":
        return raw.view(ml_dtypes.bfloat16) if dtype == "BF16" else raw
    scale = synthetic.content(name + "_scale_inv", *TENSORS[name + "_scale_inv"])
    rows, columns = (np.arange(n) // 128 for n in shape)
    return (raw.view(ml_dtypes.float8_e4m3fn).astype(np.float32) * scale[rows][:, columns]).astype(ml_dtypes.bfloat16)


def published_names() -> list[str]:
    return [name for name in TENSORS if not name.endswith("_scale_inv")]


def same(a, b) -> bool:
    a, b = np.asarray(a), np.asarray(b)
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def assert_equal_weights(model, other):
    for one, two in ((model.params, other.params), (model.router_bias, other.router_bias)):
        assert jax.tree.structure(one) == jax.tree.structure(two)
        assert all(jax.tree.leaves(jax.tree.map(same, one, two)))


def test_a_converted_model_is_the_published_one(fp8, converted):
    model = deepseek_jax.load(converted)
    assert_equal_weights(model, deepseek_jax.load(fp8))
    config = model.config
    assert (config.name, config.family, config.precision, config.data.seq_len) == ("TinyV3", "v3", "bf16", 163840)
    assert config.data.tokenizer == str(converted / "tokenizer.json") and model.tokenizer.eos_id == 0
    gate = expected("model.layers.2.mlp.experts.5.gate_proj.weight")
    assert same(model.params["moe_blocks"]["experts"]["gate_XDF"][1, 5], gate.T)
    bias = expected("model.layers.3.mlp.gate.e_score_correction_bias")
    assert same(model.router_bias["mtp"]["0"]["block"]["experts"]["router"]["bias_E"], bias)


def test_exported_again_in_bf16_each_tensor_is_the_published_one(converted, tmp_path):
    assert export.main([f"--workdir={converted}", f"--to={tmp_path / 'out'}"]) == 0
    tensors = safetensors.open_directory(tmp_path / "out")
    assert set(tensors.names()) == set(published_names())
    for name in published_names():
        assert same(tensors.read(name), expected(name)), name
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (converted / name).read_bytes()
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text()) == {"temperature": 0.6}
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert {key: config[key] for key in ("n_group", "max_position_embeddings")} == {
        "n_group": 2,
        "max_position_embeddings": 163840,
    }


@pytest.mark.parametrize("dtype", ["fp8", "fp8_ue8m0"])
def test_exported_in_fp8_it_has_the_published_layout_and_converts_again(converted, tmp_path, dtype):
    assert export.main([f"--workdir={converted}", f"--to={tmp_path / 'out'}", f"--dtype={dtype}"]) == 0
    tensors = safetensors.open_directory(tmp_path / "out")
    for name, (stored, shape) in TENSORS.items():
        assert tensors.info(name) == (stored, shape)
    convert.main([f"--from={tmp_path / 'out'}", f"--workdir={tmp_path / 'again'}"])
    model = deepseek_jax.load(tmp_path / "again")
    assert_equal_weights(model, deepseek_jax.load(tmp_path / "out"))
    up = np.asarray(model.params["moe_blocks"]["experts"]["up_XDF"][0, 0], np.float32)
    before = expected("model.layers.1.mlp.experts.0.up_proj.weight").T.astype(np.float32)
    assert np.abs(up - before).max() <= np.abs(before).max() / 16


@pytest.mark.parametrize("name", ["coder", "r1_llama", "moe", "v2_lite", "v3_mtp"])
def test_every_family_goes_there_and_back(name, tmp_path):
    convert.main([f"--from={GOLDEN / name}", f"--workdir={tmp_path / 'run'}"])
    assert_equal_weights(deepseek_jax.load(tmp_path / "run"), deepseek_jax.load(GOLDEN / name))
    export.main([f"--workdir={tmp_path / 'run'}", f"--to={tmp_path / 'out'}", "--dtype=keep"])
    before, after = safetensors.open_directory(GOLDEN / name), safetensors.open_directory(tmp_path / "out")
    for tensor in after.names():
        if tensor in before and not before.is_quantized(tensor):
            assert same(before.read(tensor), after.read(tensor)), tensor
    assert {tensor for tensor in before.names() if not tensor.endswith("_scale_inv")} <= set(after.names())


@pytest.mark.parametrize("dtype, name", [("fp32", "float32"), ("bf16", "bfloat16")])
def test_weights_are_cast_on_request_and_router_biases_never(fp8, tmp_path, dtype, name):
    convert.main([f"--from={fp8}", f"--workdir={tmp_path}", f"--dtype={dtype}"])
    model = deepseek_jax.load(tmp_path)
    assert model.config.precision == dtype
    assert {w.dtype.name for w in jax.tree.leaves(model.params)} == {name}
    assert {w.dtype.name for w in jax.tree.leaves(model.router_bias)} == {"float32"}
    head = expected("lm_head.weight").T.astype(name)
    assert same(model.params["head"]["weight_DV"], head)


def test_a_converted_checkpoint_is_restored_on_a_mesh(fp8, converted):
    mesh = jax.make_mesh((2, 4), ("data", "expert"), axis_types=(AxisType.Auto,) * 2)

    def placed(name: str, shape: tuple) -> NamedSharding:
        is_expert = name.endswith(("_XDF", "_XFD"))
        spec = [None] * (len(shape) - 3) + ["expert", "data", None] if is_expert else []
        return NamedSharding(mesh, P(*spec))

    with Checkpointer(converted / "checkpoints", read_only=True) as checkpoints:
        shapes = checkpoints.shapes()[1]
        expected = {n: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=placed(n, x.shape)) for n, x in shapes.items()}
        state = flatten(checkpoints.restore(unflatten_dict(expected, sep="/"))[1])
    model = deepseek_jax.load(fp8)
    for name, array in flatten({"params": model.params, "router_bias": model.router_bias}).items():
        assert same(state[name], array) and state[name].sharding == expected[name].sharding


KILLED = """
import os, signal, sys
from deepseek_jax.launch import convert
from deepseek_jax.train.checkpoint import streamed
streamed.CHUNK_BYTES = 4096
write, left = streamed.StreamedStep.write, [int(sys.argv[1])]
def write_until(step, *given):
    write(step, *given)
    left[0] -= 1
    if not left[0]:
        step.flush()
        os.kill(os.getpid(), signal.SIGKILL)
streamed.StreamedStep.write = write_until
convert.main(sys.argv[2:])
"""


@pytest.mark.slow
def test_killed_it_goes_on_and_ends_the_same(fp8, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(streamed, "CHUNK_BYTES", 4096)
    written, write = [], streamed.StreamedStep.write
    monkeypatch.setattr(streamed.StreamedStep, "write", lambda *given: (written.append(given[1:3]), write(*given)))
    convert.main([f"--from={fp8}", f"--workdir={tmp_path / 'undisturbed'}"])
    total = len(written)
    words = [f"--from={fp8}", f"--workdir={tmp_path / 'killed'}"]
    for pieces in ("20", "37"):
        command = [sys.executable, "-c", KILLED, pieces, *words]
        assert subprocess.run(command, timeout=120, capture_output=True).returncode == -signal.SIGKILL
        with pytest.raises(UserError, match="step 0 is unfinished"):
            deepseek_jax.load(tmp_path / "killed")
    written.clear()
    capsys.readouterr()
    convert.main(words)
    assert len(written) == total - 20 - 37
    assert "resuming an earlier start" in capsys.readouterr().out
    step = "checkpoints/step_00000000"
    before, after = (manifest.read_manifest(tmp_path / name / step, 0) for name in ("undisturbed", "killed"))
    for found in (before, after):
        del found["files"][manifest.CONFIG]  # names its tokenizer by its path
    assert before == after


def test_the_same_again_does_nothing_and_anything_else_is_refused(fp8, converted, tmp_path, capsys):
    files = {file: file.stat().st_mtime_ns for file in converted.rglob("*")}
    assert convert.main([f"--from={fp8}", f"--workdir={converted}"]) == 0
    assert "its weights are intact: nothing to do" in capsys.readouterr().out
    for words in ([f"--from={GOLDEN / 'llm'}"], [f"--from={fp8}", "--dtype=fp32"]):
        with pytest.raises(UserError, match=r"holds checkpoints of something else, steps \[0\]"):
            convert.main([*words, f"--workdir={converted}"])
    assert files == {file: file.stat().st_mtime_ns for file in converted.rglob("*")}


def test_a_source_that_has_changed_is_not_gone_on_with(fp8, tmp_path, monkeypatch):
    source = tmp_path / "source"
    shutil.copytree(fp8, source)

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(streamed.StreamedStep, "commit", stop)
        with pytest.raises(KeyboardInterrupt):
            convert.main([f"--from={source}", f"--workdir={tmp_path / 'run'}"])
    shard = next(source.glob("*.safetensors"))
    os.utime(shard, ns=(1, 1))
    with pytest.raises(UserError, match="was begun with .* is not finished; now given: .*Delete it"):
        convert.main([f"--from={source}", f"--workdir={tmp_path / 'run'}"])


def changed(shard: Path, how: str) -> None:
    """Replaces a shard by as many other bytes, as an upload or a sync may do."""
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    if how == "replaced":
        (shard.parent / "new").write_bytes(content)
        (shard.parent / "new").rename(shard)
    else:
        shard.write_bytes(content)


@pytest.mark.parametrize("how", ["replaced", "rewritten"])
@pytest.mark.parametrize("number", [0, -1])
def test_a_shard_that_changes_during_the_run_is_noticed(fp8, tmp_path, monkeypatch, how, number):
    """The changed shard was already read (the first) or not yet (the last)."""
    source, run = tmp_path / "source", tmp_path / "run"
    shutil.copytree(fp8, source)
    shard, n_written, write = sorted(source.glob("*.safetensors"))[number], [], streamed.StreamedStep.write

    def write_and_change(*given):
        n_written.append(given[1])
        if len(n_written) == 60:
            changed(shard, how)
        return write(*given)

    with monkeypatch.context() as patch:
        patch.setattr(streamed.StreamedStep, "write", write_and_change)
        with pytest.raises(UserError, match="replaced or changed while"):
            convert.main([f"--from={source}", f"--workdir={run}"])
    assert len(n_written) >= 60 and not manifest.committed_steps(run / "checkpoints")
    with pytest.raises(UserError, match="Delete it and step_00000000.journal"):
        convert.main([f"--from={source}", f"--workdir={run}"])


@pytest.mark.parametrize(
    ("file", "said"),
    [
        ("arrays/params.head.weight_DV/0.0", "arrays/params.head.weight_DV/0.0 has changed"),
        ("meta.json", "meta.json has changed"),
        ("MANIFEST.json", "do not match"),
        ("config.json", "config.json has changed"),
    ],
)
def test_the_same_again_over_a_damaged_result_says_so(fp8, converted, tmp_path, file, said):
    shutil.copytree(converted, tmp_path / "run")
    step = tmp_path / "run" / "checkpoints" / "step_00000000"
    content = bytearray((step / file).read_bytes())
    content[len(content) // 2] ^= 1
    (step / file).write_bytes(content)
    with pytest.raises(UserError, match=f"is damaged: .*{said}.*Delete it and start the same command again"):
        convert.main([f"--from={fp8}", f"--workdir={tmp_path / 'run'}"])
    shutil.rmtree(step)
    convert.main([f"--from={fp8}", f"--workdir={tmp_path / 'run'}"])
    manifest.verify(step, 0)


def test_small_files_that_are_gone_are_copied_again_and_changed_ones_named(fp8, converted, tmp_path, capsys):
    run = shutil.copytree(converted, tmp_path / "run")
    (run / "tokenizer.json").unlink()
    (run / "generation_config.json").write_text('{"temperature": 1.0}')
    convert.main([f"--from={fp8}", f"--workdir={run}"])
    shown = capsys.readouterr()
    assert "weights are intact: tokenizer.json copied again." in shown.out
    assert "other than in the source: generation_config.json" in shown.err
    assert (run / "tokenizer.json").read_bytes() == (fp8 / "tokenizer.json").read_bytes()
    assert json.loads((run / "generation_config.json").read_text()) == {"temperature": 1.0}


@pytest.mark.parametrize("name", ["fp8", "tied"])
def test_no_byte_is_read_twice(name, fp8, tmp_path, monkeypatch):
    """Of a model whose embedding and head are copied into its prediction, and of one whose head is its embedding."""
    source = fp8
    if name == "tied":
        source = shutil.copytree(GOLDEN / "llm", tmp_path / "tied")
        tensors = safetensors.open_directory(source)
        arrays = {name: tensors.read(name) for name in tensors.names() if name != "lm_head.weight"}
        (source / "model.safetensors").unlink()
        safetensors.write_directory(source, [(n, a.shape, a.dtype, lambda a=a: a) for n, a in arrays.items()])
        config = json.loads((source / "config.json").read_text()) | {"tie_word_embeddings": True}
        (source / "config.json").write_text(json.dumps(config))
    spans, read_into = [], OpenFile.read_into

    def counted(file, buffer, offset):
        if file.path.suffix == ".safetensors":
            spans.append((file.path.name, offset, offset + memoryview(buffer).nbytes))
        read_into(file, buffer, offset)

    published = hf.open_published(source)  # headers
    monkeypatch.setattr(OpenFile, "read_into", counted)
    pieces = hf.Source(published, abstract_weights(published_config(published, source)))
    read = {piece.path for piece in pieces.pieces()}
    assert len(read) > 10 and spans
    for (file, _, end), (after, begin, _) in itertools.pairwise(sorted(spans)):
        assert file != after or end <= begin


def test_a_disk_too_small_is_reported_before_anything_is_written(fp8, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(_conversion.shutil, "disk_usage", lambda _: usage._replace(free=10**6))
    with pytest.raises(UserError, match="GB to write, 0.0 GB free"):
        convert.main([f"--from={fp8}", f"--workdir={tmp_path / 'run'}"])
    assert not (tmp_path / "run").exists()


def test_invalid_arguments_are_reported(fp8, converted, tmp_path):
    for words, text in [
        ([f"--workdir={tmp_path}"], "--from is missing"),
        ([f"--from={fp8}"], "--workdir is missing"),
        ([f"--from={fp8}", f"--workdir={tmp_path}", "--dtype=int4"], "expected one of keep, bf16, fp32"),
        ([f"--from={fp8}", f"--workdir={fp8}"], "is the published directory itself"),
        ([f"--from={tmp_path}", f"--workdir={tmp_path / 'run'}"], "no config.json"),
    ]:
        with pytest.raises(UserError, match=text):
            convert.main(words)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    for words, text in [
        ([f"--workdir={converted}"], "--to is missing"),
        ([f"--to={tmp_path / 'out'}"], "--workdir is missing"),
        ([f"--workdir={converted}", f"--to={tmp_path / 'full'}"], r"not empty \(notes.txt\)"),
        ([f"--workdir={converted}", f"--to={tmp_path / 'full' / 'notes.txt'}"], "a file"),
        ([f"--workdir={converted}", f"--to={tmp_path / 'out'}", "--dtype=int4"], "expected one of bf16"),
        ([f"--workdir={tmp_path / 'full'}", f"--to={tmp_path / 'out'}"], "no checkpoint in"),
    ]:
        with pytest.raises(UserError, match=text):
            export.main(words)
    assert not (tmp_path / "out").exists()


def test_a_trained_run_is_exported_from_its_newest_intact_checkpoint(tmp_path, capsys):
    model = deepseek_jax.load(GOLDEN / "v3_mtp")
    state = {"params": model.params, "router_bias": model.router_bias, "optimizer": {"mu": model.params}}
    with Checkpointer(tmp_path / "run" / "checkpoints") as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, state, {"config": to_json(model.config)})
            checkpoints.wait()
    folder = tmp_path / "run/checkpoints/shards/step_00000002"
    damaged = max((file for file in folder.rglob("*") if file.is_file()), key=lambda file: file.stat().st_size)
    damaged.write_bytes(bytes(damaged.stat().st_size))
    export.main([f"--workdir={tmp_path / 'run'}", f"--to={tmp_path / 'out'}", "--dtype=keep"])
    out, err = capsys.readouterr()
    assert "step 1 of" in out and "step 2 is damaged" in err
    assert_equal_weights(deepseek_jax.load(tmp_path / "out"), model)


def test_progress_is_a_line_now_and_then_or_a_bar_on_a_terminal(monkeypatch):
    monkeypatch.setattr(_progress, "LINE_EVERY_S", 0)
    plain = io.StringIO()
    monkeypatch.setattr(sys, "stderr", plain)
    with _progress.Progress("convert", 4 * 10**9, done=10**9) as progress:
        progress.advance(10**9)
        progress.advance(2 * 10**9 + 7)  # never more than all
    lines = plain.getvalue().splitlines()
    assert lines[0].startswith("convert  50%  2.00 of 4.00 GB") and lines[0].endswith(" left")
    assert lines[1].startswith("convert 100%  4.00 of 4.00 GB")

    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("CI", raising=False)
    with _progress.Progress("convert", 100) as progress:
        progress.advance(100)
    assert "100%" in terminal.getvalue() and "\x1b[" in terminal.getvalue()
