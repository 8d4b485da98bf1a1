"""From the time of a step to utilisation, throughput, days and money.

    MFU = training operations of a token * tokens a second / (devices * bfloat16 peak)

The peak is the bfloat16 one whatever the matmuls run in, as published.
"""

from dataclasses import dataclass

from deepseek_jax.plan.chips import Chip
from deepseek_jax.plan.step_time import TERA

HOUR, DAY, TRILLION = 3600.0, 86_400.0, 1e12


@dataclass(frozen=True)
class Speed:
    """How fast a run is.

    Attributes:
        step_s: seconds of a step.
        tokens_per_step: over all devices.
        devices: of the run.
    """

    step_s: float
    tokens_per_step: int
    devices: int

    @property
    def tokens_per_day(self) -> float:
        """Tokens trained on in 24 hours."""
        return self.tokens_per_step * DAY / self.step_s

    def hours(self, tokens: float = TRILLION) -> float:
        """GPU hours for so many tokens."""
        return self.devices * self.step_s / HOUR * tokens / self.tokens_per_step

    def days(self, tokens: float = TRILLION) -> float:
        """Days for so many tokens."""
        return tokens / self.tokens_per_day

    def flops_per_device(self, flops_per_token: float) -> float:
        """Operations of a device in a second."""
        return flops_per_token * self.tokens_per_step / self.step_s / self.devices

    def mfu(self, flops_per_token: float, chip: Chip) -> float:
        """Model FLOPs utilisation, of the bfloat16 peak."""
        return self.flops_per_device(flops_per_token) / (chip.bf16 * TERA)


def mfu_of_hours(hours_per_trillion: float, flops_per_token: float, chip: Chip) -> float:
    """The utilisation that a run must have had whose GPU hours for 10^12 tokens are known."""
    return flops_per_token * TRILLION / (hours_per_trillion * HOUR) / (chip.bf16 * TERA)


def saving(hours: float, hours_before: float) -> float:
    """The change from `hours_before` to `hours`, as a fraction: -0.425 is 42.5 % less."""
    return hours / hours_before - 1
