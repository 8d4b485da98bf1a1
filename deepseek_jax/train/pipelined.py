"""Gradients of a step's loss over the stages of a pipeline; without one, `train.gradients.accumulated` computes them.

The weights are laid out in stages (`parallel.stage_layout`). The kind of a stage (whether it embeds, whether it ends in
the head, how many layers of each stack it has) decides which programs it runs. The step is one program on all ranks, so
it holds the programs of every kind; a rank runs those of its own stages at the ticks of the schedule. Gradients come
back in the layout of the weights, losses and loads as this rank's share of the sums over all devices. Runs on every
device.

What a stage saves for its backward pass follows from `remat`: "none" saves everything, "dots" the outputs of matmuls,
"block" only the stage's input.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from deepseek_jax.data.pipeline import Batch
from deepseek_jax.layers.base import Tree
from deepseek_jax.layers.base import split as split_module
from deepseek_jax.parallel.mesh import REPLICAS, total
from deepseek_jax.parallel.pipeline import run_pipeline
from deepseek_jax.parallel.split_backward import SAVEABLE, split
from deepseek_jax.parallel.stage_layout import StageLayout, make_layout
from deepseek_jax.parallel.tick_table import TickTable, make_table
from deepseek_jax.train.gradients import Gradients
from deepseek_jax.train.loss import Losses, Stage, Totals, totals
from deepseek_jax.tree import size

Kind = tuple[bool, bool, tuple[tuple[str, int], ...]]  # of a stage: `StageLayout.kind`

# loss(trained, state, part, over, stage, x) -> (x for the stage after, loss, losses): see `Objective.stage`; `trained`
# and `state` (step, frozen weights, router biases) hold the layers of the stage alone.
StageLoss = Callable[[Tree, Tree, Batch, Totals, Stage, Any], tuple[jax.Array, jax.Array, Losses]]


@dataclass(frozen=True)
class Pipeline:
    """How a run uses the pipeline axis of its mesh."""

    schedule: str = "1f1b"  # one of `parallel.schedule.SCHEDULES`
    end: float = 0.0  # work of the last stage besides its layers (head, multi-token prediction), in layers
    # whether what one op runs is one branch, in which exchanges can hide behind matmuls; None: yes, but on CPUs, which
    # hide nothing and compile three switches in less time (`parallel.pipeline`)
    overlap: bool | None = None

    def layout(self, model: Any, n_ranks: int, micro_batches: int) -> StageLayout:
        """Returns where the layers of a model lie."""
        _, params, _ = split_module(model)
        stacks = {name: len(jax.tree.leaves(params[name])[0]) for name in model.stacks}
        return make_layout(self.schedule, n_ranks, micro_batches, stacks, self.end)

    def overlaps(self, platform: str) -> bool:
        """Whether what one op runs is one branch on devices of a platform."""
        return platform != "cpu" if self.overlap is None else self.overlap


ONE_WAY = Pipeline()


def pipelined(stage_loss: StageLoss, layout: StageLayout, remat: str, overlap: bool = True) -> Gradients:
    """Returns gradients over the stages of `layout`; `overlap` is for `run_pipeline`.

    The model of a stage runs its layers without a loop and without recomputation, with exchanges of a fixed size
    (`Execution`); what a stage saves follows from `remat`.
    """
    kinds, table = stage_table(layout)
    n_micro = layout.schedule.micro_batches * layout.copies

    def gradients(params: Tree, state: Tree, batch: Batch) -> tuple[Tree, jax.Array, Losses]:
        over = total(totals(batch), REPLICAS)
        micro = jax.tree.map(lambda a: a.reshape(n_micro, -1, *a.shape[1:]), batch)
        weights = layout.chunks(params)
        frozen, biases = (layout.chunks(state[name]) for name in ("frozen", "router_bias"))
        fixed = [{"step": state["step"], "frozen": a, "router_bias": b} for a, b in zip(frozen, biases, strict=True)]

        def stage(kind: Kind, weights: Tree, x: Any, rest: tuple) -> tuple[jax.Array, jax.Array, Losses]:
            (fixed, part), (embeds, ends, layers) = rest, kind
            what = Stage(embeds, ends, {name: slice(0, n) for name, n in layers})
            y, loss, found = stage_loss(weights, fixed, part, over, what, x)
            return jnp.zeros_like(y) if ends else y, loss, found

        one = fixed[0], jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape[1:], a.dtype), micro)
        x = jax.eval_shape(functools.partial(stage, kinds[-1]), weights[0], None, one)[0]
        each = [jax.eval_shape(functools.partial(stage, kind), weights[0], x, one)[2] for kind in kinds]

        def reporting(kind: Kind, *arguments: Any) -> tuple[jax.Array, jax.Array, tuple]:
            y, loss, found = stage(kind, *arguments)
            return y, loss, (loss, _filled(found, each))

        run = [split(functools.partial(reporting, kind), weights[0], x, one, SAVEABLE[remat]) for kind in kinds]
        found, reports = run_pipeline(table, run, weights, fixed, micro, x, overlap)
        loads = layout.of_all_layers([losses.loads for _, losses in reports])
        sums = [(loss, losses._replace(loads={})) for loss, losses in reports]
        loss, losses = jax.tree.map(lambda *a: sum(a), *sums)
        return layout.joined(found), loss, losses._replace(loads=loads)

    return gradients


def stage_table(layout: StageLayout) -> tuple[list[Kind], TickTable]:
    """Returns the kinds of stages of a layout, and the table of its schedule, whose branches number them."""
    kinds = sorted({layout.kind(place) for place in layout.number})
    return kinds, make_table(layout.schedule, lambda place: kinds.index(layout.kind(place)))


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
