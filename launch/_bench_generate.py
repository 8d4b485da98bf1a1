"""Measure the speed of generation, side by side with transformers on torch if that is installed.

    deepseek-jax bench generate --config=v2_lite                         # on a GPU
    deepseek-jax bench generate --config=v2_lite --fp8 --no-peer         # beside it with weights in FP8
    deepseek-jax bench generate --config=tiny_v3 --prompt-tokens=64      # on this machine's CPU
    deepseek-jax bench generate --config=v2_lite --no-peer --profile=DIR # where the time of a decode step goes

Our sides are one padded batch, the loop of `serve.generate`, which is the layers and kernels of generation without
pages and scheduler; and the engine, by which `generate`, `chat` and `serve` run. All continue the same number of random
prompts greedily, with random weights of the same sizes in the dtype that config.precision computes in; with --fp8 ours
also from weights that stay in FP8. With --drafts=0.85 the engine runs without and with multi-token prediction, on
weights whose drafts are right so often (`_bench_engine`).

Per batch are printed the time to the first token of all prompts, and the tokens per second after it, medians over turns
of one side and then the next. On a chip whose memory is known stands beside it the floor: the bytes that a step cannot
but read (all weights but the table, of the routed experts those that a batch chooses if routing is uniform, the cache)
over the chip's bandwidth, and the share of it that is reached. transformers are compared up to V3's generation; the
peer comes with: pip install "deepseek_jax[parity]"
"""

import contextlib
import math
import os
import statistics
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any

from ml_collections import ConfigDict

from deepseek_jax import run_config
from deepseek_jax.bounds import number, path, whole
from deepseek_jax.errors import UserError
from deepseek_jax.launch import _options, _profile
from deepseek_jax.launch._peer import PeerProcess
from deepseek_jax.units import binary

EXTRA = {
    "batches": (str, "1,16,64", "numbers of prompts, separated by commas"),
    "prompt_tokens": (int, 1024, "tokens of each prompt", whole(1, 10**6)),
    "new_tokens": (int, 128, "tokens that each is continued by", whole(2, 10**6)),
    "turns": (int, 3, "times that each side is measured", whole(1, 10**6)),
    "batch": (bool, True, "measure one padded batch"),
    "engine": (bool, True, "measure the engine"),
    "fp8": (bool, False, "measure our sides with weights in FP8 as well"),
    "drafts": (float, -1.0, "share of drafts that are right, of multi-token prediction in the engine; -1: none"),
    "peer": (bool, True, "measure transformers on torch as well"),
    "peer_python": (str, sys.executable, "the interpreter that has torch and transformers", path(1)),
    "profile": (str, "", "directory for a trace of our decode steps, of which a table is printed", path(0)),
}
WIDTH = 14  # of the names of sides
E4M3 = "float8_e4m3fn"


def main(argv: list[str]) -> int:
    """Runs the bench; returns the exit code."""
    options = _options.parse(argv, "tiny_v3", EXTRA, workdir=False)
    batches = _numbers(options.batches)
    config = run_config.load(options.config) if isinstance(options.config, str) else options.config
    if options.profile:  # operations in a CUDA graph are traced without their names
        os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_gpu_enable_command_buffer="
    if options.peer:  # both sides share a GPU's memory, of which JAX would take three quarters at once
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    if options.drafts != -1:
        check_drafts(config, options.drafts)
    with contextlib.ExitStack() as stack:
        ours = Ours(config, options.prompt_tokens, drafts=None if options.drafts == -1 else options.drafts)
        sides = our_sides(ours, options, max(batches))
        if options.peer:
            sides["transformers"] = stack.enter_context(Peer(config, options.prompt_tokens, options.peer_python))
        print(f"{config.name}: prompts of {options.prompt_tokens} tokens, {options.new_tokens} new ones each")
        for name, side in sides.items():
            print(f"  {name:<{WIDTH}} {side.title}")
        for batch in batches:
            floors = {name: getattr(side, "floor", ours.floor)(batch) for name, side in sides.items()}
            print("\n".join(rows(sides, batch, options.new_tokens, options.turns, floors)), flush=True)
        if options.profile:
            steps = Steps(ours, batches[0])
            _profile.report(options.profile, steps, steps.n_steps)
    return 0


