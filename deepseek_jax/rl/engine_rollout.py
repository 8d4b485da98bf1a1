"""Rollouts by the serving engine: for long answers, and for answers of very different lengths.

A row that has ended gives its place to the next prompt, so that nobody waits for the longest answer, and a cache has
pages for the answers that run and no others. `rollout.roller` runs one program until all have ended. What they draw is
the same: a row's key and the position determine the noise.

`EngineRoller` draws for a `Learner`. An update takes over the memory of the weights that it changes, so the engine is
given the present ones before each rollout; what its cache has of earlier ones is forgotten then.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax
import numpy as np

from deepseek_jax.errors import UserError
from deepseek_jax.layers.base import Tree
from deepseek_jax.rl.rollout import Prompts, Rollouts
from deepseek_jax.serve.engine import Engine
from deepseek_jax.serve.offline import Completion, complete
from deepseek_jax.serve.programs import Weights
from deepseek_jax.serve.sampling import Sampling


@dataclass(frozen=True, eq=False)
class Keyed(Sampling):
    """A `Sampling` with a random key of its own in place of a seed's."""

    key: np.ndarray | None = None  # its data, as `rollout.row_keys` gives it

    @functools.cached_property
    def key_data(self) -> np.ndarray:
        """The raw data of the random key."""
        assert self.key is not None
        return self.key


class EngineRoller:
    """Draws the answers of a step by an engine on one device: `roll(state, prompts)`, as `Learner` calls it.

    Args:
        make: the engine from weights as it reads them; called at the first rollout.
        prepared: from the params of a train state to those that the engine reads; the same arrays where these are.
        n_new, stop_ids: as for `rollouts`.
    """

    def __init__(
        self, make: Callable[[Weights], Engine], prepared: Callable[[Tree], Tree], n_new: int, stop_ids: Sequence[int]
    ):
        self._make, self._prepared, self._n_new, self._stop_ids = make, prepared, n_new, stop_ids
        self._engine: Engine | None = None

    def __call__(self, state: Tree, prompts: Prompts) -> Rollouts:
        """Returns answers with the weights of a train state; as `rollouts`."""
        params, router_bias = jax.tree.map(lambda x: x.addressable_data(0), (state["params"], state["router_bias"]))
        weights = self._prepared(params), router_bias
        if self._engine is None:
            self._engine = self._make(weights)
        return rollouts(self._engine, weights, prompts, self._n_new, self._stop_ids)


def rollouts(engine: Engine, weights: Weights, prompts: Prompts, n_new: int, stop_ids: Sequence[int]) -> Rollouts:
    """Continues prompts with up to `n_new` tokens each.

    Args:
        engine: an idle one of the model.
        weights: those to draw with, as the engine reads them; they are not copied, and the cache of others is not used.
        prompts: arrays of the host. Temperatures are 1, or 0 for the likeliest tokens.
        n_new: most tokens of an answer.
        stop_ids: marks that end one.

    Returns what `rollout.roller` returns with the same keys, drawn from the whole vocabulary and without routes.

    Raises UserError: another temperature, for the engine reports log-probabilities of the model itself; weights of
    another form than the engine's, or a prompt after which `n_new` tokens are more than it can hold.
    """
    temperature_B = np.asarray(prompts.temperature_B1)[:, 0]
    others = temperature_B[~np.isin(temperature_B, (0, 1))]
    if others.size:
        raise UserError(
            f"rollouts by the engine at temperature {others[0]:g}: expected 1, or 0, at which its "
            "log-probabilities are those of the draw. Use rollout.roller for others."
        )
    lengths = np.asarray(prompts.length_B1)[:, 0].tolist()
    if max(lengths) + n_new > engine.most_positions:
        raise UserError(
            f"prompts of up to {max(lengths)} tokens with answers of up to {n_new}: expected {engine.most_positions} "
            "together at most, since the engine has no more. Make one with more positions or pages."
        )
    engine.replace_weights(weights)
    rows, keyed = zip(temperature_B.tolist(), np.asarray(prompts.key_BK), strict=True), functools.partial(Keyed, n_new)
    samplings = [keyed(temperature=number, stop_ids=tuple(stop_ids), logprobs=0, key=key) for number, key in rows]
    given = [ids[:length].tolist() for ids, length in zip(np.asarray(prompts.ids_BT), lengths, strict=True)]
    return _arrays(np.asarray(prompts.ids_BT), lengths, complete(engine, given, samplings), n_new)


def _arrays(prompt_BT: np.ndarray, lengths: Sequence[int], found: Sequence[Completion], n_new: int) -> Rollouts:
    """Completions as arrays with a row each."""
    ids_BT = np.pad(prompt_BT, ((0, 0), (0, n_new)))
    logp_BT = np.zeros(ids_BT.shape, np.float32)
    for row, (start, one) in enumerate(zip(lengths, found, strict=True)):
        answer = slice(start, start + len(one.ids))
        ids_BT[row, answer], logp_BT[row, answer] = one.ids, [token.logprob for token in one.logprobs]
    n_drawn_B1 = np.array([[len(one.ids)] for one in found], np.int32)
    is_finished_B1 = np.array([[one.ending == "stop"] for one in found])
    return Rollouts(ids_BT, logp_BT, n_drawn_B1, is_finished_B1, np.zeros((*ids_BT.shape, 0), np.uint8), {})
