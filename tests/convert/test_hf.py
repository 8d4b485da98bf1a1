"""Directories read and written: sharded as if whole, nothing read twice or kept, errors name their place."""

import functools
import gc
import json
import math
import shutil
import tracemalloc
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from ml_collections import ConfigDict

from deepseek_jax.convert import hf, names, safetensors
from deepseek_jax.convert.place import place
from deepseek_jax.errors import UserError
from deepseek_jax.layers.base import logical_axes, split
from deepseek_jax.models import family
from deepseek_jax.parallel.mesh import make_mesh
from deepseek_jax.parallel.sharding import is_axes, placements
from deepseek_jax.precision.quantize import dequantize_blocks, quantize_blocks

GOLDEN = Path(__file__).parent.parent / "golden"
BF16 = np.dtype(ml_dtypes.bfloat16)


@functools.partial(jax.jit, static_argnums=1)
def there_and_back(weight: jax.Array, scale: str) -> jax.Array:
    return dequantize_blocks(*quantize_blocks(weight, scale=scale))


def module_of(kind: str, numbers: dict) -> nnx.Module:
    config = family(kind).Config.from_config(ConfigDict(numbers))
    return nnx.eval_shape(lambda: family(kind).Model(config, rngs=nnx.Rngs(0)))


def source_at(directory: Path, warn=hf.warn_on_stderr) -> tuple[hf.Published, hf.Source]:
    published = hf.open_published(directory, warn)
    _, params, bias = split(module_of(published.family, published.numbers))
    return published, hf.Source(published, {"params": params, "router_bias": bias}, warn)


def host_tree(source: hf.Source) -> dict:
    """The weights, assembled in numpy in the simplest way."""
    tree = jax.tree.map(lambda x: np.full(x.shape, np.nan, x.dtype), source.abstract)
    for piece in source.pieces():
        leaf = tree
        for key in piece.path:
            leaf = leaf[key]
        leaf[piece.index] = piece.array
    return tree


def same_bits(one, other) -> bool:
    one, other = np.asarray(one), np.asarray(other)
    return one.dtype == other.dtype and one.shape == other.shape and one.tobytes() == other.tobytes()


@pytest.fixture
def copied(tmp_path):
    """A golden directory to damage: its path, its config, its tensors; `save` writes them back."""

    class Copy:
        def __init__(self, name: str):
            self.path = tmp_path / name
            shutil.copytree(GOLDEN / name, self.path)
            self.config = json.loads((self.path / "config.json").read_text())
            files = safetensors.open_directory(self.path)
            self.tensors = {tensor: files.read(tensor) for tensor in files.names()}

        def save(self) -> Path:
            (self.path / "config.json").write_text(json.dumps(self.config))
            (self.path / "model.safetensors").unlink()
            entries = [safetensors.Entry(n, a.shape, a.dtype, lambda a=a: a) for n, a in self.tensors.items()]
            safetensors.write_directory(self.path, entries)
            return self.path

    return Copy


# ----------------------------------------------------------------------------------------------------------- reading


@pytest.mark.parametrize("name", ["r1_qwen", "v2", "v3_mtp"])
def test_every_weight_is_filled_and_keeps_its_dtype(name):
    published, source = source_at(GOLDEN / name)
    tree = host_tree(source)
    assert all(np.isfinite(np.asarray(leaf, np.float32)).all() for leaf in jax.tree.leaves(tree))
    assert {leaf.dtype for leaf in jax.tree.leaves(tree["params"])} == {BF16}
    assert {leaf.dtype for leaf in jax.tree.leaves(tree["router_bias"])} <= {np.dtype(np.float32)}
    table = published.tensors.read("model.embed_tokens.weight")
    assert same_bits(tree["params"]["embedding"]["table_VD"], table)


