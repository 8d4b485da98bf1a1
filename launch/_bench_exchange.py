"""The exchange of tokens with their experts alone, on this machine's devices: `bench exchange`.

    deepseek-jax bench exchange                                      # V3's: 4,096 tokens of 7,168 per device
    deepseek-jax bench exchange --wire=fp8 --groups=2                # codes on the way there; two hops, two groups
    XLA_FLAGS=--xla_force_host_platform_device_count=4 deepseek-jax bench exchange --tokens=64 --width=256 # emulated

Every device has its share of the experts and as many tokens. They go to the devices of their experts and come back
(`parallel.alltoall`), --repeats times in one program, each time with what came back before; experts only weigh, so that
each token must come back as it was: `error` is the largest difference, relative to the largest number.

    one hop, two hops   `padded`: buffers as large as the loads need, in three sizes; groups: every divisor, or --groups
    ragged              only the rows that are filled; not on CPUs
    all_to_all          of whole buffers for perfect balance, with nothing packed or looked up: what the links can do

    balanced            routers send as many tokens to one device as to another
    skewed              --skew times as many to the first device's experts as to those of each other

`sent` is per device, there and back, to other devices; `rate` that by the time. `busiest` is the rows of the busiest
device's experts over the mean. With --json each row is also appended to a file.
"""

import functools
import json
import statistics
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from deepseek_jax.bounds import number, one_of, path, whole
from deepseek_jax.errors import UserError
from deepseek_jax.launch import _options
from deepseek_jax.launch._tables import print_table
from deepseek_jax.parallel import alltoall
from deepseek_jax.parallel.mesh import BATCH, EXPERT, make_mesh, per_device, place
from deepseek_jax.precision.wire import AS_IS, Codes, Wire

EXTRA = {
    "devices": (int, 0, "how many of this machine's; 0: all", whole(0, 4096)),
    "tokens": (int, 4096, "of a device", whole(1, 10**7)),
    "width": (int, 7168, "numbers of a token", whole(1, 10**6)),
    "experts": (int, 256, "over all devices", whole(1, 10**6)),
    "top_k": (int, 8, "experts of a token", whole(1, 1024)),
    "n_groups": (int, 8, "groups of experts of the router", whole(1, 10**4)),
    "top_groups": (int, 4, "of these, how many hold a token's experts", whole(1, 10**4)),
    "wire": (str, "bf16", "what travels there: bf16, or fp8 codes; back it is bf16", one_of("bf16", "fp8")),
    "groups": (int, 0, "of devices, with two hops; 0: every number that divides", whole(0, 4096)),
    "skew": (float, 4.0, "how much more the first device gets than any other", number(1, 1000)),
    "repeats": (int, 8, "exchanges of one program", whole(1, 10**4)),
    "rounds": (int, 9, "times that each program is measured", whole(1, 10**6)),
    "seed": (int, 0, "of tokens and routing", whole(0, 2**31)),
    "json": (str, "", "file to which each row is appended as JSON", path()),
}
COLUMNS = ("exchange", "load", "busiest", "ms", "sent", "rate", "buffers", "error")
WIRES: dict[str, Wire] = {"bf16": AS_IS, "fp8": Codes()}
GIGA = 1e9
ALONE = "all_to_all"


def main(argv: list[str]) -> int:
    """Runs the bench; returns 0 if all tokens came back as they were."""
    options = _options.parse(argv, extra=EXTRA, config=False, workdir=False)
    devices = jax.devices()[: options.devices or None]
    check(options, len(devices))
    kind = devices[0].device_kind
    print(f"{len(devices)} x {kind}, jax {jax.__version__}; {options.tokens} tokens of {options.width} per device")
    found = []
    for row in rows(options, devices):
        found.append(row)
        if options.json:
            with open(options.json, "a") as file:
                file.write(json.dumps({"device": kind, "devices": len(devices)} | row) + "\n")
    print_table(COLUMNS, [cells(row) for row in found], right=COLUMNS[2:])
    allowed = options.repeats * (2**-4 if options.wire == "fp8" else 2**-7)  # each exchange rounds
    return 0 if all(row["error"] <= allowed for row in found) else 1


