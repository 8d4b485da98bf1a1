"""How training scales over the devices of this machine: `deepseek-jax bench scaling`.

    deepseek-jax bench scaling                                  # v3_scaling on all devices, in every layout
    deepseek-jax bench scaling --layouts=one,data2-fsdp,expert2,pipe2-dualpipev
    XLA_FLAGS=--xla_force_host_platform_device_count=4 deepseek-jax bench scaling --config=tiny_v3        # emulated

A layout is a split of the devices over pipe x data x expert: `data2-expert2`, with FSDP `data4-fsdp`, with a pipeline
`pipe2-expert2-dualpipe`; `one` is a single device. All of them train the same batches, --sequences per device, from
the same weights; a micro-batch is --micro-sequences on a device, in a pipeline or one after the other. So losses must
agree with those of one device: to 1e-4 in fp32, to 5e-3 in bf16 and fp8.

Each layout runs in a process of its own, one after the other, and is kept in --out when it is done: an interrupted run
resumes there, and runs with other --devices add their rows. Change a flag that matters, and the layout is measured
again. On a machine with many cores --together=8 compiles so many side by side first. --out holds scaling.json, with all
that was measured and the rows of the table, on GPUs also where each layout's time goes, and scaling.md, the table for
BENCHMARKS.md:

    loads     of the steps that were measured, the rows of the busiest device's experts over those of a device on
              average, mean over the routers. Fresh routers send their tokens anywhere: with --settle=8 the
              biases of all layouts are moved against the loads for so many steps before anything is measured
    computes  share of a step in which a device computes, on average and the busiest, from a profile (GPUs)
    waiting   share of a step in which a device waits for other stages, from the same profile; beside it what the
              schedule's formula gives if F&B takes as long as F, B and W, and with ranks that wait for neighbours
              after every tick
    hidden    share of the time of the experts' all-to-all under which matmuls ran, in the whole step and in the ops
              that run a forward and a backward pass at once, from the same profile
    in NCCL   share of a step in which some collective ran, transfers that wait for the other stage included
    exchange  what the experts' all-to-all sent per device in a step, over the time that it took: its gradients are as
              many bytes as it is (not where layers run again in the backward pass, config.run.remat)
    planned   tokens per second by the planner, whose one efficiency is fitted to the row of one device, and its error

Operations keep their names in a profile only if XLA does not gather them into command buffers, so these are off.
"""

import contextlib
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple, Self

from ml_collections import ConfigDict

from deepseek_jax import run_config
from deepseek_jax.bounds import path, text, whole
from deepseek_jax.errors import UserError
from deepseek_jax.launch import _options
from deepseek_jax.launch._tables import print_table
from deepseek_jax.saved_config import to_json
from deepseek_jax.units import binary

EXTRA = {
    "devices": (int, 0, "how many of this machine's; 0: all", whole(0, 4096)),
    "schedules": (str, "1f1b,1f1b_paired,zb1p,dualpipev,dualpipe", "of layouts with a pipeline", text(1, 200)),
    "layouts": (str, "", "only these, by name; all by default", text(0, 10_000)),
    "sequences": (int, 4, "of a step, per device", whole(1, 10**6)),
    "micro_sequences": (int, 1, "of a micro-batch, on a device", whole(1, 10**6)),
    "fsdp_micro_sequences": (
        int,
        0,
        "the same with FSDP, which gathers weights for each; 0: no others",
        whole(0, 10**6),
    ),
    "losses": (int, 4, "steps whose losses are compared", whole(1, 10**4)),
    "settle": (
        int,
        0,
        "steps before all others, after each of which the routers' biases are moved in proportion to their experts' "
        "distance from the mean load, also after each step whose loss is compared",
        whole(0, 10**4),
    ),
    "turns": (int, 3, "times that each layout is measured", whole(1, 10**6)),
    "steps": (int, 2, "training steps of one turn", whole(1, 10**6)),
    "together": (int, 1, "layouts that compile at the same time, before any of them is measured", whole(1, 10**4)),
    "limit_s": (
        int,
        1800,
        "seconds after which a layout is given up, to compile and again to measure",
        whole(1, 10**6),
    ),
    "chip": (str, "", "for the planner; the devices' own by default", text(0, 500)),
    "out": (str, "scaling", "directory of the results", path(1)),
}
TOLERANCE = {"fp32": 1e-4}  # relative difference of the losses, by config.precision
LOW_PRECISION = 5e-3
LEAST_EFFICIENCY, MOST_EFFICIENCY = 1e-9, 10.0  # of the peak: emulated devices are far below it
COLUMNS: tuple[str, ...] = ("layout", "tokens/s", "of one", "step", "losses off by")
COLUMNS += ("loads", "computes", "waiting", "formula", "in ticks", "hidden", "in NCCL", "exchange", "planned")
READY = "compiled"  # the line of a process that waits to be measured
POLL_S = 0.2
MACHINE = "import jax, json; d = jax.devices(); print(json.dumps([len(d), d[0].device_kind, jax.__version__]))"