def test_eight_bit_weights_become_bfloat16():
    published, source = source_at(GOLDEN / "v3_yarn")
    tree = host_tree(source)
    stored = published.tensors.read("model.layers.0.mlp.down_proj.weight").astype(np.float32)
    scale = published.tensors.read("model.layers.0.mlp.down_proj.weight_scale_inv")
    assert scale.shape == (1, 2)  # the width of 132 leaves a partial block
    expected = (stored * np.repeat(scale, 128, axis=1)[:, : stored.shape[1]]).astype(BF16)
    assert same_bits(tree["params"]["dense_blocks"]["mlp"]["down_FD"][0], expected.T)


RULES = {
    "experts": {"experts": "expert"},
    "fsdp": {"experts": "expert", "embed": "data"},
}


@pytest.mark.parametrize("host_bytes", [0, 2**22], ids=["filled in on devices", "on the host"])
@pytest.mark.parametrize("rules", [pytest.param("experts", marks=[pytest.mark.slow, pytest.mark.matrix]), "fsdp"])
def test_placed_on_four_devices_is_placed_whole(rules, host_bytes, monkeypatch):
    monkeypatch.setattr("deepseek_jax.convert.place.HOST_BYTES", host_bytes)
    published, source = source_at(GOLDEN / "v3_mtp")
    mesh = make_mesh(2, 2, jax.devices()[:4])
    axes = dict(zip(("params", "router_bias"), logical_axes(module_of("v3", published.numbers)), strict=True))
    where = placements(axes, source.abstract, RULES[rules], mesh)
    shardings = jax.tree.map(
        lambda axes, placed: jax.sharding.NamedSharding(mesh, placed.spec), axes, where, is_leaf=is_axes
    )
    target = jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), source.abstract, shardings
    )
    done = []
    placed = place(source, target, report=lambda piece: done.append(piece.n_bytes_read))
    assert done == sorted(done) and done[-1] == source.n_bytes
    assert jax.tree.map(lambda x: x.sharding, placed) == shardings
    assert all(jax.tree.leaves(jax.tree.map(same_bits, placed, host_tree(source))))
    gate = placed["params"]["moe_blocks"]["experts"]["gate_XDF"]
    assert gate.addressable_shards[0].data.shape[1] == gate.shape[1] // 2
    double = jax.jit(lambda tree: jax.tree.map(lambda x: 2 * x, tree), donate_argnums=0, out_shardings=shardings)
    doubled = jax.tree.map(lambda x: 2 * x, host_tree(source))
    assert all(jax.tree.leaves(jax.tree.map(same_bits, double(placed), doubled)))  # its buffers may be donated
    for given, was in zip(jax.tree.leaves(placed), jax.tree.leaves(host_tree(source)), strict=True):
        assert given.is_deleted() or same_bits(given, was)  # jax 0.11 does not use every donated buffer on a CPU


def test_placing_casts_where_asked():
    _, source = source_at(GOLDEN / "llm")
    here = jax.sharding.SingleDeviceSharding(jax.devices()[3])
    target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32, sharding=here), source.abstract)
    placed = place(source, target)
    expected = jax.tree.map(lambda x: x.astype(np.float32), host_tree(source))
    assert all(jax.tree.leaves(jax.tree.map(same_bits, placed, expected)))
    assert {leaf.sharding for leaf in jax.tree.leaves(placed)} == {here}


def test_each_tensor_is_read_once_and_what_is_done_is_passed_over(monkeypatch):
    _, source = source_at(GOLDEN / "v3_mtp")
    read, original = [], safetensors.Tensors.read_dequantized
    monkeypatch.setattr(
        safetensors.Tensors,
        "read_dequantized",
        lambda self, name, *args: read.append(name) or original(self, name, *args),
    )
    pieces = [(piece.path, piece.index) for piece in source.pieces()]
    assert len(read) == len(set(read)) == len(list(names.tensors(source.abstract)))
    assert len(pieces) == len(set(pieces))
    done, whole = set(pieces[:20]), list(read)
    read.clear()
    rest = [(piece.path, piece.index) for piece in source.pieces(skip=lambda path, index: (path, index) in done)]
    assert rest == pieces[20:]
    assert 0 < len(read) < len(whole) and read == whole[-len(read) :]


