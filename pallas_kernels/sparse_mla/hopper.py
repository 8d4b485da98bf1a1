"""Attention to chosen rows by the kernel for Hopper: what it takes, tiles of heads, parts of the rows, their sum."""

import jax
import jax.numpy as jnp

from pallas_kernels import mosaic_gpu
from pallas_kernels.mla_decode import gpu as latent
from pallas_kernels.mla_decode import work
from pallas_kernels.mla_decode.gpu_plan import PAGE, ROWS, Tuning
from pallas_kernels.sparse_mla import gpu

NAME = "mosaic_gpu"
WIDTHS = (256, 512), (64,)  # of latents and of rotary keys


def attend(
    q_c_BTHC: jax.Array,
    q_rope_BTHP: jax.Array,
    c_NC: jax.Array,
    rope_NP: jax.Array,
    row_BTO: jax.Array,
    count_BT: jax.Array,
    *,
    scale: float,
    n_splits: int | None = None,
    tuning: Tuning | None = None,
    n_processors: int | None = None,
    interpret: object = None,
) -> tuple[jax.Array, jax.Array]:
    """Returns (o_BTHC, lse_BTH); arguments as in `pallas_kernels.sparse_mla`. Raises ValueError as `check` does.

    `n_processors` is the default device's if None; `interpret` runs the kernel on a CPU (JAX 0.11 and later).
    """
    check(q_c_BTHC, q_rope_BTHP, c_NC, rope_NP, scale)
    n_processors = n_processors or mosaic_gpu.check_hopper(NAME)
    b, t, h, width = q_c_BTHC.shape
    n = b * t
    tuning = tuning or gpu.TUNING
    q_c, q_rope = (_rows(x, h) for x in (q_c_BTHC, q_rope_BTHP))
    rows, counts = row_BTO.reshape(n, -1), count_BT.reshape(n)
    rows = jnp.where(jnp.arange(rows.shape[1]) < counts[:, None], rows, 0)  # each is a row that can be read
    rows = jnp.pad(rows, ((0, 0), (0, -rows.shape[1] % PAGE)))
    n_splits = n_splits or work.n_splits(n * (q_c.shape[1] // ROWS), rows.shape[1] // PAGE, n_processors)
    items = work.items(counts, n_splits, longest_first=False)
    o, lse = latent.decode(
        q_c, q_rope, (c_NC, rope_NP), rows, items,
        n_heads=h, n_tokens=1, n_splits=n_splits, scale=scale, tuning=tuning, load=gpu.load, interpret=interpret,
    )  # fmt: skip
    if n_splits > 1:
        o, lse = work.combined(o.reshape(n_splits, n, -1, width), lse.reshape(n_splits, n, -1))
    return o[:, :h].reshape(q_c_BTHC.shape).astype(q_c_BTHC.dtype), lse[:, :h].reshape(b, t, h)


def _rows(q_BTHC: jax.Array, h: int) -> jax.Array:
    """[B, T, H, C] -> [B * T, H, C], filled up to whole tiles of heads."""
    rows = q_BTHC.reshape(-1, h, q_BTHC.shape[3])
    return jnp.pad(rows, ((0, 0), (0, -h % ROWS), (0, 0))) if h % ROWS else rows


def check(q_c: jax.Array, q_rope: jax.Array, c: jax.Array, rope: jax.Array, scale: float) -> None:
    """Raises ValueError for what the kernel does not take: other dtypes or widths."""
    instead = "Use implementation='reference'."
    if q_c.dtype not in (jnp.bfloat16, jnp.float16):
        raise ValueError(f"implementation={NAME!r}: {q_c.dtype}, expected bfloat16 or float16. {instead}")
    widths = q_c.shape[3], q_rope.shape[3]
    if widths[0] not in WIDTHS[0] or widths[1] not in WIDTHS[1]:
        raise ValueError(
            f"implementation={NAME!r}: latents and rotary keys {widths} wide; expected {WIDTHS[0]} and {WIDTHS[1]}. "
            f"{instead}"
        )
    if not scale > 0:
        raise ValueError(f"implementation={NAME!r}: scale={scale}, expected a positive number. {instead}")
