"""Suggested meshes: they fit by the planner's count, `train` and `inspect` accept them, the fastest come first."""

import json
from dataclasses import replace
from itertools import islice, pairwise

import pytest

from deepseek_jax import run, run_config
from deepseek_jax.chips import chip
from deepseek_jax.errors import UserError
from deepseek_jax.launch import _options, _plan, _suggest, inspect, plan
from deepseek_jax.parallel.mesh import sizes
from deepseek_jax.plan import suggest
from deepseek_jax.plan.activations import ActivationBytes, CachedActivations, kept
from deepseek_jax.plan.memory import BARELY, capacity, fullest
from deepseek_jax.plan.recipes import recipe

SMALL = "mine:bf16=1,memory={},hbm=100,fast=10,reach=4,network=1"


def flat(found, layout, rules):
    """The same for every layer, less for policies that keep less; replaces a derivative."""
    n_bytes = {"none": 3e6, "dots": 2e6, "block": 1e6, "v3": 1e6}[found.remat]
    return dict.fromkeys(("dense_blocks", "moe_blocks"), ActivationBytes(n_bytes, 0, 4e6 - n_bytes))


@pytest.fixture
def space_of(subject):
    def of(
        name="tiny_v3", devices=8, memory=0.1, recipes=(("run", "none"), ("run", "dots"), ("run", "block")), **changes
    ):
        it = subject(name)
        made = [recipe(kind, precision="bf16", moments_dtype="float32", remat=remat) for kind, remat in recipes]
        space = suggest.Space(
            network=it.network,
            chip=chip(SMALL.format(memory)),
            devices=devices,
            batch=64,
            batch_start=64,
            seq_len=256,
            loss_chunk=256,
            rules=it.config.sharding.to_dict(),
            recipes=made,
            kept=flat,
        )
        return replace(space, **changes)

    return of


@pytest.mark.parametrize("devices, memory", [(1, 0.2), (4, 0.08), (8, 0.1), (8, 0.05), (12, 0.06), (16, 0.04)])
def test_the_first_is_the_fastest_of_all_that_fit(space_of, devices, memory):
    space = space_of(devices=devices, memory=memory)
    everything = [job for line in suggest.lines(space) for job in line]
    fitting = [job for job in everything if fullest(job, flat(job.recipe, 0, 0), 256) <= (1 - BARELY) * capacity(job)]
    found = list(suggest.search(space))
    assert 0 < len(fitting) < len(everything)  # the case decides something
    assert found[0].step_s == min(suggest.step_of(space, job) for job in fitting)
    assert all(a.step_s <= b.step_s for a, b in pairwise(found))
    meshes = {(job.layout.pipe, job.layout.data, job.layout.expert) for job in fitting}
    at = [it.job.layout for it in found]
    assert sorted((layout.pipe, layout.data, layout.expert) for layout in at) == sorted(meshes)  # each once


def test_what_is_suggested_uses_every_device_once(space_of):
    for it in suggest.search(space_of(devices=12, memory=1.0, recipes=[("bf16", "block")])):
        at = it.job.layout
        assert at.devices == 12 and at.batch % (at.data * at.expert * at.micro_batches) == 0
        assert it.batch_start % (at.data * at.expert * at.micro_batches) == 0 and it.batch_start <= at.batch


