"""GRPO's objective: the formula once more in numpy, and the laws that a policy gradient has to obey."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.errors import UserError
from deepseek_jax.rl import grpo
from deepseek_jax.rl.grpo import GRPO, Drawn, advantages, tied_share, token_weights

objective = jax.jit(grpo.objective, static_argnums=0)

B, T, LONGEST = 6, 5, 7
PLAIN = GRPO(
    advantage="mean",
    aggregation="token",
    ratio="token",
    clip_low=0.2,
    clip_high=0.28,
    log_ratio_bound=20.0,
    beta=0.0,
    unbiased_kl=False,
    off_policy_bound=0.0,
    importance_cap=0.0,
)
REWARDS, GROUPS = [1.0, 0.0, 0.0, 0.5, 0.5, 0.5], ["a", "a", "b", "b", "a", "b"]
FULL = dict(beta=0.3, off_policy_bound=0.05, importance_cap=1.2)
VARIANTS = {
    "plain": {},
    "DeepSeekMath": dict(advantage="std", aggregation="sequence", clip_high=0.2, beta=0.04),
    "R1": dict(advantage="std", aggregation="sequence", clip_low=10.0, clip_high=10.0, beta=0.001),
    "V3.2": dict(**FULL, unbiased_kl=True),
    "Dr. GRPO": dict(aggregation="constant"),
    "GSPO": dict(advantage="std", aggregation="sequence", ratio="sequence", clip_low=3e-4, clip_high=4e-4),
    "all": dict(**FULL, aggregation="constant", log_ratio_bound=0.1),
}


def config(**changes) -> GRPO:
    return dataclasses.replace(PLAIN, **changes)


def batch(c=PLAIN, seed=0, spread=0.3, rewards=REWARDS):
    """(logp_BT, answers, share_BT): answers of different lengths that begin at different places; noise elsewhere."""
    rng = np.random.default_rng(seed)
    sampled, old, reference, logp = -1 + spread * rng.normal(size=(4, B, T))
    length_B = np.array([1, 5, 3, 4, 2, 3])
    start_B = np.array([3, 0, 2, 1, 0, 1])
    mask = ((np.arange(T) >= start_B[:, None]) & (np.arange(T) < (start_B + length_B)[:, None])).astype(np.float32)
    A = advantages(rewards, GROUPS, c.advantage)[:, None] * np.ones((1, T))
    drawn = Drawn(mask, sampled, old, reference, A, token_weights(mask, c.aggregation, LONGEST))
    return logp, drawn, mask / mask.sum()


def oracle(c: GRPO, logp, drawn: Drawn) -> float:
    """The objective, written out token by token."""
    value = 0.0
    n_tokens, n_answers = drawn.mask_BT.sum(), len(drawn.mask_BT)
    for b in range(B):
        places = np.flatnonzero(drawn.mask_BT[b])
        logs = {t: np.clip(logp[b, t] - drawn.old_logp_BT[b, t], -c.log_ratio_bound, c.log_ratio_bound) for t in places}
        mean_log = np.mean(list(logs.values()))
        A = drawn.advantage_BT[b, 0]
        away = np.mean([drawn.sampled_logp_BT[b, t] - logp[b, t] for t in places])
        keep = not (c.off_policy_bound and A < 0 and away > c.off_policy_bound)
        for t in places:
            rho = np.exp(logs[t] if c.ratio == "token" else mean_log)
            gain = min(rho * A, np.clip(rho, 1 - c.clip_low, 1 + c.clip_high) * A) * keep
            if c.importance_cap:
                d = np.clip(
                    drawn.old_logp_BT[b, t] - drawn.sampled_logp_BT[b, t], -c.log_ratio_bound, c.log_ratio_bound
                )
                gain *= min(np.exp(d), c.importance_cap)
            d = np.clip(drawn.reference_logp_BT[b, t] - logp[b, t], -c.log_ratio_bound, c.log_ratio_bound)
            kl = np.exp(d) - d - 1
            if c.unbiased_kl:
                kl *= np.exp(logs[t])
            over = {"token": n_tokens, "sequence": len(places) * n_answers, "constant": LONGEST * n_answers}
            value += (gain - c.beta * kl) / over[c.aggregation]
    return value


slope_of = jax.jit(jax.grad(lambda logp, c, *given: grpo.objective(c, logp, *given)[0]), static_argnums=1)


def gradient(c, logp, drawn, share):
    return np.asarray(slope_of(np.float32(logp), c, drawn, share))


@pytest.mark.parametrize("name", VARIANTS)
def test_the_objective_is_the_formula(name):
    c = config(**VARIANTS[name])
    logp, drawn, share = batch(c)
    assert float(objective(c, np.float32(logp), drawn, share)[0]) == pytest.approx(oracle(c, logp, drawn), abs=1e-6)
    slope = gradient(c, logp, drawn, share)
    for b, t in itertools.product(range(B), range(T)):
        step = np.zeros((B, T))
        step[b, t] = 1e-6
        expected = (oracle(c, logp + step, drawn) - oracle(c, logp - step, drawn)) / 2e-6
        assert slope[b, t] == pytest.approx(expected, abs=2e-5), (b, t)


@pytest.mark.parametrize("name", VARIANTS)
def test_the_first_update_has_ratio_one(name):
    """Then the gradient is w A, and clipping and truncation change nothing."""
    c = config(**VARIANTS[name] | {"beta": 0.0})
    _, drawn, share = batch(c)
    logp = drawn.sampled_logp_BT
    drawn = drawn._replace(old_logp_BT=logp)
    _, figures = objective(c, np.float32(logp), drawn, share)
    assert float(figures.ratio) == pytest.approx(1, abs=1e-6) and float(figures.importance) == pytest.approx(
        1, abs=1e-6
    )
    assert float(figures.clipped_low) == float(figures.clipped_high) == float(figures.off_policy) == 0
    np.testing.assert_allclose(gradient(c, logp, drawn, share), drawn.weights_BT * drawn.advantage_BT, atol=1e-7)


@pytest.mark.parametrize("kind", ["mean", "std"])
def test_tied_groups_have_no_gradient(kind):
    """Rewards whose mean is rounded (.35 three times) included; other groups keep theirs."""
    c = config(advantage=kind)
    logp, drawn, share = batch(c, rewards=[0.35, 0.35, 1.0, 0.0, 0.35, 0.0])
    slope = gradient(c, logp, drawn, share)
    tied = [n for n, group in enumerate(GROUPS) if group == "a"]
    assert not slope[tied].any() and slope[[n for n in range(B) if n not in tied]].any()
    logp, drawn, share = batch(c, rewards=[0.1 + 0.2] * B)
    assert not gradient(c, logp, drawn, share).any()
    held = gradient(config(advantage=kind, beta=0.1), logp, drawn, share)
    ratio = np.exp(drawn.reference_logp_BT - logp)
    np.testing.assert_allclose(held, 0.1 * (ratio - 1) * drawn.weights_BT, atol=1e-7)  # the divergence is felt by all


@pytest.mark.parametrize("name", ["V3.2", "all", "GSPO", "DeepSeekMath"])
def test_neither_micro_batches_nor_the_order_of_rows_matter(name):
    c = config(**VARIANTS[name])
    logp, drawn, share = batch(c)
    whole, slope = float(objective(c, np.float32(logp), drawn, share)[0]), gradient(c, logp, drawn, share)
    parts = [jax.tree.map(lambda x, n=n: x[n : n + 2], (logp, drawn, share)) for n in (0, 2, 4)]
    assert sum(float(objective(c, np.float32(x), *rest)[0]) for x, *rest in parts) == pytest.approx(whole, abs=1e-6)
    np.testing.assert_allclose(np.concatenate([gradient(c, *part) for part in parts]), slope, atol=1e-7)
    order = np.array([3, 0, 5, 1, 4, 2])
    found = advantages([REWARDS[n] for n in order], [GROUPS[n] for n in order], c.advantage)
    np.testing.assert_allclose(found, advantages(REWARDS, GROUPS, c.advantage)[order], atol=1e-15)
    logp, drawn, share = jax.tree.map(lambda x: x[order], (logp, drawn, share))
    np.testing.assert_allclose(gradient(c, logp, drawn, share), slope[order], atol=1e-7)


def test_nothing_flows_from_where_nothing_was_drawn():
    c = config(**VARIANTS["V3.2"])
    logp, drawn, share = batch(c)
    empty = drawn.mask_BT == 0
    broken = {key: np.where(empty, np.nan, getattr(drawn, key)) for key in ("sampled_logp_BT", "reference_logp_BT")}
    other = gradient(c, np.where(empty, -np.inf, logp), drawn._replace(**broken), share)
    np.testing.assert_array_equal(other, gradient(c, logp, drawn, share))
    assert not other[empty].any() and other[:, -1].any(), "the last token of an answer, its end mark, is learnt"


def test_large_ratios_stay_finite():
    c = config(beta=0.1, unbiased_kl=True, importance_cap=2.0, off_policy_bound=0.1)
    for shift in (100.0, -100.0, 1e4, -1e4):
        for key in ("old_logp_BT", "reference_logp_BT", "sampled_logp_BT"):
            logp, drawn, share = batch(c)
            drawn = drawn._replace(**{key: getattr(drawn, key) + shift})
            value, figures = objective(c, np.float32(logp), drawn, share)
            assert np.isfinite([float(value), *map(float, figures)]).all()
            assert np.isfinite(gradient(c, logp, drawn, share)).all()


def test_aggregations_differ_on_unequal_lengths_only():
    found = {}
    for kind in grpo.AGGREGATIONS:
        mask = batch()[1].mask_BT
        found[kind] = token_weights(mask, kind, LONGEST)
        assert not found[kind][mask == 0].any()
        equal = token_weights(np.ones((B, T)), kind, T)
        np.testing.assert_allclose(equal, 1 / (B * T))
    assert found["token"].sum() == pytest.approx(1) and found["sequence"].sum() == pytest.approx(1)
    assert found["sequence"].sum(1) == pytest.approx(1 / B)
    assert found["constant"][1, 0] == np.float32(1 / (LONGEST * B))
    assert not np.allclose(found["token"], found["sequence"])
    mask = np.array([[1, 1], [0, 0]])  # an answer that could not be scored is not counted
    assert [token_weights(mask, kind, 4)[0, 0] for kind in grpo.AGGREGATIONS] == [0.5, 0.5, 0.25]


def test_advantages_by_hand():
    assert advantages([1, 0, 0, 0], [7] * 4, "mean").tolist() == [0.75, -0.25, -0.25, -0.25]
    found = advantages([1, 0, 3, 1], ["a", "a", "b", "b"], "std")
    np.testing.assert_allclose(found, [0.70711, -0.70711, 0.70711, -0.70711], rtol=2e-4)
    assert advantages([1, None, 0, None], ["a", "a", "a", "b"], "mean").tolist() == [0.5, 0, -0.5, 0]
    assert advantages([5.0], ["a"], "std").tolist() == [0], "a group of one says nothing"
    assert tied_share([1, 1, 0, 1, None, 2], ["a", "a", "b", "b", "c", "c"]) == pytest.approx(2 / 3)


def test_the_divergence_is_an_unbiased_estimate():
    """k3 over samples of pi has the mean KL(pi || ref); the gradient of V3.2's form is that of KL, k3's is not."""
    theta, ref = jnp.array([0.3, -0.5, 0.9, 0.0]), jax.nn.log_softmax(jnp.array([0.0, 0.4, -0.2, 0.1]))

    def kl(theta):
        logp = jax.nn.log_softmax(theta)
        return jnp.sum(jnp.exp(logp) * (logp - ref))

    def expected(theta, unbiased):
        """The expectation of the penalty over samples of pi_old = pi."""
        logp, old = jax.nn.log_softmax(theta), jax.lax.stop_gradient(jax.nn.log_softmax(theta))
        ratio = jnp.exp(logp - old) if unbiased else 1.0
        return jnp.sum(jnp.exp(old) * grpo.k3(logp, ref, 20.0) * ratio)

    assert float(expected(theta, False)) == pytest.approx(float(kl(theta)), abs=1e-6)
    slopes = [np.asarray(jax.grad(expected)(theta, unbiased)) for unbiased in (True, False)]
    np.testing.assert_allclose(slopes[0], jax.grad(kl)(theta), atol=1e-6)
    assert np.abs(slopes[1] - slopes[0]).max() > 0.01


def test_off_policy_answers_are_left_out_of_the_gain_alone():
    c = config(off_policy_bound=0.5)
    logp, drawn, share = batch(c)
    drawn = drawn._replace(sampled_logp_BT=logp + 1.0)  # all are a nat less likely by now
    slope, worse = gradient(c, logp, drawn, share), drawn.advantage_BT[:, 0] < 0
    assert not slope[worse].any() and slope[~worse & (drawn.advantage_BT[:, 0] > 0)].any()
    assert float(objective(c, np.float32(logp), drawn, share)[1].off_policy) == pytest.approx(share[worse].sum())
    with_kl = gradient(dataclasses.replace(c, beta=0.1), logp, drawn, share)
    assert with_kl[worse].any(), "the divergence still pulls them to the reference"


def test_the_part_of_a_vocabulary_that_was_drawn_from():
    logits, kept = jnp.array([[1.0, 2.0, 3.0]]), jnp.array([[True, False, True]])
    found = grpo.kept_log_softmax(logits, kept)
    np.testing.assert_allclose(found[0, [0, 2]], jax.nn.log_softmax(jnp.array([1.0, 3.0])), rtol=1e-6)
    assert found[0, 1] == -jnp.inf
    slope = jax.grad(lambda x: grpo.kept_log_softmax(x, kept)[0, 0])(logits)
    assert np.isfinite(slope).all() and slope[0, 1] == 0


def test_settings_are_checked():
    with pytest.raises(UserError, match="rl.grpo.aggregation='tokens': expected one of token, sequence, constant"):
        config(aggregation="tokens")
    with pytest.raises(UserError, match="set rl.grpo.aggregation=sequence"):
        config(ratio="sequence")
