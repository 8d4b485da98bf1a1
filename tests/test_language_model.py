"""The model in one line: calls, generation, building, and loading what a run has saved."""

import copy
import io
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import deepseek_jax
from deepseek_jax import on_mesh, run_config
from deepseek_jax.abstract_model import abstract_module, abstract_weights, count_parameters
from deepseek_jax.errors import UserError
from deepseek_jax.language_model import LanguageModel
from deepseek_jax.launch import generate, inspect
from deepseek_jax.launch._continuation import write
from deepseek_jax.layers.base import split
from deepseek_jax.saved_config import to_json
from deepseek_jax.serve.offline import complete
from deepseek_jax.serve.sampling import Sampling
from deepseek_jax.train.checkpoint.checkpointer import Checkpointer
from deepseek_jax.weights import WEIGHTS, open_weights

SIZES = {"d_model": 16, "n_layers": 2, "n_dense_layers": 0, "n_heads": 2, "q_rank": 12, "kv_rank": 8, "nope_width": 8}
SIZES |= {"rope_width": 4, "value_width": 8, "n_experts": 8, "expert_width": 8, "top_k": 2, "mtp_depth": 0}
PROMPT = [1, 2, 3]
GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(scope="module")
def config():
    config = run_config.load("tiny_v3")
    config.model.update(SIZES)
    config.data.seq_len = 32
    return config


@pytest.fixture(scope="module")
def model(config):
    """Random weights of which no initialiser had to be compiled."""
    _, *shapes = split(abstract_module(config))
    draw = np.random.default_rng(0)
    weights = jax.tree.map(lambda x: jax.device_put(np.asarray(0.3 * draw.normal(size=x.shape), x.dtype)), shapes)
    return LanguageModel(config, *weights)


def save(directory, model, *steps):
    """What a run leaves behind: more than the model's weights."""
    with Checkpointer(directory) as checkpoints:
        for step in steps:
            moments = jax.tree.map(jnp.zeros_like, model.params)
            state = {"params": model.params, "router_bias": model.router_bias, "optimizer": {"mu": moments}}
            checkpoints.save(step, state, {"config": to_json(model.config)})


def equal(tree, other):
    same = jax.tree.map(lambda a, b: a.dtype == b.dtype and np.array_equal(a, b), tree, other)
    return all(jax.tree.leaves(same))


def test_logits_of_a_batch_and_of_a_sequence(model):
    logits_BTV = model(np.array([PROMPT]))
    assert (logits_BTV.shape, logits_BTV.dtype) == ((1, 3, 272), jnp.float32)
    assert np.array_equal(model(PROMPT), logits_BTV[0])


@pytest.mark.parametrize("ids", [[], [[1], [1, 2]], [1.5], 3, [[[1]]], [272], [-1]])
def test_ids_that_are_none_are_refused(model, ids):
    with pytest.raises(UserError):
        model(ids)


def test_a_replaced_weight_is_used_at_the_next_call(model):
    changed = LanguageModel(model.config, jax.tree.map(lambda w: w, model.params), model.router_bias)
    assert np.array_equal(changed([PROMPT]), model([PROMPT]))
    changed.params["head"]["weight_DV"] = 2 * changed.params["head"]["weight_DV"]
    np.testing.assert_allclose(changed([PROMPT]), 2 * model([PROMPT]), rtol=1e-5)


def test_a_layer_can_be_taken_out_as_documented(model):
    blocks = model.module.moe_blocks
    assert blocks.attention.kv_down_DC.shape == (2, 16, 8)
    definition, weights = nnx.split(blocks)
    block = nnx.merge(definition, jax.tree.map(lambda w: w[1], weights))
    assert np.array_equal(block.attention.kv_down_DC[...], model.params["moe_blocks"]["attention"]["kv_down_DC"][1])


def test_generate_stream_and_complete_say_the_same(model):
    ids = model.generate(PROMPT, max_new_tokens=10)
    assert ids == list(model.stream(PROMPT, max_new_tokens=10))
    assert ids == model.generate(np.array(PROMPT), max_new_tokens=10)
    text = model.complete("\x01\x02\x03", max_new_tokens=10)
    assert text == model.tokenizer.decode(ids)
    assert model.complete(["\x01\x02\x03"], max_new_tokens=10) == [text]
    assert model.complete([]) == []


