"""V4's names and formats: what a release stores comes back bit for bit, FP8 and FP4 included, in either spelling."""

import json
import math

import jax
import ml_dtypes
import numpy as np
import pytest

import deepseek_jax
from deepseek_jax.convert import fp8_weights, hf, hf_config, names, safetensors
from deepseek_jax.errors import UserError
from deepseek_jax.precision.fp4_weight import Fp4Weight
from deepseek_jax.precision.fp8_weight import Fp8Weight
from deepseek_jax.tree import paths

SLOW = pytest.mark.slow
V, D, H, Q, R, G, X, F, K, STREAMS, INDEX = 48, 64, 2, 32, 16, 2, 4, 32, 2, 4, 16
NUMBERS = {"vocab_size": V, "d_model": D, "n_layers": 4, "compress_ratios": (0, 4, 8, 4, 0), "index_ratio": 4}
NUMBERS |= {"n_hash_layers": 1, "n_heads": H, "head_width": Q, "rope_width": 8, "q_rank": R, "out_groups": G}
NUMBERS |= {"out_rank": 16, "window": 8, "rope_base": 10_000.0, "compress_rope_base": 160_000.0}
NUMBERS |= {"yarn": {"factor": 16.0, "original_length": 64}, "index_heads": 2, "index_width": INDEX, "index_top_k": 4}
NUMBERS |= {"n_streams": STREAMS, "sinkhorn_steps": 20, "hyper_eps": 1e-6, "n_experts": X, "n_shared_experts": 1}
NUMBERS |= {"expert_width": F, "top_k": K, "route_scale": 1.5, "swiglu_limit": 10.0, "mtp_depth": 1}
NUMBERS |= {"norm_eps": 1e-6, "init_std": 0.006, "index_dense": False}


def compressor(ratio: int, width: int) -> dict:
    wide = 2 * width if ratio == 4 else width
    return {"kv_DQ": (D, wide), "gate_DQ": (D, wide), "bias_JQ": (ratio, wide), "norm": {"gain": (width,)}}


def residual() -> dict:
    return {"mix_ODY": (STREAMS, D, 24), "bias_Y": (24,), "scale": (3,)}


def streams_head() -> dict:
    return {"mix_ODJ": (STREAMS, D, STREAMS), "bias_O": (STREAMS,), "scale": (1,)}