def check_drafts(config: ConfigDict, share: float) -> None:
    """Raises UserError for an invalid share of right drafts, or a model that drafts nothing."""
    number(0, 1).check("--drafts", share)
    if not config.model.get("mtp_depth"):
        raise UserError(
            f"--drafts={share:g}: {config.name} has no multi-token prediction (config.model.mtp_depth) to draft with. "
            "Leave --drafts out, or give a config that has."
        )


def our_sides(ours: "Ours", options: Any, n_rows: int) -> dict[str, Any]:
    """Returns our sides by name."""
    from deepseek_jax.launch._bench_engine import Engine

    networks = {"": ours} | ({", FP8": Ours(ours.config, ours.n_prompt, in_fp8=True)} if options.fp8 else {})
    sides: dict[str, Any] = {}
    for name, network in networks.items():
        if options.batch:
            sides[f"one batch{name}"] = network
        if options.engine:
            sides[f"engine{name}"] = Engine(network, n_rows, options.new_tokens)
    if options.drafts != -1:
        sides["engine, drafts"] = Engine(ours, n_rows, options.new_tokens, n_drafts=1)
    return sides


def rows(sides: dict[str, Any], batch: int, n_new: int, turns: int, floors: Mapping[str, float | None]) -> list[str]:
    """Measures one batch and returns the lines to print; `floors` are the least seconds of each side's steps."""
    first: dict[str, list[float]] = {name: [] for name in sides}
    steps: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(turns + 1):
        for name, side in sides.items():
            one, whole_time = side.run(batch, 1), side.run(batch, n_new)
            if turn:  # the first turn compiles and warms up
                first[name].append(one)
                steps[name].append((whole_time - one) / (n_new - 1))
    lines = [f"  batch {batch}"]
    for name, side in sides.items():
        step, floor = statistics.median(steps[name]), floors[name]
        share = f", {floor / step:.0%} of the floor of {1e3 * floor:.2f} ms" if floor else ""
        right = getattr(side, "acceptance", None)
        drafts = "" if right is None else f"; {right:.0%} of the drafts right"
        lines.append(
            f"    {name:<{WIDTH}} {batch / step:9,.1f} tokens/s ({1e3 * step:.2f} ms a token, fastest "
            f"{1e3 * min(steps[name]):.2f}){share}; first token after {statistics.median(first[name]):.3f} s{drafts}"
        )
    return lines


class Ours:
    """Our network with random weights, in FP8 where releases have them so, and one padded batch generated with it.

    `drafts`: the share of drafts of multi-token prediction that are right; None: as random weights make them.
    """

    def __init__(self, config: ConfigDict, n_prompt: int, in_fp8: bool = False, drafts: float | None = None):
        import jax
        import numpy as np

        from deepseek_jax import on_device
        from deepseek_jax.abstract_model import abstract_module
        from deepseek_jax.kernels import XLA
        from deepseek_jax.launch import _bench_engine
        from deepseek_jax.layers.base import logical_axes, split
        from deepseek_jax.serve.generate import Generator

        self.config, self.n_prompt, self.device = config, n_prompt, jax.devices()[0]
        module = abstract_module(config, XLA)
        definition, params, router_bias = split(module)
        reads = on_device.reads(config, module, jax.default_backend() == "gpu")
        small = _bench_engine.SMALL if drafts is not None else 1.0
        coded = coded_layouts(config) if in_fp8 else {}
        self.weights = random_weights(
            module, params, router_bias, reads, coded, dict.fromkeys(_bench_engine.ADDS, small)
        )
        if drafts is not None:
            self.weights = _bench_engine.with_drafts(self.weights, drafts)
        self.bytes_read = read_per_token(self.weights[0], logical_axes(module)[0])
        options = on_device.compiler_options()
        self.definition = on_device.definition(config, definition)
        ends_early = on_device.ends_early()
        self.generator = Generator(self.definition, compiler_options=options, ends_early=ends_early)
        self.tokens = np.random.default_rng(0)
        n_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self.weights))
        chosen = on_device.kernels(config).chosen if jax.default_backend() == "gpu" else {}
        kernels = [f"{operation} by {name}" for operation, name in chosen.items() if name != "xla"]
        self.title = (
            f"deepseek_jax, jax {jax.__version__}, {self.device.device_kind}, weights of {binary(n_bytes)}, "
            f"{', '.join(kernels) or 'all by xla'}"
        )

    def prompts(self, batch: int) -> list[Any]:
        """Random prompts."""
        return list(self.tokens.integers(0, self.config.model.vocab_size, (batch, self.n_prompt)))

    def run(self, batch: int, n_new: int) -> float:
        """Seconds until `batch` prompts are continued by `n_new` tokens."""
        from deepseek_jax.serve.sampler import row_keys

        prompts, keys = self.prompts(batch), row_keys(0, batch)
        begin = time.perf_counter()
        n_positions = 1 << (self.n_prompt + n_new).bit_length()
        inputs: tuple = (*self.weights, prompts, keys)
        new_BT = self.generator.generate(*inputs, max_new_tokens=n_new, n_positions=n_positions)
        taken = time.perf_counter() - begin
        assert new_BT.shape == (batch, n_new)
        return taken

    def floor(self, batch: int) -> float | None:
        """Seconds that the memory needs for what a step reads; None on a chip whose bandwidth is unknown."""
        from deepseek_jax.chips import memory_bandwidth

        bandwidth = memory_bandwidth(self.device.device_kind)
        return bandwidth and self.bytes_per_step(batch) / bandwidth

    def bytes_per_step(self, batch: int) -> float:
        """Bytes that a decode step of `batch` sequences of the prompts' length has to read."""
        import jax.numpy as jnp

        from deepseek_jax.models import family
        from deepseek_jax.plan.network import cache_bytes_per_token
        from deepseek_jax.precision.policy import policy

        sizes, maker = self.config.model, family(self.config.family)
        chosen = 1 - (1 - sizes.top_k / sizes.n_experts) ** batch if "n_experts" in sizes else 1

        width = jnp.dtype(policy(self.config.precision).compute).itemsize
        cached = cache_bytes_per_token(maker, maker.Config.from_config(sizes)) * width / 2
        always, routed = self.bytes_read
        return always + chosen * routed + batch * self.n_prompt * cached


