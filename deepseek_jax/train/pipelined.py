"""Gradients of a step's loss over the stages of a pipeline; without one, `train.gradients.accumulated` computes them.

The weights are laid out in stages (`parallel.stage_layout`). The kind of a stage (whether it ends with the final norm
and multi-token prediction, how many layers of each stack it has) decides which programs it runs. The step is one
program on all ranks, so it holds the programs of every kind; a rank runs those of its own stages at the ticks of the
schedule. Embedding and head belong to no stage: each rank has their part for its share of the vocabulary, and all ranks
work together on the micro-batches that enter and leave the pipeline in a tick. Gradients come back in the layout of the
weights, losses and loads as this rank's share of the sums over all devices. Runs on every device.

What a stage saves for its backward pass follows from `remat`: "none" saves all that takes more than one pass over the
numbers to make again (`parallel.split_backward`), "dots" the outputs of matmuls, "block" only the stage's input.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from deepseek_jax.data.pipeline import Batch
from deepseek_jax.layers.base import Execution, Tree
from deepseek_jax.layers.base import split as split_module
from deepseek_jax.layers.embed import rows, rows_gradient
from deepseek_jax.parallel.homes import Homes, Key, make_homes
from deepseek_jax.parallel.pipeline import Ends, run_pipeline
from deepseek_jax.parallel.split_backward import SAVEABLE, split
from deepseek_jax.parallel.stage_layout import StageLayout, make_layout
from deepseek_jax.parallel.tick_table import TickTable, make_table
from deepseek_jax.precision.coded import with_zeros, without
from deepseek_jax.train.gradients import Gradients, divided
from deepseek_jax.train.loss import Losses, Stage, Totals, step_totals
from deepseek_jax.tree import size

ENDS = ("embedding", "head")  # entries of a model's weights that all ranks have a part of
Kind = tuple[bool, tuple[tuple[str, int], ...]]  # of a stage: `StageLayout.kind`


class StageLosses(NamedTuple):
    """The loss of a model in pieces: see `Objective`."""

    # stage(trained, state, part, over, stage, x, embeddings ahead) -> (x for the stage after, hidden, loss, losses);
    # `trained` and `state` (step, frozen weights, router biases, codes) hold the layers of the stage alone, weights and
    # codes those of each layer apart
    stage: Callable[[Tree, Tree, Batch, Totals, Stage, Any, Any], tuple[jax.Array, list, jax.Array, Losses]]
    # head(weight_DV, step, part, over, hidden) -> (loss, (main, mtp))
    head: Callable[[jax.Array, jax.Array, Batch, Totals, list], tuple[jax.Array, tuple[jax.Array, jax.Array]]]
    ids_read: Callable[[Batch, Batch], jax.Array]  # (first, last) -> ids_KBT, by the first stage and by each MTP depth
    begin: Callable[[jax.Array], jax.Array]  # embeddings -> x for the first stage; linear (`layers.decoder.Decoder`)
    run: Execution  # of the model: compute dtype, vocabulary


@dataclass(frozen=True)
class Pipeline:
    """How a run uses the pipeline axis of its mesh."""

    schedule: str = "1f1b"  # one of `parallel.schedule.SCHEDULES`
    end: float = 0.0  # work of the last stage besides its layers (head, multi-token prediction), in layers
    # whether what one op runs is one branch, in which exchanges can hide behind matmuls; None: yes, but on CPUs, which
    # hide nothing and compile three switches in less time (`parallel.pipeline`)
    overlap: bool | None = None
    put_off: int = -1  # W that a rank puts off at most (`parallel.schedule.bounded`)

    def layout(self, model: Any, n_ranks: int, micro_batches: int) -> StageLayout:
        """Returns where the layers of a model lie."""
        _, params, _ = split_module(model)
        stacks = {name: len(jax.tree.leaves(params[name])[0]) for name in model.stacks}
        return make_layout(self.schedule, n_ranks, micro_batches, stacks, self.end, self.put_off)

    def overlaps(self, platform: str) -> bool:
        """Whether what one op runs is one branch on devices of a platform."""
        return platform != "cpu" if self.overlap is None else self.overlap


ONE_WAY = Pipeline()


def pipelined(losses: StageLosses, layout: StageLayout, remat: str, overlap: bool = True) -> Gradients:
    """Returns gradients over the stages of `layout`; `overlap` is for `run_pipeline`.

    The model of a stage runs its layers without a loop and without recomputation, with exchanges of a fixed size
    (`Execution`); what a stage saves follows from `remat`.
    """
    kinds, table = stage_table(layout)
    placed = np.array(
        [[kinds.index(layout.kind((r, c))) for c in range(layout.n_chunks)] for r in range(layout.n_ranks)]
    )
    n_micro = layout.schedule.micro_batches * layout.copies

    def gradients(params: Tree, state: Tree, batch: Batch) -> tuple[Tree, jax.Array, Losses]:
        over = step_totals(batch)
        micro = divided(batch, n_micro)
        own = {name: sub for name, sub in params.items() if name not in ENDS}
        both = {name: params.get(name, {}) | state["frozen"].get(name, {}) for name in ENDS}
        ends = _ends(losses, both, state["step"], over)
        codes = layout.chunks(state["codes"])
        weights, frozen = _chunks(layout, own, codes), _chunks(layout, state["frozen"] | both, codes)
        codes, biases = [layout.apart(each) for each in codes], layout.chunks(state["router_bias"])
        names = ("frozen", "router_bias", "codes")
        each = zip(frozen, biases, codes, strict=True)
        fixed = [{"step": state["step"], **dict(zip(names, of_chunk, strict=True))} for of_chunk in each]
        one = fixed[0], jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape[1:], a.dtype), micro)
        x = jax.eval_shape(ends.given, one[1], one[1])
        stage = functools.partial(_stage, losses, over)
        forms = [jax.eval_shape(functools.partial(stage, kind), weights[0], x, one)[2] for kind in kinds]

        def reporting(kind: Kind, *arguments: Any) -> tuple[tuple, jax.Array, tuple]:
            y, loss, found = stage(kind, *arguments)
            return y, loss, (loss, _filled(found, forms))

        run = [split(functools.partial(reporting, kind), weights[0], x, one, SAVEABLE[remat]) for kind in kinds]
        homes, fixed_of = _housed(placed, [stage.is_read for stage in run], weights[0], fixed)
        sums, reports, (of_ends, at_head) = run_pipeline(
            table, run, homes, homes.filled(weights), fixed_of, micro, x[0], ends, overlap=overlap
        )
        found = [homes.of_chunk(sums, chunk) for chunk in range(layout.n_chunks)]
        trained = {name: {key: of_ends[name][key] for key in params[name]} for name in ENDS if name in params}
        return layout.joined([layout.together(each) for each in found]) | trained, *_summed(layout, reports, at_head)

    return gradients


def _housed(
    placed: np.ndarray, is_read: Sequence[Sequence[bool]], weights: Tree, fixed: Sequence[Tree]
) -> tuple[Homes, Callable[[Key], Tree]]:
    """Returns where the weights of each stage lie, and a function of what else it reads, codes from shared arrays.

    Args:
        placed: kind of the stage of each chunk, [ranks, chunks].
        is_read: by kind, of each leaf of the weights.
        weights, fixed: of the first chunk; of each chunk.
    """
    homes = make_homes(placed, _forms(weights), is_read)
    codes = [each["codes"] for each in fixed]

    def of_codes(flags: Sequence[bool]) -> list[bool]:
        known = flatten_dict(jax.tree.unflatten(homes.structure, flags))
        return jax.tree.leaves(unflatten_dict({path: (known.get(path, True),) * 2 for path in flatten_dict(codes[0])}))

    of_coded = make_homes(placed, _forms(codes[0]), [of_codes(flags) for flags in is_read])
    arrays = of_coded.filled(codes)
    return homes, lambda key: fixed[key[0]] | {"codes": of_coded.tree(arrays, key)}


def _forms(tree: Tree) -> Tree:
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), tree)


def _chunks(layout: StageLayout, weights: Tree, codes: Sequence[Tree]) -> list[Tree]:
    """`layout.chunks`, layers apart; of weights in codes, which nothing reads but each chunk's codes, nothing moves."""
    chunks = layout.chunks(without(weights, codes[0]))
    return [layout.apart(with_zeros(plain, weights, of_chunk)) for plain, of_chunk in zip(chunks, codes, strict=True)]


