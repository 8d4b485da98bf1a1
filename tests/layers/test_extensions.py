"""What a new part needs: nothing but itself. Each is defined here, outside the package, and run by it."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.nn.initializers import ones

from deepseek_jax.data.pipeline import Batch
from deepseek_jax.errors import UserError
from deepseek_jax.layers.base import SINGLE_DEVICE, bind, param
from deepseek_jax.layers.block import Add, Block
from deepseek_jax.layers.decoder import Decoder, Stack
from deepseek_jax.layers.gqa import GQA, GQAConfig
from deepseek_jax.layers.swiglu import SwiGLU
from deepseek_jax.layers.tokens import Tokens
from deepseek_jax.models import family
from deepseek_jax.train.loss import PreTraining, Totals

B, T, V, D, N_LAYERS = 2, 6, 11, 8, 4
IDS = np.random.default_rng(0).integers(0, V, (B, T)).astype(np.int32)


def decoder(filled, attention=GQA, stacks=None, **options):
    """(definition, params, router biases) of a small model, of one stack of blocks with this attention by default."""

    def block(width: int, attention=attention):
        def build(rngs):
            def mixer(rngs):
                return attention(GQAConfig(2, 1, 4), D, rngs=rngs)

            return Block(mixer, lambda r: SwiGLU(D, width, 0.1, rngs=r), "mlp", D, 1e-6, **options, rngs=rngs)

        return build

    made = stacks(block) if stacks else (Stack("blocks", (block(5),), N_LAYERS),)
    return filled(lambda: Decoder(V, D, 1e-6, 0.1, SINGLE_DEVICE, made, rngs=nnx.Rngs(0)), std=0.3)


# A new auxiliary loss: its layer, and a weight in the config.


class Watched(GQA):
    """An attention that is asked for small keys."""

    def over_itself(self, x_BTD, tokens, entries):
        """As `GQA`'s, and one loss."""
        u_BTD, _ = super().over_itself(x_BTD, tokens, entries)
        return u_BTD, {"small_keys": jnp.sum(jnp.mean(entries.k_BSZQ**2, axis=(1, 2, 3)))}


def test_a_new_loss_goes_from_its_layer_to_the_log_under_its_name(filled):
    definition, params, bias = decoder(filled, Watched)
    ones_BT = np.ones_like(IDS)
    positions = np.broadcast_to(np.arange(T, dtype=np.int32), (B, T))
    batch = Batch(IDS, np.roll(IDS, -1, axis=1), ones_BT, positions, ones_BT.astype(np.float32))

    def run(params, **auxiliary):
        objective = PreTraining(
            8, False, mtp_weight=0.0, mtp_weight_final=0.0, mtp_weight_switch=0, auxiliary=auxiliary
        )
        return objective(bind(definition, params, bias), batch, Totals(B * T, B), jnp.int32(0))

    gradient = jax.jit(jax.grad(lambda params, alpha: run(params, small_keys=alpha), has_aux=True))
    (without, found), (with_it, _) = gradient(params, 0.0), gradient(params, 1.0)
    assert found.auxiliary.keys() == {"small_keys"} and found.auxiliary["small_keys"] > 0
    assert np.any(without["blocks"]["attention"]["k_DZQ"] != with_it["blocks"]["attention"]["k_DZQ"])
    with pytest.raises(UserError, match=r"config\.\w+\.auxiliary\.small_keys: missing"):
        jax.eval_shape(run, params)
    with pytest.raises(UserError, match=r"auxiliary\.large_keys=0.5: no layer .* Its losses: small_keys\."):
        jax.eval_shape(lambda params: run(params, small_keys=1.0, large_keys=0.5, other=0.0), params)


# A new residual connection, with weights of its own.


class Scaled(nnx.Module):
    """x <- x + gain * f(x)."""

    def __init__(self, *, rngs):
        self.gain = param(rngs, (D,), (None,), ones, role="gain")

    def read(self, x_BTD):
        return x_BTD, self.gain[...]

    def write(self, x_BTD, u_BTD, carry):
        return x_BTD + carry * u_BTD


def test_a_new_residual_connection_is_an_argument_of_a_block(filled):
    definition, params, bias = decoder(filled, residual=lambda rngs: Scaled(rngs=rngs))
    shape = params["blocks"]["attention_residual"]["gain"].shape
    assert shape == (N_LAYERS, D) and "mlp_residual" in params["blocks"]
    plain, plain_params, _ = decoder(filled, residual=lambda rngs: Add())
    run = jax.jit(lambda definition, p: bind(definition, p, bias)(IDS), static_argnums=0)
    for name in ("attention_residual", "mlp_residual"):
        params["blocks"][name]["gain"] = jnp.ones((N_LAYERS, D))
        assert name not in plain_params["blocks"]
    same = {key: params["blocks"][key] for key in plain_params["blocks"]}
    expected = run(plain, params | {"blocks": same})
    np.testing.assert_allclose(run(definition, params), expected, rtol=1e-5)
    params["blocks"]["attention_residual"]["gain"] = jnp.full((N_LAYERS, D), 0.5)
    assert np.abs(run(definition, params) - expected).max() > 1e-3


# A new cache layout: a window of tokens in a ring buffer.


