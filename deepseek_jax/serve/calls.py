"""The calls of the engine's programs: what the devices hold of its requests, and the rows of a step.

    calls.decode(plans, n_rows, width) -> call      of each program (`programs`) one method, named as it is
    calls.needed(sizes) -> calls                    of all programs that requests can need, to compile them

`plans` has the parts of each device (`batches`), and nothing where a program is to be compiled alone; all sizes are
padded. A call whose arrays are not computed yet has their shapes.
"""

import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from deepseek_jax.parallel.replicas import Replicas
from deepseek_jax.precision.fp8_weight import Fp8Weight
from deepseek_jax.serve import batches, speculation
from deepseek_jax.serve.batches import Plans
from deepseek_jax.serve.memory import Memory
from deepseek_jax.serve.programs import Call, Current, Weights
from deepseek_jax.serve.sampling import MOST_TOP, Kind

ALL = 0xFFFFFFFF  # a word of `allowed_RW` that allows its 32 tokens


class CallSizes(NamedTuple):
    """The sizes that programs are compiled for, each ascending."""

    lengths: list[int]  # tokens of a part of a prompt
    widths: list[int]  # pages of a row
    rows: list[int]
    prompts: list[int]  # of which one program computes a part

    @property
    def largest(self) -> "CallSizes":
        """The largest of each, but for prompts: a program computes a part of as few as there are."""
        return CallSizes(self.lengths[-1:], self.widths[-1:], self.rows[-1:], self.prompts)


