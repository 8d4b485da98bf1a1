"""The training step: the same numbers on every mesh, and every promise of its docstring."""

import dataclasses
from types import SimpleNamespace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.nn.initializers import normal
from jax.sharding import NamedSharding

from deepseek_jax.data.pipeline import Batch
from deepseek_jax.errors import UserError
from deepseek_jax.layers.base import RouterBias, bind, param
from deepseek_jax.models import family
from deepseek_jax.parallel.lint import check_collectives
from deepseek_jax.parallel.mesh import global_batch, make_mesh, place
from deepseek_jax.train.loss import PreTraining
from deepseek_jax.train.optimizers import Schedule, adamw
from deepseek_jax.train.step import Report, State, StepConfig, Trainer

STEPS, B, T, V = 5, 16, 16, 64
ADAMW = {"beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1, "moments_dtype": "float32"}
STEP = StepConfig(
    rate=Schedule(1e-2, 2, 100, 2, 1e-3, 1, 1e-4),
    clip_norm=1.0,
    micro_batches=1,
    balance_rate=1e-3,
    balance_rate_stop=4,
)
OBJECTIVE = PreTraining(
    chunk=24,
    mask_documents=True,
    mtp_weight=0.3,
    mtp_weight_final=0.1,
    mtp_weight_switch=3,
    auxiliary={"expert_balance": 1e-2},
)
EXPERTS = {"experts": "expert"}


def batch(step: int) -> Batch:
    """Sequences of one or two documents, some of them padded; targets of any weight: devices hold different sums."""
    rng = np.random.default_rng(step)
    ids = rng.integers(0, V, (B, T + 1)).astype(np.int32)
    cut = rng.integers(3, T, (B, 1))
    index = np.arange(T, dtype=np.int32)[None]
    segments = np.where(index < cut, 1, 2).astype(np.int32)
    segments[::5] = np.where(index < cut[::5], 1, 0)  # nothing after the first document
    targets = np.where((index == cut - 1) | (segments == 0), -1, ids[:, 1:])
    positions = np.where(index < cut, index, index - cut).astype(np.int32)
    weights = rng.choice([0.0, 0.5, 1.0], (B, T)) * (targets >= 0)
    return Batch(ids[:, :-1], targets, segments, positions, weights.astype(np.float32))


class Run(NamedTuple):
    """A trainer, its state before the first and after each step (on the host), the last on its devices, the reports."""

    trainer: Trainer
    states: list[State]
    last: State
    reports: list[Report]


@pytest.fixture(scope="module")
def sizes(tiny_sizes):
    """Two layers with experts; `test_pipelined.py` has dense ones as well."""
    numbers = tiny_sizes.copy_and_resolve_references()
    numbers.update(n_layers=2, n_dense_layers=0)
    return family("v3").Config.from_config(numbers)


@pytest.fixture(scope="module")
def weights(sizes, filled) -> tuple:
    """(params, router biases) that every run starts from."""
    return filled(lambda: family("v3").Model(sizes, rngs=nnx.Rngs(0)), std=0.1)[1:]


def trainer(sizes, data: int, expert: int, rules: dict, *, context: int = 1, **options) -> Trainer:
    mesh = make_mesh(data, expert, jax.devices()[: data * context * expert], context=context)
    options = {"objective": OBJECTIVE, "optimizer": adamw(**ADAMW), "config": STEP} | options
    return Trainer(lambda run, rngs: family("v3").Model(sizes, run, rngs=rngs), mesh, rules, **options)


def start(trainer: Trainer, weights: tuple) -> State:
    """The state before the first step, with these (params, router biases)."""
    return trainer.init(0, *jax.tree.map(np.array, weights))


def run(trainer: Trainer, weights: tuple, steps: int = STEPS) -> Run:
    state = start(trainer, weights)
    states, reports = [jax.device_get(state)], []
    for step in range(steps):
        state, report = trainer.step(state, global_batch(batch(step), trainer.mesh))
        states.append(jax.tree.map(np.array, jax.device_get(state)))
        reports.append(jax.device_get(report))
    return Run(trainer, states, state, reports)


@pytest.fixture(scope="module")
def one_device(sizes, weights) -> Run:
    return run(trainer(sizes, 1, 1, EXPERTS), weights)


@pytest.fixture(scope="module")
def expert_parallel(sizes, weights) -> Run:
    return run(trainer(sizes, 2, 2, EXPERTS, remat="block"), weights)


@pytest.fixture(scope="module")
def fully_sharded(sizes, weights) -> Run:
    """FSDP over four devices, experts over two, each share of the batch in two parts."""
    two_parts = dataclasses.replace(STEP, micro_batches=2)
    return run(trainer(sizes, 4, 2, EXPERTS | {"embed": "data"}, config=two_parts, remat="dots"), weights)


@pytest.fixture(scope="module")
def narrow(sizes, weights) -> Run:
    optimizer = adamw(**ADAMW | {"moments_dtype": "bfloat16"})
    return run(trainer(sizes, 1, 1, EXPERTS, optimizer=optimizer, compute=jnp.bfloat16, weights=jnp.bfloat16), weights)


def leaves(tree) -> list[tuple[str, np.ndarray]]:
    return [(jax.tree_util.keystr(path, simple=True, separator="."), x) for path, x in jax.tree.leaves_with_path(tree)]


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) for name in ("expert_parallel", "fully_sharded")]
)
def test_every_mesh_trains_the_same_model(one_device, name, request):
    """Devices, remat, accumulation and ZeRO-1 change nothing: five steps, losses, weights, gradients.

    The first moments after a step are its gradients, but for a factor. Divided sequences: `test_context_steps.py`.
    """
    other = request.getfixturevalue(name)
    for expected, got in zip(one_device.reports, other.reports, strict=True):
        for field in ("loss", "main", "mtp", "gradient_norm", "max_violation"):
            assert getattr(got, field) == pytest.approx(getattr(expected, field), rel=1e-5), field
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), got.auxiliary, expected.auxiliary)
        jax.tree.map(np.testing.assert_array_equal, got.loads, expected.loads)
    for (path, expected), (_, got) in zip(leaves(one_device.states[-1]), leaves(other.states[-1]), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-3, atol=1e-4, err_msg=path)
    first = ((path, x) for path, x in leaves(one_device.states[1]["optimizer"]["mu"]))
    for (path, expected), (_, got) in zip(first, leaves(other.states[1]["optimizer"]["mu"]), strict=True):
        assert np.linalg.norm(got - expected) <= 3e-5 * np.linalg.norm(expected), path
    assert [got.checksum for got in other.reports] == [expected.checksum for expected in one_device.reports]


