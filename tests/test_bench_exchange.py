"""`bench exchange`: tokens come back as they went, in one hop or two, and the loads are those that were asked for."""

import json
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from deepseek_jax.errors import UserError
from deepseek_jax.launch import _bench_exchange, bench

TINY = {"devices": 4, "tokens": 16, "width": 128, "experts": 16, "top_k": 4, "n_groups": 4, "top_groups": 2}


def options(**changed) -> SimpleNamespace:
    return SimpleNamespace(**{name: flag[1] for name, flag in _bench_exchange.EXTRA.items()} | TINY | changed)


@pytest.mark.slow
def test_every_exchange_brings_tokens_back_and_is_printed(tmp_path, capsys):
    words = [f"--{name.replace('_', '-')}={value}" for name, value in TINY.items()]
    assert bench.main(["exchange", *words, "--repeats=2", "--rounds=1", f"--json={tmp_path / 'rows'}"]) == 0
    rows = [json.loads(line) for line in (tmp_path / "rows").read_text().splitlines()]
    names = [(row["exchange"], row["load"]) for row in rows]
    both = [(name, load) for name in ("one hop", "two hops, 2 groups") for load in ("balanced", "skewed 4:1")]
    assert names == [*both, ("all_to_all", "balanced")]
    assert all(row["ms"] > 0 and row["within_bytes"] > 0 and row["devices"] == 4 for row in rows)
    assert [row["across_bytes"] > 0 for row in rows] == [False, False, True, True, False]
    assert "GB/s" in capsys.readouterr().out


@pytest.mark.parametrize("skew", [1.0, 4.0])
def test_routing_chooses_like_a_router_and_as_often_as_asked(skew):
    asked = options(tokens=2048, skew=skew)
    chosen = _bench_exchange.routing(asked, 4, skew)
    assert chosen.shape == (4 * 2048, 4) and all(len({*row}) == 4 for row in chosen[:99].tolist())
    assert max(len({expert // 4 for expert in row}) for row in chosen.tolist()) <= 2  # groups
    pairs = np.bincount(chosen.ravel() // 4, minlength=4)
    if skew == 1:
        assert np.allclose(pairs / pairs.mean(), 1, atol=0.05)
    else:
        assert pairs[0] > 1.5 * pairs[1] and np.allclose(pairs[1:] / pairs[1:].mean(), 1, atol=0.05)
    assert _bench_exchange.busiest(chosen, 16, 4) == pairs.max() / pairs.mean()


def test_ragged_is_measured_where_it_exists():
    assert list(_bench_exchange.ways(options(), 8, "gpu")) == [
        "one hop",
        *map("two hops, {} groups".format, (2, 4)),
        "ragged",
    ]
    assert list(_bench_exchange.ways(options(groups=4), 8, "cpu")) == ["one hop", "two hops, 4 groups"]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"devices": 64}, "Give two or more"),
        ({"experts": 18}, "--experts=18: expected a multiple of 4 devices"),
        ({"top_k": 9}, "with enough experts"),
        ({"groups": 3}, "--groups=3: expected a divisor of 4 devices"),
    ],
)
def test_what_cannot_be_exchanged_is_refused(changed, message):
    asked = options(**changed)
    with pytest.raises(UserError, match=message):
        _bench_exchange.check(asked, len(jax.devices()[: asked.devices]))
