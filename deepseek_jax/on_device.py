"""How a model generates on the device that is here: by which kernels, and from weights of which dtypes and layouts.

| device | layers | weights | routed experts |
| --- | --- | --- | --- |
| CPU, TPU | a loop over stacked layers, which compiles fast | stacked | XLA's loop over the experts' rows |
| GPU | no loop | one array per layer, for XLA would copy each layer's out of the stack in every step | the same |
| Hopper | no loop | the same, routed experts stacked | the kernels that read chosen experts once |

Sparse attention (V3.2, V4) is XLA's everywhere: its kernels are measured for one sequence at a time only. On Hopper the
mixing matrices of V4's streams are one kernel each.
The kernels take bfloat16 and widths that are multiples of 128, that of one token a model's of 256 up to 8,192. On a
GPU the axes that a product of weights with activations sums over are the innermost in memory: then XLA multiplies a
matrix with one token in one kernel that reads the matrix once, and otherwise in two that write all products to memory
in between. And hidden layers of dense feed-forwards are filled up with zeros to a multiple of 256, if few are needed:
XLA divides sums over them into 16 parts of 16 numbers or more, and fills up a weight that it cannot divide so in every
step; the kernels that read FP8 take multiples of 128. V2-Lite's one of 10,944 becomes 11,008.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from ml_collections import ConfigDict

from deepseek_jax.abstract_model import abstract_module, abstract_weights
from deepseek_jax.convert import fp8_weights
from deepseek_jax.kernels import XLA, Kernels
from deepseek_jax.layers.base import MULTIPLIED, Tree, Turned, Unstacked, dtype_read, logical_axes, roles, split
from deepseek_jax.precision.fp8_weight import Fp8Weight
from deepseek_jax.precision.grouped import layer_of
from deepseek_jax.precision.policy import policy

# Axes in memory of a weight of which a decode step sums over the last axis: the absorbed form's queries, per head.
SUMMED_LAST = {"k_up_CHN": (1, 0, 2)}
ABSORBED = ("k_up_CHN", "v_up_CHU")  # in decode steps a small product per head, for which no kernel reads FP8
DIVIDED = 256  # numbers of a hidden layer: it gets zeros up to a multiple of them
MOST_ZEROS = 0.02  # of its width


def definition(config: ConfigDict, in_a_loop: nnx.GraphDef) -> nnx.GraphDef:
    """Returns the network of a config as this device generates with it; `in_a_loop` is the one by `XLA` in a loop."""
    if jax.default_backend() != "gpu":
        return in_a_loop
    return split(abstract_module(config, kernels(config), unroll=0))[0]


def kernels(config: ConfigDict) -> Kernels:
    """Returns the kernels by which a GPU generates, each where it can run; the rest is computed by XLA."""
    from pallas_kernels.mosaic_gpu import is_hopper  # Mosaic GPU is not part of every JAX build

    if not is_hopper() or config.precision != "bf16":
        return XLA
    chosen = _on_hopper(config.model)
    if _fits_codes(config):
        chosen |= {"coded_matmul": "mosaic_gpu"}
        if "grouped_matmul" in chosen and not config.model.get("swiglu_limit"):  # which the kernel does not know
            chosen["coded_experts"] = "mosaic_gpu"
    return Kernels(**chosen)


def _on_hopper(sizes: ConfigDict) -> dict[str, str]:
    """Returns the operations that a kernel for Hopper computes in a model of these sizes, in bfloat16."""
    chosen = {}
    if "expert_width" in sizes and not any(width % 128 for width in (sizes.d_model, sizes.expert_width)):
        chosen["grouped_matmul"] = "mosaic_gpu"
        if not sizes.d_model % 256 and sizes.d_model <= 8192 and not sizes.get("swiglu_limit"):
            chosen["token_experts"] = "mosaic_gpu"
    if "sinkhorn_steps" in sizes:
        chosen["sinkhorn"] = "triton"
    if "kv_rank" in sizes and sizes.kv_rank in (256, 512) and sizes.rope_width == 64:
        chosen["latent_decode"] = "by_size"
        if not sizes.nope_width % 64 and not sizes.value_width % 64:
            chosen["attention"] = "mosaic_gpu"
    return chosen


def _fits_codes(config: ConfigDict) -> bool:
    """Returns whether the kernel takes a model's weights in FP8: rows in multiples of 64, experts' columns of 128."""
    layouts = [layout for found in fp8_weights.of_model(abstract_weights(config)).values() for layout in found]
    widths = [config.model.get(name, 0) for name in ("d_model", "expert_width")]
    rows = [size for layout in layouts for size in (layout.matrix[0], layout.block_rows)]
    return not any(size % 64 for size in rows) and not any(width % 128 for width in widths)


def compiler_options() -> dict[str, str | bool]:
    """Returns the options with which programs that generate are compiled for this device.

    On a GPU kernels that do not depend on one another run side by side; most of a small batch fill a part of the chip.
    """
    return {"xla_gpu_command_buffer_scheduling_mode": "CONCURRENT"} if jax.default_backend() == "gpu" else {}


def ends_early() -> bool:
    """Returns whether a program of several decode steps ends as soon as all sequences have.

    Not on a GPU: there a loop whose number of turns is not known waits for the host in every turn.
    """
    return jax.default_backend() != "gpu"


def chunk() -> int:
    """Returns how many tokens of prompts one pass reads: on a GPU more, whose matrix products then are efficient."""
    return 8192 if jax.default_backend() == "gpu" else 2048


class Read(NamedTuple):
    """How a step reads a weight."""

    dtype: DTypeLike  # unless it is stored in fewer bytes
    is_unstacked: bool  # one array per layer
    order: tuple[int, ...]  # axes of the array in memory, from the outermost to the innermost
    as_numbers: bool = False  # also if it is stored in FP8
    zeros: tuple[int, ...] = ()  # after the numbers of each axis of the weight, of a layer's if it is unstacked


class Prepared:
    """Weights as a step reads them: what is stored otherwise is cast, unstacked and turned once, not in every step.

    Others are the same arrays. A leaf that was replaced since the last call is prepared again. `for_gpu`: as a GPU
    reads them; None: as the default device does.
    """

    def __init__(self, config: ConfigDict, for_gpu: bool | None = None):
        self._config = config
        self._for_gpu = jax.default_backend() == "gpu" if for_gpu is None else for_gpu
        self._made: dict[tuple, tuple[Any, Any]] = {}  # by path: what is stored, what is read

    def __call__(self, params: Tree) -> Tree:
        """Returns the trained weights in the dtypes in which they are read."""
        if not self._for_gpu and policy(self._config.precision).compute == jnp.float32:
            return params
        is_weight = lambda x: isinstance(x, Fp8Weight)  # noqa: E731
        return jax.tree_util.tree_map_with_path(self._prepared, params, self._reads, is_leaf=is_weight)

    @functools.cached_property
    def _reads(self) -> Tree:
        return reads(self._config, abstract_module(self._config, XLA), self._for_gpu)

    def _prepared(self, path: tuple, stored: jax.Array | Fp8Weight, read: Read) -> Any:
        if path not in self._made or self._made[path][0] is not stored:
            self._made[path] = stored, prepared(stored, read)
        return self._made[path][1]


def reads(config: ConfigDict, module: nnx.Module, for_gpu: bool) -> Tree:
    """Returns how a step reads each weight of a network, a tree of `Read`."""
    chosen = policy(config.precision, config.fp8)

    def read(path: tuple, role: str, axes: tuple, leaf: Any) -> Read:
        dtype, is_stacked = dtype_read(role, chosen.weights, chosen.compute), axes[0] == "layers"
        own_axes = axes[1:] if is_stacked else axes
        is_read_alone = is_stacked or role == "head" or path[0].key == "mtp"
        if not for_gpu or own_axes[0] == "experts" or not is_read_alone:
            return Read(dtype, False, tuple(range(len(axes))))
        zeros = _zeros(role, own_axes, leaf.shape[-len(own_axes) :])
        return Read(dtype, is_stacked, _order(len(own_axes), role, path[-1].key), path[-1].key in ABSORBED, zeros)

    return jax.tree_util.tree_map_with_path(read, roles(module), logical_axes(module)[0], split(module)[1])


def _zeros(role: str, axes: tuple, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Returns how many zeros follow the numbers of each axis: those that fill up a hidden layer; () for none."""
    is_hidden = [role in ("gate", "up", "down") and axis == "mlp" for axis in axes]
    zeros = tuple(-size % DIVIDED if hidden else 0 for size, hidden in zip(shape, is_hidden, strict=True))
    return zeros if 0 < max(n / size for n, size in zip(zeros, shape, strict=True)) <= MOST_ZEROS else ()