def stage_table(layout: StageLayout) -> tuple[list[Kind], TickTable]:
    """Returns the kinds of stages of a layout, and the table of its schedule, whose branches number them."""
    kinds = sorted({layout.kind(place) for place in layout.number})
    return kinds, make_table(layout.schedule, lambda place: kinds.index(layout.kind(place)))


def _stage(losses: StageLosses, over: Totals, kind: Kind, weights: Tree, x: tuple, rest: tuple) -> tuple:
    """A stage as `parallel.split_backward` takes it: ((x, embeddings ahead) -> (y, hidden), loss, losses)."""
    (fixed, part), (ends, layers), (x_BTD, x_KBTD) = rest, kind, x
    what = Stage(ends, {name: slice(0, n) for name, n in layers})
    y_BTD, hidden, loss, found = losses.stage(weights, fixed, part, over, what, x_BTD, x_KBTD)
    no_hidden = jnp.zeros((*x_BTD.shape[:2], x_BTD.shape[-1]), x_BTD.dtype)
    out = (jnp.zeros_like(x_BTD), hidden) if ends else (y_BTD, [no_hidden, *map(jnp.zeros_like, x_KBTD)])
    return out, loss, found


def _ends(losses: StageLosses, weights: Tree, step: jax.Array, over: Totals) -> Ends:
    """Embedding and head, each rank with its share of the vocabulary."""
    table_VD, weight_DV = weights["embedding"]["table_VD"], weights["head"]["weight_DV"]
    run = losses.run

    def given(first: Batch, last: Batch) -> tuple[jax.Array, list[jax.Array]]:
        x_BTD, *x_KBTD = rows(table_VD, losses.ids_read(first, last), run.vocabulary).astype(run.compute)
        return losses.begin(x_BTD), x_KBTD

    def loss(hidden: list[jax.Array], last: Batch) -> tuple[tuple, list[jax.Array], Tree]:
        def of(hidden: list[jax.Array], weight_DV: jax.Array) -> tuple:
            return losses.head(weight_DV, step, last, over, hidden)

        (value, parts), (d_hidden, d_weight_DV) = jax.value_and_grad(of, (0, 1), has_aux=True)(hidden, weight_DV)
        return (value, parts), d_hidden, {"head": {"weight_DV": d_weight_DV}}

    def backward(first: Batch, last: Batch, d: tuple[jax.Array, list[jax.Array]]) -> Tree:
        d_x, d_KBTD = d
        embedded_BTD = jax.ShapeDtypeStruct((*d_x.shape[:2], table_VD.shape[1]), d_x.dtype)
        (d_x_BTD,) = jax.linear_transpose(losses.begin, embedded_BTD)(d_x)
        d_given = jnp.stack([d_x_BTD, *d_KBTD])
        d_table_VD = rows_gradient(losses.ids_read(first, last), d_given, len(table_VD), run.vocabulary)
        return {"embedding": {"table_VD": d_table_VD}}

    return Ends(given, loss, backward)