@pytest.fixture(scope="module")
def wide(tmp_path_factory) -> Path:
    """A model whose tensors are large compared with Python's own memory: 23 MB, the largest 1 MB."""
    directory = tmp_path_factory.mktemp("wide")
    numbers = {
        **{"vocab_size": 1024, "d_model": 256, "n_layers": 4, "dense_width": 1024, "n_heads": 4, "n_kv_heads": 2},
        **{"head_width": 64, "attention_bias": False, "rope_base": 1e4, "rope_factor": 1.0, "rope_llama3": {}},
        **{"norm_eps": 1e-6, "init_std": 0.02, "qk_norm": False, "yarn": {}},
    }
    _, params, bias = split(module_of("v1", numbers))
    shapes = {"params": params, "router_bias": bias}
    rng = np.random.default_rng(0)
    flat = names.flatten(shapes)
    hf.write(
        *(directory / "model", "v1", numbers, shapes),
        lambda path, index: rng.normal(size=flat[path][len(index) :]).astype(np.float32),
        "fp32",
    )
    return directory / "model"


def test_the_host_holds_one_tensor_at_a_time(wide, monkeypatch):
    published, source = source_at(wide)
    largest = max(math.prod(published.tensors.info(name).shape) * 4 for name in published.tensors.names())
    assert source.n_bytes > 14 * largest
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    target = jax.tree.map(lambda x: x.update(sharding=here), source.abstract)
    monkeypatch.setattr("deepseek_jax.convert.place.BLOCK_BYTES", largest // 4)
    monkeypatch.setattr("deepseek_jax.convert.place.HOST_BYTES", 2**13)  # the gains of norms
    place(source, target)  # imports and compilation
    gc.collect()
    tracemalloc.start()
    for piece in source.pieces():
        del piece
    assert tracemalloc.get_traced_memory()[1] < 1.2 * largest
    tracemalloc.reset_peak()
    place(source, target)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3.2 * largest  # one being read while another is on its way, and a contiguous copy of a transposed one


def test_a_tied_head_is_the_embedding(copied):
    spoilt = copied("r1_qwen")
    del spoilt.tensors["lm_head.weight"]
    spoilt.config["tie_word_embeddings"] = True
    _, source = source_at(spoilt.save())
    tree = host_tree(source)
    assert same_bits(tree["params"]["head"]["weight_DV"], tree["params"]["embedding"]["table_VD"].T)


def test_a_head_that_is_stored_is_the_head_whatever_the_config_says(copied):
    spoilt = copied("r1_qwen")
    spoilt.config["tie_word_embeddings"] = True
    _, source = source_at(spoilt.save())
    assert same_bits(host_tree(source)["params"]["head"]["weight_DV"], spoilt.tensors["lm_head.weight"].T)


def test_old_files_keep_rotary_frequencies_that_nobody_needs(copied):
    spoilt = copied("llm")
    spoilt.tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)
    source_at(spoilt.save())


def test_prediction_that_is_promised_and_missing_is_left_out_with_a_warning(copied):
    spoilt, said = copied("v3_mtp"), []
    spoilt.tensors = {name: array for name, array in spoilt.tensors.items() if ".layers.2." not in name}
    published, source = source_at(spoilt.save(), said.append)
    assert published.numbers["mtp_depth"] == 0 and "mtp" not in source.abstract["params"]
    assert len(said) == 1 and "multi-token prediction" in said[0]


