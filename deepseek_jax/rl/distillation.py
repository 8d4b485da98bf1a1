"""On-policy distillation: a teacher judges every token that the student has drawn.

    A_t = log pi_T(o_t | q, o_<t) - log pi_old(o_t | q, o_<t)

takes the place of a group's advantages. Over draws from pi_old its mean is -KL(pi_old || pi_T) of the next token, and
the policy gradient with it is the gradient of -KL: -grad KL = E[A grad log pi], for E[grad log pi] = 0. So one forward
pass of the teacher per answer is all that is needed, whatever its network; it reads the same ids.

V4's report distils the whole vocabulary from hidden states that are kept; here it is the tokens that were drawn.
Papers: Gu et al. 2023, arXiv 2306.08543 (reverse KL); Agarwal et al. 2023, arXiv 2306.13649 (on the student's answers).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from deepseek_jax.rl.objective import Answers, Measured
from deepseek_jax.train.step import State


@dataclass(frozen=True)
class Teacher:
    """A network with its weights, on the mesh of the student."""

    state: State  # {"params", "router_bias"}
    measure: Callable[[State, Answers], Measured]  # a program, of `Trainer.with_model(measurer(…))`


def judged(
    teacher_logp_BT: np.ndarray, old_logp_BT: np.ndarray, is_drawn_BT: np.ndarray, bound: float
) -> tuple[np.ndarray, dict[str, float]]:
    """Returns (float32 A_BT, 0 where nothing was drawn and within ±`bound` nats; figures: an estimate of the KL)."""
    away_BT = (teacher_logp_BT - old_logp_BT) * is_drawn_BT
    divergence = -float(away_BT.sum() / max(is_drawn_BT.sum(), 1))
    return np.clip(away_BT, -bound, bound).astype(np.float32), {"teacher_kl": divergence}


def without_routes(found: Answers) -> Any:
    """Returns answers as a network with other experts reads them."""
    return found._replace(routes={})
