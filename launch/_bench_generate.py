"""Measure the speed of generation in one padded batch, side by side with transformers on torch if that is installed.

    deepseek-jax bench generate --config=v2_lite                         # on a GPU
    deepseek-jax bench generate --config=tiny_v3 --prompt-tokens=64      # on this machine's CPU
    deepseek-jax bench generate --config=v2_lite --no-peer --profile=DIR # where the time of a decode step goes

Our side is the loop of `serve.generate`: the layers and kernels of generation, without the engine's pages and
scheduler. Both sides continue the same number of random prompts greedily, with random weights of the same sizes in the
dtype that config.precision computes in. Per batch are printed the time to the first token of all prompts, and the
tokens per second after it, medians over turns of one and then the other. On a chip whose memory is known stands beside
it the floor: the bytes that a step cannot but read (all weights but the table, of the routed experts those that a batch
chooses if routing is uniform, the cache) over the chip's bandwidth, and the share of it that is reached. transformers
are compared up to V3's generation; the peer comes with: pip install "deepseek_jax[parity]"
"""

import contextlib
import os
import statistics
import sys
import time
from typing import Any

from ml_collections import ConfigDict

from deepseek_jax import run_config
from deepseek_jax.bounds import path, whole
from deepseek_jax.errors import UserError
from deepseek_jax.launch import _options, _profile
from deepseek_jax.launch._peer import PeerProcess
from deepseek_jax.units import binary

EXTRA = {
    "batches": (str, "1,16,64", "numbers of prompts, separated by commas"),
    "prompt_tokens": (int, 1024, "tokens of each prompt", whole(1, 10**6)),
    "new_tokens": (int, 128, "tokens that each is continued by", whole(2, 10**6)),
    "turns": (int, 3, "times that each side is measured", whole(1, 10**6)),
    "peer": (bool, True, "measure transformers on torch as well"),
    "peer_python": (str, sys.executable, "the interpreter that has torch and transformers", path(1)),
    "profile": (str, "", "directory for a trace of our decode steps, of which a table is printed", path(0)),
}


def main(argv: list[str]) -> int:
    """Runs the bench; returns the exit code."""
    options = _options.parse(argv, "tiny_v3", EXTRA, workdir=False)
    batches = _numbers(options.batches)
    config = run_config.load(options.config) if isinstance(options.config, str) else options.config
    if options.profile:  # operations in a CUDA graph are traced without their names
        os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_gpu_enable_command_buffer="
    if options.peer:  # both sides share a GPU's memory, of which JAX would take three quarters at once
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    with contextlib.ExitStack() as stack:
        ours = Ours(config, options.prompt_tokens)
        sides: dict[str, Any] = {"deepseek_jax": ours}
        if options.peer:
            sides["transformers"] = stack.enter_context(Peer(config, options.prompt_tokens, options.peer_python))
        print(f"{config.name}: prompts of {options.prompt_tokens} tokens, {options.new_tokens} new ones each")
        for name, side in sides.items():
            print(f"  {name:<13} {side.title}")
        for batch in batches:
            print("\n".join(rows(sides, batch, options.new_tokens, options.turns, ours.floor(batch))), flush=True)
        if options.profile:
            steps = Steps(ours, batches[0])
            _profile.report(options.profile, steps, steps.n_steps)
    return 0


def rows(sides: dict[str, Any], batch: int, n_new: int, turns: int, floor: float | None) -> list[str]:
    """Measures one batch and returns the lines to print; `floor` is the least seconds of a step."""
    first: dict[str, list[float]] = {name: [] for name in sides}
    steps: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(turns + 1):
        for name, side in sides.items():
            one, whole_time = side.run(batch, 1), side.run(batch, n_new)
            if turn:  # the first turn compiles and warms up
                first[name].append(one)
                steps[name].append((whole_time - one) / (n_new - 1))
    lines = [
        f"  batch {batch}" + (f": at most {batch / floor:,.0f} tokens/s, {1e3 * floor:.2f} ms a step" if floor else "")
    ]
    for name in sides:
        step = statistics.median(steps[name])
        share = f", {floor / step:.0%} of the floor" if floor else ""
        lines.append(
            f"    {name:<13} {batch / step:9,.1f} tokens/s ({1e3 * step:.2f} ms a step, fastest "
            f"{1e3 * min(steps[name]):.2f}){share}; first token after {statistics.median(first[name]):.3f} s"
        )
    return lines