def test_a_batch_gives_a_list_for_each_prompt_and_stops_at_stop_ids(model):
    ids = model.generate(PROMPT, max_new_tokens=10)
    assert model.generate([PROMPT], max_new_tokens=10) == [ids]
    assert model.generate(PROMPT, max_new_tokens=10, stop_ids=ids[3:4]) == ids[: ids.index(ids[3]) + 1]
    ending = LanguageModel(copy.deepcopy(model.config), model.params, model.router_bias)
    ending.config.release.end_ids = (ids[3], 271)

    assert ending.end_ids == tuple(sorted({ids[3], 257, 271}))
    assert ending.generate(PROMPT, max_new_tokens=10) == ids[: ids.index(ids[3]) + 1]


@pytest.mark.slow
def test_a_batch_draws_as_its_prompts_alone_with_the_seeds_after_the_first_and_as_the_engine(model):
    drawing, prompts = {"temperature": 1.0, "top_p": 0.9}, [PROMPT, [7]]
    found = model.generate(prompts, 8, seed=np.int64(5), **drawing)
    assert found == [model.generate(prompt, 8, seed=5 + row, **drawing) for row, prompt in enumerate(prompts)]
    assert found == [list(model.stream(prompt, 8, seed=5 + row, **drawing)) for row, prompt in enumerate(prompts)]
    engine, sampling = model._kept["generate"].engine, Sampling(8, seed=5, **drawing, stop_ids=model.end_ids)
    assert complete(engine, [PROMPT], [sampling])[0].ids == found[0] != model.generate(PROMPT, 8, seed=6, **drawing)


def test_streams_may_be_left_unread_and_read_side_by_side(model):
    """An engine of its own for each that is open, with the same programs; replaced weights count from the next one."""
    ids, streams = model.generate(PROMPT, 10), [model.stream(PROMPT, 10) for _ in range(2)]
    engine = model._kept["generate"].engine
    assert [next(streams[0]), next(streams[1])] == [ids[0]] * 2
    other = model._kept["generate"].engine
    assert other is not engine and other.programs is engine.programs
    before = model.params["head"]["weight_DV"]
    model.params["head"]["weight_DV"] = before[:, ::-1]
    assert model.generate(PROMPT, 2)[0] == 271 - ids[0]
    model.params["head"]["weight_DV"] = before
    assert list(streams[0]) == ids[1:] and engine.is_idle and not other.is_idle
    streams[1].close()
    assert other.is_idle


@pytest.mark.slow
def test_a_replaced_weight_may_have_another_dtype(model):
    before = model.params["head"]["weight_DV"]
    expected = model.generate(PROMPT, 3)
    model.params["head"]["weight_DV"] = before.astype(jnp.bfloat16)
    assert len(model.generate(PROMPT, 3)) == 3
    model.params["head"]["weight_DV"] = before
    assert model.generate(PROMPT, 3) == expected


def test_pages_are_those_of_the_prompts_that_run_at_the_same_time(model, monkeypatch):
    """Of the longest, if they differ."""
    asked = []
    monkeypatch.setattr(model, "_idle_engine", lambda purpose, options: asked.append(options))
    monkeypatch.setattr(model, "_kept", {})
    for n_prompts, length in ((256, 600), (3000, 600), (3000, 60)):
        model._large_enough([[1] * length] * n_prompts + [[1] * 600] * 256, 40, {})
    assert [options["n_pages"] for options in asked] == [1 + 256 * 16] * 3


def test_an_engine_that_a_call_runs_is_no_other_calls(model):
    """One that comes meanwhile, as from another thread, has its own."""
    options = {"n_rows": 2, "n_pages": 5, "chunk": 16}
    with model._idle_engine("serve", options) as engine, model._idle_engine("serve", options) as other:
        assert other is not engine
    with model._idle_engine("serve", options) as again:
        assert again is other


def test_redundant_experts_by_fresh_loads_are_another_engine(model, monkeypatch):
    first, fresh = (on_mesh.Redundant(2, {"moe_blocks": np.ones((2, 8))}) for _ in range(2))
    monkeypatch.setattr(model, "engine", lambda redundant: SimpleNamespace(is_idle=True, loads=redundant))
    monkeypatch.setattr(model, "_kept", {})
    for redundant in (first, first, fresh):
        with model._idle_engine("serve", {"redundant": redundant}) as engine:
            assert engine.loads is redundant


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 2.5}, "max_new_tokens=2.5: expected a whole number"),
        ({"max_new_tokens": "9"}, "max_new_tokens='9': expected a whole number"),
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"temperature": "warm"}, "temperature='warm'"),
        ({"temperature": float("inf")}, "temperature=inf"),
        ({"temperature": -1.0}, "temperature=-1.0"),
        ({"top_p": None}, "top_p=None"),
        ({"seed": -1}, "seed=-1"),
    ],
)
def test_settings_that_cannot_be_are_refused_before_anything_runs(model, options, message):
    for function in (model.generate, model.stream):
        with pytest.raises(UserError, match=message):
            function(PROMPT, **options)