Plan = Callable[[dict], float | None]  # from a saved config to the seconds of a step; None: no such schedule to plan


class Split(NamedTuple):
    """A layout."""

    pipe: int
    data: int
    expert: int
    schedule: str = ""
    fsdp: bool = False

    @property
    def name(self) -> str:
        """What it is called in --layouts."""
        sizes = {"pipe": self.pipe, "data": self.data, "expert": self.expert}
        axes = [f"{axis}{n}" for axis, n in sizes.items() if n > 1]
        return "-".join([*axes, *([self.schedule] if self.schedule else []), *(["fsdp"] if self.fsdp else [])]) or "one"

    @property
    def devices(self) -> int:
        """How many it takes."""
        return self.pipe * self.data * self.expert


def splits(n_devices: int, schedules: list[str]) -> list[Split]:
    """Returns one device, and every split of `n_devices` over pipe x data x expert, those without a pipeline first."""
    found = [Split(1, 1, 1)]
    sizes = [n for n in range(1, n_devices + 1) if n_devices % n == 0]
    for pipe, expert in itertools.product(sizes, sizes):
        data, rest = divmod(n_devices, pipe * expert)
        if rest or n_devices == 1:
            continue
        plain = Split(pipe, data, expert)
        if pipe > 1:
            found += [plain._replace(schedule=schedule) for schedule in schedules]
        else:
            found += [plain, *([plain._replace(fsdp=True)] if data > 1 else [])]
    return found


def main(argv: list[str]) -> int:
    """Runs the bench; returns 0 if all layouts were measured and their losses agree."""
    options = _options.parse(argv, "v3_scaling", EXTRA, workdir=False)
    config = run_config.validate(options.config)
    environment = dict(os.environ)
    environment["XLA_FLAGS"] = f"{environment.get('XLA_FLAGS', '')} --xla_gpu_enable_command_buffer=".strip()
    environment.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95")  # JAX takes three quarters of a GPU by itself
    if options.together > 1:  # and those that wait leave it to the one that runs
        environment.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    os.environ["JAX_PLATFORMS"] = "cpu"  # this process plans; the devices belong to those that it starts
    if options.fsdp_micro_sequences and options.sequences % options.fsdp_micro_sequences:
        raise UserError(
            f"--sequences={options.sequences} --fsdp-micro-sequences={options.fsdp_micro_sequences}: expected a "
            "multiple."
        )
    if options.sequences % options.micro_sequences or options.sequences < 2 * options.micro_sequences:
        raise UserError(
            f"--sequences={options.sequences} --micro-sequences={options.micro_sequences}: expected a multiple, of at "
            "least two micro-batches per device, which DualPipe needs."
        )
    if options.settle and not has_biases(config):
        raise UserError(f"--settle={options.settle}: {config.name} has no router biases to move. Leave it out.")
    there, kind, jax_version = machine(environment)
    n_devices = options.devices or there
    if n_devices > there:
        raise UserError(f"--devices={n_devices}: this machine has {there}. Give at most so many.")
    folder = Path(options.out).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "scaling.json"
    entries = read(file)
    print(f"{config.name} on {n_devices} of {there} x {kind}, jax {jax_version}; results in {file}", flush=True)
    about = {"device": kind, "jax": jax_version}
    jobs = {}
    for split in chosen(splits(n_devices, known_schedules(options.schedules)), options.layouts):
        job = about | {key: getattr(options, key) for key in ("settle", "losses", "turns", "steps")}
        job |= {"split": split, "xla_flags": environment["XLA_FLAGS"]}
        job["config"] = to_json(config_of(split, config, options, n_devices))
        jobs[f"{n_devices}-{split.name}"] = json.loads(json.dumps(job))
    for name in [name for name, job in jobs.items() if is_known(entries.get(name), job)]:
        print(f"{name}: measured before", flush=True)
        del jobs[name]
    for name, found in measure(jobs, options.together, options.limit_s, environment):
        entries[name] = {"job": jobs[name], "found": found}
        if table := found.pop("table", []):
            (folder / f"{name}.txt").write_text("\n".join(table) + "\n")
        write(file, {"entries": entries})
        result = f"{1e3 * statistics.median(found['seconds']):,.1f} ms per step" if "seconds" in found else found
        loads = f", experts of the busiest device {found['imbalance']:.2f} of the mean" if "imbalance" in found else ""
        print(f"{name}: {result}{loads}", flush=True)
    rows = compared(entries, kind, options.chip)
    write(file, {"rows": rows, "entries": entries})
    lines = [COLUMNS, ("---",) * len(COLUMNS), *map(cells, rows)]
    (folder / "scaling.md").write_text("".join(f"| {' | '.join(line)} |\n" for line in lines))
    show(rows)
    return 0 if all(row.get("agrees", "refused" in row) for row in rows) else 1