class Ours:
    """Our generator with random weights."""

    def __init__(self, config: ConfigDict, n_prompt: int):
        import jax
        import numpy as np

        from deepseek_jax import on_device
        from deepseek_jax.abstract_model import abstract_module
        from deepseek_jax.kernels import XLA
        from deepseek_jax.layers.base import logical_axes, split
        from deepseek_jax.serve.generate import Generator

        self.config, self.n_prompt, self.device = config, n_prompt, jax.devices()[0]
        module = abstract_module(config, XLA)
        definition, params, router_bias = split(module)
        reads = on_device.reads(config, module, jax.default_backend() == "gpu")
        self.weights = random_weights(module, params, router_bias, reads)
        self.bytes_read = read_per_token(params, logical_axes(module)[0], reads)
        options = on_device.compiler_options()
        definition = on_device.definition(config, definition)
        self.generator = Generator(definition, compiler_options=options)
        self.tokens = np.random.default_rng(0)
        n_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self.weights))
        chosen = on_device.kernels(config).chosen if jax.default_backend() == "gpu" else {}
        kernels = [f"{operation} by {name}" for operation, name in chosen.items() if name != "xla"]
        self.title = (
            f"deepseek_jax, jax {jax.__version__}, {self.device.device_kind}, weights of {binary(n_bytes)}, "
            f"{', '.join(kernels) or 'all by xla'}"
        )

    def run(self, batch: int, n_new: int) -> float:
        """Seconds until `batch` prompts are continued by `n_new` tokens."""
        from deepseek_jax.serve.sampler import row_keys

        prompts = list(self.tokens.integers(0, self.config.model.vocab_size, (batch, self.n_prompt)))
        keys = row_keys(0, batch)
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

        prompts = list(ours.tokens.integers(0, ours.config.model.vocab_size, (batch, ours.n_prompt), np.int32))
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


def read_per_token(params: dict, axes: dict, reads: dict) -> tuple[int, int]:
    """Returns the bytes of weights that every decode step reads, and those of routed experts, of which it reads some.

    Of the table it reads a few rows, and nothing of multi-token prediction.
    """
    import jax
    import jax.numpy as jnp

    sizes = {"always": 0, "routed": 0}

    def add(path: tuple, leaf: jax.ShapeDtypeStruct, names: tuple, read: Any) -> None:
        if path[0].key not in ("embedding", "mtp"):
            sizes["routed" if "experts" in names else "always"] += leaf.size * jnp.dtype(read.dtype).itemsize

    jax.tree_util.tree_map_with_path(add, params, axes, reads)
    return sizes["always"], sizes["routed"]


def random_weights(module: Any, params: dict, router_bias: dict, reads: dict) -> tuple[dict, dict]:
    """Returns weights as a step reads them (`on_device.Read`), drawn on the device one by one; gains are 1."""
    import jax
    import jax.numpy as jnp

    from deepseek_jax import on_device
    from deepseek_jax.layers.base import roles

    keys = iter(jax.random.split(jax.random.key(0), 10**4))

    def drawn(leaf: jax.ShapeDtypeStruct, role: str, read: on_device.Read) -> Any:
        if role in ("gain", "bias"):
            return on_device.prepared(jnp.full(leaf.shape, role == "gain", read.dtype), read)
        draw = jax.jit(lambda key: 0.02 * jax.random.normal(key, leaf.shape, read.dtype))
        return on_device.prepared(draw(next(keys)), read)

    weights = jax.tree.map(drawn, params, roles(module), reads)
    return weights, jax.tree.map(lambda b: jnp.zeros(b.shape, b.dtype), router_bias)


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