def _order(n_axes: int, role: str, name: str) -> tuple[int, ...]:
    """Returns a weight's axes in the order in which those that a decode step sums over are the innermost."""
    axes = tuple(range(n_axes))
    if role not in (*MULTIPLIED, "router", "index", "head") or name in SUMMED_LAST:
        return SUMMED_LAST.get(name, axes)
    n_summed = n_axes - 1 if role == "attention_out" else 1
    return axes[n_summed:] + axes[:n_summed]


def prepared(stored: jax.Array | Fp8Weight, read: Read) -> jax.Array | Fp8Weight | Turned | Unstacked:
    """Returns a weight as it is read; the same array if it is stored so.

    In FP8 it stays as it lies in memory, but for those that XLA would dequantise in every step: of V2-Lite and V3 they
    are 0.4 and 0.2 % of the weights.
    """
    if isinstance(stored, Fp8Weight) and not read.as_numbers:
        coded = _filled(stored, read.zeros) if read.zeros else stored
        return Unstacked(_apart(coded)) if read.is_unstacked else coded
    array: jax.Array = _numbers(stored, read.dtype) if isinstance(stored, Fp8Weight) else stored
    dtype = read.dtype if jnp.dtype(read.dtype).itemsize < array.dtype.itemsize else array.dtype
    if read.is_unstacked:
        layers = _layers(array, dtype, read.order, read.zeros)
        return Unstacked(tuple(_as_read(layer, read.order) for layer in layers))
    return _as_read(_turned(array, dtype, read.order, read.zeros), read.order)


