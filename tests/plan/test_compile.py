"""deepseek-jax plan --compile: a process of its own says of the step what the real trainer's compiled step says."""

import contextlib
import io
import json
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest

from deepseek_jax import run, run_config
from deepseek_jax.errors import UserError
from deepseek_jax.launch import _compile, _compiled_step, plan
from deepseek_jax.parallel import targets
from deepseek_jax.parallel.mesh import make_mesh
from deepseek_jax.parallel.traced import collectives
from deepseek_jax.plan.compiled import read_hlo
from deepseek_jax.plan.report.compiled import AGREES

NANO = str(Path(__file__).parents[1] / "train" / "nano_v3.py")
PIPE, EXPERT, MICRO = 2, 2, 2
KEYS = {"mesh.pipe": PIPE, "mesh.data": 1, "mesh.expert": EXPERT, "pipeline.micro_batches": MICRO}
KEYS |= {"model.n_layers": 3, "model.mtp_depth": 0, "model.n_dense_layers": 0}  # blocks with experts: two, and one
KEYS |= {"precision": "bf16", "run.remat": "block", "data.seq_len": 128}
KEYS |= {"model.d_model": 128, "model.expert_width": 64}  # so wide that arrays are all that counts
WORDS = [f"--config={NANO}", "--chip=h100", *(f"--config.{key}={value}" for key, value in KEYS.items())]
LITTLE = ("--config.model.mtp_depth=0", "--config.model.n_dense_layers=0")  # to be traced
FORWARD, BACKWARD = 4, 3  # exchanges of a layer: experts, factors, tokens, results; gradients of all but the experts


@pytest.fixture(scope="module")
def subject() -> SimpleNamespace:
    """The smallest V3 in two stages: the real trainer, its step as traced, and as compiled."""
    config = run_config.override(run_config.load(NANO), {key: str(value) for key, value in KEYS.items()})
    mesh = make_mesh(**config.mesh, devices=jax.devices()[: PIPE * EXPERT])
    trainer = run.trainer(config, mesh)
    traced = trainer.step.trace(trainer.abstract, run.abstract_batch(config, mesh))
    return SimpleNamespace(config=config, trainer=trainer, traced=traced, compiled=traced.lower().compile())


