"""deepseek-jax plan --suggest: meshes that fit a config's model, and the words that choose them."""

import json
import math
from dataclasses import replace
from itertools import islice
from types import SimpleNamespace
from typing import Any

from ml_collections import ConfigDict

from deepseek_jax import run, run_config
from deepseek_jax.chips import Chip, chip
from deepseek_jax.errors import UserError
from deepseek_jax.launch._tables import print_table
from deepseek_jax.models import family
from deepseek_jax.parallel.mesh import sizes
from deepseek_jax.plan import figures, suggest
from deepseek_jax.plan.activations import CachedActivations
from deepseek_jax.plan.figures import DERIVED, FITTED, GIVEN, Section
from deepseek_jax.plan.job import Job
from deepseek_jax.plan.recipes import Recipe, recipe
from deepseek_jax.plan.report import PlannedModel
from deepseek_jax.plan.suggest import MOST_DEVICES, Space, Suggestion, missing, schedule_name
from deepseek_jax.plan.verdict import suggestions, verdict
from deepseek_jax.train.ramp import BatchRamp

RUNS_TODAY, NOT_YET = 3, 2  # suggestions of each kind


def only(config: ConfigDict, options: SimpleNamespace, subject: PlannedModel) -> int:
    """Prints suggestions in place of a plan; returns the exit code."""
    devices = options.devices or (subject.run.devices if subject.run else 0)
    devices = devices or math.prod(sizes(**config.mesh, n_devices=0).values())
    options.chip = options.chip or (subject.run.chip if subject.run else "h800")
    found = sections(config, options, subject, devices, is_opened=True)
    if options.json:
        head = {"config": config.name, "family": config.family, "chip": options.chip, "devices": devices}
        print(json.dumps(head | figures.as_json(found), indent=2))
        return 0
    print(f"{config.name} on {devices:,} {chip(options.chip).name}: meshes that fit, the fastest first")
    for section in found:
        show(section)
    print(
        "\nStep, tokens per second and MFU (causal, as a training log) rest on the efficiency fitted for the recipe.\n"
        "What stands under a table is what deepseek-jax train and deepseek-jax plan take to choose that mesh."
    )
    return 0


def show(section: Section) -> None:
    """Prints a section as a table; where there are several figures in a row, the notes stand under it."""
    names, several = [column.name for column in section.columns], len(section.columns) > 1
    rows = [
        (row.label, *(figure.text for figure in row.figures), *([] if several else [row.note])) for row in section.rows
    ]
    print()
    print_table((section.title, *names, *([] if several else [""])), rows, right=tuple(names))
    for row in section.rows if several else ():
        print(f"  {row.label.partition(' ')[0]} {row.note}")


def sections(
    config: ConfigDict, options: SimpleNamespace, subject: PlannedModel, devices: int, *, is_opened: bool = False
) -> list:
    """What train can run today, and what would be faster; where nothing fits, on how many devices something would.

    `is_opened`: whether the verdict of the fastest that runs today comes first.
    """
    space = space_of(config, options, subject, devices)
    today = list(islice(suggest.search(space), RUNS_TODAY))
    later = list(islice(suggest.search(replace(space, recipes=later_recipes(config, space.chip))), NOT_YET))
    found = []
    if today and is_opened:
        best, given = today[0], options.efficiency
        known = (given or best.job.recipe.efficiency, f"{DERIVED}/{GIVEN}" if given else FITTED)
        found.append(verdict(best.job, best.memory, *known, suggest.missing(best.job)))
    if today:
        text = [words(config, space, it) for it in today]
        found.append(suggestions("suggested", "deepseek-jax train runs today", today, text))
    else:
        found.append(none_fits(space, suggest.smallest(space)))
    if later:
        text = [words(config, space, it) for it in later]
        found.append(suggestions("not_yet", "can be planned, not run yet", later, text))
    return found


