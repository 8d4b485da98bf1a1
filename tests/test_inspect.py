"""The table of weights: published counts from shapes alone, on meshes that are not here."""

import math

import jax
import pytest
from ml_collections import ConfigDict

from deepseek_jax import run, run_config
from deepseek_jax.abstract_model import abstract_module, count_parameters
from deepseek_jax.configs import base
from deepseek_jax.errors import UserError
from deepseek_jax.launch import inspect
from deepseek_jax.launch._tables import print_table
from deepseek_jax.layers.base import split
from deepseek_jax.parallel.mesh import make_mesh


@pytest.fixture(scope="module")
def v3():
    return run_config.load("v3_671b")


def test_the_counts_of_v3_are_the_published_ones(v3):
    _, params, router_bias = split(abstract_module(v3))
    main, ahead = count_parameters(params)
    assert (round(main / 1e6), round(ahead / 1e6)) == (671_026, 11_610)
    assert sum(math.prod(bias.shape) for bias in jax.tree.leaves(router_bias)) == (58 + 1) * 256


def test_tables_of_experts_by_token_id_are_rows_and_no_biases():
    rows, totals = inspect.inspect(run_config.load("tiny_v4"), {})
    assert [row.dtype for row in rows if row.name == "blocks_0.experts.router.experts_VK"] == ["int32"]
    assert dict(totals)["router biases"] == str(5 * 16)  # four layers and a depth of multi-token prediction


def test_adapters_are_rows_and_alone_have_moments():
    config = run_config.load("tiny_v1").copy_and_resolve_references().unlock()
    config.lora.rank, config.run.init_from, config.loss.balance_rate = 4, "runs/a", 0.0
    rows, totals = inspect.inspect(config, {"data": 1, "expert": 1})
    own = [weight for weight in rows if ".adapters." in weight.name]
    n_own = sum(math.prod(weight.shape) for weight in own)
    trained = run.trainer(config, make_mesh(data=1, devices=jax.devices()[:1]))
    assert own and sum(weight.optimizer_bytes for weight in rows) == 2 * 4 * n_own
    assert all(weight.optimizer_bytes == 8 * math.prod(weight.shape) for weight in own)
    moments = jax.tree.leaves(trained.abstract["optimizer"]["mu"])
    assert sum(x.size for x in moments) == n_own and totals[-1][0].startswith("adapters of rank 4")


def test_bytes_on_a_device_follow_the_mesh(v3):
    one, totals = inspect.inspect(v3, {"data": 1, "expert": 1})
    weights = {weight.name: weight for weight in one}
    bias_bytes = 4 * (58 + 1) * 256
    masters = sum(weight.master_bytes or weight.weight_bytes for weight in one)
    assert masters == 4 * (671_026_404_352 + 11_610_067_968) + bias_bytes
    narrow = [weight for weight in one if weight.dtype == "bfloat16"]  # what a step reads of them
    assert sum(weight.weight_bytes for weight in narrow) * 2 == sum(weight.master_bytes for weight in one)
    assert sum(weight.weight_bytes for weight in narrow) > 0.999 * 2 * 682_636_472_320
    assert sum(weight.optimizer_bytes for weight in one) == 2 * 2 * (671_026_404_352 + 11_610_067_968)  # bfloat16
    assert ("multi-token prediction", "11,610,067,968 (11,610M)") in totals

    many, _ = inspect.inspect(v3, {"data": 4, "expert": 64})
    for weight in many:
        whole = weights[weight.name]
        parts = 64 if "experts" in weight.axes else 1
        assert weight.weight_bytes * parts == whole.weight_bytes
        assert weight.optimizer_bytes * 256 == whole.optimizer_bytes
    gate = next(weight for weight in many if weight.name == "moe_blocks.experts.gate_XDF")
    assert inspect.cells(gate)[:5] == (
        *("moe_blocks.experts.gate_XDF", "58x256x7168x2048", "bfloat16"),
        *("layers,experts,embed,mlp", "-,expert,-,-"),
    )


