"""From the time of a step to utilization, throughput, days and cost.

    MFU = training operations per token * tokens per second / (devices * bfloat16 peak)

The peak is the bfloat16 one whatever format the matmuls run in, as in the published numbers.
"""

from dataclasses import dataclass

from deepseek_jax.chips import Chip
from deepseek_jax.plan.step_time import TERA

HOUR, DAY, TRILLION = 3600.0, 86_400.0, 1e12


@dataclass(frozen=True)
class Speed:
    """Speed of a run."""

    step_s: float
    tokens_per_step: int  # tokens over all devices
    devices: int

    @property
    def tokens_per_day(self) -> float:
        """Returns the tokens trained on in 24 hours."""
        return self.tokens_per_step * DAY / self.step_s

    def hours(self, tokens: float = TRILLION) -> float:
        """Returns the GPU hours for a number of tokens."""
        return self.devices * self.step_s / HOUR * tokens / self.tokens_per_step

    def days(self, tokens: float = TRILLION) -> float:
        """Returns the days for a number of tokens."""
        return tokens / self.tokens_per_day

    def flops_per_device(self, flops_per_token: float) -> float:
        """Returns the operations per device and second."""
        return flops_per_token * self.tokens_per_step / self.step_s / self.devices

    def mfu(self, flops_per_token: float, chip: Chip) -> float:
        """Returns the model FLOPs utilization, as a fraction of the bfloat16 peak."""
        return self.flops_per_device(flops_per_token) / (chip.bf16 * TERA)


def mfu_of_hours(hours_per_trillion: float, flops_per_token: float, chip: Chip) -> float:
    """Returns the utilization that the published GPU hours per 10^12 tokens imply."""
    return flops_per_token * TRILLION / (hours_per_trillion * HOUR) / (chip.bf16 * TERA)
