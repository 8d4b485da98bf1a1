"""On-policy distillation: what a teacher says of drawn tokens has the gradient of the divergence from it."""

import jax
import jax.numpy as jnp
import numpy as np

from deepseek_jax.rl.distillation import judged
from deepseek_jax.rl.grpo import Drawn, objective
from tests.rl.test_grpo import config

STATES, V = 3, 5


def test_the_gradient_is_that_of_the_reverse_divergence():
    """All tokens of a small vocabulary, each as often as it is drawn, after three prompts."""
    student_SV, teacher_SV = np.random.default_rng(0).normal(size=(2, STATES, V)).astype(np.float32)
    logp_SV, theirs_SV = jax.nn.log_softmax(student_SV), jax.nn.log_softmax(teacher_SV)
    each_BT = np.ones((STATES * V, 1), np.float32)
    flat = lambda x_SV: np.asarray(x_SV).reshape(-1, 1)  # noqa: E731  # a row per state and token
    A_BT, figures = judged(flat(theirs_SV), flat(logp_SV), each_BT > 0, 20.0)
    drawn = Drawn(each_BT, flat(logp_SV), flat(logp_SV), flat(logp_SV), A_BT, np.exp(flat(logp_SV)))

    def gain(student_SV):
        return objective(config(), jax.nn.log_softmax(student_SV).reshape(-1, 1), drawn, each_BT)[0]

    def divergence(student_SV):
        logp_SV = jax.nn.log_softmax(student_SV)
        return jnp.sum(jnp.exp(logp_SV) * (logp_SV - theirs_SV))

    found, expected = jax.jit(jax.grad(gain))(student_SV), jax.jit(jax.grad(divergence))(student_SV)
    np.testing.assert_allclose(found, -expected, atol=1e-6)
    assert np.abs(expected).max() > 0.05
    np.testing.assert_allclose(figures["teacher_kl"], np.mean(logp_SV - theirs_SV), rtol=1e-5)


def test_only_drawn_tokens_are_judged_and_within_a_bound():
    theirs, own = np.array([[-9.0, -1.0, -2.0]]), np.array([[-1.0, -1.5, 0.0]])
    A_BT, figures = judged(theirs, own, np.array([[True, True, False]]), 5.0)
    np.testing.assert_array_equal(A_BT, [[-5.0, 0.5, 0.0]])
    assert A_BT.dtype == np.float32 and figures == {"teacher_kl": 3.75}
    A_BT, figures = judged(own, own, np.ones((1, 3), bool), 5.0)
    assert not A_BT.any() and figures == {"teacher_kl": 0.0}