@pytest.mark.parametrize(
    ("precision", "mesh"),
    [("fp32", (1, 1, 1)), ("fp32", (1, 2, 4)), ("bf16", (1, 2, 4)), ("bf16", (2, 2, 2))],
)
def test_a_trainer_keeps_the_bytes_that_are_shown(precision, mesh):
    """What lies on a device between steps: masters, which a step may read as they are, moments, biases; no copies."""
    pipe, data, expert = mesh
    config = run_config.load("tiny_v3")
    config.precision, config.pipeline.micro_batches = precision, 4
    config.sharding.mlp = "data" if pipe > 1 else ""  # FSDP
    config.optimizer.method = "adamw" if pipe > 1 else "muon"
    trainer = run.trainer(config, make_mesh(data, expert, jax.devices()[: math.prod(mesh)], pipe))

    def kept(name: str) -> int:
        leaves = [x for x in jax.tree.leaves(trainer.abstract[name]) if x.ndim]
        return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves)

    weights, _ = inspect.inspect(config, {"pipe": pipe, "data": data, "expert": expert})
    masters = sum(weight.master_bytes or weight.weight_bytes for weight in weights)
    assert masters == kept("params") + kept("router_bias")
    assert sum(weight.optimizer_bytes for weight in weights) == kept("optimizer")


def test_an_expert_axis_that_does_not_divide_is_refused_by_name():
    with pytest.raises(UserError) as error:
        inspect.main(["--config=v3_671b", "--config.mesh.expert=48"])
    assert "256 experts over mesh axis 'expert' of size 48: not divisible." in str(error.value)
    assert "config.mesh.expert" in str(error.value)


def test_layers_are_split_along_a_pipeline(capsys):
    """Each rank holds as many layers as the fullest stage; parameters are counted once."""
    assert inspect.main(["--config=tiny_v3"]) == 0
    whole = capsys.readouterr().out
    assert inspect.main(["--config=tiny_v3", "--config.mesh.pipe=2"]) == 0
    out = capsys.readouterr().out
    assert "mesh pipe 2 x data 1 x expert 1 (2 devices)" in out
    (row,) = [line for line in out.splitlines() if line.startswith("moe_blocks.experts.router.centroids_DE")]
    assert "pipe" in row
    totals = [text[text.index("main model") :].splitlines()[:3] for text in (whole, out)]
    assert totals[0] == totals[1]


def test_more_stages_than_layers_are_refused():
    with pytest.raises(UserError, match="16 stages for .* layers. Choose a config.mesh.pipe of at most"):
        inspect.main(["--config=tiny_v3", "--config.mesh.pipe=16"])


def test_the_resolved_config_can_be_pasted_into_a_file(capsys):
    overrides = ["--config.loop.steps=7", "--config.release.eos_ids=(1,)"]
    assert inspect.main(["--config=tiny_v3", *overrides, "--show-config"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "config.loop.steps = 7" in lines and "config.model.yarn = ConfigDict()" in lines
    config = base.get_config()
    exec("\n".join(lines), {"config": config, "ConfigDict": ConfigDict})
    expected = run_config.load("tiny_v3")
    expected.loop.steps, expected.release.eos_ids = 7, (1,)
    assert config.to_dict() == expected.to_dict()


def test_the_verb_prints_aligned_text(capsys):
    assert inspect.main([]) == 0
    out = capsys.readouterr().out
    lines = out.splitlines()
    assert lines[0] == "tiny_v3: family v3, mesh data 1 x expert 1 (1 devices)"
    table = lines[2 : lines.index("", 3)]
    assert len({len(line) for line in table}) == 1  # the last column ends flush right
    assert any(line.startswith("main model ") and line.endswith("1,682,944 (1.68M)") for line in lines)
    assert "on each device: weights 8.34 MiB, optimizer state 16.69 MiB" in lines


def test_a_terminal_gets_a_drawn_table(capsys, monkeypatch):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "80")
    print_table(("weight", "weight/device"), [("head.weight_DV", "1.00 MiB")])
    assert "──" in capsys.readouterr().out