def has_biases(config: ConfigDict) -> bool:
    """Whether the config's network has router biases."""
    from deepseek_jax.abstract_model import abstract_module
    from deepseek_jax.layers.base import split

    return bool(split(abstract_module(config))[2])


def known_schedules(names: str) -> list[str]:
    """Returns the schedules named in --schedules."""
    from deepseek_jax.parallel.schedule import SCHEDULES

    if unknown := [name for name in names.split(",") if name not in SCHEDULES]:
        raise UserError(f"--schedules={names}: no schedule {unknown[0]!r}. Choose from {', '.join(SCHEDULES)}.")
    return names.split(",")


def machine(environment: dict[str, str]) -> tuple[int, str, str]:
    """Returns (number of devices, their kind, jax's version) as a process sees them that may use them."""
    done = subprocess.run([sys.executable, "-c", MACHINE], env=environment, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"jax finds no devices: {(done.stderr.strip().splitlines() or ['no message'])[-1]}. Fix that.")
    return tuple(json.loads(done.stdout.splitlines()[-1]))


def chosen(found: list[Split], names: str) -> list[Split]:
    """Returns the layouts named in --layouts, in the order of `found`; all if none are named."""
    asked = [name for name in names.split(",") if name]
    if unknown := [name for name in asked if name not in {split.name for split in found}]:
        known = ", ".join(split.name for split in found)
        raise UserError(f"--layouts={names}: no layout {unknown[0]} here. Choose from {known}.")
    return [split for split in found if not asked or split.name in asked]


def config_of(split: Split, config: ConfigDict, options: SimpleNamespace, n_devices: int) -> ConfigDict:
    """Returns the config of a layout: the same batches as on all others."""
    config = config.copy_and_resolve_references()
    config.mesh.update(pipe=split.pipe, data=split.data, expert=split.expert)
    batch = options.sequences * n_devices
    config.batch.update(size=batch, size_start=batch, ramp_steps=0)
    of_micro_batch = (split.fsdp and options.fsdp_micro_sequences) or options.micro_sequences
    config.pipeline.micro_batches = batch // (split.data * split.expert * of_micro_batch)
    config.pipeline.schedule = split.schedule or config.pipeline.schedule
    config.sharding.embed = "data" if split.fsdp else config.sharding.embed
    return config


def is_known(entry: dict | None, job: dict[str, Any]) -> bool:
    """Whether the same job was measured before."""
    return entry is not None and entry["job"] == job and "failed" not in entry["found"]


def measure(
    jobs: dict[str, dict], together: int, limit_s: int, environment: dict[str, str]
) -> Iterator[tuple[str, dict]]:
    """Yields what was found of each job, by its name; `together` processes compile before the first of them runs.

    The layout of one device does so alone: which algorithms are fastest it can only find out undisturbed, and the
    others read it from the cache of compiled programs.
    """
    alone = [name for name in jobs if name.endswith("-one")]
    others = [name for name in jobs if name not in alone]
    groups = [[name] for name in alone] + [
        others[start : start + together] for start in range(0, len(others), together)
    ]
    with tempfile.TemporaryDirectory() as folder:
        for names in groups:
            with contextlib.ExitStack() as stack:
                layouts = [stack.enter_context(Layout(jobs[name], folder, environment)) for name in names]
                for layout in layouts:
                    layout.wait(limit_s, until_compiled=True)
                for name, layout in zip(names, layouts, strict=True):
                    yield name, layout.found(limit_s)


