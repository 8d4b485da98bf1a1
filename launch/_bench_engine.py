"""The engine as a side of `bench generate`: the same weights, requests in continuous batching instead of one batch.

With drafts, weights are such that the model continues n by n + 1 and multi-token prediction is wrong after some
tokens, which a text meets so often that the share of right drafts is the one that is asked for: the embeddings are
random, the head is the table shifted by one, what layers add is drawn a thousand times smaller, and multi-token
prediction keeps the embedding of the last token alone. Embeddings of the tokens that it is wrong after lie in
dimensions to which its norm gives no weight. A step reads and computes what it would with any other weights.
"""

import time
from typing import Any

import numpy as np

from deepseek_jax.bounds import number

STEPS = 100  # of a text, of which the asked for share has a right draft; then the pattern repeats
SMALL = 1e-3  # factor of what layers add to the residual stream
ADDS = ("attention_out", "down")  # roles of the weights that make it
ACCEPTANCE = number(0, 1)


class Engine:
    """The engine with the weights of a side of ours, for up to `n_rows` requests of `n_new` new tokens.

    `options` are those of `serve.engine.Engine` besides the ones that `LanguageModel.serve` gives it.
    """

    def __init__(self, ours: Any, n_rows: int, n_new: int, **options: Any):
        from deepseek_jax import on_device
        from deepseek_jax.language_model import OFFLINE
        from deepseek_jax.serve.engine import Engine
        from deepseek_jax.serve.pages import PAGE_SIZE

        n_positions = ours.n_prompt + n_new
        compiled = {"compiler_options": on_device.compiler_options(), "ends_early": on_device.ends_early()}
        sizes = {"n_rows": n_rows, "n_pages": 1 + n_rows * -(-n_positions // PAGE_SIZE), "chunk": on_device.chunk()}
        settings = OFFLINE | sizes | compiled | options
        self.engine = Engine(ours.definition, ours.weights, n_positions, **settings)
        at_once = f"{settings['n_steps']} steps and {settings['n_prompts']} prompts at a time"
        self.ours, self.title = ours, f"the engine, up to {n_rows} requests of {n_positions} tokens, {at_once}"

    def run(self, batch: int, n_new: int) -> float:
        """Seconds until `batch` requests are continued by `n_new` tokens."""
        from deepseek_jax.serve.offline import complete
        from deepseek_jax.serve.sampling import Sampling

        prompts = self.ours.prompts(batch)
        begin = time.perf_counter()
        found = complete(self.engine, [prompt.tolist() for prompt in prompts], [Sampling(n_new)] * batch)
        taken = time.perf_counter() - begin
        assert all(len(one.ids) == n_new for one in found)
        return taken

    def floor(self, batch: int) -> float | None:
        """See `_bench_generate.Ours.floor`."""
        return self.ours.floor(batch)

    @property
    def acceptance(self) -> float | None:
        """The share of drafts that were right; None where there were none."""
        return self.engine.n_accepted / self.engine.n_drafted if self.engine.n_drafted else None


def with_drafts(weights: tuple[dict, dict], acceptance: float) -> tuple[dict, dict]:
    """Returns weights, of which `ADDS` are small already, whose drafts are right with this share; see above."""
    import jax.numpy as jnp

    params, router_bias = weights
    table_VD, head = params["embedding"]["table_VD"], params["head"]["weight_DV"]
    vocab_size, d = table_VD.shape
    is_wrong_V = wrong_after(acceptance, vocab_size)
    is_kept_D = jnp.arange(d) < 3 * d // 4
    table_VD = jnp.where(is_wrong_V[:, None] == is_kept_D, 0, table_VD).astype(table_VD.dtype)
    module = params["mtp"]["0"]
    changed = {
        "join_YD": _like(module["join_YD"], jnp.eye(2 * d, d)),
        "embedding_norm": {"gain": is_kept_D.astype(module["embedding_norm"]["gain"].dtype)},
    }
    return params | {
        "embedding": {"table_VD": table_VD},
        "head": {"weight_DV": _like(head, jnp.roll(table_VD, 1, axis=0).T)},
        "mtp": params["mtp"] | {"0": module | changed},
    }, router_bias


def wrong_after(acceptance: float, vocab_size: int) -> np.ndarray:
    """Returns whether drafts are wrong after each id, so that this share of a text's steps has a right draft.

    A step moves on by one id if its draft is wrong, else by two, and begins at all ids that drafts are wrong after.
    """
    n_wrong_S = np.arange(STEPS + 1) * round(STEPS * (1 - acceptance)) // STEPS  # steps before, spread evenly
    is_wrong_S = np.diff(n_wrong_S) > 0
    id_S = np.cumsum([0, *np.where(is_wrong_S, 1, 2)])
    return np.resize(np.isin(np.arange(id_S[-1]), id_S[:-1][is_wrong_S]), vocab_size)


def _like(weight: Any, new: Any) -> Any:
    """`new` in the dtype of a weight, and with its axes in memory."""
    import jax.numpy as jnp

    from deepseek_jax.layers.base import Turned

    if isinstance(weight, Turned):
        return Turned(jnp.transpose(new, weight.order).astype(weight.array.dtype), weight.order)
    return new.astype(weight.dtype)