@dataclass(frozen=True)
class Window:
    """The last `size` tokens: slot p % size holds the token at position p."""

    size: int

    def empty(self, entries, n_positions):
        return jax.tree.map(lambda x: jnp.zeros((x.shape[0], self.size, *x.shape[2:]), x.dtype), entries)

    def write(self, cached, entries, tokens):
        at_BT = tokens.positions_BT
        last_B1 = jnp.max(
            jnp.where(tokens.real_BT, at_BT, 0) if tokens.real_BT is not None else at_BT, 1, keepdims=True
        )
        is_kept_BT = (at_BT <= last_B1) & (at_BT > last_B1 - self.size)
        slots_BT = jnp.where(is_kept_BT, at_BT % self.size, self.size)
        rows = jnp.arange(at_BT.shape[0])[:, None]
        return jax.tree.map(lambda old, new: old.at[rows, slots_BT].set(new, mode="drop"), cached, entries)

    def seen(self, cached, tokens):
        at_BT1 = tokens.positions_BT[..., None]
        return at_BT1 - (at_BT1 - jnp.arange(self.size)) % self.size >= 0

    def packed(self, entries):
        return entries

    def unpacked(self, cached):
        return cached


class Windowed(GQA):
    """Each token sees the last three, itself included."""

    def __init__(self, c, d_model, *, rngs):
        super().__init__(c, d_model, rngs=rngs)
        self.cache = Window(3)

    def over_itself(self, x_BTD, tokens, entries):
        back = tokens.positions_BT[:, :, None] - tokens.positions_BT[:, None]
        return self.over_cache(x_BTD, tokens, entries, (back >= 0) & (back < 3)), {}


def test_a_new_cache_layout_belongs_to_its_attention(filled):
    """Prompts of two lengths, read at once and then token by token, over three slots: as the whole sequences."""
    definition, params, bias = decoder(filled, Windowed)
    lengths = np.array([4, 2])

    @jax.jit
    def whole(params):
        return bind(definition, params, bias)(IDS)

    @jax.jit
    def prefill(params):
        return bind(definition, params, bias).prefill(IDS[:, :4], T, np.arange(4) < lengths[:, None])

    decode = jax.jit(lambda params, *args: bind(definition, params, bias).decode(*args))
    expected, (_, cache) = whole(params), prefill(params)
    assert cache["blocks"].k_BSZQ.shape == (N_LAYERS, B, 3, 1, 4)
    for step in range(2):
        at = (lengths + step)[:, None]
        logits, cache = decode(params, np.take_along_axis(IDS, at, 1), at, cache)
        np.testing.assert_allclose(logits[:, 0], np.take_along_axis(expected, at[..., None], 1)[:, 0], atol=1e-5)


# Layers that alternate, and a part of the layers.


def alternating(block):
    return (Stack("first", (block(5),), 1), Stack("pairs", (block(3), block(7, Windowed)), 2))


@pytest.mark.slow
def test_a_stack_repeats_a_group_of_different_blocks(filled):
    """The same as its blocks one by one; a cache of each kind; prefill and decode agree with the whole."""
    definition, params, bias = decoder(filled, stacks=alternating)
    pairs = params["pairs"]["blocks"]
    assert [pairs[n]["mlp"]["gate_DF"].shape for n in "01"] == [(2, D, 3), (2, D, 7)]

    @jax.jit
    def both(params):
        model = bind(definition, params, bias)
        tokens = Tokens.of(IDS)
        x_BTD, _ = model.run_blocks(model.embed(tokens), tokens, part={"first": slice(0, 1)})
        definition_of, weights = nnx.split(model.pairs)
        for turn in range(2):
            for block in nnx.merge(definition_of, jax.tree.map(lambda w, turn=turn: w[turn], weights)).blocks:
                x_BTD, _ = block(x_BTD, tokens)
        return model(IDS), model.head(model.finish(x_BTD))

    whole, one_by_one = both(params)
    np.testing.assert_allclose(whole, one_by_one, atol=1e-5)
    _, cache = jax.jit(lambda p: bind(definition, p, bias).prefill(IDS[:, :4], T))(params)
    assert [cached.k_BSZQ.shape[2] for cached in cache["pairs"]] == [T, 3]
    at = np.full((B, 1), 4)
    logits, _ = jax.jit(lambda p, *args: bind(definition, p, bias).decode(*args))(params, IDS[:, 4:5], at, cache)
    np.testing.assert_allclose(logits[:, 0], whole[:, 4], atol=1e-5)


def test_parts_of_the_layers_are_the_layers(filled):
    definition, params, bias = decoder(filled)

    @jax.jit
    def both(params):
        model, tokens = bind(definition, params, bias), Tokens.of(IDS)
        x_BTD = model.embed(tokens)
        for part in (slice(0, 1), slice(1, N_LAYERS)):
            x_BTD, _ = model.run_blocks(x_BTD, tokens, part={"blocks": part})
        return model.finish(x_BTD), model.hidden(tokens)[0]

    np.testing.assert_allclose(*both(params), atol=1e-6)


def test_a_block_is_its_four_phases(tiny_sizes, filled):
    """Called apart, as a pipeline would: with experts, their loads and losses."""
    sizes = family("v3").Config.from_config(tiny_sizes)
    definition, params, bias = filled(lambda: family("v3").Model(sizes, rngs=nnx.Rngs(0)))

    @jax.jit
    def both(params, bias):
        model, tokens = bind(definition, params, bias), Tokens.of(IDS)
        block, x_BTD = model.mtp[0].block, model.embed(tokens)
        attended_BTD, _, _ = block.attend(x_BTD, tokens)
        sent = block.dispatch(attended_BTD, tokens)
        y_BTD, found = block.combine(attended_BTD, block.compute(sent))
        return block(x_BTD, tokens), (y_BTD, (None, found))

    whole, apart = both(params, bias)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), whole, apart)