class Layout:
    """The process of a layout; to be used as a context, at whose end it is ended.

    `job` is what it is given; its files are in `folder`, with those of other layouts.
    """

    def __init__(self, job: dict[str, Any], folder: str, environment: dict[str, str]):
        name = Split(*job["split"]).name
        self._file, self._output = Path(folder) / f"{name}.json", Path(folder) / f"{name}.txt"
        # -P: the installed package, not a checkout that happens to be the working directory
        command = [sys.executable, "-P", "-m", "deepseek_jax.launch._scaling_run", json.dumps(job), folder]
        with self._output.open("w") as said:
            self._process = subprocess.Popen(
                [*command, str(self._file)], env=environment, stdin=subprocess.PIPE, stdout=said, stderr=said
            )
        self._failure = ""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()

    def wait(self, limit_s: int, until_compiled: bool = False) -> None:
        """Waits until its step is compiled or until its end, at most so many seconds; then it is ended."""
        end = time.monotonic() + limit_s
        while self._process.poll() is None and not (until_compiled and READY in self._said()):
            if time.monotonic() > end:
                self._failure = f"took more than {limit_s} s"
                self._process.kill()
                self._process.wait()
            time.sleep(POLL_S)

    def found(self, limit_s: int) -> dict[str, Any]:
        """Lets it run, and returns what it has found."""
        if self._process.poll() is None and self._process.stdin:
            self._process.stdin.write(b"measure\n")
            self._process.stdin.flush()
            self.wait(limit_s)
        if self._file.is_file():
            return json.loads(self._file.read_text())
        failure = self._failure or f"ended with code {self._process.returncode}"
        return {"failed": f"{failure}: {(self._said() or ['no message'])[-1]}"}

    def _said(self) -> list[str]:
        return self._output.read_text(errors="replace").strip().splitlines()


def read(file: Path) -> dict[str, dict]:
    """Returns what earlier runs have measured, by number of devices and layout: {"job": ..., "found": ...}."""
    return json.loads(file.read_text())["entries"] if file.is_file() else {}


def write(file: Path, content: dict[str, Any]) -> None:
    """Writes a file of results, whole or not at all."""
    partial = file.with_suffix(".part")
    partial.write_text(json.dumps(content, indent=1))
    partial.replace(file)


def compared(entries: dict[str, dict], kind: str, chip: str) -> list[dict[str, Any]]:
    """Returns a row for every layout, compared with one device of the same run."""
    groups: dict[int, list] = {}
    for name, entry in sorted(entries.items(), key=lambda item: item[1]["job"]["split"]):
        groups.setdefault(int(name.partition("-")[0]), []).append((name, entry))
    rows = []
    for _, group in sorted(groups.items()):
        one = next((entry for name, entry in group if name.endswith("-one") and "seconds" in entry["found"]), None)
        plan = planner(one, kind, chip) if one else None
        rows += [row(name, entry, one, plan) for name, entry in group]
    return rows


def row(name: str, entry: dict, one: dict | None, plan: Plan | None) -> dict[str, Any]:
    """Returns what is known of a layout: what was measured, and what follows from it."""
    job, found = entry["job"], entry["found"]
    split = Split(*job["split"])
    if "seconds" not in found:
        return {"layout": name, **found}
    tokens = job["config"]["batch"]["size"] * job["config"]["data"]["seq_len"]
    seconds = statistics.median(found["seconds"])
    made: dict[str, Any] = {"layout": name, "split": split._asdict(), **found, "turns": found["seconds"]}
    made |= {"seconds": seconds, "tokens_per_second": tokens / seconds}
    made |= waits(split, *(job["config"]["pipeline"][key] for key in ("micro_batches", "put_off")))
    if one and shared(one["job"]) == shared(job):
        alone = one["found"]
        made["of_one"] = statistics.median(alone["seconds"]) / seconds
        made["losses_off"] = max(abs(a / b - 1) for a, b in zip(found["losses"], alone["losses"], strict=True))
        made["agrees"] = made["losses_off"] <= TOLERANCE.get(job["config"]["precision"], LOW_PRECISION)
    if "of_one" in made and plan and (planned := plan(job["config"])):
        made |= {"planned_tokens_per_second": tokens / planned, "planned_error": seconds / planned - 1}
    return made


def shared(job: dict[str, Any]) -> dict[str, Any]:
    """Returns what must be equal of two jobs for them to be compared: all but the layout."""
    config = {key: value for key, value in job["config"].items() if key not in ("mesh", "pipeline", "sharding")}
    return job | {"split": None, "config": config}


def waits(split: Split, micro_batches: int, put_off: int) -> dict[str, float]:
    """Returns the shares of a step that a rank waits: by the schedule alone, and waiting for neighbours every tick."""
    if split.pipe == 1:
        return {}
    from deepseek_jax.parallel.schedule import make_schedule
    from deepseek_jax.parallel.simulate import Times, bubble, coupled_seconds, simulate, ticks

    unit = Times(forward=1, backward=2, weights=1, both=3).seconds
    schedule = make_schedule(split.schedule, split.pipe, micro_batches, put_off)
    spans = simulate(schedule, unit)
    total = max(span.end for span in spans)
    busy = total - bubble(spans)
    return {"bubble_by_formula": 1 - busy / total, "bubble_in_ticks": 1 - busy / coupled_seconds(ticks(schedule), unit)}


