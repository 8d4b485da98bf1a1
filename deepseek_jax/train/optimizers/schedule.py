"""The learning rate of each step.

    rate:  0 -> peak (linear)  |  peak  |  peak -> tail (cosine)  |  tail  |  final

Paper: V3 section 4.2.
"""

from dataclasses import dataclass

import jax
import optax

LAST = 2**31 - 1  # step that int32 counts to


@dataclass(frozen=True)
class Schedule:
    """A learning rate as a function of the training step."""

    peak_rate: float  # after warm-up (V3: 2.2e-4)
    warmup_steps: int  # linear from 0 (2,000)
    constant_steps: int  # at `peak_rate` (to 10T tokens)
    cosine_steps: int  # from `peak_rate` to `tail_rate` (over 4.3T tokens)
    # tail_rate, tail_steps: first constant tail (2.2e-5 for 333B tokens)
    tail_rate: float
    tail_steps: int
    final_rate: float  # from there on (7.3e-6 for 167B tokens)

    def __call__(self, step: jax.Array | int) -> jax.Array:
        """The learning rate of `step`, a float32 scalar."""
        parts = [
            optax.linear_schedule(0.0, self.peak_rate, max(self.warmup_steps, 1)),
            optax.constant_schedule(self.peak_rate),
            optax.cosine_decay_schedule(self.peak_rate, max(self.cosine_steps, 1), self.tail_rate / self.peak_rate),
            optax.constant_schedule(self.tail_rate),
            optax.constant_schedule(self.final_rate),
        ]
        ends, end = [], 0
        for steps in (self.warmup_steps, self.constant_steps, self.cosine_steps, self.tail_steps):
            end = min(end + steps, LAST)
            ends.append(end)
        return optax.join_schedules(parts, ends)(step)
