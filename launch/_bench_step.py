"""Our training step on random tokens, compiled and timed: what `bench train` and `bench scaling` measure."""

import functools
import time
from typing import TYPE_CHECKING, Any

from ml_collections import ConfigDict

from deepseek_jax.errors import UserError

if TYPE_CHECKING:
    from deepseek_jax.data.pipeline import Batch


# what a bias moves by per share of the mean load, in standard deviations of a fresh router's logits; scores, which are
# sigmoids of them, spread by a quarter of one
LEVELLING = 0.2


class Ours:
    """Our training step, compiled; the host makes each batch while the last step is being waited for, as in a run.

    The weights are made for the first step: until then it takes no memory of the devices.
    """

    def __init__(self, config: ConfigDict):
        from deepseek_jax.compat import keep_freed_memory

        keep_freed_memory()
        import jax
        import numpy as np

        from deepseek_jax import run
        from deepseek_jax.parallel.mesh import SEQUENCES, make_mesh, size
        from deepseek_jax.train.attempts import Attempts

        self.shape, self.seed = (config.batch.size, config.data.seq_len), config.seed
        self.vocab_size = config.model.vocab_size
        self.levelling = LEVELLING * config.model.init_std * config.model.d_model**0.5
        begin = time.perf_counter()
        mesh = make_mesh(**config.mesh)
        run.batch_ramp(config, size(mesh, SEQUENCES))  # checks that the batch divides over the devices
        batch = run.abstract_batch(config, mesh)
        self.trainer = run.trainer(config, mesh)
        self.compiled = self.trainer.step.lower(self.trainer.abstract, batch).compile()
        # which program runs is found out in the first turn, which warms up
        self.step = self.trainer.step if isinstance(self.trainer.step, Attempts) else self.compiled
        self.tokens = np.random.default_rng(1)
        self.compile_seconds = time.perf_counter() - begin
        self.n_params = self.trainer.n_params
        self.device = jax.devices()[0].device_kind
        self.title = f"deepseek_jax, jax {jax.__version__}, {self.device}; compiled in {self.compile_seconds:.1f} s"

    @functools.cached_property
    def state(self) -> dict:
        """What the next step begins with."""
        return self.trainer.init(self.seed)

    def batch(self) -> "Batch":
        """A batch of random tokens on the mesh."""
        import numpy as np

        from deepseek_jax.data.pipeline import Batch
        from deepseek_jax.parallel.mesh import global_batch

        ids = self.tokens.integers(0, self.vocab_size, (self.shape[0], self.shape[1] + 1), dtype=np.int32)
        positions = np.broadcast_to(np.arange(self.shape[1], dtype=np.int32), self.shape)
        ones = np.ones(self.shape, np.int32)
        rows = Batch(ids[:, :-1], ids[:, 1:], ones, positions, ones.astype(np.float32))
        return global_batch(rows, self.trainer.mesh)

    def run(self, n_steps: int) -> float:
        """Seconds of `n_steps` training steps."""
        import jax

        jax.block_until_ready(self.state)  # made before the clock starts
        begin = time.perf_counter()
        for _ in range(n_steps):
            self.state, found = self.step(self.state, self.batch())
        jax.block_until_ready(self.state)
        taken = time.perf_counter() - begin
        self.loss, self.report = float(found.loss), found
        if not bool(found.finite):
            raise UserError("a step was not finite: its time means nothing. Set a lower --config.schedule.peak_rate.")
        return taken

    @property
    def loads(self) -> list:
        """Tokens per expert in the last step, [..., E] of each stack of routers."""
        import jax

        return jax.device_get(jax.tree.leaves(self.report.loads))

    def level(self) -> None:
        """Moves each router's bias by its experts' distance from the mean load in the last step, times `levelling`.

        Tokens here are random, so the loads of one step are those of the next but for chance. The bias update of a run
        takes steps of one size: small ones need hundreds of steps, and large ones never come to rest.
        """
        import jax
        import numpy as np

        def by(change: Any, bias: Any) -> Any:  # integers are tables of experts by token id, which stay
            return (bias + change).astype(bias.dtype) if np.issubdtype(bias.dtype, np.floating) else bias

        def moved(load: Any, biases: Any) -> Any:
            missing = 1 - load / np.maximum(load.mean(-1, keepdims=True), 1)
            return jax.tree.map(functools.partial(by, self.levelling * missing), biases)

        biases, loads = self.trainer.router_biases(self.state), jax.device_get(self.report.loads)
        biases = {"router_bias": jax.tree.map(moved, loads, biases)}
        shardings = jax.tree.map(lambda x: x.sharding, {"router_bias": self.trainer.stored["router_bias"]})
        self.state |= self.trainer.load(jax.device_put(biases, shardings))

    def program(self) -> str:
        """The compiled program of a step, as text."""
        from deepseek_jax.train.attempts import Attempts

        is_other = isinstance(self.step, Attempts) and self.step.level > 0
        return (self.step.lower(self.state, self.batch()).compile() if is_other else self.compiled).as_text()

    @property
    def peak_memory_bytes(self) -> int | None:
        """The most memory in use so far, on a GPU; None on a CPU, where compiling takes the most."""
        import jax

        return (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