@pytest.mark.slow
@pytest.mark.matrix  # two parts, on devices: the run `fully_sharded`
def test_four_micro_batches_are_one_batch(one_device, sizes, weights):
    """On one device: the parts' gradients, losses and loads add up, though they hold different numbers of targets."""
    four = run(trainer(sizes, 1, 1, EXPERTS, config=dataclasses.replace(STEP, micro_batches=4)), weights, steps=2)
    for expected, got in zip(one_device.reports, four.reports, strict=False):
        for field in ("loss", "main", "mtp", "gradient_norm", "max_violation"):
            assert getattr(got, field) == pytest.approx(getattr(expected, field), rel=1e-5), field
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), got.auxiliary, expected.auxiliary)
        jax.tree.map(np.testing.assert_array_equal, got.loads, expected.loads)
    for (path, expected), (_, got) in zip(leaves(one_device.states[2]), leaves(four.states[2]), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-3, atol=1e-4, err_msg=path)


def test_the_loss_falls(one_device):
    assert one_device.reports[-1].main < one_device.reports[0].main


def test_the_reported_loss_is_the_full_cross_entropy(one_device, weights):
    first = batch(0)
    tokens = (first.ids_BT, first.positions_BT, first.segments_BT)
    call = jax.jit(lambda p, b: bind(one_device.trainer.definition, p, b)(*tokens))
    logits = np.float64(call(*weights))
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    picked = np.take_along_axis(log_p, np.maximum(first.targets_BT, 0)[..., None], -1)[..., 0]
    expected = -np.average(picked, weights=first.weights_BT)
    assert one_device.reports[0].main == pytest.approx(expected, rel=1e-5)
    assert expected > 3


