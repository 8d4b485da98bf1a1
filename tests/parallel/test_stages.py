"""Stages: every layer is in one, and each is held and passed as often as its schedule says."""

import pytest

from deepseek_jax.parallel.stages import ARRANGEMENTS, divide, slices


def test_layers_go_where_least_is_done():
    assert divide(8, 4, 0.0, folded=False) == (2, 2, 2, 2)
    assert divide(8, 4, 2.0, folded=False) == (3, 3, 2, 0)
    assert divide(8, 4, 2.0, folded=True) == (3, 3, 2, 0)  # devices with stages 0 and 3, 1 and 2: 3 + 2 and 5
    assert divide(4, 4, 0.0, folded=True) == (1, 1, 1, 1)
    assert divide(7, 4, 1.2, folded=True) == (2, 2, 2, 1)  # 2 and 1 + 1.2, 2 and 2
    assert divide(61, 1, 5.0, folded=False) == (61,)
    assert sum(divide(61, 5, 2.0, folded=True)) == 61


@pytest.mark.parametrize("counts", [(61,), (2, 3, *[4] * 14), (0, 61), (30, 0, 31), (1, 1, 1, 58)])
def test_the_stages_slices_make_up_the_stacks(counts):
    stacks = {"dense": 3, "moe": 58}
    stages = slices(stacks, counts)
    assert [sum(part.stop - part.start for part in stage.values()) for stage in stages] == list(counts)
    for name, n in stacks.items():
        layers = [layer for stage in stages for layer in range(n)[stage.get(name, slice(0))]]
        assert layers == list(range(n)), "in order, each once"


def test_slices_by_hand():
    assert slices({"dense": 3, "moe": 5}, (2, 3, 3)) == (
        {"dense": slice(0, 2)},
        {"dense": slice(2, 3), "moe": slice(0, 2)},
        {"moe": slice(2, 5)},
    )


@pytest.mark.parametrize("name", ARRANGEMENTS)
@pytest.mark.parametrize("n_devices", [2, 4, 16])
def test_every_stage_is_held_as_often_as_there_are_copies(name, n_devices):
    found = ARRANGEMENTS[name]
    held = [hold for rank in range(n_devices) for hold in found.hold(rank, n_devices)]
    stages = found.n_stages(n_devices)
    assert sorted(hold.stage for hold in held) == sorted([*range(stages)] * found.copies)
    for stage in range(stages):  # each micro-batch passes each stage once
        assert sum(hold.share for hold in held if hold.stage == stage) == 1


def test_micro_batches_in_flight():
    def in_flight(name: str) -> list[int]:
        return [sum(hold.in_flight for hold in ARRANGEMENTS[name].hold(rank, 8)) for rank in range(8)]

    assert in_flight("1f1b") == [8, 7, 6, 5, 4, 3, 2, 1]
    assert in_flight("1f1b_paired") == [16, 14, 12, 10, 8, 6, 4, 2]
    assert in_flight("zb1p") == [8] * 8
    assert in_flight("dualpipe") == [8 + 1] * 8
    assert in_flight("dualpipev") == [16 + 1] * 8