def check(options: SimpleNamespace, n_devices: int) -> None:
    """Raises `UserError` if what is asked for cannot be exchanged."""
    if n_devices < 2 or options.devices > n_devices:
        raise UserError(f"bench exchange: this machine has {len(jax.devices())} devices. Give two or more of them.")
    if options.experts % (n_devices * options.n_groups // np.gcd(n_devices, options.n_groups)):
        raise UserError(
            f"--experts={options.experts}: expected a multiple of {n_devices} devices and of --n-groups="
            f"{options.n_groups}."
        )
    if (
        options.top_groups > options.n_groups
        or options.top_k > options.experts // options.n_groups * options.top_groups
    ):
        raise UserError(
            f"--top-k={options.top_k} of --top-groups={options.top_groups} of --n-groups={options.n_groups}: "
            "expected fewer groups than there are, with enough experts."
        )
    if options.groups and n_devices % options.groups:
        raise UserError(f"--groups={options.groups}: expected a divisor of {n_devices} devices.")


def ways(options: SimpleNamespace, n_devices: int, platform: str) -> dict[str, alltoall.Exchange]:
    """Returns the exchanges to measure, by name."""
    one = alltoall.Exchange(EXPERT, n_devices)
    numbers = [options.groups] if options.groups else [n for n in range(2, n_devices) if n_devices % n == 0]
    found = {"one hop": one}
    found |= {f"two hops, {n} groups": alltoall.Exchange(EXPERT, n_devices, n) for n in numbers}
    return found if platform == "cpu" else found | {"ragged": alltoall.Exchange(EXPERT, n_devices, kind="ragged")}


def rows(options: SimpleNamespace, devices: list) -> Iterator[dict]:
    """Measures one exchange after the other, each with both loads."""
    n = len(devices)
    mesh = make_mesh(1, n, devices)
    loads = {"balanced": 1.0, f"skewed {options.skew:g}:1": options.skew}
    x_MD = np.random.default_rng(options.seed).normal(size=(n * options.tokens, options.width)).astype(jnp.bfloat16)
    weights_MK = np.full((n * options.tokens, options.top_k), 1 / options.top_k, np.float32)
    chosen = {name: routing(options, n, skew) for name, skew in loads.items()}
    specs = (BATCH, BATCH, BATCH)
    for name, exchange in ways(options, n, devices[0].platform).items():
        plan = plan_of(exchange, options)
        one = functools.partial(there_and_back, plan=plan, wire=WIRES[options.wire])
        run = jax.jit(per_device(functools.partial(repeated, one, options.repeats), mesh, specs, (BATCH, BATCH)))
        for load, experts_MK in chosen.items():
            given = place((x_MD, experts_MK, weights_MK), mesh, specs)
            y_MD, sent = run(*given)
            error = float(jnp.max(jnp.abs(y_MD - given[0])) / jnp.max(jnp.abs(given[0])))
            within, across, *too_small = np.asarray(sent).sum(axis=0) / n
            level = int(np.argmin([*(np.array(too_small) > 0), False]))
            row = {"exchange": name, "load": load, "busiest": busiest(experts_MK, options.experts, n), "error": error}
            row |= {
                "within_bytes": float(within),
                "across_bytes": float(across),
                "buffers": list(plan.sizes[level].buffers),
            }
            yield row | {"ms": measured(run, given, options)}
    yield alone(options, mesh, x_MD)


def plan_of(exchange: alltoall.Exchange, options: SimpleNamespace) -> alltoall.Plan:
    """Returns the plan of an exchange."""
    limit = options.top_groups, options.n_groups
    return exchange.plan(options.tokens, options.top_k, options.experts // exchange.n_devices, limit)


def routing(options: SimpleNamespace, n_devices: int, skew: float) -> np.ndarray:
    """Returns the experts of all tokens, int32 [tokens, K], drawn as a router chooses: some groups, there the best."""
    rng = np.random.default_rng(options.seed + 1)
    factors = np.where(np.arange(options.experts) < options.experts // n_devices, skew, 1.0)
    found = []
    for _ in range(n_devices):  # a device's tokens at a time: so many random numbers take memory
        scores_MX = rng.gumbel(size=(options.tokens, options.experts)) + np.log(factors)
        by_group_MGX = scores_MX.reshape(options.tokens, options.n_groups, -1)
        best_MG = np.sort(by_group_MGX, axis=2)[:, :, -2:].sum(axis=2)
        worst_MG = np.argsort(best_MG, axis=1)[:, : options.n_groups - options.top_groups]
        np.put_along_axis(by_group_MGX, worst_MG[:, :, None], -np.inf, axis=1)
        found.append(np.argsort(scores_MX, axis=1)[:, -options.top_k :])
    return np.concatenate(found).astype(np.int32)


def busiest(experts_MK: np.ndarray, n_experts: int, n_devices: int) -> float:
    """Returns the pairs of a token and an expert of the busiest device, over those of the mean."""
    pairs_W = np.bincount(experts_MK.ravel() // (n_experts // n_devices), minlength=n_devices)
    return float(pairs_W.max() / pairs_W.mean())


def weighed(x_AD: jax.Array, experts_AK: jax.Array, weights_AK: jax.Array, n_local: int) -> jax.Array:
    """What experts make that only weigh: each token times the factors of its experts here."""
    return x_AD * jnp.sum(jnp.where(experts_AK < n_local, weights_AK, 0), axis=1, keepdims=True).astype(x_AD.dtype)


def there_and_back(
    x_MD: jax.Array, experts_MK: jax.Array, weights_MK: jax.Array, *, plan: alltoall.Plan, wire: Wire
) -> tuple[jax.Array, alltoall.Sent]:
    """One exchange on a device, as `layers.experts` makes it."""
    given, n_local = (x_MD, experts_MK, weights_MK), plan.hops[-1].n_held
    sent = plan.report(*given, wire)
    if plan.given is None:

        def compute(x_AD: jax.Array, experts_AK: jax.Array, weights_AK: jax.Array, _: int | None) -> jax.Array:
            return weighed(x_AD, experts_AK, weights_AK, n_local)

        return alltoall.on_expert_devices(compute, *given, plan, sent, wire), sent
    arrived = alltoall.dispatch(*given, plan=plan, sizes=plan.given, wire=wire)
    return alltoall.combine(weighed(*arrived[:3], n_local), arrived, wire=wire), sent


def repeated(one: Callable, n: int, x_MD: jax.Array, *others: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(tokens after n exchanges, what one of them reports) on a device."""

    def turn(x_MD: jax.Array, _: None) -> tuple[jax.Array, alltoall.Sent]:
        return one(x_MD, *others)

    y_MD, sent = jax.lax.scan(turn, x_MD, None, length=n)
    return y_MD, jnp.concatenate([jnp.ravel(a[0]) for a in sent])[None]


def alone(options: SimpleNamespace, mesh: Any, x_MD: np.ndarray) -> dict:
    """Measures all_to_all of whole buffers, there and back, of as many rows as perfect balance takes."""
    n = mesh.shape[EXPERT]
    limit = options.top_groups, options.n_groups
    n_rows = -(-options.tokens * alltoall.copies(n, options.top_k, limit) // n)

    def one(x_AD: jax.Array) -> tuple[jax.Array, alltoall.Sent]:
        hop = alltoall.Hop(EXPERT, n, 1, 1)
        return jax.lax.optimization_barrier(
            hop.send(jax.lax.optimization_barrier(hop.send(x_AD)))
        ), alltoall.nothing_sent()

    filled = np.resize(x_MD, (n * n * n_rows, options.width))
    run = jax.jit(per_device(functools.partial(repeated, one, options.repeats), mesh, (BATCH,), (BATCH, BATCH)))
    given = place((filled,), mesh, (BATCH,))
    error = float(jnp.max(jnp.abs(run(*given)[0] - given[0])))
    n_bytes = 2.0 * (n - 1) * n_rows * options.width * filled.itemsize
    row = {"exchange": ALONE, "load": "balanced", "busiest": 1.0, "within_bytes": n_bytes, "across_bytes": 0.0}
    return row | {"buffers": [n_rows], "error": error, "ms": measured(run, given, options)}


def measured(run: Callable, given: tuple, options: SimpleNamespace) -> float:
    """Returns the milliseconds of one exchange, the median over the rounds."""
    taken = []
    for _ in range(options.rounds):
        begin = time.perf_counter()
        jax.block_until_ready(run(*given))
        taken.append(time.perf_counter() - begin)
    return 1e3 * statistics.median(taken) / options.repeats


def cells(row: dict) -> tuple[str, ...]:
    """Returns a row of the table."""
    n_bytes = row["within_bytes"] + row["across_bytes"]
    return (
        row["exchange"],
        row["load"],
        f"{row['busiest']:.2f}",
        f"{row['ms']:.3f}",
        f"{n_bytes / 1e6:,.1f} MB",
        f"{n_bytes / row['ms'] / 1e6:.1f} GB/s",
        f"{'+'.join(map(str, row['buffers']))} rows",
        f"{row['error']:.1e}",
    )