def _as_read(array: jax.Array, order: tuple[int, ...]) -> jax.Array | Turned:
    return array if order == tuple(range(array.ndim)) else Turned(array, order)


def _turned(stored: jax.Array, dtype: DTypeLike, order: tuple[int, ...], zeros: tuple[int, ...]) -> jax.Array:
    array = stored.astype(dtype)
    return jnp.transpose(jnp.pad(array, [(0, n) for n in zeros]) if zeros else array, order)


@functools.partial(jax.jit, static_argnames="dtype")
def _numbers(stored: Fp8Weight, dtype: DTypeLike) -> jax.Array:
    return stored.astype(dtype)


@functools.partial(jax.jit, static_argnames="zeros")
def _filled(stored: Fp8Weight, zeros: tuple[int, ...]) -> Fp8Weight:
    return stored.filled(zeros)


@jax.jit
def _apart(stack: Fp8Weight) -> tuple[Fp8Weight, ...]:
    return tuple(layer_of(stack, number) for number in range(len(stack.codes)))


@functools.partial(jax.jit, static_argnames=("dtype", "order", "zeros"))
def _layers(
    stack: jax.Array, dtype: DTypeLike, order: tuple[int, ...], zeros: tuple[int, ...]
) -> tuple[jax.Array, ...]:
    return tuple(_turned(layer, dtype, order, zeros) for layer in stack)
