"""Measure the speed of training and generation, side by side with transformers on torch where that is installed.

    deepseek-jax bench train                                   # the 8M-parameter micro_v3 on this machine
    deepseek-jax bench train --peer-python=/path/to/python     # an interpreter that has torch and transformers
    deepseek-jax bench train --config=tiny_v3 --no-peer
    deepseek-jax bench train --config=v3_slice                         # V3's widths, for a GPU: see the config
    deepseek-jax bench train --config=v3_slice --no-peer --profile=DIR                       # where the time goes
    deepseek-jax bench generate --config=v2_lite               # tokens/s at batch 1, 16, 64; --help lists its flags
    deepseek-jax bench serve                                   # a running server; --help lists its flags
    deepseek-jax bench requests                                # many requests on this CPU; --help lists its flags
    deepseek-jax bench rl                                      # steps of GRPO beside TRL; --help lists its flags
    deepseek-jax bench kernels                                 # FP8 kernels, on a Hopper GPU; --help lists its flags
    deepseek-jax bench scaling                                 # layouts of this machine's devices beside one of them
    deepseek-jax bench exchange                                # tokens to experts and back, on this machine's devices

Both sides train the same sizes on fresh random tokens with AdamW, in turns: a few steps of one, then a few of the
other, after a warm-up. Printed are the medians over the turns and their ratio; what else the machine does in the
meantime touches both alike. Ours computes in config.precision over float32 master weights, with moments of
config.optimizer.moments_dtype. The peer's weights, gradients and moments are all bfloat16, or float32 if the precision
is fp32. Operations count causal attention as half. The peer comes with: pip install "deepseek_jax[parity]"
"""

import contextlib
import importlib
import os
import statistics
import sys
from typing import Any

from ml_collections import ConfigDict

from deepseek_jax import run_config
from deepseek_jax.bounds import path, whole
from deepseek_jax.errors import UserError
from deepseek_jax.launch import _options, _profile
from deepseek_jax.launch._bench_step import Ours
from deepseek_jax.launch._peer import PeerProcess, in_turns, transformers_sizes
from deepseek_jax.units import binary

EXTRA = {
    "turns": (int, 15, "times that each side is measured", whole(1, 10**6)),
    "steps": (int, 4, "training steps of one turn", whole(1, 10**6)),
    "peer": (bool, True, "measure transformers on torch as well"),
    "peer_python": (str, sys.executable, "the interpreter that has torch and transformers", path(1)),
    "profile": (str, "", "directory for a trace of our steps, of which a table is printed", path(0)),
}
OTHERS = {  # benches with flags of their own, in modules that import jax
    "generate": "_bench_generate",
    "serve": "_bench_serve",
    "requests": "_bench_requests",
    "rl": "_bench_rl",
    "kernels": "_bench_kernels",
    "scaling": "_scaling",
    "exchange": "_bench_exchange",
}


def main(argv: list[str]) -> int:
    """Runs the verb; returns the exit code."""
    subject = argv[0] if argv and not argv[0].startswith("--") else None
    if subject in OTHERS:
        return importlib.import_module(f"deepseek_jax.launch.{OTHERS[subject]}").main(argv[1:])
    options = _options.parse(argv[1:] if subject else argv, "micro_v3", EXTRA, workdir=False)
    if subject != "train":
        said = f"bench {subject}: no such bench" if subject else "bench: nothing to measure was named"
        raise UserError(f"{said}. Give: deepseek-jax bench {' | '.join(('train', *OTHERS))}.")
    config = run_config.validate(options.config)
    if options.profile:  # operations in a CUDA graph are traced without their names
        os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_gpu_enable_command_buffer="
    if options.peer:  # both sides share a GPU's memory, of which JAX would take three quarters at once
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    with contextlib.ExitStack() as stack:
        sides: dict[str, Any] = {"deepseek_jax": Ours(config)}
        if options.peer:
            sides["transformers"] = stack.enter_context(Peer(config, options.peer_python))
        seconds = in_turns(sides, options.turns, options.steps)
        report(config, sides, seconds, options.steps)
        if options.profile:
            _profile.report(options.profile, sides["deepseek_jax"], options.steps)
    return 0


class Peer(PeerProcess):
    """transformers' DeepseekV3ForCausalLM of the same sizes, training."""

    def __init__(self, config: ConfigDict, python: str):
        job = {
            "sizes": transformers_sizes(config),
            "optimizer": {
                "rate": config.schedule.peak_rate,
                "betas": (config.optimizer.beta1, config.optimizer.beta2),
                **{key: config.optimizer[key] for key in ("eps", "weight_decay")},
                "clip_norm": config.loss.clip_norm,
            },
            "batch": (config.batch.size, config.data.seq_len),
            "dtype": "float32" if config.precision == "fp32" else "bfloat16",
        }
        super().__init__("_torch_peer.py", job, python)
        self.title, self.n_params = self.ready["name"], self.ready["n_params"]
        self.peak_memory_bytes: int | None = None

    def run(self, n_steps: int) -> float:
        """Seconds of `n_steps` training steps."""
        answer = self.ask(str(n_steps))
        self.loss, self.peak_memory_bytes = answer["loss"], answer["peak_memory_bytes"]
        return answer["seconds"]


def report(config: ConfigDict, sides: dict, seconds: dict, n_steps: int) -> None:
    """Prints the medians and their ratio."""
    tokens = config.batch.size * config.data.seq_len * n_steps
    medians = {name: tokens / statistics.median(taken) for name, taken in seconds.items()}
    turns = len(next(iter(seconds.values())))
    print(f"{config.name}: {config.batch.size} x {config.data.seq_len} tokens per step, {turns} turns of {n_steps}")
    for name, side in sides.items():
        spread = sorted(tokens / taken for taken in seconds[name])
        print(
            f"  {name:<13} {medians[name]:9,.0f} tokens/s  (slowest {spread[0]:,.0f}, fastest {spread[-1]:,.0f})  "
            f"{side.n_params / 1e6:.2f}M parameters  {side.title}"
        )
    for name, side in sides.items():
        print(f"  {name}: {_rates(config, sides['deepseek_jax'], medians[name])}; {_memory_and_loss(side)}")
    if len(medians) == 2:
        print(f"  ratio of the medians: {medians['deepseek_jax'] / medians['transformers']:.2f}")


def _rates(config: ConfigDict, ours: Ours, tokens_per_second: float) -> str:
    """Returns TFLOP/s, and MFU on a chip whose peak is known; operations are the same on both sides."""
    from deepseek_jax.chips import peak_flops

    rate = tokens_per_second * ours.trainer.flops_per_token(config.data.seq_len)
    peak = (peak_flops(ours.device) or 0.0) * ours.trainer.mesh.size
    mfu = f", MFU {rate / peak:.1%} of {peak / 1e12:,.0f} (causal attention)" if peak else ""
    return f"{rate / 1e12:.3f} TFLOP/s{mfu}"


def _memory_and_loss(side: Ours | Peer) -> str:
    """Returns the peak memory, where it is known, and the last loss."""
    memory = f"peak memory {binary(side.peak_memory_bytes)}; " if side.peak_memory_bytes else ""
    return f"{memory}last loss {side.loss:.4f}"