@pytest.mark.parametrize("said_in_config", [0, None])
def test_prediction_that_the_config_does_not_name_is_left_out_with_a_warning(copied, said_in_config):
    spoilt, said = copied("v3_mtp"), []
    _, whole = source_at(GOLDEN / "v3_mtp")
    spoilt.config["num_nextn_predict_layers"] = said_in_config
    published, source = source_at(spoilt.save(), said.append)
    assert published.numbers["mtp_depth"] == 0
    main, expected = host_tree(source)["params"], host_tree(whole)["params"]
    del expected["mtp"]
    assert all(jax.tree.leaves(jax.tree.map(same_bits, main, expected)))
    assert len(said) == 1 and "model.layers.2.*" in said[0] and "num_nextn_predict_layers=0" in said[0]


def test_a_layer_too_many_that_predicts_nothing_is_refused(copied):
    """For example if num_hidden_layers is wrong: not a module of multi-token prediction."""
    spoilt = copied("v3_mtp")
    spoilt.config["num_nextn_predict_layers"] = 0
    del spoilt.tensors["model.layers.2.eh_proj.weight"]
    with pytest.raises(UserError, match=r"unexpected: model\.layers\.2\."):
        source_at(spoilt.save())


def test_tensors_without_numbers_are_passed_over(copied):
    spoilt = copied("v2")
    spoilt.tensors["model.layers.1.mlp.more_experts.gate_proj.weight"] = np.ones((0, 24), np.float32)
    _, source = source_at(spoilt.save())
    _, expected = source_at(GOLDEN / "v2")
    assert all(jax.tree.leaves(jax.tree.map(same_bits, host_tree(source), host_tree(expected))))


def test_a_factor_that_is_not_read_is_told_of():
    said = []
    source_at(GOLDEN / "r1_qwen3", said.append)
    assert len(said) == 1 and "attn_factor=0.878 is not read" in said[0]


@pytest.mark.parametrize("copy", ["model.layers.2.embed_tokens.weight", "model.layers.2.shared_head.head.weight"])
def test_a_copy_that_is_none_is_told_of(copied, copy, capsys):
    spoilt, said = copied("v3_mtp"), []
    _, source = source_at(spoilt.path, said.append)
    list(source.pieces())
    assert said == []
    spoilt.tensors[copy] = spoilt.tensors[copy] + np.ones((), BF16)
    _, source = source_at(spoilt.save())
    list(source.pieces())
    err = capsys.readouterr().err
    assert err.startswith("warning: ") and f"{copy} differs" in err and err.count("\n") == 1


def spoil_missing(c):
    del c.tensors["model.layers.1.mlp.experts.3.up_proj.weight"]


def spoil_unexpected(c):
    c.tensors["model.layers.9.input_layernorm.weight"] = np.ones(24, np.float32)


def spoil_shape(c):
    c.tensors["model.norm.weight"] = np.ones(25, np.float32)


def spoil_transposed(c):
    name = "model.layers.1.self_attn.q_a_proj.weight"
    c.tensors[name] = np.ascontiguousarray(c.tensors[name].T)


def spoil_dtype(c):
    c.tensors["model.norm.weight"] = np.ones(24, np.int32)


def spoil_bias(c):
    del c.tensors["model.layers.1.mlp.gate.e_score_correction_bias"]


def spoil_layers(c):
    c.config["num_hidden_layers"] = 2000


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (spoil_missing, "missing: model.layers.1.mlp.experts.3.up_proj.weight"),
        (spoil_unexpected, "unexpected: model.layers.9.input_layernorm.weight"),
        (spoil_shape, "model.norm.weight has shape [25], expected [24]"),
        (spoil_transposed, "q_a_proj.weight has shape [24, 20], expected [20, 24]"),
        (spoil_dtype, "model.norm.weight is I32"),
        (spoil_bias, "missing: model.layers.1.mlp.gate.e_score_correction_bias"),
        (spoil_layers, "missing: model.layers.3.input_layernorm.weight"),
    ],
)
def test_files_that_do_not_hold_the_model_are_refused_by_name(copied, spoil, named):
    spoilt = copied("v3")
    spoil(spoilt)
    with pytest.raises(UserError) as caught:
        source_at(spoilt.save())
    assert named in str(caught.value)
    assert "unexpected: " in named or "unexpected: " not in str(caught.value)
    assert len(str(caught.value)) < 600


