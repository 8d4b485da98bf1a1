"""How kernels start, what differs between JAX 0.10, 0.11 and 0.12, and what Pallas can only do by inlining PTX."""

import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import utils as mgpu
from jax.experimental.mosaic.gpu.fragmented_array import WGMMA_LAYOUT, FragmentedArray


def can_interpret() -> bool:
    """Whether this JAX runs Mosaic GPU kernels on a CPU, tensor cores and clusters included (0.11 and later)."""
    return hasattr(plgpu, "InterpretGPUParams")


def can_exchange() -> bool:
    """Whether a CTA can store into the shared memory of another one of its cluster (0.11 and later)."""
    return hasattr(plgpu, "async_store_smem")


def kernel(
    body: Callable[..., None],
    *,
    n_warpgroups: int,
    interpret: object = None,
    approx_math: bool = True,
    reduction_scratch_bytes: int | None = None,
    **options: Any,
) -> Callable:
    """Returns `plgpu.kernel` as the kernels here start it: a program is a warpgroup, its number "warpgroup".

    Args:
        body: the program.
        n_warpgroups: of a CTA.
        interpret: parameters with which it runs on a CPU (JAX 0.11 and later); None: on the chip.
        approx_math: whether exponentials and quotients may be the chip's fast ones.
        reduction_scratch_bytes: of shared memory for sums over several warps; None: JAX's own number.
        options: outputs, shared memory, grid and cluster, as `plgpu.kernel` takes them.
    """
    scratch: dict[str, Any] = {}
    if reduction_scratch_bytes is not None:
        scratch["reduction_scratch_bytes"] = reduction_scratch_bytes
    if interpret is not None:
        options["interpret"] = interpret
    return plgpu.kernel(
        body,
        num_threads=n_warpgroups,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(
            approx_math=approx_math, lowering_semantics=plgpu.LoweringSemantics.Warpgroup, **scratch
        ),
        **options,
    )


def by_one_warp(work: Callable[[], None]) -> None:
    """Runs `work` in one warp of a warpgroup; in all four of them with JAX 0.10, which lowers too little for one."""
    if can_interpret():
        plgpu.warp_map(lambda warp: pl.when(warp == 0)(work))
    else:
        work()


def set_registers(n: int, at_start: int) -> None:
    """Gives each thread of a warpgroup that has `at_start` registers `n` of them."""
    if n != at_start:
        plgpu.set_max_registers(n, action="increase" if n > at_start else "decrease")


def load(ref: Any, layout: Any) -> jax.Array:
    """Returns what `ref` holds in registers, in `layout`."""
    read: Any = plgpu.load
    try:
        return read(ref, layout=layout, optimized=False)
    except TypeError:  # JAX 0.10 takes an index as well
        return read(ref, (), layout=layout, optimized=False)


def transpose(ref: Any) -> Any:
    """Returns `ref` with its two axes exchanged; moves nothing."""
    return ref.transpose((1, 0)) if hasattr(ref, "transpose") else plgpu.transpose_ref(ref, (1, 0))


def store_rows(
    values: jax.Array,
    ref: Any,
    row: int | jax.Array,
    column: int | jax.Array,
    low: int | jax.Array,
    high: int | jax.Array,
    transposed: bool = False,
    with_evens_first: bool = False,
) -> None:
    """Writes `values` (in layout WGMMA) to ref[row:, column:], as far as low <= row < high and there are columns.

    Straight from the registers of the threads that hold them, two neighbours of a row at a time. `transposed`: the
    transpose of `values`, number by number. `with_evens_first`: rows of it in the order of `evens_first`, from a column
    that is a multiple of 16.
    """
    splat = plgpu.Layout.WG_SPLAT(())

    @plgpu.inline_mgpu(arg_types=(plgpu.Layout.WGMMA, plgpu.RefType(), splat, splat, splat, splat))
    def emit(_: Any, values: Any, ref: Any, *numbers: Any) -> None:
        arith, llvm, ir = mgpu.arith, mgpu.llvm, mgpu.ir
        row, column, low, high = (number.registers.item() for number in numbers)
        n_columns = ir.MemRefType(ref.type).shape[1]
        i32, i64, void = (ir.Type.parse(name) for name in ("i32", "i64", "!llvm.void"))
        size = mgpu.bitwidth(values.mlir_dtype) // 8
        base = llvm.ptrtoint(i64, mgpu.memref_ptr(ref))

        def store(r: Any, c: Any, value: Any, n_bytes: int) -> None:
            kind, letter = {2: ("i16", "h"), 4: ("i32", "r"), 8: ("i64", "l")}[n_bytes]
            at_row, at_column = arith.addi(row, r), arith.addi(column, c)
            inside = arith.cmpi(arith.CmpIPredicate.sge, at_row, low)
            for left, right in ((at_row, high), (at_column, mgpu.c(n_columns, i32))):
                inside = arith.andi(inside, arith.cmpi(arith.CmpIPredicate.slt, left, right))
            element = arith.addi(
                arith.muli(arith.extsi(i64, at_row), mgpu.c(n_columns, i64)), arith.extsi(i64, at_column)
            )
            address = arith.addi(base, arith.muli(element, mgpu.c(size, i64)))
            operands = [inside, address, mgpu.bitcast(value, ir.Type.parse(kind))]
            text = f"@$0 st.global.b{8 * n_bytes} [$1], $2;"
            llvm.inline_asm(void, operands, text, f"b,l,{letter}", has_side_effects=True)

        def place(c: Any) -> Any:
            """Of 16 columns: the even ones first."""
            half = arith.shrui(arith.andi(c, mgpu.c(14, i32)), mgpu.c(1, i32))
            odd = arith.shli(arith.andi(c, mgpu.c(1, i32)), mgpu.c(3, i32))
            return arith.ori(arith.andi(c, mgpu.c(~15, i32)), arith.ori(half, odd))

        for indices, pair in zip(values.layout.thread_idxs(values.shape), values.registers.flat, strict=True):
            r, c = (arith.index_cast(i32, index) for index in indices)
            if not transposed:
                store(r, c, pair, 2 * size)
                continue
            for i in range(2):
                value = mgpu.vector.extract(pair, dynamic_position=[], static_position=[i])
                store(arith.addi(c, mgpu.c(i, i32)), place(r) if with_evens_first else r, value, size)

    emit(values, ref, row, column, low, high)