def block(ratio: int) -> dict:
    attention = {"q_down_DR": (D, R), "q_norm": {"gain": (R,)}, "q_up_RHQ": (R, H, Q), "kv_DQ": (D, Q)}
    attention |= {"kv_norm": {"gain": (Q,)}, "sink_H": (H,), "out_down_YGR": (H * Q // G, G, 16)}
    attention |= {"out_up_GRD": (G, 16, D)} | ({"compressor": compressor(ratio, Q)} if ratio else {})
    if ratio == 4:
        attention["indexer"] = {"q_up_RHQ": (R, 2, INDEX), "weight_DH": (D, 2), "key": compressor(4, INDEX)}
    experts = {"router": {"centroids_DE": (D, X)}, "gate_XDF": (X, D, F), "up_XDF": (X, D, F), "down_XFD": (X, F, D)}
    experts["shared"] = {"gate_DF": (D, F), "up_DF": (D, F), "down_FD": (F, D)}
    norms = {"attention_norm": {"gain": (D,)}, "experts_norm": {"gain": (D,)}}
    parts = {"attention": attention, "experts": experts, "attention_residual": residual()}
    return norms | parts | {"experts_residual": residual()}


def shapes() -> dict:
    """One layer with a table of experts, a group (CSA, HCA), a CSA, and multi-token prediction."""
    stacked = lambda tree, n: jax.tree.map(lambda s: (n, *s), tree, is_leaf=lambda x: isinstance(x, tuple))  # noqa: E731
    bias = {"experts": {"router": {"bias_E": (X,)}}}
    depth = {"embedding_norm": {"gain": (D,)}, "hidden_norm": {"gain": (D,)}, "embedding_YD": (D, D)}
    depth |= {"hidden_YD": (D, D), "block": block(0), "streams_head": streams_head(), "final_norm": {"gain": (D,)}}
    params = {
        "embedding": {"table_VD": (V, D)},
        "blocks_0": stacked(block(0), 1),
        "blocks_1": {"blocks": {"0": stacked(block(4), 1), "1": stacked(block(8), 1)}},
        "blocks_3": stacked(block(4), 1),
        "streams_head": streams_head(),
        "final_norm": {"gain": (D,)},
        "head": {"weight_DV": (D, V)},
        "mtp": {"0": depth},
    }
    router_bias = {
        "blocks_0": {"experts": {"router": {"experts_VK": (1, V, K)}}},
        "blocks_1": {"blocks": {"0": stacked(bias, 1), "1": stacked(bias, 1)}},
        "blocks_3": stacked(bias, 1),
        "mtp": {"0": {"block": bias}},
    }
    tree = {"params": params, "router_bias": router_bias}
    made = lambda s: jax.ShapeDtypeStruct(s, np.float32)  # noqa: E731
    return jax.tree.map(made, tree, is_leaf=lambda x: isinstance(x, tuple))


def entries(*, in_fp4: bool = True) -> dict[str, np.ndarray]:
    """A release of random bytes: any codes, and scales that no quantiser would choose.

    Base models have no FP4, and their scales are powers of two as well but in float32.
    """
    rng, found = np.random.default_rng(0), {}

    def scales(*shape: int) -> np.ndarray:
        return rng.integers(122, 128, shape, np.uint8).view(ml_dtypes.float8_e8m0fnu)

    for tensor in names.tensors(shapes()):
        name, (*_, rows, columns) = tensor.name, (1, *tensor.shape)
        if in_fp4 and names.IN_FP4.search(name):
            found[name] = rng.integers(-128, 128, (rows, columns // 2), np.int8)
            found[names.scale_name(name)] = scales(rows, columns // 32)
        elif names.QUANTIZED.search(name):
            codes = rng.integers(0, 0x7F, tensor.shape, np.uint8) | rng.choice(np.uint8([0, 128]), tensor.shape)
            found[name] = codes.view(ml_dtypes.float8_e4m3fn)
            of_blocks = scales(-(-rows // 128), -(-columns // 128))
            found[names.scale_name(name)] = of_blocks if in_fp4 else of_blocks.astype(np.float32)
        elif names.INTEGERS.search(name):
            found[name] = rng.integers(0, X, tensor.shape)
        else:
            dtype = np.float32 if names.FLOAT32.search(name) else ml_dtypes.bfloat16
            found[name] = rng.normal(size=tensor.shape).astype(dtype)
    return found


def publish(directory, tensors: dict, *, in_fp4: bool = True, **config) -> None:
    directory.mkdir()
    found = hf_config.to_hf("v4", NUMBERS, quantized="ue8m0", experts="fp4" if in_fp4 else "fp8") | config
    (directory / "config.json").write_text(json.dumps(found))
    made = [safetensors.Entry(name, a.shape, a.dtype, lambda a=a: a) for name, a in tensors.items()]
    safetensors.write_directory(directory, made)


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    folder = tmp_path_factory.mktemp("v4")
    publish(folder / "hub", entries())
    return folder / "hub"


def host_tree(source: hf.Source) -> dict:
    """The weights, assembled in NumPy."""
    tree = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), source.abstract)
    for piece in source.pieces():
        leaf = tree
        for key in piece.path:
            leaf = leaf[key]
        leaf[piece.index] = piece.array
    return tree


def held(directory) -> dict:
    """The weights on the host, those in FP8 and FP4 in codes."""
    published = hf.open_published(directory)
    source = hf.Source(published, shapes(), in_fp8=True)
    assert (published.family, published.numbers) == ("v4", NUMBERS)
    return fp8_weights.joined(host_tree(source), source.coded)


def test_the_names_of_a_layer_are_the_released_ones():
    """Those of Flash's index, layer 2 (CSA) and the last depth; 0.5 M parameters are each in one tensor."""
    found = {tensor.name for tensor in names.tensors(shapes())}
    own = {name.removeprefix("layers.1.") for name in found if name.startswith("layers.1.") and "experts." not in name}
    assert own == {
        *(f"hc_{part}_{what}" for part in ("attn", "ffn") for what in ("fn", "base", "scale")),
        *("attn_norm.weight", "ffn_norm.weight", "ffn.gate.weight", "ffn.gate.bias", "attn.attn_sink"),
        *(f"attn.{name}.weight" for name in ("wq_a", "wq_b", "q_norm", "wo_a", "wo_b", "wkv", "kv_norm")),
        *("attn.indexer.wq_b.weight", "attn.indexer.weights_proj.weight"),
        *(
            f"attn.{at}compressor.{name}"
            for at in ("", "indexer.")
            for name in ("ape", "wkv.weight", "wgate.weight", "norm.weight")
        ),
    }
    ahead = {name.removeprefix("mtp.0.") for name in found if name.startswith("mtp.0.")}
    assert ahead >= {"enorm.weight", "hnorm.weight", "e_proj.weight", "h_proj.weight", "norm.weight", "hc_head_fn"}
    assert {"layers.0.ffn.gate.tid2eid", "layers.3.ffn.experts.3.w2.weight", "mtp.0.ffn.experts.0.w1.weight"} <= found
    assert {"embed.weight", "norm.weight", "head.weight", "hc_head_base", "hc_head_scale"} <= found
    sizes = [math.prod(tensor.shape) for tensor in names.tensors(shapes())]
    assert sum(sizes) == sum(math.prod(leaf.shape) for leaf in paths(shapes()).values())


@pytest.mark.parametrize("in_fp4", [True, False], ids=["experts in FP4", "Base"])
def test_what_a_release_stores_comes_back_bit_for_bit(released, tmp_path, in_fp4):
    if not in_fp4:
        released = tmp_path / "base"
        publish(released, entries(in_fp4=False), in_fp4=False)
    weights = held(released)
    kinds = {type(leaf) for leaf in paths(weights).values()}
    assert kinds == ({np.ndarray, Fp8Weight, Fp4Weight} if in_fp4 else {np.ndarray, Fp8Weight})
    hf.write(tmp_path / "again", "v4", NUMBERS, weights, hf.from_tree(weights), "keep")
    first, again = (safetensors.open_directory(at) for at in (released, tmp_path / "again"))
    assert set(first.names()) == set(again.names())
    for name in first.names():
        assert first.info(name) == again.info(name)
        assert first.read(name).tobytes() == again.read(name).tobytes(), name
    configs = [json.loads((at / "config.json").read_text()) for at in (released, tmp_path / "again")]
    assert configs[0] == configs[1] and configs[0]["expert_dtype"] == ("fp4" if in_fp4 else "fp8")


@pytest.mark.parametrize(
    "in_fp4", [pytest.param(True, id="experts in FP4"), pytest.param(False, id="Base", marks=SLOW)]
)
def test_a_release_that_is_loaded_and_saved_is_the_same_bit_for_bit(released, tmp_path, in_fp4):
    """By the whole way: onto the device as stored, in the stacks of the model, and back."""
    if not in_fp4:
        released = tmp_path / "base"
        publish(released, entries(in_fp4=False), in_fp4=False)
    deepseek_jax.save_pretrained(deepseek_jax.load(released, weights="stored"), tmp_path / "again", "keep")
    first, again = (safetensors.open_directory(at) for at in (released, tmp_path / "again"))
    assert set(first.names()) == set(again.names())
    for name in first.names():
        assert first.info(name) == again.info(name) and first.read(name).tobytes() == again.read(name).tobytes(), name
    configs = [json.loads((at / "config.json").read_text()) for at in (released, tmp_path / "again")]
    assert configs[0] == configs[1]


def test_scales_that_are_no_powers_of_two_are_not_kept(released, tmp_path):
    """V4's files have no others: what V3's rule has quantised goes back to its own format."""
    wide = host_tree(hf.Source(hf.open_published(released), shapes()))
    hf.write(tmp_path / "fp8", "v4", NUMBERS, wide, hf.from_tree(wide), "fp8")
    weights = held(tmp_path / "fp8")
    with pytest.raises(UserError, match=r"w1.weight is held in FP8 with scales that are no .*Give 'fp8' or 'bf16'"):
        hf.write(tmp_path / "kept", "v4", NUMBERS, weights, hf.from_tree(weights), "keep")
    assert not list((tmp_path / "kept").iterdir())


def test_numbers_are_codes_times_scales(released):
    weights, files = held(released), safetensors.open_directory(released)
    name = "layers.1.ffn.experts.2.w3.weight"
    packed = files.read(name).view(np.uint8)
    codes = np.stack([packed & 15, packed >> 4], -1).reshape(F, D).view(ml_dtypes.float4_e2m1fn)
    scales = np.repeat(files.read("layers.1.ffn.experts.2.w3.scale").astype(np.float32), 32, -1)
    expected = codes.astype(np.float32) * scales
    np.testing.assert_array_equal(files.read_dequantized(name).astype(np.float32), expected)
    up = weights["params"]["blocks_1"]["blocks"]["0"]["experts"]["up_XDF"]
    assert up.shape == (1, X, D, F) and up.nbytes == X * (D * F // 2 + D * F // 32)
    np.testing.assert_array_equal(jax.jit(lambda w: w.astype("float32"))(up)[0, 2], expected.T)


def test_experts_in_fp4_become_fp8_of_the_same_numbers(released):
    weights = held(released)
    before = weights["params"]["blocks_3"]["experts"]["down_XFD"]
    widen = jax.jit(lambda w: w.astype("float32"))
    known = widen(before)
    after = fp8_weights.quantized(jax.device_put(weights))["params"]["blocks_3"]["experts"]["down_XFD"]
    assert type(after) is Fp8Weight
    np.testing.assert_array_equal(widen(after), known)
    scale = np.array(before.scale)
    scale[0, 0, :2, 0] = 100, 122
    damaged = {"experts": {"down_XFD": Fp4Weight(before.codes, scale, before.layout)}}
    wide = {"params": {"streams_head": {}, "blocks_3": damaged}}
    with pytest.raises(UserError, match=r"down_XFD is in FP4, and scales within 128 x 128 .* differ by more than 2\^6"):
        fp8_weights.quantized(wide | {"router_bias": {}})


def as_saved_by_transformers(released, directory) -> None:
    """No multi-token prediction, all in bfloat16; kinds of layers in place of ratios, two rotary bases."""
    files, theirs = safetensors.open_directory(released), {}
    for tensor in names.tensors(shapes()):
        if not tensor.name.startswith("mtp."):
            theirs[names.saved_by_others(tensor.name)] = files.read_dequantized(tensor.name)
    publish(directory, theirs)
    config = json.loads((directory / "config.json").read_text())
    for key in ("compress_ratios", "num_hash_layers", "rope_scaling", "expert_dtype", "quantization_config"):
        del config[key]
    yarn = {"rope_type": "yarn", "rope_theta": 1.6e5, "factor": 16.0, "attention_factor": 1.0}
    yarn |= {"original_max_position_embeddings": 64, "beta_fast": 32.0, "beta_slow": 1.0}
    main = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.25}
    config |= {"rope_parameters": {"main": main, "compress": yarn}, "mlp_layer_types": ["hash_moe", *["moe"] * 3]}
    (directory / "config.json").write_text(json.dumps(config))


def test_the_spelling_of_transformers_is_read_too(released, tmp_path):
    as_saved_by_transformers(released, tmp_path / "theirs")
    files = safetensors.open_directory(tmp_path / "theirs")
    assert {"model.layers.2.attn.norm.weight", "model.hc_head.hc_fn", "model.embed_tokens.weight"} < set(files.names())
    warned: list[str] = []
    published = hf.open_published(tmp_path / "theirs", warned.append)
    assert published.numbers == NUMBERS | {"mtp_depth": 0} and "multi-token prediction" in warned[0]
    model = {root: {name: sub for name, sub in tree.items() if name != "mtp"} for root, tree in shapes().items()}
    mine = paths(host_tree(hf.Source(published, model)))
    wide = paths(host_tree(hf.Source(hf.open_published(released), shapes())))
    for path, leaf in mine.items():
        np.testing.assert_array_equal(leaf, wide[path], err_msg=str(path))


@pytest.mark.parametrize("dtype", ["fp4", "fp8_e8m0", "bf16"])
def test_numbers_are_written_in_other_formats(released, tmp_path, dtype):
    """The same numbers in bfloat16; quantised again in FP4 and FP8, what FP4 and FP8 hold stays."""
    wide = host_tree(hf.Source(hf.open_published(released), shapes()))
    hf.write(tmp_path / dtype, "v4", NUMBERS, wide, hf.from_tree(wide), dtype)
    files = safetensors.open_directory(tmp_path / dtype)
    kind = {"fp4": "I8", "fp8_e8m0": "F8_E4M3", "bf16": "BF16"}[dtype]
    assert files.info("layers.0.ffn.experts.0.w1.weight").dtype == kind
    assert files.info("layers.0.ffn.gate.tid2eid").dtype == "I64" and files.info("hc_head_fn").dtype == "F32"
    again = host_tree(hf.Source(hf.open_published(tmp_path / dtype), shapes()))
    for path, leaf in paths(wide).items():
        np.testing.assert_array_equal(paths(again)[path], leaf, err_msg=str(path))


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("compress_ratios", [0, 4], "one for each of 4"),
        ("layer_types", ["full_attention"] * 4, "one of sliding_attention"),
        ("compress_rates", {"heavily_compressed_attention": 0}, "numbers of tokens"),
        ("num_hash_layers", 5, "at most 4"),
        ("expert_dtype", "fp3", "'fp4', 'fp8' or null"),
        ("scoring_func", "sigmoid", "the only value supported"),
    ],
)
def test_a_config_that_makes_no_model_is_refused(key, value, expected):
    found = json.loads(json.dumps(hf_config.to_hf("v4", NUMBERS)))
    assert hf_config.from_hf(found) == ("v4", NUMBERS)
    with pytest.raises(UserError, match=rf"{key}.*expected .*{expected}"):
        hf_config.from_hf(found | {key: value})


@pytest.mark.parametrize(
    ("ratios", "sparse", "layers"),
    [
        ((0, 4, 8, 16, 0), 4, None),
        ((0, 8, 16, 32, 0), 8, None),
        ((0, 4, 8, 4, 8), 4, ["sliding", "compressed_sparse", "heavily_compressed", "compressed_sparse"]),
        ((0, 4, 8, 4, 16), 4, ["sliding", "compressed_sparse", "heavily_compressed", "compressed_sparse"]),
        ((0, 128, 0, 0, 0), 128, ["sliding", "compressed_sparse", "sliding", "sliding"]),
    ],
)
def test_schedules_are_read_as_they_were_written(ratios, sparse, layers):
    """In the words of transformers too, where it has some; the depth of multi-token prediction is not in these."""
    numbers = NUMBERS | {"compress_ratios": ratios, "index_ratio": sparse}
    found = json.loads(json.dumps(hf_config.to_hf("v4", numbers)))
    assert hf_config.from_hf(found) == ("v4", numbers)
    assert found.get("layer_types") == (layers and [f"{kind}_attention" for kind in layers])


def test_fp4_is_for_v4():
    with pytest.raises(UserError, match="dtype='fp4' is for V4"):
        weights = {"params": {"embedding": {"table_VD": np.zeros((4, 4), np.float32)}}, "router_bias": {}}
        hf.write("nowhere", "v3", {}, weights, hf.from_tree(weights), "fp4")