@pytest.fixture(scope="module")
def said(subject) -> SimpleNamespace:
    """What the verb prints: its JSON, and on standard error."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        assert plan.main([*WORDS, "--compile", "--memory=4", "--json"]) == 0
    return SimpleNamespace(json=json.loads(out.getvalue()), progress=err.getvalue())


def counts(subject, rank: int) -> dict[str, float]:
    """Collectives per step on a rank, by kind and axes."""
    rows = collectives(subject.traced.jaxpr, dict(subject.trainer.mesh.shape), ranks(subject)[rank])
    return {f"{row.kind} {' '.join(row.axes)}": row.per_step for row in rows}


def expert_layers(subject, rank: int) -> int:
    part = subject.trainer.layout.stages[rank]["moe_blocks"]
    return part.stop - part.start


def ranks(subject) -> list:
    return _compiled_step.switches(subject.config, subject.trainer)


@pytest.mark.slow
def test_exchanges_are_those_of_the_layers_of_a_rank(subject):
    for rank in range(PIPE):
        of_layers = expert_layers(subject, rank) * (FORWARD + FORWARD + BACKWARD)
        fewer = rank < PIPE - 1  # the results of its last layer are recomputed where the final norm reads them
        assert counts(subject, rank)["all_to_all expert"] == MICRO * (of_layers - fewer)


@pytest.mark.slow
def test_neighbours_exchange_x_and_dy_in_every_tick(subject):
    for rank in range(PIPE):
        assert counts(subject, rank)["ppermute pipe"] == 2 * ranks(subject)[rank].n_ticks


@pytest.mark.slow
def test_every_weight_with_copies_is_gathered_once_and_its_gradient_scattered_once(subject):
    cut = [place for place in jax.tree.leaves(subject.trainer.placements) if place.zero_dim is not None]
    filled = MICRO * expert_layers(subject, 0)  # each exchange gathers how full its buffers are
    for kind, more in (("all_gather", filled), ("reduce_scatter", 0)):
        assert sum(n for name, n in counts(subject, 0).items() if name.startswith(kind)) == len(cut) + more


@pytest.mark.slow
def test_the_process_reports_the_memory_of_the_real_step(subject, said):
    found, memory = said.json["figures"]["compiled_memory"]["compiled"], subject.compiled.memory_analysis()
    arguments = (found["state_gib"] + found["batch_gib"]) * 2**30
    assert arguments == memory.argument_size_in_bytes
    abstract = _compiled_step.bytes_per_device(subject.trainer.abstract)
    assert found["state_gib"] * 2**30 == pytest.approx(abstract, abs=1)
    temporaries = memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    made = (found["carried_gib"] + found["others_gib"]) * 2**30
    assert 0.5 * temporaries < made < temporaries  # here cores are kept busy, there the order needs least memory


@pytest.mark.slow
def test_the_plan_agrees_on_what_is_kept_between_steps(said):
    found = said.json["figures"]["compiled_memory"]
    for part in ("state", "batch"):
        assert found["planned"][f"{part}_gib"] == pytest.approx(found["compiled"][f"{part}_gib"], rel=0.01)


@pytest.mark.slow
def test_the_plan_agrees_with_the_compiled_step_on_the_whole(said):
    found = said.json["figures"]["compiled_memory"]
    assert found["planned"]["total_gib"] == pytest.approx(found["compiled"]["total_gib"], rel=AGREES)


@pytest.mark.slow
def test_the_process_reports_the_collectives_of_the_busiest_rank(subject, said):
    found = said.json["figures"]["compiled_collectives"]
    sizes, rows = dict(subject.trainer.mesh.shape), []
    for rank in ranks(subject):
        rows.append(collectives(subject.traced.jaxpr, sizes, rank))
    most = max(rows, key=lambda of_rank: sum(row.n_bytes for row in of_rank))
    for row in most:
        key = f"{row.kind}_{'_'.join(row.axes)}"
        assert found["in_program"][f"{key}_count"] == row.in_program
        assert found["per_step"][f"{key}_count"] == row.per_step
        assert found["sent"][f"{key}_gb"] == pytest.approx(row.n_bytes / 1e9)
    in_hlo, _ = read_hlo(subject.compiled.as_text())
    assert in_hlo["all-to-all"] == sum(row.in_program for row in most if row.kind == "all_to_all")


@pytest.mark.slow
def test_progress_names_the_phases_with_their_seconds(said):
    lines = said.progress.splitlines()
    assert [line.split(": ")[1] for line in lines if line.endswith(" s")] == list(_compile.WORDS.values())


def test_compiling_stops_at_the_given_memory(capsys):
    with pytest.raises(UserError, match=r"took more than --memory=0.1 GiB"):
        plan.main([f"--config={NANO}", "--chip=h100", *LITTLE, "--compile", "--memory=0.1"])


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("h300", "no such target. Choose cpu, one of h100, h200, h800, or a TPU slice by its shape"),
        ("v5p:2x2x2", "has 8 devices, the mesh 4"),
        ("v5p:2x2x1", "the wheel libtpu is not installed"),
        ("h200", "the wheel jax-cuda13-plugin is not installed"),
    ],
)
def test_a_target_that_cannot_be_compiled_for_is_refused(monkeypatch, target, message):
    monkeypatch.setattr(targets, "has_plugin", lambda name: False)
    with pytest.raises(UserError, match=message):
        plan.main([*WORDS, "--compile", f"--target={target}"])


def test_only_what_train_does_is_compiled():
    with pytest.raises(UserError, match="--recipe=v3: train runs recipe run"):
        plan.main(["--compile", "--recipe=v3"])


def test_collectives_of_a_compiled_program_are_counted_once():
    text = "  %a = f32[2] all-gather-start(%x)\n  %b = f32[2] all-gather-done(%a)\n  %c = f32[2] all-to-all(%b)\n"
    assert read_hlo(text) == ({"all-gather": 1, "all-to-all": 1}, 3)
