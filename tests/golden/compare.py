"""The distance of a model of ours to what transformers says of it: shared by the golden tests and the live ones.

Loaded by path (tests are no package):  compare = module_at(Path("tests/golden/compare.py")).
"""

import dataclasses
import functools
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from ml_collections import ConfigDict

from deepseek_jax.convert import hf, names
from deepseek_jax.convert.place import place
from deepseek_jax.layers.base import bind, split
from deepseek_jax.layers.tokens import Tokens
from deepseek_jax.models import family
from deepseek_jax.tree import paths

PROMPT = 8  # as in make_golden.py
MTP_WEIGHT = 0.3
INDEXER = ".indexer."  # in the names of its weights


@dataclass(frozen=True)
class Model:
    """A published directory as a network with float32 weights."""

    published: hf.Published
    source: hf.Source
    definition: nnx.GraphDef
    weights: dict


def load(directory: Path, published: hf.Published | None = None) -> Model:
    """Reads a directory through everything that users read theirs through."""
    published = published or hf.open_published(directory)
    definition, shapes = abstract(published.family, published.numbers)
    source = hf.Source(published, shapes)
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32, sharding=here), source.abstract)
    return Model(published, source, definition, place(source, target))


def read(directory: Path) -> Model:
    """The same without devices: NumPy arrays of what the file holds."""
    published = hf.open_published(directory)
    definition, shapes = abstract(published.family, published.numbers)
    source = hf.Source(published, shapes)
    weights = jax.tree.map(lambda x: np.empty(x.shape, x.dtype), source.abstract)
    flat = paths(weights)
    for piece in source.pieces():
        flat[piece.path][piece.index] = piece.array
    return Model(published, source, definition, weights)


def in_float32(model: Model) -> Model:
    """On a device, as `load` places it: the same programs fit both."""
    weights = jax.device_put(jax.tree.map(np.float32, model.weights), jax.devices()[0])
    return dataclasses.replace(model, weights=weights)


def abstract(name: str, numbers: dict) -> tuple[nnx.GraphDef, dict]:
    """(definition, {"params", "router_bias"} of shapes) of a family's model."""
    module = family(name)
    config = module.Config.from_config(ConfigDict(numbers))
    definition, params, bias = split(nnx.eval_shape(lambda: module.Model(config, rngs=nnx.Rngs(0))))
    return definition, {"params": params, "router_bias": bias}


def cross_entropy(logits_BTV: jax.Array, targets_BT: jax.Array) -> jax.Array:
    """The mean over all tokens."""
    return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits_BTV), targets_BT[..., None], axis=-1))


def whole(model: Model, ids_BT: np.ndarray) -> dict[str, np.ndarray]:
    """Logits of whole sequences, the loss, and its gradient as a dict of published names."""
    has_mtp = "mtp" in model.weights["params"]

    @functools.partial(jax.value_and_grad, has_aux=True)
    def run(params, bias, ids_BT):
        module = bind(model.definition, params, bias)
        h_BTD, _ = module.hidden(Tokens.of(ids_BT))
        logits_BTV = module.head(h_BTD)
        loss, said = cross_entropy(logits_BTV[:, :-1], ids_BT[:, 1:]), {"logits": logits_BTV}
        if has_mtp:
            targets_BT = jnp.pad(ids_BT[:, 1:], ((0, 0), (0, 1)), constant_values=-1)
            (depth,) = module.mtp_depths(h_BTD, targets_BT, Tokens.of(ids_BT))
            said["mtp_logits"] = module.head(depth.h_BTD)[:, :-1]
            loss += MTP_WEIGHT * cross_entropy(said["mtp_logits"][:, :-1], ids_BT[:, 2:])
        return loss, said

    run = jax.jit(run)
    (loss, said), gradient = run(model.weights["params"], model.weights["router_bias"], ids_BT)
    get = hf.from_tree({"params": jax.device_get(gradient)})  # on the host, where a slice needs no program
    trained = [tensor for tensor in names.tensors(model.source.abstract) if tensor.places[0][0][0] == "params"]
    gradient = {tensor.name: tensor.to_theirs([get(*place) for place in tensor.places]) for tensor in trained}
    choosing = [name for name in gradient if INDEXER in name]  # which no gradient of this loss reaches
    assert not any(np.any(gradient.pop(name)) for name in choosing)
    return jax.tree.map(np.asarray, said) | {"loss": float(loss), "gradient": gradient}


def token_by_token(model: Model, ids_BT: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Prefill of the first PROMPT ids, then one token at a time over the cache.

    Returns:
        (logits from the last of the prompt on, the given ids read; the ids chosen greedily instead).
    """
    n_rows, n_slots = ids_BT.shape

    @jax.jit
    def run(weights, ids_BT):
        module = bind(model.definition, weights["params"], weights["router_bias"])
        given_BT = jnp.concatenate([ids_BT, ids_BT])  # these read what is given, these what they choose
        h_BTD, cache = module.prefill(given_BT[:, :PROMPT], n_slots)

        def step(carry, at):
            cache, logits_BV = carry
            chosen_B = jnp.argmax(logits_BV, -1)
            next_B = jnp.where(jnp.arange(2 * n_rows) < n_rows, given_BT[:, at], chosen_B).astype(jnp.int32)
            new_BTV, cache = module.decode(next_B[:, None], jnp.full((2 * n_rows, 1), at), cache)
            return (cache, new_BTV[:, 0]), (new_BTV[:n_rows, 0], chosen_B[n_rows:])

        first_BV = module.head(h_BTD)[:, -1]
        _, (logits_TBV, chosen_TB) = jax.lax.scan(step, (cache, first_BV), jnp.arange(PROMPT, n_slots))
        return jnp.concatenate([first_BV[None, :n_rows], logits_TBV]), chosen_TB

    logits_TBV, chosen_TB = run(model.weights, ids_BT)
    return np.asarray(logits_TBV).swapaxes(0, 1), np.asarray(chosen_TB).T


def apart(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Of logits: the largest difference relative to the largest of theirs."""
    return float(np.max(np.abs(ours - theirs)) / np.max(np.abs(theirs)))


def distance(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Of a gradient: the norm of the difference relative to that of theirs."""
    assert ours.shape == theirs.shape
    return float(np.linalg.norm(ours - theirs) / max(np.linalg.norm(theirs), 1e-12))


def check(model: Model, said: dict[str, np.ndarray]) -> None:
    """Asserts that we say what transformers said (`oracle` of make_golden.py, its gradient as a dict of names).

    Prints how far the two are apart (pytest -rP shows it).
    """
    ours = whole(model, said["ids"])
    worst = {key: apart(ours[key], said[key]) for key in ("logits", "mtp_logits") if key in said}
    worst["loss"] = abs(ours["loss"] - float(said["loss"]))
    gradient = {name: theirs for name, theirs in said["gradient"].items() if theirs.size}  # some tensors are hollow
    assert ours["gradient"].keys() == gradient.keys()
    distances = {name: distance(ours["gradient"][name], theirs) for name, theirs in gradient.items()}
    worst["gradient"] = max(distances.values())
    decoded, greedy = token_by_token(model, said["ids"])
    worst["decoded"] = apart(decoded, said["logits"][:, PROMPT - 1 :])
    print(model.published.tensors.directory.name, {key: f"{value:.1e}" for key, value in worst.items()})
    for key in worst.keys() - {"gradient"}:
        assert worst[key] <= 2e-5, (key, worst)
    assert worst["gradient"] <= 1e-4, max(distances, key=distances.get)
    np.testing.assert_array_equal(greedy, said["greedy"])
