"""What the compiled decode step does with the cache and with the experts' weights, read in its text."""

import re

import jax
import numpy as np
import pytest
from flax import nnx

from deepseek_jax.layers.base import Execution, bind, split
from deepseek_jax.models import family

B, SLOTS = 3, 208  # numbers that no other size of the network has
IN_PLACE = ("scatter", "dynamic-update-slice")
MOVES_NOTHING = ("parameter", "get-tuple-element", "bitcast", "tuple", "while")


def instructions(program):
    """{computation: [(name, dtype and dims of the result, operation, the rest of the line)]} of a compiled program."""
    found, body = {}, []
    for line in program.splitlines():
        if opening := re.match(r"(?:ENTRY )?%?([\w.\-]+) .*\{$", line):
            body = found.setdefault(opening[1], [])
        elif one := re.match(r"\s+(?:ROOT )?%([\w.\-]+) = (\w+\[[\d,]*\])\S* ([\w\-]+)\((.*)", line):
            body.append(one.groups())
    return found


def is_in_place(computations, operation, rest):
    """Whether an instruction overwrites a part of its operand: alone, or as the end of a fusion."""
    if operation in IN_PLACE:
        return True
    called = re.search(r"calls=%?([\w.\-]+)", rest)
    if operation != "fusion" or not called:
        return False
    fused = computations[called[1]]
    operands = {name for name, _, kind, _ in fused if kind == "parameter"}
    _, _, kind, arguments = fused[-1]
    return kind in IN_PLACE and re.match(r"%([\w.\-]+)", arguments)[1] in operands


@pytest.fixture(scope="module", params=[1, 0], ids=["a loop over layers", "no loop"])
def compiled(request, network):
    """(program of a decode step with the cache donated, shapes of the cache, its bytes)."""
    config = network.config
    maker, run = family(config.family), Execution(unroll=request.param)
    make = maker.Config.from_config(config.model)
    definition, _, _ = split(nnx.eval_shape(lambda: maker.Model(make, run, rngs=nnx.Rngs(0))))

    def decode(weights, ids_B, positions_B, cache):
        return bind(definition, *weights).decode(ids_B[:, None], positions_B[:, None], cache)

    prompt, row = np.zeros((B, 16), np.int32), np.zeros(B, np.int32)
    cache = jax.eval_shape(lambda weights: bind(definition, *weights).prefill(prompt, SLOTS)[1], network.weights)
    program = jax.jit(decode, donate_argnames="cache").lower(network.weights, row, row, cache).compile()
    return program, cache


def test_the_cache_is_updated_in_place(compiled):
    """All of it is aliased; nothing of its size is made but by overwriting a part of it; temporaries are smaller."""
    program, cache = compiled
    leaves = jax.tree.leaves(cache)
    shapes = {f"f32[{','.join(map(str, leaf.shape))}]" for leaf in leaves if leaf.shape[0] != 1}
    computations = instructions(program.as_text())
    fused = set(re.findall(r"calls=%?([\w.\-]+)", program.as_text()))
    updates = 0
    for name, body in computations.items():
        for instruction, shape, operation, rest in body:
            if name not in fused and shape in shapes and operation not in MOVES_NOTHING:
                assert is_in_place(computations, operation, rest), (instruction, shape, operation)
                updates += 1
    assert updates >= 2  # latents and rotary keys
    memory, n_bytes = program.memory_analysis(), sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
    assert n_bytes <= memory.alias_size_in_bytes < 1.1 * n_bytes
    assert memory.temp_size_in_bytes < n_bytes


def test_the_experts_of_a_layer_are_neither_copied_nor_joined(compiled, network):
    """Matrices are taken one by one from where all layers' lie: no result has the size of a layer's experts."""
    m = network.config.model
    layer, joined = ([m.n_experts, m.d_model, n * m.expert_width] for n in (1, 2))
    for body in instructions(compiled[0].as_text()).values():
        for name, shape, operation, _ in body:
            dims = sorted(int(n) for n in re.findall(r"\d+", shape.partition("[")[2]) if n != "1")
            assert operation in MOVES_NOTHING or dims not in (sorted(layer), sorted(joined)), (name, shape, operation)