def none_fits(space: Space, least: int) -> Section:
    """What is said where nothing that `train` can run fits: on how many devices something would."""
    note = "the smallest power of two on which deepseek-jax train could run it"
    if not least:
        note = f"nothing fits up to {MOST_DEVICES:,}: more memory per chip, or a shorter config.data.seq_len"
    number = replace(figures.plain("smallest_devices_count", least), text=f"{least:,}" if least else "none")
    row = ("devices needed", number, note)
    return figures.column("suggested", f"no mesh that train runs today fits on {space.devices:,}", [row])


def space_of(config: ConfigDict, options: SimpleNamespace, subject: PlannedModel, devices: int) -> Space:
    """What may be chosen on so many devices, of what `train` can run today."""
    precisions = dict.fromkeys((config.precision, "bf16"))
    return Space(
        network=subject.network,
        chip=chip(options.chip or "h800"),
        devices=devices,
        batch=config.batch.size,
        batch_start=BatchRamp(**config.batch).start,
        seq_len=config.data.seq_len,
        loss_chunk=config.loss.chunk,
        rules=config.sharding.to_dict(),
        recipes=[recipe_of(config, "run", p, r) for p in precisions for r in ("none", "dots", "block")],
        kept=kept_of(config, subject),
        efficiency=options.efficiency,
    )


def later_recipes(config: ConfigDict, chip: Chip) -> list:
    """The recipe to plan with beyond what runs today: V3's where the chip computes faster in FP8."""
    if chip.fp8 > chip.bf16:
        return [recipe_of(config, "v3", "bf16", "block")]
    return [recipe_of(config, "bf16", "bf16", remat) for remat in ("none", "block")]


def recipe_of(config: ConfigDict, name: str, precision: str, remat: str) -> Recipe:
    """A recipe with the config's moments."""
    o = config.optimizer
    return recipe(name, precision=precision, moments_dtype=o.moments_dtype, remat=remat, method=o.method)


def kept_of(config: ConfigDict, subject: PlannedModel) -> CachedActivations:
    """A function that says what a layer of each stack keeps under a job, each derivative made once."""
    module = family(config.family)
    return CachedActivations(module, module.Config.from_config(config.model), subject.network)


def hindrances(config: ConfigDict, job: Job) -> list[str]:
    """Why `deepseek-jax train` cannot run a job today: what is not written yet, or the batch does not divide."""
    found, at = missing(job), job.layout
    if not found:
        try:
            run.batch_ramp(config, at.data * at.expert)
        except UserError as error:
            found.append(str(error))
    return found


def words(config: ConfigDict, space: Space, suggestion: Suggestion) -> str:
    """What is said on the command line to get a suggestion: the keys that differ from the config."""
    job = suggestion.job
    at, dtype = job.layout, "fp8" if job.recipe.fp8 else "bf16" if job.recipe.activations == 2 else "fp32"
    chosen: dict[str, Any] = {"mesh.pipe": at.pipe, "mesh.context": at.context, "mesh.expert": at.expert}
    chosen |= {"exchange.groups": job.groups, "pipeline.micro_batches": at.micro_batches}
    chosen |= {"mesh.data": at.data} if config.mesh.data != -1 else {}
    chosen |= {"pipeline.schedule": schedule_name(job), "pipeline.put_off": job.put_off} if at.pipe > 1 else {}
    is_constant = suggestion.batch_start == at.batch and not config.batch.size_start
    chosen |= {"batch.size": at.batch, "batch.size_start": 0 if is_constant else suggestion.batch_start}
    chosen |= {f"sharding.{name}": axis for name, axis in job.rules.items()}
    if not missing(job):
        chosen |= {"run.remat": job.recipe.remat, "precision": dtype}
    always = ("mesh.expert",) if space.network.n_experts > 1 else ()
    same = {key for key, value in chosen.items() if value == run_config.lookup(config, key)}
    found = [f"--config.{key}={value}" for key, value in chosen.items() if key in always or key not in same]
    needs = "; ".join(missing(job))
    return " ".join(found) + (f"   (missing: {needs})" if needs else "")
