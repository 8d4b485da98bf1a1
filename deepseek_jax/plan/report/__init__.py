"""Everything that is reported about a plan, one section per table, in reading order."""

from deepseek_jax.plan.figures import Section
from deepseek_jax.plan.job import Job
from deepseek_jax.plan.report.balance import balance
from deepseek_jax.plan.report.compiled import compiled as compiled
from deepseek_jax.plan.report.division import drawn, layout, memory, traffic
from deepseek_jax.plan.report.inputs import PlannedModel, PlanOptions, memory_of
from deepseek_jax.plan.report.model import generation, operations, parameters
from deepseek_jax.plan.report.published import compared, published
from deepseek_jax.plan.report.speed import schedules, speed


def report(model: PlannedModel, job: Job, options: PlanOptions) -> list[Section]:
    """Returns every section, in the order in which they are read."""
    sections = [
        parameters(model),
        operations(model.network, job),
        *([generation(model.network)] if model.network.is_sparse else []),
        layout(job),
        memory(job, memory_of(job, options)),
        *([drawn(job, options.drawing)] if options.drawing else []),
        traffic(job),
        *([schedules(job, options)] if job.layout.pipe > 1 else []),
        speed(model, job, options),
        *([balance(job, options.load_LE)] if options.load_LE is not None else []),
    ]
    sections += [published(model, model.run, options)] if model.run else []
    sections += [compared(model, job, options.against)] if options.against else []
    return sections
