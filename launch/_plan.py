"""`deepseek-jax plan`, once its command line has been read: the job and its report."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from ml_collections import ConfigDict

from deepseek_jax.abstract_model import abstract_weights
from deepseek_jax.chips import CHIPS, chip, chips_of
from deepseek_jax.errors import UserError
from deepseek_jax.launch import _compile, _options, _pictures, _suggest
from deepseek_jax.launch._reinforcement import check_engine, check_rows, check_sizes
from deepseek_jax.launch._tables import print_table
from deepseek_jax.layers import lora
from deepseek_jax.models import family
from deepseek_jax.plan import figures, report
from deepseek_jax.plan.activations import kept
from deepseek_jax.plan.counts import count
from deepseek_jax.plan.figures import DERIVED, FITTED, GIVEN, PUBLISHED, Section
from deepseek_jax.plan.job import Job
from deepseek_jax.plan.layout import make_layout
from deepseek_jax.plan.memory import capacity, fullest
from deepseek_jax.plan.network import BF16, LAYERS, Weight, cache_bytes_per_token
from deepseek_jax.plan.published import RUNS, Run
from deepseek_jax.plan.recipes import recipe
from deepseek_jax.plan.report import PlannedModel, PlanOptions
from deepseek_jax.plan.rollout import Drawing
from deepseek_jax.plan.schedules import schedule
from deepseek_jax.plan.verdict import mesh_text, verdict
from deepseek_jax.run import network_of
from deepseek_jax.train.metrics import EXPERT_LOADS
from deepseek_jax.train.ramp import BatchRamp
from deepseek_jax.weights import lora_of


def run(config: ConfigDict, options: SimpleNamespace) -> int:
    """Plans, or suggests, and prints; returns the exit code."""
    name_chips(options)
    answers = settle_rl(config, options) if options.rl else None
    is_changed = options.rl or any(key.startswith("model.") for key in options.overrides)
    subject = subject_of(config, is_whole=not is_changed)
    if options.compile and options.recipe not in ("", "run"):
        raise UserError(f"--compile with --recipe={options.recipe}: train runs recipe run. Leave --recipe out.")
    options.recipe = "run" if options.compile else options.recipe
    if options.suggest:
        return _suggest.only(config, options, subject)
    job = job_of(config, options, subject)
    if options.compile:
        _compile.check(options, job.layout.devices)
    question = question_of(config, options, subject, job)
    question = replace(question, drawing=answers and replace(answers, cache_bytes=subject.cache_bytes))
    memory, known = fullest(job, question.kept, question.loss_chunk), (question.efficiency, question.efficiency_mark)
    sections = [verdict(job, memory, *known, _suggest.hindrances(config, job)), *report.report(subject, job, question)]
    instead = []
    if options.compile:
        step = _compile.compiled_step(config, job, options)
        sections += report.compiled(job, step, question)
    if memory > capacity(job):
        instead = _suggest.sections(config, options, subject, job.layout.devices)
    if options.picture:
        _pictures.memory(job, report.memory_of(job, question), config.name, options.picture)
    if options.draw:
        _pictures.schedule(job, options.schedule, question.efficiency, options.draw)
    if options.json:
        print(json.dumps(header(config, options, job) | figures.as_json([*sections, *instead]), indent=2))
    else:
        show(title(config, options, job), sections, job.recipe.fitted_to)
        for section in instead:
            _suggest.show(section)
        if options.picture:
            print(f"\nmemory drawn: {options.picture}")
        if options.draw:
            print(f"\nschedule drawn: {options.draw}")
    return 0


def name_chips(options: SimpleNamespace) -> None:
    """Splits a chip that says how many ("8xh100", "v5p-512") into `options.chip` and `options.devices`.

    Raises UserError if --devices says another number.
    """
    if not options.chip:
        return
    found, count = chips_of(options.chip)
    if count and options.devices not in (0, count):
        raise UserError(f"--chip={options.chip} names {count} chips, --devices={options.devices}. Give one of them.")
    if count:
        options.chip, options.devices = found.name, count


def subject_of(config: ConfigDict, *, is_whole: bool = True) -> PlannedModel:
    """The network of a config and what is known of it; nothing was published of one whose model was changed."""
    module = family(config.family)
    sizes = module.Config.from_config(config.model)
    network = network_of(config)
    run = RUNS.get(config.name) if is_whole else None
    try:
        coded = cache_bytes_per_token(module, sizes, replace(BF16, cache="fp8"))
    except UserError:  # its attention has no such cache
        coded = None
    return PlannedModel(config.name, network, count(network), cache_bytes_per_token(module, sizes), coded, run)


def job_of(config: ConfigDict, options: SimpleNamespace, subject: PlannedModel) -> Job:
    """The network, divided as the command line, the config and the published run say."""
    run, mesh = subject.run or Run(""), config.mesh
    pipe, expert = (
        run_size if run_size and f"mesh.{key}" not in options.overrides else mesh[key]
        for key, run_size in (("pipe", run.pipe), ("expert", run.expert))
    )
    layout = make_layout(
        pipe=pipe,
        data=mesh.data,
        expert=expert,
        devices=options.devices or (run.devices if mesh.data == -1 else 0),
        batch=config.batch.size,
        micro_batches=config.pipeline.micro_batches,
        seq_len=config.data.seq_len,
        context=mesh.context,
    )
    options.recipe = options.recipe or run.recipe or "run"
    is_chosen = "pipeline.schedule" in options.overrides
    published = run.schedule if pipe > 1 and not is_chosen else ""
    options.schedule = options.schedule or published or config.pipeline.schedule
    adapters, adapted = adapters_of(config, layout.pipe)
    return Job(
        network=subject.network,
        layout=layout,
        chip=chip(options.chip or run.chip),
        schedule=schedule(options.schedule, layout.pipe, layout.micro_batches),
        recipe=recipe(
            options.recipe,
            precision=config.precision,
            moments_dtype=config.optimizer.moments_dtype,
            method=config.optimizer.method,
            remat=config.run.remat,
        ),
        rules=config.sharding.to_dict(),
        groups=config.exchange.groups,
        put_off=config.pipeline.put_off,
        adapters=adapters,
        adapted=adapted,
    )


def settle_rl(config: ConfigDict, options: SimpleNamespace) -> Drawing:
    """Makes an update of reinforcement learning the step that is planned; returns how its answers are drawn.

    Raises UserError for what `rl` refuses: a mesh on which none are drawn, rows that do not divide over the devices,
    settings with which the engine does not draw; and with --compile.
    """
    if options.compile:
        raise UserError("--compile with --rl: it compiles a step of pre-training. Give one of them.")
    check_sizes(config)
    rl, n_devices = config.rl, options.devices or max(config.mesh.data, 1) * config.mesh.expert
    check_rows(config, n_devices)
    if rl.rollout == "engine":
        check_engine(config, n_devices)
    n_rows, n_tokens = rl.questions * rl.answers, rl.longest_prompt + rl.longest_answer
    with config.unlocked():
        config.data.seq_len, config.batch.size = n_tokens - 1, n_rows // rl.updates
        config.batch.size_start = config.batch.ramp_steps = 0
    return Drawing(rl.rows_at_once or n_rows, n_tokens, rl.grpo.beta > 0, cache_bytes=0.0)


def adapters_of(config: ConfigDict, n_ranks: int) -> tuple[tuple[Weight, ...], int]:
    """Returns (the low-rank adapters of a config, how many numbers the matrices beside them have).

    Raises UserError for adapters along a pipeline.
    """
    found = lora_of(config)
    if found is None:
        return (), 0
    if n_ranks > 1:
        raise UserError(
            f"config.lora.rank={config.lora.rank} with config.mesh.pipe={n_ranks}: adapters are not trained along a "
            "pipeline. Set config.mesh.pipe=1."
        )
    shapes = lora.abstract_adapters(abstract_weights(config)["params"], found)
    layers = {path[: path.index(lora.ADAPTERS)]: shape.shape[0] for path, shape in shapes.items()}
    matrices = ((layers[block], *target.shape) for block, targets in found.blocks for target in targets)
    n_adapted = sum(n_layers * n_out * n_in for n_layers, n_out, n_in in matrices)
    axes = (LAYERS, None, None)
    return tuple(Weight(".".join(path), x.shape, axes, "adapter") for path, x in shapes.items()), n_adapted


def question_of(config: ConfigDict, options: SimpleNamespace, subject: PlannedModel, job: Job) -> PlanOptions:
    """What is asked about the job."""
    job.parts  # noqa: B018  what does not divide is refused before anything is traced
    run, module = subject.run or Run(""), family(config.family)
    sizes = module.Config.from_config(config.model)
    step_s, step_mark = options.step_time_s or None, GIVEN
    if step_s is None and is_published(run, job):
        step_s, step_mark = run.step_time_s, PUBLISHED
    tokens, tokens_mark = options.tokens or run.tokens, GIVEN if options.tokens else PUBLISHED
    if not tokens:
        ramp = BatchRamp(**config.batch)
        tokens, tokens_mark = ramp.first(config.loop.steps) * job.layout.seq_len, GIVEN
    against = options.against or run.against
    return PlanOptions(
        kept=kept(module, sizes, job.network, job.layout, job.recipe, job.rules),
        loss_chunk=config.loss.chunk,
        efficiency=options.efficiency or job.recipe.efficiency,
        efficiency_mark=f"{DERIVED}/{GIVEN}" if options.efficiency else FITTED,
        step_s=step_s,
        step_mark=step_mark,
        tokens=tokens,
        tokens_mark=tokens_mark,
        dollars=options.price,
        load_LE=loads_of(options.loads, job) if options.loads else None,
        against=subject_of(_options.load(against, flag="--against")) if against else None,
    )


def loads_of(workdir: str, job: Job) -> np.ndarray:
    """The tokens of each expert in each layer that a run has logged last.

    Raises UserError if there are none for this network, or its experts are not split.
    """
    try:
        load_LE = np.asarray(json.loads((Path(workdir) / EXPERT_LOADS).read_bytes())["tokens"], np.float64)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"--loads={workdir}: no {EXPERT_LOADS} to be read there ({error}). Give the workdir of a run of a model "
            "with experts."
        ) from error
    if load_LE.ndim != 2 or load_LE.shape[1] != job.network.n_experts:
        raise UserError(
            f"--loads={workdir} has loads of shape {load_LE.shape}, expected [layers, {job.network.n_experts}]. Give a "
            "run of this network."
        )
    if job.expert_devices == 1:
        raise UserError("--loads: the experts are all on one device. Split them with --config.mesh.expert.")
    return load_LE


def is_published(run: Run, job: Job) -> bool:
    """Whether a job is divided as the published run was, on the same chips."""
    at = job.layout
    ours = (job.chip, at.devices, at.pipe, at.expert, at.batch, at.seq_len)
    return ours == (CHIPS[run.chip], run.devices, run.pipe, run.expert, run.batch, run.seq_len)


def title(config: ConfigDict, options: SimpleNamespace, job: Job) -> str:
    """The line above the tables."""
    at = job.layout
    mesh = mesh_text(job)
    pipeline = f", {job.schedule.title}" if at.pipe > 1 else ""
    return f"{config.name} on {at.devices:,} {job.chip.name}: {mesh}{pipeline}, recipe {options.recipe}"


def header(config: ConfigDict, options: SimpleNamespace, job: Job) -> dict:
    """What was planned, for JSON."""
    at = job.layout
    mesh = {"pipe": at.pipe, "data": at.data, "context": at.context, "expert": at.expert}
    chosen = {"schedule": options.schedule, "recipe": options.recipe}
    return {"config": config.name, "family": config.family, "chip": job.chip.name, "mesh": mesh, **chosen}


def show(line: str, sections: Sequence[Section], fitted_to: str) -> None:
    """Prints the sections as tables, marks in a column or under the heads of several, and what the marks mean."""
    print(line)
    for section in sections:
        own_marks = not section.columns[0].mark
        names = [column.name for column in section.columns]
        head = (section.title, *names, *(["what it is"] if own_marks else []), "")
        rows = [] if own_marks else [("", *(column.mark for column in section.columns), "")]
        for row in section.rows:
            marks = [row.figures[0].mark] if own_marks else []
            rows.append((row.label, *(figure.text for figure in row.figures), *marks, row.note))
        print()
        print_table(head, rows, right=tuple(names))
    print(
        "\nderived: from shapes, stated formulas and the chip's data sheet; derived/published: and from a published\n"
        f"number.  published, given: copied.  fitted: rests on one efficiency, calibrated for this recipe with\n"
        f"{fitted_to} and carried over, unverified, to all else."
    )