def test_the_parts_add_up_with_the_weights_of_the_step(one_device):
    for step, report in enumerate(one_device.reports):
        mtp_weight = 0.3 if step < 3 else 0.1
        expected = report.main + mtp_weight * report.mtp + 1e-2 * report.auxiliary["expert_balance"]
        assert report.loss == pytest.approx(expected, rel=1e-6)
        assert report.mtp > 3 and report.auxiliary["expert_balance"] > 2
        assert report.finite == 1 and report.skipped == report.skipped_in_row == 0
    assert [report.learning_rate for report in one_device.reports[:4]] == pytest.approx([0, 0.005, 0.01, 0.01])
    assert [int(state["step"]) for state in one_device.states] == list(range(STEPS + 1))


def test_every_weight_is_trained(one_device):
    """Each layer of every weight has a gradient, and each expert that a token chose; the router bias alone has none."""
    moments = one_device.states[-1]["optimizer"]["mu"]
    used = {"moe_blocks": sum(report.loads["moe_blocks"] for report in one_device.reports) > 0}
    used["mtp"] = sum(report.loads["mtp"]["0"] for report in one_device.reports) > 0
    assert np.mean(used["moe_blocks"]) > 0.8
    for path, moment in leaves(moments):
        has_gradient = np.any(moment.reshape(*moment.shape[: moment.ndim - 2], -1), axis=-1)
        family, _, name = path.partition(".")
        if name.endswith(("gate_XDF", "up_XDF", "down_XFD")):
            np.testing.assert_array_equal(has_gradient, used[family], err_msg=path)
        else:
            assert has_gradient.all(), path
    assert not any("bias_E" in path for path, _ in leaves(moments))


def test_the_first_moment_holds_the_clipped_gradient(one_device):
    squares = [np.sum(np.float64(x) ** 2) for _, x in leaves(one_device.states[1]["optimizer"]["mu"])]
    norm = one_device.reports[0].gradient_norm
    assert np.sqrt(sum(squares)) / 0.1 == pytest.approx(min(norm, STEP.clip_norm), rel=1e-4)


def test_the_router_bias_moves_by_gamma_towards_the_mean_load(one_device):
    for step, report in enumerate(one_device.reports):
        before, after = (one_device.states[i]["router_bias"] for i in (step, step + 1))
        old = np.concatenate([np.atleast_2d(x) for _, x in leaves(before)])
        new = np.concatenate([np.atleast_2d(x) for _, x in leaves(after)])
        load = np.concatenate([np.atleast_2d(x) for _, x in leaves(report.loads)])
        read = batch(step)  # padding visits no expert; nor, in multi-token prediction, does a token that none follows
        n_text, n_followed = np.sum(read.segments_BT > 0), np.sum(read.targets_BT >= 0)
        np.testing.assert_array_equal(load.sum(axis=1), [2 * n_text, 2 * n_text, 2 * n_followed])
        assert load.shape == (3, 8) and n_followed < n_text < B * T
        gamma = np.float32(1e-3 if step < 4 else 0)
        np.testing.assert_array_equal(new, old + gamma * np.sign(load.mean(axis=1, keepdims=True) - load))
        assert np.any(new != old) == (step < 4)
        assert report.max_violation == pytest.approx(np.mean(load.max(axis=1) / load.mean(axis=1) - 1), rel=1e-5)


@pytest.mark.slow
def test_what_is_kept_between_steps_is_cut_over_the_devices(expert_parallel):
    """ZeRO-1: of a weight that four devices read whole each keeps a quarter, and so of its moments."""
    trainer, state = expert_parallel.trainer, expert_parallel.last
    whole = {path: x.size for path, x in leaves(state["params"])}
    cut = {path: x.addressable_shards[0].data.size for path, x in leaves(state["optimizer"]["nu"])}
    assert cut == {path: x.addressable_shards[0].data.size for path, x in leaves(state["params"])}
    assert cut["embedding.table_VD"] * 4 == V * 32
    assert cut["moe_blocks.experts.gate_XDF"] * 4 == whole["moe_blocks.experts.gate_XDF"]
    assert sum(cut.values()) < 0.27 * sum(whole.values())
    for (path, x), (_, expected) in zip(leaves(state), leaves(trainer.abstract), strict=True):
        assert x.sharding.is_equivalent_to(expected.sharding, x.ndim), path
        assert (x.shape, x.dtype) == (expected.shape, expected.dtype), path