def test_the_batch_grows_to_what_the_devices_divide(space_of):
    for batch, devices, grown in ((64, 12, 72), (3, 8, 8), (16, 8, 16)):
        found = suggest.search(space_of(devices=devices, memory=10, batch=batch, batch_start=batch // 2))
        it = next(it for it in found if it.job.layout.pipe == 1)
        assert it.job.layout.batch == grown and 0 < it.batch_start <= grown and it.batch_start % devices == 0


def test_other_recipes_are_named_as_missing(space_of):
    found = list(suggest.search(space_of(devices=4, memory=10, recipes=[("v3", "block")])))
    assert {it.job.layout.pipe for it in found} == {1, 2, 4}
    for it in found:
        assert suggest.NO_V3 in suggest.missing(it.job)
    bf16 = next(suggest.search(space_of(memory=10, recipes=[("bf16", "none")]))).job
    assert suggest.NO_BF16 in suggest.missing(bf16)
    assert suggest.missing(next(suggest.search(space_of(memory=10))).job) == []


def test_the_smallest_number_of_devices_fits_and_half_of_it_does_not(space_of):
    space = space_of(devices=3, memory=0.03)
    assert not list(suggest.search(space))
    least = suggest.smallest(space)
    assert least > 3 and least & (least - 1) == 0
    assert next(suggest.search(replace(space, devices=least)), None)
    assert not list(suggest.search(replace(space, devices=least // 2)))
    assert suggest.smallest(space_of(memory=0.001)) == 0


@pytest.mark.slow
def test_what_layers_keep_is_the_same_by_one_derivative_for_many_meshes(subject, job_of):
    it = subject("tiny_v3")
    once = CachedActivations(it.module, it.sizes, it.network)
    for mesh in ({"data": 4, "expert": 2}, {"data": 2, "expert": 2}):
        job = job_of("tiny_v3", remat="block", sharding={"embed": "data", "heads": "expert"}, **mesh)
        exact = kept(it.module, it.sizes, job.network, job.layout, job.recipe, job.rules)
        mine = once(job.recipe, job.layout, job.rules)
        for name, found in exact.items():
            assert mine[name].pools is None is found.pools  # those of a pipeline, which this is not
            assert mine[name][:-1] == pytest.approx(found[:-1], rel=1e-4, abs=1024)


def test_experts_on_several_nodes_are_suggested_with_a_group_for_each_node(space_of):
    """8 devices, four on a node: experts on one node need no groups, on two nodes two; recipes say it themselves."""
    space = space_of(recipes=(("run", "block"), ("bf16", "block")))
    jobs = [job for line in suggest.lines(space) for job in line]
    assert {(job.layout.expert, job.groups) for job in jobs if job.recipe.alike} == {(1, 1), (2, 1), (4, 1), (8, 2)}
    assert {job.groups for job in jobs if not job.recipe.alike} == {1}
    config = run_config.load("tiny_v3")
    found = next(job for job in jobs if job.groups == 2)
    assert (
        "--config.exchange.groups=2" in _suggest.words(config, space, suggest.Suggestion(found, 64, 1.0, 1.0)).split()
    )


@pytest.fixture(scope="module")
def suggested():
    """(words, JSON) of a few suggestions for a tiny model."""
    import contextlib
    import io

    words = ["--config=tiny_v1", "--config.batch.size=64", "--config.batch.size_start=32"]
    words += ["--chip=mine:bf16=1,memory=0.1,hbm=100,fast=10,reach=4,network=1", "--devices=8"]
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert plan.main([*words, "--suggest", "--json"]) == 0
    return words, json.loads(out.getvalue())


def test_a_suggestion_is_what_plan_train_and_inspect_make_of_its_words(suggested, capsys):
    words, found = suggested
    options = _options.parse(words, "tiny_v1", plan.EXTRA, workdir=False)
    subject = _plan.subject_of(options.config)
    space = _suggest.space_of(options.config, options, subject, 8)
    for number, it in enumerate(islice(suggest.search(space), _suggest.RUNS_TODAY), 1):
        said = _suggest.words(options.config, space, it).split()
        assert plan.main([*words, *said, "--json"]) == 0
        planned = json.loads(capsys.readouterr().out)["figures"]
        assert planned["memory"]["fits"] and planned["verdict"]["fits"]
        assert planned["memory"]["total_gib"] == pytest.approx(it.memory / 2**30, rel=1e-3)
        assert planned["speed"]["calibrated"]["step_s"] == pytest.approx(it.step_s)
        assert found["figures"]["suggested"][f"{number}_step_s"] == pytest.approx(it.step_s)
        of_the_config = [word for word in words if word.startswith("--config")]
        config = _options.parse([*of_the_config, *said], "tiny_v1", {}, workdir=False).config
        run_config.validate(config)
        mesh = sizes(**config.mesh, n_devices=8)
        run.batch_ramp(config, mesh["data"] * mesh["expert"])
        inspect.inspect(config, mesh)


def test_where_nothing_fits_plan_says_how_many_devices_would_do(capsys):
    words = ["--config=tiny_v1", "--chip=mine:bf16=1,memory=0.02,hbm=100,fast=10,reach=4,network=1", "--devices=1"]
    for more in (["--suggest"], []):
        assert plan.main([*words, *more]) == 0
        out = capsys.readouterr().out
        assert "no mesh that train runs today fits on 1" in out and "devices needed" in out


def test_a_chip_says_how_many_or_devices_do(capsys):
    assert plan.main(["--config=tiny_v1", "--chip=8xh100", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["mesh"]["data"] == 8
    with pytest.raises(UserError, match="names 8 chips, --devices=4"):
        plan.main(["--config=tiny_v1", "--chip=8xh100", "--devices=4"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "chip"), [("tiny_v1", "v5p-8"), pytest.param("v3_671b", "v5p-512", marks=pytest.mark.matrix)]
)
def test_small_and_largest_models_get_a_mesh_that_runs_today(name, chip, capsys):
    """The largest is traced for a minute, in the parts of many meshes."""
    assert plan.main([f"--config={name}", f"--chip={chip}", "--suggest"]) == 0
    out = capsys.readouterr().out
    assert "deepseek-jax train runs today" in out and suggest.NO_BF16 in out