def planner(one: dict, kind: str, chip: str) -> Plan | None:
    """Returns what plans steps, None for an unknown chip.

    Its efficiency is the one with which the planner gives the measured step of `one` device.
    """
    from deepseek_jax.chips import DEVICE_KINDS
    from deepseek_jax.launch import _plan
    from deepseek_jax.plan import schedules
    from deepseek_jax.plan.job import Job
    from deepseek_jax.plan.step_time import step
    from deepseek_jax.saved_config import from_json

    known = [name for part, name in DEVICE_KINDS.items() if part.lower() in kind.lower() and isinstance(name, str)]
    chip = chip or (known or [""])[0]
    if not chip:
        return None

    def job(saved: dict) -> Job:
        config = from_json(saved)
        options = SimpleNamespace(devices=0, chip=chip, recipe="run", schedule="", overrides={})
        return _plan.job_of(config, options, _plan.subject_of(config, is_whole=False))

    alone, seconds = job(one["job"]["config"]), statistics.median(one["found"]["seconds"])
    low, high = LEAST_EFFICIENCY, MOST_EFFICIENCY
    while high > low * 1.0001:
        middle = (low * high) ** 0.5
        low, high = (middle, high) if step(alone, middle).total > seconds else (low, middle)

    def seconds_of(saved: dict) -> float | None:
        is_known = saved["mesh"]["pipe"] == 1 or saved["pipeline"]["schedule"] in schedules.SCHEDULES
        return step(job(saved), low).total if is_known else None

    return seconds_of


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    """Returns a row of the table."""
    if "seconds" not in row:
        return (row["layout"], *([""] * (len(COLUMNS) - 2)), f"{next(iter(row.keys() - {'layout'}))}")

    def share(key: str) -> str:
        return f"{row[key]:.1%}" if key in row else ""

    profile = row["profile"]
    hidden = [
        f"{profile[f'{part}_hidden'] / profile[part]:.0%}" if profile.get(part) else "-"
        for part in ("exchange", "main_exchange")
    ]
    plan = f"{row['planned_tokens_per_second']:,.0f} ({row['planned_error']:+.1%})" if "planned_error" in row else ""
    return (
        row["layout"],
        f"{row['tokens_per_second']:,.0f}",
        f"{row['of_one']:.2f}" if "of_one" in row else "",
        f"{1e3 * row['seconds']:,.1f} ms",
        f"{row['losses_off']:.1e}{'' if row['agrees'] else ' TOO MUCH'}" if "agrees" in row else "",
        f"{row['imbalance']:.2f}" if "imbalance" in row else "",
        computing(profile),
        f"{profile['waiting'] / profile['step']:.1%}" if profile else "",
        share("bubble_by_formula"),
        share("bubble_in_ticks"),
        f"{hidden[0]}, main {hidden[1]}" if profile else "",
        f"{profile['nccl'] / profile['step']:.1%}" if profile else "",
        exchanged(row),
        plan,
    )


def computing(profile: dict[str, float]) -> str:
    """Returns for what share of a step devices compute, on average and the busiest; "" without a profile."""
    if "compute_most" not in profile:
        return ""
    return f"{profile['compute'] / profile['step']:.1%}, {profile['compute_most'] / profile['step']:.1%}"


def exchanged(row: dict[str, Any]) -> str:
    """Returns what the exchange of tokens sent, and how fast; "" without a profile or an exchange."""
    if not (row["profile"].get("exchange") and row.get("sent_bytes")):
        return ""
    n_bytes = 2 * row["sent_bytes"]
    return f"{n_bytes / 1e9:,.1f} GB, {n_bytes / row['profile']['exchange'] / 1e6:,.0f} GB/s"


def show(rows: list[dict]) -> None:
    """Prints the table, and what stands in no column."""
    print()
    print_table(COLUMNS, [cells(row) for row in rows], right=COLUMNS[1:4])
    for row in rows:
        if "seconds" not in row:
            print(f"{row['layout']}: {row.get('refused') or row.get('failed')}")
        elif row["peak_memory_bytes"]:
            compiled = f"compiled in {row['compile_seconds']:.0f} s"
            print(f"{row['layout']}: {binary(row['peak_memory_bytes'])} at most, {compiled}")
