"""The summary of a plan in five lines, and the tables of suggested meshes."""

from collections.abc import Sequence

from deepseek_jax import units
from deepseek_jax.plan import figures, flops, step_time
from deepseek_jax.plan.cost import Speed
from deepseek_jax.plan.figures import DERIVED, Column, Figure, Row, Section
from deepseek_jax.plan.job import Job
from deepseek_jax.plan.memory import capacity
from deepseek_jax.plan.step_time import Step
from deepseek_jax.plan.suggest import Suggestion
from deepseek_jax.plan.traffic import rank_traffic

PARTS = {
    "compute": "arithmetic",
    "exchange": "all-to-all",
    "bubble": "pipeline bubble",
    "reduce": "ZeRO-1 and FSDP",
    "context": "gathering over context",
    "optimizer": "optimizer's memory traffic",
}


def verdict(job: Job, memory: float, efficiency: float, mark: str, hindrances: Sequence[str]) -> Section:
    """Returns whether the job fits, its memory, step time, MFU and bottleneck.

    `memory`: bytes on the fullest device. `efficiency`: of the matmuls, with the origin `mark`. `hindrances`: reasons
    why `train` cannot run the job today.
    """
    fits, step, size = memory <= capacity(job), step_time.step(job, efficiency), units.binary(capacity(job))
    per_second, mfu = _speed(job, step.total)
    runs = "deepseek-jax train runs it" if not hindrances else f"train cannot run it yet: {'; '.join(hindrances)}"
    limit, advice = bottleneck(job, step) if fits else ("memory", "--suggest names meshes that fit")
    rate, counted = f"{per_second:,.0f} tokens per second", "causal, as in the training log" + above(mfu, job)
    rows = [
        ("fits", Figure("fits", fits, "yes" if fits else "NO", DERIVED), runs),
        ("bytes per device", figures.gib("memory", memory), f"of {size}, on the fullest"),
        ("step", Figure("step_s", step.total, figures.seconds(step.total), mark), rate),
        ("MFU", Figure("mfu_log_percent", mfu, figures.percent(mfu), mark), counted),
        ("bottleneck", Figure("bottleneck", limit, limit, mark), advice),
    ]
    return figures.column("verdict", "verdict", rows)


def _speed(job: Job, step_s: float) -> tuple[float, float]:
    """Returns (tokens per second over all devices, MFU in percent as the training log counts it)."""
    at = job.layout
    speed = Speed(step_s, at.tokens_per_step, at.devices)
    return at.tokens_per_step / step_s, 100 * speed.mfu(flops.training(job.network, at.seq_len), job.chip)


def above(mfu_percent: float, job: Job, *, in_full: bool = False, is_given: bool = False) -> str:
    """Returns the reasons why a utilization is above 100 %, as the end of a remark; "" if it is not.

    `in_full`: whether the operations count attention to later tokens, which is not computed. `is_given`: whether one of
    the steps was given rather than computed.
    """
    if mfu_percent <= 100:
        return ""
    reasons = []
    if job.recipe.fp8 and job.chip.fp8 > job.chip.bf16:
        ratio = job.chip.fp8 / job.chip.bf16
        reasons.append(f"FP8 matmuls run at up to {ratio:.3g} x the bfloat16 peak that is counted")
    if in_full:
        reasons.append("half of the counted attention is not computed")
    if is_given:
        reasons.append("the given step may be shorter than the chip allows")
    return f"; above 100 %: {'; '.join(reasons)}"


def bottleneck(job: Job, step: Step) -> tuple[str, str]:
    """Returns the longest part of a step, and what would shorten it."""
    part = max(PARTS, key=lambda name: getattr(step, name))
    return PARTS[part], f"{getattr(step, part) / step.total:.0%} of the step; {_advice(job, part)}"


def _advice(job: Job, part: str) -> str:
    if part == "exchange":
        if job.layout.expert > job.chip.reach:
            nodes, rest = divmod(job.layout.expert, job.chip.reach)
            grouped = job.recipe.node_limited or job.groups > 1 or rest
            once = "" if grouped else f"config.exchange.groups={nodes} sends a token to each node once; "
            stays = f"config.mesh.expert <= {job.chip.reach} stays on the fast link"
            return f"{once}{stays}; a schedule that overlaps hides it"
        return "a smaller config.mesh.expert, or a schedule that overlaps, hides it"
    if part == "context":
        return "a smaller config.mesh.context gathers less"
    if part == "bubble":
        return "more micro-batches, or fewer stages (config.mesh.pipe)"
    if part == "reduce":
        traffic = max((rank_traffic(job, rank) for rank in range(len(job.ranks))), key=lambda t: t.total)
        if traffic.fsdp.seconds(job.chip) > traffic.zero.seconds(job.chip):
            return "fewer config.pipeline.micro_batches or config.sharding rules: each micro-batch gathers the weights"
        return "more tokens per step: config.batch.size"
    if part == "optimizer":
        return "more tokens per step: config.batch.size"
    again = step_time.recomputed_flops(job) > 0
    return "more devices" + (", or less recomputation (config.run.remat) where memory allows" if again else "")


def suggestions(key: str, title: str, found: Sequence[Suggestion], words: Sequence[str]) -> Section:
    """Returns a table of suggestions, fastest first; `words`: the command-line arguments of each."""
    rows = []
    for number, (it, text) in enumerate(zip(found, words, strict=True), 1):
        per_second, mfu = _speed(it.job, it.step_s)
        cells = (
            Figure(f"{number}_step_s", it.step_s, figures.seconds(it.step_s), DERIVED),
            Figure(f"{number}_tokens_per_second", per_second, f"{per_second:,.0f}", DERIVED),
            Figure(f"{number}_mfu_log_percent", mfu, figures.percent(mfu), DERIVED),
            figures.gib(f"{number}_memory", it.memory),
        )
        rows.append(Row(f"{number}. {mesh_text(it.job)}", cells, text))
    names = ("step", "tokens per second", "MFU", "memory")
    return Section(key, title, tuple(rows), tuple(Column(name, DERIVED) for name in names))


def mesh_text(job: Job) -> str:
    """Returns the mesh as text."""
    at = job.layout
    context = f" x context {at.context}" if at.context > 1 else ""
    return f"pipe {at.pipe} x data {at.data}{context} x expert {at.expert}"