def _summed(layout: StageLayout, reports: Sequence[tuple], at_head: tuple) -> tuple[jax.Array, Losses]:
    """This rank's share of (loss, losses)."""
    loads = layout.of_all_layers([losses.loads for _, losses in reports])
    sums = [(loss, losses._replace(loads={})) for loss, losses in reports]
    loss, losses = jax.tree.map(lambda *a: sum(a), *sums)
    more, (main, mtp) = at_head
    return loss + more, losses._replace(main=losses.main + main, mtp=losses.mtp + mtp, loads=loads)


def _filled(found: Losses, each: Sequence[Losses]) -> Losses:
    """Returns what a stage reports in one form for all kinds of stages: zeros for losses and layers that it has not."""

    def like_all(mine: Tree, theirs: list[Tree]) -> Tree:
        forms = {name: _largest([tree[name] for tree in theirs if name in tree]) for tree in theirs for name in tree}
        return {name: jax.tree.map(_padded, form, mine.get(name, _none(form))) for name, form in forms.items()}

    return found._replace(
        auxiliary=like_all(found.auxiliary, [losses.auxiliary for losses in each]),
        loads=like_all(found.loads, [losses.loads for losses in each]),
    )


def _largest(trees: list[Tree]) -> Tree:
    return max(trees, key=size)


def _none(form: Tree) -> Tree:
    return jax.tree.map(lambda a: jnp.zeros((0,) * a.ndim, a.dtype), form)


def _padded(form: jax.ShapeDtypeStruct, a: jax.Array) -> jax.Array:
    """`a` with zeros after its end along each axis, in the shape of `form`."""
    return jnp.pad(a, [(0, n - m) for n, m in zip(form.shape, a.shape, strict=True)]) if a.ndim else a + 0