def numbers_of(codes: jax.Array, on_chip: bool) -> jax.Array:
    """Returns the bfloat16 numbers that E4M3 codes (int8, in layout WGMMA) stand for; by XLA where interpreted."""
    if on_chip:
        return e4m3_to_bfloat16(codes)
    return lax.bitcast_convert_type(codes, jnp.float8_e4m3fn).astype(jnp.bfloat16)


def numbers_evens_first(ref: Any, on_chip: bool) -> jax.Array:
    """Returns the bfloat16 numbers that E4M3 codes (int8 [64, K] in shared memory) stand for, in layout WGMMA.

    Of each 16 in a row those in even places come first (`evens_first`): so a thread loads four neighbours in one word,
    and makes two numbers at a time of every second one.
    """
    if not on_chip:
        return evens_first(numbers_of(load(ref, plgpu.Layout.WGMMA), on_chip))

    @plgpu.inline_mgpu(
        arg_types=(plgpu.Layout.WGMMA_8BIT,),
        return_type=plgpu.ShapeDtypeStruct(ref.shape, jnp.bfloat16, layout=plgpu.Layout.WGMMA),
    )
    def emit(_: Any, codes: Any) -> Any:
        i32, bf16 = mgpu.ir.IntegerType.get_signless(32), mgpu.ir.VectorType.get((2,), mgpu.ir.BF16Type.get())
        registers = codes.registers.repeat(2, axis=1)  # one has 4 codes of 16 columns, or 2 numbers of 8
        for at in itertools.product(*map(range, codes.registers.shape)):
            word = mgpu.bitcast(codes.registers[at], i32)
            for half, text in enumerate(_FROM_E4M3_WORD):
                number: Any = mgpu.llvm.inline_asm(i32, [word], text, "=r,r")
                registers[at[0], 2 * at[1] + half, *at[2:]] = mgpu.bitcast(number, bf16)
        return FragmentedArray(_registers=registers, _layout=WGMMA_LAYOUT, _is_signed=None)

    return emit(load(ref, plgpu.Layout.WGMMA_8BIT))


def evens_first(x_AK: jax.Array) -> jax.Array:
    """Returns x [A, K] with, of each 16 numbers of a row, those in even places before those in odd ones."""
    return jnp.swapaxes(x_AK.reshape(x_AK.shape[0], -1, 8, 2), 2, 3).reshape(x_AK.shape)