def test_a_directory_without_a_config_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"no config\.json"):
        hf.open_published(tmp_path)


# ----------------------------------------------------------------------------------------------------------- writing


def written(directory: Path, name: str, dtype: str, **options) -> tuple[hf.Published, hf.Source, dict]:
    """A golden model read and written again as `dtype`, and the tree that was written."""
    published, source = source_at(GOLDEN / name)
    tree = host_tree(source)
    get = hf.from_tree(tree)
    hf.write(directory, published.family, published.numbers, source.abstract, get, dtype, **options)
    return *source_at(directory), tree


@pytest.mark.parametrize("name", sorted(path.parent.name for path in GOLDEN.glob("*/config.json")))
def test_stored_dtypes_come_back_bit_by_bit(tmp_path, name):
    """All except 8-bit files are written as they were; those come back as the bfloat16 that was read."""
    published, _, _ = written(tmp_path / "out", name, "keep")
    original = safetensors.open_directory(GOLDEN / name)
    again = published.tensors
    assert set(again.names()) == {n for n in original.names() if not n.endswith("_scale_inv")}
    for tensor in again.names():
        assert same_bits(again.read(tensor), original.read_dequantized(tensor)), tensor
    assert published.numbers == hf.open_published(GOLDEN / name).numbers


def test_bfloat16_round_trip_is_exact_and_router_biases_stay_wide(tmp_path):
    published, source, tree = written(tmp_path / "out", "v3_mtp", "bf16", n_positions=999, bos_id=0, eos_ids=(1,))
    assert all(jax.tree.leaves(jax.tree.map(same_bits, host_tree(source), tree)))
    dtypes = {published.tensors.info(name).dtype for name in published.tensors.names()}
    assert dtypes == {"BF16", "F32"}
    bias = published.tensors.info("model.layers.2.mlp.gate.e_score_correction_bias")
    assert bias.dtype == "F32"
    assert published.facts == (999, 0, (1,), False, None)
    assert published.config["torch_dtype"] == "bfloat16"
    for copy, original in names.copies(source.abstract).items():
        assert same_bits(published.tensors.read(copy), published.tensors.read(original))
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert (generation["bos_token_id"], generation["eos_token_id"]) == (0, 1)


EIGHT_BITS = [("fp8", "fp32", "F32"), ("fp8_ue8m0", "ue8m0", "F32"), ("fp8_e8m0", "ue8m0", "F8_E8M0")]


@pytest.mark.parametrize(("dtype", "scale", "stored"), EIGHT_BITS)
def test_eight_bit_export_is_quantise_dequantise(tmp_path, dtype, scale, stored):
    published, source, tree = written(tmp_path / "out", "v3_mtp", dtype)
    get, again = hf.from_tree(tree), hf.from_tree(host_tree(source))
    n_quantized = 0
    for tensor in names.tensors(source.abstract):
        expected = tensor.to_theirs([get(*place) for place in tensor.places])
        is_quantized = published.tensors.is_quantized(tensor.name)
        assert is_quantized == bool(names.QUANTIZED.search(tensor.name))
        if is_quantized:
            n_quantized += 1
            expected = np.asarray(there_and_back(expected, scale))
        assert same_bits(tensor.to_theirs([again(*place) for place in tensor.places]), expected), tensor.name
    assert n_quantized == 2 * 5 + 3 + 3 * 9 + 5 + 3 * 9  # attention, dense, experts; the prediction layer
    assert published.config["quantization_config"].get("scale_fmt") == ("ue8m0" if scale == "ue8m0" else None)
    scales = [name for name in published.tensors.names() if name.endswith("_scale_inv")]
    assert {published.tensors.info(name).dtype for name in scales} == {stored} and len(scales) == n_quantized
    mantissas = {float(m) for name in scales for m in np.frexp(published.tensors.read(name).astype(np.float32))[0].flat}
    assert (mantissas == {0.5}) == (scale == "ue8m0")
    assert published.tensors.info("model.layers.2.eh_proj.weight").dtype == "BF16"