def test_the_limit_of_positions_is_told_and_may_be_raised(model):
    with pytest.raises(UserError, match="exceed the 32 positions"):
        model.generate(PROMPT, max_new_tokens=30)
    with pytest.raises(UserError, match="a prompt is empty"):
        model.generate([])
    with pytest.raises(UserError, match="a prompt of 40 tokens fills the 32 positions"):
        model.complete("x" * 40)


def test_text_and_ids_are_not_mixed_up(model):
    for text in ("def", ["def"]):
        with pytest.raises(UserError, match="a prompt is text"):
            model.generate(text)
    for ids in (PROMPT, [PROMPT], ["def", 5], [None]):
        with pytest.raises(UserError, match=r"expected a text or a list of texts. For ids there is model.generate"):
            model.complete(ids)
    with pytest.raises(UserError, match=r"generate\(5\): expected ids of one prompt"):
        model.generate(5)


def test_the_repr_is_short_and_tells_the_sizes(model):
    text = repr(model)
    assert len(text) < 200
    for word in ("tiny_v3", "v3", "2 layers of width 16", "vocabulary 272", "0.0M parameters", "weights given"):
        assert word in text


@pytest.mark.slow
def test_building_twice_gives_the_same_and_another_seed_does_not(config):
    first, second = (deepseek_jax.build(config) for _ in range(2))
    assert equal(first.params, second.params)
    assert first.params["head"]["weight_DV"].std() == pytest.approx(config.model.init_std, rel=0.1)
    assert (first.params["final_norm"]["gain"] == 1).all()
    assert not equal(first.params, deepseek_jax.build(config, seed=1).params)


def test_what_cannot_be_built_is_told():
    with pytest.raises(UserError, match="no such config.*tiny_v3"):
        deepseek_jax.build("tiny_v33")
    with pytest.raises(UserError, match="the weights of v3_671b take 2,543 GiB"):
        deepseek_jax.build("v3_671b")


def test_loading_gives_back_what_was_saved_bit_for_bit(model, tmp_path):
    save(tmp_path / "run" / "checkpoints", model, 5)
    for path in (tmp_path / "run", str(tmp_path / "run" / "checkpoints")):
        loaded = deepseek_jax.load(path)
        assert equal((loaded.params, loaded.router_bias), (model.params, model.router_bias))
        assert loaded.config == model.config
        assert f"step 5 of {path}" in repr(loaded)
    assert np.array_equal(loaded([PROMPT]), model([PROMPT]))


def test_a_damaged_newest_checkpoint_gives_way_to_the_one_before(model, tmp_path, capsys):
    save(tmp_path / "checkpoints", model, 5, 10)
    newest = tmp_path / "checkpoints" / "shards" / "step_00000010"
    data = max((file for file in newest.rglob("*") if file.is_file()), key=lambda file: file.stat().st_size)
    data.write_bytes(data.read_bytes()[:-1])
    loaded = deepseek_jax.load(tmp_path)
    assert "step 5 of" in repr(loaded)
    assert "damaged, not used: step 10" in capsys.readouterr().err
    assert equal(loaded.params, model.params)


def test_where_nothing_can_be_loaded_it_is_told(tmp_path):
    with pytest.raises(UserError, match="no such directory"):
        deepseek_jax.load(tmp_path / "nowhere")
    with pytest.raises(UserError, match="no checkpoint in"):
        deepseek_jax.load(tmp_path)
    (tmp_path / "bare").mkdir()
    shutil.copy(GOLDEN / "llm" / "model.safetensors", tmp_path / "bare")
    with pytest.raises(UserError, match="no config.json beside them"):
        deepseek_jax.load(tmp_path / "bare")
    with Checkpointer(tmp_path / "checkpoints") as checkpoints:
        checkpoints.save(1, {"params": {"w": jnp.zeros(1)}})
    with pytest.raises(UserError, match="holds no config"):
        deepseek_jax.load(tmp_path)


@pytest.fixture(scope="module")
def published():
    """A tiny V3 with multi-token prediction as others publish it."""
    return deepseek_jax.load(GOLDEN / "v3_mtp")


