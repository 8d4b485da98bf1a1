"""What the engine's compiled steps do with the cache, the experts' weights and the logits, read in their text."""

import re

import jax
import pytest
from flax import nnx

from deepseek_jax.layers.base import Execution, split
from deepseek_jax.models import family
from deepseek_jax.serve.engine import Engine

pytestmark = pytest.mark.slow  # compiles steps of an engine, which it reads

N_PAGES = 211  # a number that no other size of the network has
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


def definition_of(network, **options):
    """The network, run with these options."""
    maker, sizes = family(network.config.family), network.config.model
    make = maker.Config.from_config(sizes)
    return split(nnx.eval_shape(lambda: maker.Model(make, Execution(**options), rngs=nnx.Rngs(0))))[0]


RUNS = [
    pytest.param((1, 2), id="a loop over layers"),
    pytest.param((1, 1), id="of one row", marks=pytest.mark.slow),
    pytest.param((0, 2), id="no loop", marks=pytest.mark.slow),
]


@pytest.fixture(scope="module", params=RUNS)
def compiled(request, network):
    """(program of several steps of two rows or one, the cache)."""
    unroll, n_rows = request.param
    options = {"page_size": 8, "n_rows": n_rows, "n_pages": N_PAGES, "n_steps": 4}
    engine = Engine(definition_of(network, unroll=unroll), network.weights, 32, **options)
    call = engine.calls.steps(engine.calls.nobody, n_rows, 4, "random", -1)
    return engine.programs._program(call), engine.calls.memory.cache


def test_the_cache_is_updated_in_place(compiled):
    """All of it is aliased; nothing of its size, or of a layer's, is made but by overwriting a part of it.

    Temporaries together are smaller than the mean of its arrays.
    """
    program, cache = compiled
    leaves = jax.tree.leaves(cache)
    stacks = [leaf.shape for leaf in leaves if leaf.ndim == 4]
    sizes = [leaf.shape for leaf in leaves] + [size[1:] for size in stacks]
    sizes += [(size[0] * N_PAGES, *size[2:]) for size in stacks]  # the pages of all layers side by side
    assert all(N_PAGES in size[:2] or not size[0] % N_PAGES for size in sizes)
    shapes = {f"f32[{','.join(map(str, size))}]" for size in sizes}
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
    assert memory.temp_size_in_bytes < n_bytes / len(leaves)


def test_the_experts_of_a_layer_are_neither_copied_nor_joined(compiled, network):
    """Matrices are taken one by one from where all layers' lie: no result has the size of a layer's experts."""
    m = network.config.model
    layer, joined = ([m.n_experts, m.d_model, n * m.expert_width] for n in (1, 2))
    for body in instructions(compiled[0].as_text()).values():
        for name, shape, operation, _ in body:
            dims = sorted(int(n) for n in re.findall(r"\d+", shape.partition("[")[2]) if n != "1")
            assert operation in MOVES_NOTHING or dims not in (sorted(layer), sorted(joined)), (name, shape, operation)


def test_the_vocabulary_is_not_sorted(compiled, network):
    """Not even with a nucleus; what is sorted are the choices of experts."""
    sorts = [shape for body in instructions(compiled[0].as_text()).values() for _, shape, op, _ in body if op == "sort"]
    assert not [shape for shape in sorts if str(network.vocab_size) in shape]
