"""Devices, sequences and layers: what is divided adds up, and what does not divide is refused."""

import pytest

from deepseek_jax import run_config
from deepseek_jax.errors import UserError
from deepseek_jax.models import family
from deepseek_jax.plan.layout import describe_layers, make_layout, make_stages
from deepseek_jax.plan.network import describe

SIZES = {"pipe": 16, "data": -1, "expert": 64, "devices": 2048, "batch": 15_360, "micro_batches": 1, "seq_len": 4096}


@pytest.fixture(scope="module")
def v3():
    config = run_config.load("v3_671b")
    module = family(config.family)
    return describe(module, module.Config.from_config(config.model))


def test_the_published_layout():
    at = make_layout(**SIZES)
    assert (at.pipe, at.data, at.expert, at.devices) == (16, 2, 64, 2048)
    assert (at.micro_batches, at.sequences, at.tokens) == (120, 1, 4096)  # one sequence per micro-batch
    assert at.tokens_per_step == 62_914_560


def test_without_a_pipeline_micro_batches_are_those_of_the_config():
    at = make_layout(**SIZES | {"pipe": 1, "devices": 128, "micro_batches": 4})
    assert (at.data, at.micro_batches, at.sequences) == (2, 4, 30)
    assert make_layout(**SIZES | {"pipe": 1, "devices": 0}).data == 1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"devices": 2000}, "does not divide the 2000 devices. Choose other sizes, or a multiple of 1024"),
        ({"data": 3}, "does not divide the 2048 devices. Choose other sizes, or a multiple of 3072"),
        ({"expert": 0}, "expected sizes >= 1"),
        ({"pipe": -1}, "expected sizes >= 1"),
        ({"batch": 100}, "does not divide over data 2 x expert 64 = 128 devices. Choose a multiple of 128"),
        ({"micro_batches": 7}, "each of the 128 shares has 120 sequences. Choose a divisor of 120"),
    ],
)
def test_what_does_not_divide_is_refused(change, words):
    with pytest.raises(UserError, match=words):
        make_layout(**SIZES | change)


@pytest.mark.parametrize("n_stages", [1, 2, 7, 16, 32])
@pytest.mark.parametrize("folded", [False, True])
def test_every_layer_is_in_one_stage(v3, n_stages, folded):
    stages = make_stages(v3, n_stages, 4096, folded=folded)
    assert len(stages) == n_stages
    assert sum(stage.n_layers for stage in stages) == 61
    assert sum(dict(stage.repeats).get("dense_blocks", 0) for stage in stages) == 3
    assert [stage.has_embedding for stage in stages] == [True] + [False] * (n_stages - 1)
    assert [stage.has_head for stage in stages] == [False] * (n_stages - 1) + [True]
    assert stages[-1].mtp_depth == 1
    numbers = sum(w.size for stage in stages for w in stage.weights)
    second_embedding = 0 if folded or n_stages == 1 else 129_280 * 7168
    assert numbers == sum(w.size for w in v3.weights) + second_embedding
    assert min((stage.n_layers for stage in stages[:-1]), default=1) >= 1


def test_more_stages_than_layers_are_refused(v3):
    with pytest.raises(UserError, match="62 pipeline stages for 61 layers"):
        make_stages(v3, 62, 4096)


def test_layers_in_words(v3):
    assert describe_layers(make_stages(v3, 1, 4096)) == "61"
    assert describe_layers(make_stages(v3, 16, 4096, folded=True, slow=2.0)) == "2, 3 x 5, 11 x 4, 0"