def test_published_weights_are_three_lines_from_logits(published):
    assert published.config.family == "v3" and published.config.precision == "bf16"
    assert {w.dtype.name for w in jax.tree.leaves(published.params)} == {"bfloat16"}
    assert {w.dtype.name for w in jax.tree.leaves(published.router_bias)} == {"float32"}
    wide = deepseek_jax.load(GOLDEN / "v3_mtp", precision="fp32")
    oracle = np.load(GOLDEN / "v3_mtp" / "oracle.npz")
    np.testing.assert_allclose(wide(oracle["ids"]), oracle["logits"], atol=2e-5)
    with pytest.raises(UserError, match="precision"):
        deepseek_jax.load(GOLDEN / "v3_mtp", precision="int4")


def test_saved_as_published_and_loaded_again_nothing_has_changed(published, model, tmp_path):
    deepseek_jax.save_pretrained(published, tmp_path / "bf16")
    again = deepseek_jax.load(tmp_path / "bf16")
    assert equal((again.params, again.router_bias), (published.params, published.router_bias))
    numbers = ("yarn", "mtp_depth", "norm_eps", "route_scale")
    assert [again.config.model[key] for key in numbers] == [published.config.model[key] for key in numbers]
    deepseek_jax.save_pretrained(model, tmp_path / "fp32", dtype="fp32")
    assert equal(deepseek_jax.load(tmp_path / "fp32").params, model.params)
    with pytest.raises(UserError):
        deepseek_jax.save_pretrained(published, tmp_path / "bf16")
    with pytest.raises(UserError, match="expected one of bf16"):
        deepseek_jax.save_pretrained(published, tmp_path / "other", dtype="int4")


