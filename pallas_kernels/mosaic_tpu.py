"""What the TPU kernels have in common: which chips there are, and how sizes are divided into tiles."""

import jax

BLOCK = 128
# Kinds of devices, as jax names them, whose matrix units take E4M3 itself.
TAKE_E4M3 = ("TPU7x",)
TWO_CORES = ("TPU v4", "TPU v5")  # kinds whose chips are one device with two cores, between which a grid is divided


def check_tpu(name: str) -> bool:
    """Returns whether the default device multiplies E4M3; raises ValueError unless it is a TPU."""
    kind = jax.devices()[0].device_kind
    if jax.default_backend() != "tpu":
        raise ValueError(f"implementation={name!r} on {kind}: needs a TPU. Use implementation='reference'.")
    return kind in TAKE_E4M3


def n_cores() -> int:
    """Returns how many cores the default device has."""
    return 2 if jax.devices()[0].device_kind in TWO_CORES else 1


def step(size: int, most: int) -> int:
    """Returns the largest multiple of 128 up to `most` that divides `size`, itself a multiple of 128."""
    return next(length for length in range(most, 0, -BLOCK) if size % length == 0)


def tile(size: int, most: int) -> int:
    """Returns `most`, or half of it where less of the last tile lies outside, or `size` if it is not larger."""
    if size <= most:
        return size
    return min((most, most // 2), key=lambda length: -(-size // length) * length)