class Calls:
    """Calls with what the devices hold at that time, which whoever runs them replaces by what they give.

    Args:
        model: whose programs they call.
        weights: its parameters and router biases.
        memory: the pages of all devices.
        page_size: tokens of a page.
        n_rows, n_drafts, n_steps, replicas: as of the engine.

    Attributes:
        weights, memory: the same.
        last_R: the token that each row drew last, int32; the last place of a device is that of padding.
        draft_R: the draft of the token after it.
        position_R: the position of the token in `last_R`, as `speculate` left it.
        coded_head: the head in FP8 by which drafts are made, if it is; not where several devices run the programs.
        allowed_RW: the tokens that each row may draw next, as bits of uint32.
    """

    def __init__(
        self,
        model: Any,
        weights: Weights,
        memory: Memory,
        *,
        page_size: int,
        n_rows: int,
        n_drafts: int,
        n_steps: int,
        replicas: Replicas | None,
    ):
        self.memory = memory
        self._page_size, self._n_rows, self._n_drafts, self._n_steps = page_size, n_rows, n_drafts, n_steps
        self._replicas, self._n_ranks = replicas, replicas.n if replicas else 1
        # what attentions keep of running requests alone
        self._has_rows = any(attention.has_rows for attention in model.attentions)
        self._vocab_size, d_model = model.embedding.table_VD.shape
        self._hidden_shape = model.ahead_shape if n_drafts else (d_model,)  # of a token
        self._dtype, self._has_routes = model.run.compute, model.run.routes
        self._codes_head = n_drafts > 0 and not replicas and speculation.reads_codes(model)
        self.use(weights)
        n_places = self._n_ranks * (n_rows + 1)
        by_row = (self._by_row(np.zeros(n_places, np.int32)) for _ in range(3))
        self.last_R, self.draft_R, self.position_R = by_row
        self.allowed_RW = self._by_row(np.full((n_places, -(-self._vocab_size // 32)), ALL, np.uint32))
        # On one device arrays have no given place; for one with a place a second program would be compiled.
        place = self.allowed_RW.sharding if replicas else None
        self._put_words = jax.jit(_with_row, donate_argnums=0, out_shardings=place)

    def use(self, weights: Weights) -> None:
        """Takes these weights for all later calls."""
        self.weights = weights
        self.coded_head: Fp8Weight | None = None
        if self._codes_head:
            self.coded_head = speculation.head_in_codes(weights[0]["head"]["weight_DV"])

    @property
    def nobody(self) -> Plans:
        """A plan without a part on any device."""
        return [[] for _ in range(self._n_ranks)]

    def allow(self, place: int, words_W: np.ndarray | None) -> None:
        """Puts what a row may draw next in its place; None: any token."""
        words = np.full(self.allowed_RW.shape[1], ALL if words_W is None else 0, np.uint32)
        if words_W is not None:
            words[: len(words_W)] = words_W
        self.allowed_RW = self._put_words(self.allowed_RW, words, np.int32(place))

    def needed(self, sizes: CallSizes) -> list[Call]:
        """Returns a call of each program of these sizes that requests can need, for nobody."""
        nobody, (lengths, widths, _, prompts) = self.nobody, sizes
        needed = [self.begin(nobody, *both) for both in itertools.product(prompts, lengths)]
        needed += [self.extend(nobody, *three) for three in itertools.product(prompts, lengths, widths)]
        needed += self._needed_by_rows(sizes)
        if self._has_routes:
            needed += [self.routes(nobody, width) for width in widths]
        if self._n_drafts:
            needed += [self.foresee(nobody, *both) for both in itertools.product(lengths, widths)]
        for n_top in (0, MOST_TOP):
            needed += [self.score(n_rows, n_top) for n_rows in {*prompts, *sizes.rows}]
            needed += [self.recite(nobody, length, n_top) for length in lengths]
        return needed

    def _needed_by_rows(self, sizes: CallSizes) -> list[Call]:
        """The programs of rows that compute one token each, and those that draw."""
        needed: list[Call] = []
        kinds: tuple[Kind, ...] = ("greedy", "random", "shaped")
        nobody, (_, widths, rows, prompts) = self.nobody, sizes
        if not self._n_drafts:
            needed += [self.decode(nobody, *both) for both in itertools.product(rows, widths)]
        for n_rows, kind in itertools.product([1] if self._n_drafts else {*prompts, *rows}, kinds):
            several = widths if kind == "shaped" else widths[:1]
            needed += [self.draw(nobody, n_rows, kind, width) for width in several]
        for n_rows, width, kind in itertools.product(rows, widths, kinds):
            if self._n_drafts:
                steps = sorted({1, self._n_steps})
                needed += [self.speculate(nobody, n_rows, width, kind, -1, n) for n in steps]
            elif self._n_steps > 1 and kind != "shaped":
                needed.append(self.steps(nobody, n_rows, width, kind, -1))
        return needed

    def begin(self, plans: Plans, n_rows: int, length: int) -> Call:
        """First parts of prompts of up to `length` tokens."""
        _, state, rows, _ = self.extend(plans, n_rows, length, -(-length // self._page_size))
        del rows["start_B"]
        return Call("begin", state, rows)

    def extend(self, plans: Plans, n_rows: int, length: int, width: int) -> Call:
        """Parts of prompts of up to `length` tokens, over `width` pages."""
        rows = batches.prompts(plans, n_rows, length, width)
        rows |= batches.slots(plans, n_rows, self._n_rows) if self._has_rows else {}
        return Call("extend", {"weights": self.weights, "memory": self.memory}, rows)

    def decode(self, plans: Plans, n_rows: int, width: int) -> Call:
        """One token per row."""
        state = {"weights": self.weights, "memory": self.memory, "last_R": self.last_R}
        return Call("decode", state, {"current": Current(**batches.singles(plans, n_rows, width, self._n_rows))})

    def draw(self, plans: Plans, n_rows: int, kind: Kind, width: int, logits_BV: jax.Array | None = None) -> Call:
        """What rows draw from their logits, by a way of this kind."""
        rows = batches.positions(plans, n_rows) | batches.slots(plans, n_rows, self._n_rows)
        rows |= batches.how(plans, n_rows, kind, self._n_rows)
        state: dict[str, Any] = {"logits_BV": self._logits(n_rows, logits_BV), "last_R": self.last_R}
        if kind == "shaped":
            state |= {"ids_PS": self.memory.ids_PS, "allowed_RW": self.allowed_RW}
            rows |= batches.tables(plans, n_rows, width)
        return Call("draw", state, rows)

    def steps(self, plans: Plans, n_rows: int, width: int, kind: Kind, n_top: int) -> Call:
        """Several steps of rows that all draw."""
        _, state, rows, _ = self.decode(plans, n_rows, width)
        rows |= batches.limits(plans, n_rows) | batches.how(plans, n_rows, kind, self._n_rows)
        state |= {"allowed_RW": self.allowed_RW} if kind == "shaped" else {}
        return Call("steps", state, rows, {"n_steps": self._n_steps, "n_top": self._n_top(n_top)})

    def speculate(self, plans: Plans, n_rows: int, width: int, kind: Kind, n_top: int, n_steps: int) -> Call:
        """`n_steps` of these, each of which draws up to two tokens per row."""
        _, state, rows, static = self.steps(plans, n_rows, width, kind, n_top)
        state, rows = state | {"position_R": self.position_R}, rows | batches.ends(plans, n_rows)
        return Call("speculate", state | self._drafting, rows, {**static, "n_steps": n_steps})

    def foresee(self, plans: Plans, length: int, width: int, h_BTD: jax.Array | None = None) -> Call:
        """The first draft after parts of prompts."""
        _, state, rows, _ = self.extend(plans, 1, length, width)
        del rows["ids_BT"]
        rows |= batches.next_of_prompts(plans, length) | batches.slots(plans, 1, self._n_rows)
        state |= {"last_R": self.last_R, "h_BTD": self._hidden(length, h_BTD)}
        return Call("foresee", state | self._drafting, rows)

    @property
    def _drafting(self) -> dict[str, Any]:
        return {"draft_R": self.draft_R} | ({"coded_head": self.coded_head} if self.coded_head else {})

    def score(
        self, n_rows: int, n_top: int, logits_BV: jax.Array | None = None, id_BT: jax.Array | None = None
    ) -> Call:
        """Log-probabilities of what was drawn."""
        abstract = jax.ShapeDtypeStruct((self._n_ranks * n_rows, 1), jnp.int32)
        rows = {"id_BT": abstract if id_BT is None else id_BT}
        return Call("score", {"logits_BV": self._logits(n_rows, logits_BV)}, rows, {"n_top": self._n_top(n_top)})

    def recite(self, plans: Plans, length: int, n_top: int, h_BTD: jax.Array | None = None) -> Call:
        """Log-probabilities of the tokens of prompts."""
        rows = batches.next_of_prompts(plans, length)
        state = {"weights": self.weights, "h_BTD": self._hidden(length, h_BTD)}
        return Call("recite", state, rows, {"n_top": self._n_top(n_top)})

    def routes(self, plans: Plans, width: int) -> Call:
        """The experts that the tokens in these pages chose."""
        return Call("routes", {"weights": self.weights, "memory": self.memory}, batches.tables(plans, 1, width))

    def _logits(self, n_rows: int, logits_BV: jax.Array | None) -> Any:
        shape = self._n_ranks * n_rows, self._vocab_size
        return jax.ShapeDtypeStruct(shape, jnp.float32) if logits_BV is None else logits_BV

    def _hidden(self, length: int, h_BTD: jax.Array | None) -> Any:
        shape = self._n_ranks, length, *self._hidden_shape
        return jax.ShapeDtypeStruct(shape, self._dtype) if h_BTD is None else h_BTD

    def _n_top(self, n_top: int) -> int:
        return min(n_top, self._vocab_size)

    def _by_row(self, array: np.ndarray) -> jax.Array:
        """An array of a place per row, on the devices."""
        return jax.device_put(array, self._replicas.sharding() if self._replicas else None)


def _with_row(allowed_RW: jax.Array, words_W: jax.Array, place: jax.Array) -> jax.Array:
    return allowed_RW.at[place].set(words_W)
