"""What was published about runs: measurements to start from and to compare with. Nothing here is computed.

Sources: V3 report, arXiv 2412.19437, table 1 and sections 3.1, 3.2, 4.2; "Insights into DeepSeek-V3", arXiv 2505.09343,
table 4; V2 report, arXiv 2405.04434, section 3.1.3.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Run:
    """A published run; fields that the source does not state are None, 0 or empty."""

    source: str  # where these numbers are published
    # chip, devices, pipe, expert: chips, and how they were divided
    chip: str = "h800"
    devices: int = 0
    pipe: int = 0
    expert: int = 0
    # schedule, recipe: pipeline schedule and number formats (`schedules.SCHEDULES`, `recipes.NAMES`)
    schedule: str = ""
    recipe: str = ""
    step_time_s: float | None = None  # seconds of a step of `batch` sequences of `seq_len` tokens
    # batch, seq_len: sequences per step, tokens per sequence
    batch: int = 0
    seq_len: int = 0
    phases_s: tuple[tuple[str, float], ...] = ()  # where the time of that step went, in seconds on one pipeline rank
    # mfu, mfu_causal: fraction of the bfloat16 peak with full and with causal attention; routers and MTP not counted
    mfu: float | None = None
    mfu_causal: float | None = None
    tokens: float | None = None  # tokens trained on
    hours: tuple[tuple[str, float], ...] = ()  # GPU hours by stage, pre-training first
    hours_per_trillion: float | None = None  # GPU hours per 10^12 tokens
    dollars_per_hour: float | None = None  # price assumed in the source
    against: str = ""  # config that it was compared with


RUNS = {
    "v3_671b": Run(
        source="V3 report, table 1, sections 3.2 and 4.2; arXiv 2505.09343, table 4",
        devices=2048,
        pipe=16,
        expert=64,
        schedule="dualpipe",
        recipe="v3",
        step_time_s=19.926,
        batch=15_360,
        seq_len=4096,
        phases_s=(
            *(("forward alone", 1.13), ("bubble", 2.06), ("backward alone", 1.99), ("weight gradients", 0.48)),
            *(("forward and backward overlapped", 13.95), ("optimizer", 0.29)),
        ),
        mfu=0.4373,
        mfu_causal=0.3894,
        tokens=14.8e12,
        hours=(("pre-training", 2664e3), ("context extension", 119e3), ("post-training", 5e3)),
        hours_per_trillion=180e3,
        dollars_per_hour=2.0,
    ),
    "v2_236b": Run(
        source="V2 report, section 3.1.3",
        pipe=16,
        expert=8,
        schedule="zb1p",
        recipe="bf16",
        batch=9216,
        seq_len=4096,
        tokens=8.1e12,
        hours_per_trillion=172.8e3,
        against="llm_67b",
    ),
    "llm_67b": Run(
        source="V2 report, section 3.1.3",
        recipe="bf16",
        batch=4608,
        seq_len=4096,
        tokens=2e12,
        hours_per_trillion=300.6e3,
    ),
}