def where_bits(words: list, x: jax.Array, otherwise: float, on_chip: bool) -> jax.Array:
    """Returns x [64, N], in layout WGMMA, where bits are set: bit i of words[w] [64] is about column 32 w + i."""
    if not on_chip:
        columns = jnp.arange(x.shape[1], dtype=jnp.int32) % 32
        is_set = jnp.repeat(jnp.stack(words, axis=1), 32, axis=1) >> columns[None] & 1
        return jnp.where(is_set > 0, x, otherwise)
    rows = plgpu.Layout.WGMMA.reduce(1)

    @plgpu.inline_mgpu(
        arg_types=(plgpu.Layout.WGMMA, *[rows] * len(words)),
        return_type=plgpu.ShapeDtypeStruct(x.shape, x.dtype, layout=plgpu.Layout.WGMMA),
    )
    def emit(_: Any, x: Any, *words: Any) -> Any:
        arith, ir, vector = mgpu.arith, mgpu.ir, mgpu.vector
        i32, pair_of_bits = (ir.Type.parse(name) for name in ("i32", "vector<2xi1>"))
        lane = arith.muli(arith.remui(mgpu.thread_idx(), mgpu.c(4, i32)), mgpu.c(2, i32))  # its first column of 8
        own = [[arith.shrui(mgpu.bitcast(half, i32), lane) for half in word.registers.flat] for word in words]
        pair_type = x.registers.flat[0].type
        other = vector.broadcast(pair_type, mgpu.c(otherwise, ir.F32Type.get()))
        registers = x.registers.copy()
        for n, pair in enumerate(x.registers.flat):
            group, half = divmod(n, 2)  # 8 columns; rows 8 apart
            word, first = own[group // 4][half], group % 4 * 8
            bits = [arith.andi(word, mgpu.c(1 << (first + i), i32)) for i in range(2)]
            is_set = [arith.cmpi(arith.CmpIPredicate.ne, bit, mgpu.c(0, i32)) for bit in bits]
            registers.flat[n] = arith.select(vector.from_elements(pair_of_bits, is_set), pair, other)
        return FragmentedArray(_registers=registers, _layout=x.layout, _is_signed=None)

    return emit(x, *words)


def product(weights: jax.Array, x: Any, on_chip: bool) -> jax.Array:
    """Returns weights x^T in float32, on the tensor cores; `weights` in registers, x [rows, K] in shared memory."""
    if not on_chip:
        return jnp.dot(weights, x[...].T, preferred_element_type=jnp.float32)

    def multiply(products: Any) -> jax.Array:
        plgpu.wgmma(products, weights, transpose(x))
        return products[...]

    return pl.run_scoped(multiply, plgpu.ACC((weights.shape[0], x.shape[0]), jnp.float32))


def e4m3_to_bfloat16(codes: jax.Array) -> jax.Array:
    """Returns the numbers that E4M3 codes (int8, in layout WGMMA) stand for; a NaN becomes 480.

    E4M3 is s eeee mmm, bfloat16 s eeeeeeee mmmmmmm. The bits of a code, put where they belong, are its number times
    2^-120, the difference of the biases; numbers below E4M3's normal ones are below bfloat16's there. All is exact.
    """

    @plgpu.inline_mgpu(
        arg_types=(plgpu.Layout.WGMMA,),
        return_type=plgpu.ShapeDtypeStruct(codes.shape, jnp.bfloat16, layout=plgpu.Layout.WGMMA),
    )
    def emit(_: Any, codes: Any) -> Any:
        arith, llvm, ir = mgpu.arith, mgpu.llvm, mgpu.ir
        i16, i32 = (ir.IntegerType.get_signless(n) for n in (16, 32))
        bf16 = ir.VectorType.get((2,), ir.BF16Type.get())
        registers = codes.registers.copy()
        for i, pair in enumerate(codes.registers.flat):
            bits = arith.extui(i32, mgpu.bitcast(pair, i16))
            number: Any = llvm.inline_asm(i32, [bits], _FROM_E4M3, "=r,r")
            registers.flat[i] = mgpu.bitcast(number, bf16)
        return FragmentedArray(_registers=registers, _layout=codes.layout, _is_signed=None)

    return emit(codes)


# A code to the upper byte of each half; the sign stays, the others move four places down; times 2^120.
_FROM_E4M3 = """{
.reg .b32 t, u, f;
prmt.b32 t, $1, 0, 0x1404;
shr.u32 u, t, 4;
and.b32 u, u, 0x07f007f0;
lop3.b32 t, t, 0x80008000, u, 0xea;
mov.b32 f, 0x7b807b80;
mul.rn.bf16x2 $0, t, f;
}"""

# The same of a word of four codes: of the first and the third, and of the second and the fourth.
_FROM_E4M3_WORD = (
    """{
.reg .b32 t, u, f;
shl.b32 t, $1, 8;
shl.b32 u, $1, 4;
and.b32 u, u, 0x07f007f0;
lop3.b32 t, t, 0x80008000, u, 0xea;
mov.b32 f, 0x7b807b80;
mul.rn.bf16x2 $0, t, f;
}""",
    """{
.reg .b32 t, u, f;
shr.u32 u, $1, 4;
and.b32 u, u, 0x07f007f0;
lop3.b32 t, $1, 0x80008000, u, 0xea;
mov.b32 f, 0x7b807b80;
mul.rn.bf16x2 $0, t, f;
}""",
)


def is_hopper() -> bool:
    """Returns whether the default device is a Hopper GPU."""
    return jax.default_backend() == "gpu" and getattr(jax.devices()[0], "compute_capability", None) == "9.0"


def check_hopper(name: str) -> int:
    """Returns the number of processors of the default device; raises ValueError unless it is a Hopper GPU."""
    device = jax.devices()[0]
    if not is_hopper():
        raise ValueError(
            f"implementation={name!r} on {device.device_kind}: needs a Hopper GPU (compute capability 9.0). Use "
            "implementation='reference'."
        )
    return device.core_count