class Steps:
    """Our decode steps alone, as `_profile` runs and reads them."""

    def __init__(self, ours: Ours, batch: int):
        import numpy as np

        from deepseek_jax.serve.generate import BLOCK, Drawing, bucket
        from deepseek_jax.serve.sampler import row_keys

        prompts = ours.prompts(batch)
        n_slots = bucket(ours.n_prompt + 3 * BLOCK, 1 << (ours.n_prompt + 3 * BLOCK).bit_length())
        self.ours, self.n_steps = ours, BLOCK
        self.rest = Drawing(row_keys(0, batch), None), np.zeros(0, np.int32)
        _, self.state = ours.generator._prefill(ours.weights, prompts, *self.rest, n_slots)
        self.run(self.n_steps)

    def run(self, n_steps: int) -> float:
        """Seconds of `n_steps` steps."""
        import jax
        import numpy as np

        begin = time.perf_counter()
        decode = self.ours.generator._decode_block
        new_BT, self.state = decode(self.ours.weights, self.state, *self.rest, np.int32(n_steps))
        jax.block_until_ready(new_BT)
        return time.perf_counter() - begin

    def program(self) -> str:
        """The compiled program of the steps, as text."""
        import numpy as np

        lowered = self.ours.generator._decode_block.lower(self.ours.weights, self.state, *self.rest, np.int32(1))
        return lowered.compile().as_text() or ""


def read_per_token(params: dict, axes: dict) -> tuple[int, int]:
    """Returns the bytes of weights that every decode step reads, and those of routed experts, of which it reads some.

    Of the table it reads a few rows, and nothing of multi-token prediction.
    """
    import jax

    from deepseek_jax.parallel.sharding import is_axes

    sizes = {"always": 0, "routed": 0}

    def add(path: tuple, names: tuple, weight: Any) -> None:
        if path[0].key not in ("embedding", "mtp"):
            n_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(weight))
            sizes["routed" if "experts" in names else "always"] += n_bytes

    jax.tree_util.tree_map_with_path(add, axes, params, is_leaf=is_axes)
    return sizes["always"], sizes["routed"]


def coded_layouts(config: ConfigDict) -> dict[tuple, Any]:
    """Returns the layouts (`precision.fp8_weight`) of the weights that FP8 releases store in FP8, by their paths."""
    from deepseek_jax.abstract_model import abstract_weights
    from deepseek_jax.convert import fp8_weights

    found = fp8_weights.of_model(abstract_weights(config))
    return {path[1:]: how for paths, hows in found.items() for path, how in zip(paths, hows, strict=True)}