def test_a_tokenizer_goes_along(published, tmp_path):
    spec = {
        "version": "1.0",
        "added_tokens": [],
        "model": {"type": "WordLevel", "vocab": {"a": 0, "b": 1}, "unk_token": "a"},
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    settings = {"bos_token": {"content": "b"}, "add_bos_token": True}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    with published.config.unlocked():
        published.config.data.tokenizer = str(tmp_path / "tokenizer.json")
    deepseek_jax.save_pretrained(published, tmp_path / "out")
    loaded = deepseek_jax.load(tmp_path / "out")
    assert loaded.config.data.tokenizer == str(tmp_path / "out" / "tokenizer.json")
    assert loaded.prompt("a") == [1, 0]
    assert json.loads((tmp_path / "out" / "config.json").read_text())["bos_token_id"] == 1


@pytest.mark.parametrize("name", ["v3_mtp", "v2"])
def test_weights_of_other_sizes_are_no_beginning(config, name):
    other = config.copy_and_resolve_references()
    other.model.update(n_layers=3, n_dense_layers=1, dense_width=24)
    target = abstract_weights(other)
    told = rf"{name}: params/dense_blocks/\S+ is \[1, .*\] there, \[1, .*\] in this run .*weights differ.*inspect"
    with pytest.raises(UserError, match=told):
        open_weights(GOLDEN / name).read(target)


WORDS = {"version": "1.0", "added_tokens": [], "model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}}


def test_a_tokenizer_that_is_a_link_keeps_its_neighbours(tmp_path):
    """As in the cache of downloads, where names lead to blobs."""
    (tmp_path / "blob").write_text(json.dumps(WORDS))
    shutil.copytree(GOLDEN / "llm", tmp_path / "snapshot")
    (tmp_path / "snapshot" / "tokenizer.json").symlink_to(tmp_path / "blob")
    (tmp_path / "snapshot" / "tokenizer_config.json").write_text('{"bos_token": "a"}')
    assert deepseek_jax.load(tmp_path / "snapshot").tokenizer.bos_id == 0


def test_a_run_that_has_been_moved_has_its_tokenizer(model, tmp_path):
    moved = LanguageModel(copy.deepcopy(model.config), model.params, model.router_bias)
    moved.config.data.tokenizer = str(tmp_path / "before" / "tokenizer.json")
    save(tmp_path / "now" / "checkpoints", moved, 1)
    with pytest.raises(UserError, match="there is no file"):
        deepseek_jax.load(tmp_path / "now").tokenizer  # noqa: B018
    (tmp_path / "now" / "tokenizer.json").write_text(json.dumps(WORDS))
    for path in (tmp_path / "now", tmp_path / "now" / "checkpoints"):
        assert deepseek_jax.load(path).tokenizer.encode("a").tolist() == [0]


@pytest.mark.slow
def test_weights_that_come_without_a_tokenizer_take_ids_only(published, tmp_path):
    loaded = deepseek_jax.load(GOLDEN / "v3_mtp")
    assert loaded.end_ids == (1,) and len(loaded.generate(PROMPT, 4, stop_ids=())) == 4
    with pytest.raises(UserError, match="without a tokenizer.json"):
        loaded.complete("def")
    deepseek_jax.save_pretrained(loaded, tmp_path / "out")
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (written["bos_token_id"], written["eos_token_id"]) == (0, 1)  # as its config.json says


@pytest.mark.parametrize("stored", [pytest.param("published", marks=pytest.mark.slow), "checkpoint"])
def test_a_training_state_can_begin_with_weights_from_elsewhere(published, tmp_path, stored):
    """Read into float32 on a mesh, with the rules of a run."""
    from deepseek_jax import run
    from deepseek_jax.parallel.mesh import make_mesh

    path = GOLDEN / "v3_mtp"
    if stored == "checkpoint":
        path = tmp_path
        save(path / "checkpoints", published, 3)
    config = run_config.load("tiny_v3")
    config.model, config.sharding.embed = published.config.model, "data"
    trainer = run.trainer(config, make_mesh(2, 4))
    target = {name: trainer.abstract[name] for name in WEIGHTS}
    source = open_weights(path)
    weights = source.read(target)
    assert source.config.model == published.config.model
    expected = {"params": published.params, "router_bias": published.router_bias}
    for got, want, like in zip(*map(jax.tree.leaves, (weights, expected, target)), strict=True):
        assert got.dtype == like.dtype and got.sharding == like.sharding
        np.testing.assert_array_equal(got, np.asarray(want, np.float32))


def test_the_verbs_work_on_published_weights(tmp_path, capsys):
    shutil.copytree(GOLDEN / "llm", tmp_path / "llm")
    (tmp_path / "llm" / "tokenizer.json").write_text(json.dumps(WORDS))
    words = [f"--workdir={tmp_path / 'llm'}", "--prompt=a", "--max-tokens=4", "--temperature=0"]
    assert generate.main(words) == 0
    assert inspect.main([f"--workdir={GOLDEN / 'llm'}"]) == 0
    assert "family v1" in capsys.readouterr().out


@pytest.mark.slow
def test_the_verbs_work_on_a_run(model, tmp_path, capsys):
    save(tmp_path / "checkpoints", model, 5)
    words = [f"--workdir={tmp_path}", "--prompt=\x01\x02\x03"]
    assert generate.main([*words, "--max-tokens=10", "--temperature=0"]) == 0
    out, err = capsys.readouterr()
    assert out == "\x01\x02\x03" + model.complete("\x01\x02\x03", 10) + "\n"
    assert err.startswith("10 tokens, the first after ") and err.rstrip().endswith(" tokens/s")

    assert generate.main([*words, "--max-tokens=1000", "--temperature=0"]) == 0
    assert "stopped after 32 tokens" in capsys.readouterr().err
    with pytest.raises(UserError, match="the prompt has 32 tokens"):
        generate.main([f"--workdir={tmp_path}", f"--prompt={'x' * 32}"])

    assert inspect.main([f"--workdir={tmp_path}"]) == 0
    assert capsys.readouterr().out.startswith(f"tiny_v3 ({tmp_path}): family v3")
    with pytest.raises(UserError, match="Give one of them"):
        inspect.main([f"--workdir={tmp_path}", "--config=tiny_v3"])


def test_a_prompt_is_asked_for(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="no such directory. Train first"):
        generate.main([f"--workdir={tmp_path / 'nowhere'}", "--prompt=x"])
    with pytest.raises(UserError, match="the prompt is empty"):
        generate.main([f"--workdir={tmp_path}", "--prompt="])
    monkeypatch.setattr("sys.stdin", io.StringIO())
    with pytest.raises(UserError, match="the prompt is empty"):
        generate.main([f"--workdir={tmp_path}"])


def test_a_terminal_is_spared_control_characters(monkeypatch, capsys):
    write("a\x1b[2Jb\n\tc")
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    write("a\x1b[2Jb\n\tc")
    assert capsys.readouterr().out == "a\x1b[2Jb\n\tca\ufffd[2Jb\n\tc"


def test_counts_leave_multi_token_prediction_apart():
    leaf = jax.ShapeDtypeStruct((2, 3), jnp.float32)
    assert count_parameters({"head": {"w": leaf}, "mtp": {"0": {"a": leaf, "b": leaf}}}) == (6, 12)