@pytest.mark.slow
def test_fsdp_reads_and_keeps_weights_in_shards(fully_sharded):
    """Read in 4 shards, over `data`; of each, a device keeps one of the 2 parts that ZeRO-1 makes along `expert`."""
    trainer, table = fully_sharded.trainer, fully_sharded.last["params"]["embedding"]["table_VD"]
    read = NamedSharding(trainer.mesh, trainer.placements["embedding"]["table_VD"].spec)
    assert read.shard_shape(table.shape) == (V, 32 // 4)
    assert table.addressable_shards[0].data.shape == (V // 2, 32 // 4)


@pytest.mark.slow
def test_bfloat16_is_close_and_masters_stay_float32(one_device, narrow):
    for expected, got in zip(one_device.reports, narrow.reports, strict=True):
        assert got.finite == 1
        assert got.main == pytest.approx(expected.main, rel=0.03)
        assert got.gradient_norm == pytest.approx(expected.gradient_norm, rel=0.1)
    state = narrow.states[-1]
    assert {x.dtype for x in jax.tree.leaves((state["params"], state["router_bias"]))} == {np.dtype(np.float32)}
    moments = (state["optimizer"]["mu"], state["optimizer"]["nu"])
    assert {x.dtype for x in jax.tree.leaves(moments)} == {np.dtype(jnp.bfloat16)}


def test_a_step_that_is_not_finite_changes_nothing(one_device, weights):
    trainer = one_device.trainer
    state = start(trainer, weights)
    bad = jax.tree.map(np.array, weights[0])
    bad["head"]["weight_DV"][0, 0] = np.nan
    state = place(state | {"params": bad}, trainer.mesh, trainer.specs)
    before = jax.tree.map(np.array, jax.device_get(state))
    for in_row in (1, 2):
        state, report = trainer.step(state, global_batch(batch(0), trainer.mesh))
        assert (float(report.finite), int(report.skipped), int(report.skipped_in_row)) == (0, in_row, in_row)
        assert int(state["step"]) == in_row
        for part in ("params", "router_bias", "optimizer"):
            jax.tree.map(np.testing.assert_array_equal, jax.device_get(state[part]), before[part])
    good = jax.tree.map(np.array, weights[0])
    state = place(state | {"params": good}, trainer.mesh, trainer.specs)
    state, report = trainer.step(state, global_batch(batch(0), trainer.mesh))
    assert (float(report.finite), int(report.skipped), int(report.skipped_in_row)) == (1, 2, 0)
    assert (int(state["step"]), int(state["optimizer"]["count"])) == (3, 1)


def test_the_state_given_is_donated(one_device, weights):
    trainer = one_device.trainer
    state, _ = trainer.step(start(trainer, weights), global_batch(batch(0), trainer.mesh))
    after, _ = trainer.step(state, global_batch(batch(1), trainer.mesh))
    assert all(x.is_deleted() for x in jax.tree.leaves((state["params"], state["optimizer"])))
    assert not any(x.is_deleted() for x in jax.tree.leaves(after))


def test_what_decays(one_device):
    decayed = dict(leaves(one_device.trainer.optimizer.decayed))
    spared = {path for path, decays in decayed.items() if not decays}
    assert spared == {path for path in decayed if path.endswith("gain")} and spared
    assert decayed["moe_blocks.experts.router.centroids_DE"] and decayed["embedding.table_VD"]


@pytest.mark.slow
def test_the_evaluator_sums_nats_and_bytes(one_device, expert_parallel, weights):
    """Of the main model alone; bytes of the targets that there are, each with its weight."""
    lengths = np.arange(V) % 3
    first = batch(0)
    trainer = expert_parallel.trainer
    evaluate = trainer.evaluator(jnp.asarray(lengths))
    nats, n_bytes, weight = evaluate(start(trainer, weights), global_batch(first, trainer.mesh))
    assert float(weight) == first.weights_BT.sum() < np.sum(first.targets_BT >= 0)
    assert float(nats) == pytest.approx(one_device.reports[0].main * first.weights_BT.sum(), rel=1e-5)
    assert float(n_bytes) == np.sum(lengths[first.targets_BT] * first.weights_BT)


@pytest.mark.parametrize(
    ("mesh", "rules", "message"),
    [
        ((1, 3), EXPERTS, r"moe_blocks\.experts\.\w+: 8 experts over mesh axis 'expert' of size 3: not divisible"),
        ((2, 1), {"embed": "data", "mlp": "data"}, "both want mesh axis 'data'"),
        ((2, 1), {"embed": "model"}, "config.sharding.embed='model': no such mesh axis"),
        ((2, 1), {"experts": "model"}, "config.sharding.experts='model': no such mesh axis"),
    ],
)
def test_a_layout_that_cannot_be_is_explained(sizes, mesh, rules, message):
    with pytest.raises(UserError, match=message):
        trainer(sizes, *mesh, rules)


class Toy(nnx.Module):
    """Stands for a model where only its weights matter."""

    def __init__(self, *, rngs: nnx.Rngs):
        self.weight_DF = param(rngs, (8, 16), ("embed", "mlp"), normal(0.02), role="up")
        self.other_DF = param(rngs, (8, 16), ("embed", "mlp"), normal(0.02), role="up")
        self.bias = RouterBias(jnp.zeros(3), axes=(None,))
        self.config = SimpleNamespace(vocab_size=3)


def test_the_first_weights_depend_on_the_seed_alone():
    def first(data: int, expert: int, rules: dict, seed: int) -> State:
        mesh = make_mesh(data, expert, jax.devices()[: data * expert])
        return Trainer(lambda run, rngs: Toy(rngs=rngs), mesh, rules, OBJECTIVE, adamw(**ADAMW), STEP).init(seed)

    state = first(1, 1, {}, 0)
    jax.tree.map(np.testing.assert_array_equal, state, first(2, 4, {"embed": "data"}, 0))
    weight, other = state["params"]["weight_DF"], state["params"]["other_DF"]
    assert not np.allclose(weight, other)
    assert not np.allclose(weight, first(1, 1, {}, 1)["params"]["weight_DF"])
    assert float(jnp.std(weight)) == pytest.approx(0.02, rel=0.3)
    assert not any(np.any(x) for name, part in state.items() if name != "params" for x in jax.tree.leaves(part))


@pytest.mark.slow
def test_all_devices_reach_every_collective_of_the_step(expert_parallel):
    """The exchange sits in a switch of buffer sizes, within a loop over layers that are recomputed."""
    subject = expert_parallel.trainer
    program = subject.step.trace(*arguments_of(subject))
    assert str(program.jaxpr).count("all_to_all") > 2
    check_collectives(program.jaxpr)


@pytest.mark.slow
def test_the_compiled_step_is_given_what_a_device_keeps(expert_parallel):
    """Bytes of the arguments by XLA's count: this device's parts of the state, and of the batch."""
    subject = expert_parallel.trainer
    found = subject.step.trace(*arguments_of(subject)).lower().compile().memory_analysis()
    kept = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(expert_parallel.last))
    assert found.argument_size_in_bytes == kept + sum(x.nbytes for x in batch(0)) // 4
    weights = sum(x.size * 4 for x in jax.tree.leaves(expert_parallel.states[0]["params"]))
    assert kept < 0.8 * weights < found.argument_size_in_bytes + found.temp_size_in_bytes


def arguments_of(trainer: Trainer) -> tuple:
    """As the runs of this file call a step, which is therefore neither traced nor compiled again."""
    given = global_batch(batch(0), trainer.mesh)
    return trainer.abstract, jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), given)