def random_weights(
    module: Any, params: dict, router_bias: dict, reads: dict, coded: dict[tuple, Any], factors: dict[str, float]
) -> tuple[dict, dict]:
    """Returns weights as a step reads them (`on_device.Read`), drawn on the device one by one; gains are 1.

    Those of `coded`, layouts by path, are in FP8. `factors`: of the standard deviation of 0.02, by role.
    """
    import jax
    import jax.numpy as jnp

    from deepseek_jax import on_device
    from deepseek_jax.layers.base import roles
    from deepseek_jax.precision.fp8_weight import Fp8Weight

    keys = iter(jax.random.split(jax.random.key(0), 10**4))

    def drawn(path: tuple, leaf: jax.ShapeDtypeStruct, role: str, read: on_device.Read) -> Any:
        if role in ("gain", "bias"):
            return on_device.prepared(jnp.full(leaf.shape, role == "gain", read.dtype), read)
        std, how = 0.02 * factors.get(role, 1.0), coded.get(tuple(part.key for part in path))
        if how is not None:
            before = leaf.shape[: leaf.ndim - len(how.order)]
            codes = _normal(next(keys), (*before, *how.matrix), "bfloat16", E4M3, 1.0)
            scale = jnp.full((*before, *how.blocks), std, jnp.float32)
            return on_device.prepared(Fp8Weight(codes, scale, how), read)
        dtype = str(jnp.dtype(read.dtype))
        return on_device.prepared(_normal(next(keys), leaf.shape, dtype, dtype, std), read)

    weights = jax.tree_util.tree_map_with_path(drawn, params, roles(module), reads)
    return weights, random_biases(params, router_bias, keys)


def random_biases(params: dict, router_bias: dict, keys: Iterator) -> dict:
    """Returns router biases of zero; tables of experts by token id are drawn as `layers.router.HashRouter` does."""
    import jax
    import jax.numpy as jnp

    from deepseek_jax.layers.router import random_table
    from deepseek_jax.tree import paths

    def drawn(path: tuple, leaf: jax.ShapeDtypeStruct) -> Any:
        names = [part.key for part in path]
        if names[-1] != "experts_VK":
            return jnp.zeros(leaf.shape, leaf.dtype)
        *stacked, vocab_size, top_k = leaf.shape
        n_experts = paths(params)[*names[:-1], "centroids_DE"].shape[-1]

        def tables(key: Any) -> Any:  # one after the other, to spare memory
            each = jax.random.split(key, math.prod(stacked))
            found = jax.lax.map(lambda one: random_table(one, vocab_size, n_experts, top_k), each)
            return found.reshape(leaf.shape)

        return jax.jit(tables)(next(keys))

    return jax.tree_util.tree_map_with_path(drawn, router_bias)


def _normal(key: Any, shape: tuple[int, ...], drawn: Any, stored: Any, std: float) -> Any:
    """Returns normal numbers, drawn in one dtype and stored in another; a stack layer by layer, to spare memory."""
    import jax

    def draw(key: Any, shape: tuple[int, ...]) -> Any:
        return (std * jax.random.normal(key, shape, drawn)).astype(stored)

    if len(shape) < 3:
        return jax.jit(lambda key: draw(key, shape))(key)
    return jax.jit(lambda key: jax.lax.map(lambda one: draw(one, shape[1:]), jax.random.split(key, shape[0])))(key)


class Peer(PeerProcess):
    """transformers' model of the same sizes."""

    def __init__(self, config: ConfigDict, n_prompt: int, python: str):
        from deepseek_jax.convert.hf_config import to_hf

        dtype = "float32" if config.precision == "fp32" else "bfloat16"
        sizes = to_hf(config.family, config.model.to_dict(), dtype=dtype) | {"use_cache": True}
        super().__init__("_torch_generate.py", {"sizes": sizes, "dtype": dtype, "prompt": n_prompt}, python)
        self.title = self.ready["name"]

    def run(self, batch: int, n_new: int) -> float:
        """Seconds until `batch` prompts are continued by `n_new` tokens."""
        return self.ask(f"{batch} {n_new}")["seconds"]


def _numbers(text: str) -> list[int]:
    numbers = [int(one) for one in text.split(",") if one.isdecimal()]
    if not numbers or len(numbers) != len(text.split(",")) or min(numbers) < 1:
        raise UserError(f"--batches={text}: expected numbers of prompts separated by commas, such as 1,16,64.")
    return numbers