def test_v32_in_eight_bits_keeps_its_indexers_weights_of_heads_wide(tmp_path):
    """With multi-token prediction, whose layer has an indexer too; read and written again, the numbers are the same."""
    numbers = hf.open_published(GOLDEN / "v32").numbers | {"mtp_depth": 1}
    _, params, router_bias = split(module_of("v32", numbers))
    shapes, draw = {"params": params, "router_bias": router_bias}, np.random.default_rng(0)
    tree = jax.tree.map(lambda x: np.asarray(draw.normal(size=x.shape), jnp.bfloat16), shapes)
    hf.write(tmp_path / "one", "v32", numbers, shapes, hf.from_tree(tree), "fp8_e8m0")
    published, source = source_at(tmp_path / "one")
    for layer in range(3):
        indexer = f"model.layers.{layer}.self_attn.indexer."
        dtypes = {name: published.tensors.info(f"{indexer}{name}").dtype for name in ("wq_b.weight", "wk.weight")}
        assert set(dtypes.values()) == {"F8_E4M3"}
        assert published.tensors.info(f"{indexer}wk.weight_scale_inv").dtype == "F8_E8M0"
        assert published.tensors.info(f"{indexer}weights_proj.weight").dtype == "BF16"
        assert published.tensors.info(f"{indexer}k_norm.bias").shape == (numbers["index_width"],)
    assert published.numbers == numbers and published.config["num_nextn_predict_layers"] == 1
    hf.write(tmp_path / "two", "v32", numbers, shapes, hf.from_tree(host_tree(source)), "fp8_e8m0")
    again = source_at(tmp_path / "two")[0].tensors
    stored = [name for name in published.tensors.names() if not name.endswith("_scale_inv")]
    assert all(same_bits(again.read_dequantized(name), published.tensors.read_dequantized(name)) for name in stored)


def test_partial_blocks_of_eight_bits(tmp_path):
    published, _, _ = written(tmp_path / "out", "v3_yarn", "fp8")
    assert published.tensors.info("model.layers.0.mlp.up_proj.weight_scale_inv").shape == (2, 1)


def test_an_eight_bit_file_read_and_written_is_the_same_function(tmp_path):
    """Quantising dequantised numbers changes none by more than rounding to bfloat16 did."""
    _, source, tree = written(tmp_path / "out", "v3_yarn", "fp8")
    for one, other in zip(jax.tree.leaves(host_tree(source)), jax.tree.leaves(tree), strict=True):
        np.testing.assert_allclose(np.asarray(one, np.float32), np.asarray(other, np.float32), rtol=2**-7)


def test_shards_tokenizer_files_and_progress(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    done = []
    options = {
        "files": {"tokenizer.json": tmp_path / "tokenizer.json"},
        "max_shard_bytes": 20_000,
        "report": done.append,
    }
    published, source, tree = written(tmp_path / "out", "v2_lite", "fp32", **options)
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"
    assert len(list((tmp_path / "out").glob("model-*-of-*.safetensors"))) > 3
    assert len(done) == len(published.tensors.names())
    expected = jax.tree.map(lambda x: x.astype(np.float32), tree)
    assert all(jax.tree.leaves(jax.tree.map(same_bits, host_tree(source), expected)))


def test_nothing_is_written_over_weights_or_as_an_unknown_dtype(tmp_path):
    with pytest.raises(UserError, match="fp4"):
        written(tmp_path / "out", "llm", "fp4")
    assert not (tmp_path / "out").exists()
    shutil.copytree(GOLDEN / "llm", tmp_path / "there")
    before = (tmp_path / "there" / "config.json").read_bytes()
    with pytest.raises(UserError, match="already"):
        written(tmp_path / "there", "llm", "bf16")
    assert (tmp_path / "there" / "config.json").read_bytes() == before
