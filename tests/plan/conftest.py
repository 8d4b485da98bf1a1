"""Jobs to plan: a config's network, divided as a test asks."""

import functools
from types import SimpleNamespace

import pytest


@functools.cache
def described(name: str) -> SimpleNamespace:
    """A config with its family's module, its sizes and its network."""
    from deepseek_jax import run_config
    from deepseek_jax.models import family
    from deepseek_jax.run import network_of

    config = run_config.load(name)
    module = family(config.family)
    sizes = module.Config.from_config(config.model)
    return SimpleNamespace(config=config, module=module, sizes=sizes, network=network_of(config))


@pytest.fixture(scope="session")
def subject():
    return described


@pytest.fixture(scope="session")
def job_of():
    """A function that returns a `Job`; mesh sizes default to 1."""
    from deepseek_jax.chips import CHIPS
    from deepseek_jax.plan.job import Job
    from deepseek_jax.plan.layout import make_layout
    from deepseek_jax.plan.recipes import recipe
    from deepseek_jax.plan.schedules import SCHEDULES

    def job(name, *, style="run", plan="1f1b", remat=None, sharding=None, batch=0, chip="h800", method="adamw", **mesh):
        it = described(name)
        batch = batch or it.config.batch.size
        sizes = {"pipe": 1, "data": 1, "expert": 1, "micro_batches": 1} | mesh
        layout = make_layout(**sizes, devices=0, batch=batch, seq_len=it.config.data.seq_len)
        formats = {"precision": it.config.precision, "moments_dtype": it.config.optimizer.moments_dtype}
        formats["method"] = method
        found = recipe(style, **formats, remat=remat or it.config.run.remat)
        rules = it.config.sharding.to_dict() | (sharding or {})
        return Job(it.network, layout, CHIPS[chip], SCHEDULES[plan], found, rules)

    return job


@pytest.fixture(scope="session")
def kept_of():
    """A function that returns what a layer of each stack keeps."""
    from deepseek_jax.plan.activations import kept

    def of(name, job):
        it = described(name)
        return kept(it.module, it.sizes, job.network, job.layout, job.recipe, job.rules)

    return of
