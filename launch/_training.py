"""A training run from its config to its last checkpoint: what the verbs that train have in common."""

import functools
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ml_collections import ConfigDict

from deepseek_jax import streams
from deepseek_jax.launch import _beginning
from deepseek_jax.launch._continuation import show_sample
from deepseek_jax.launch._headline import headline
from deepseek_jax.launch._progress import Progress
from deepseek_jax.paths import check_writable
from deepseek_jax.storage import Place, StorageError

if TYPE_CHECKING:
    from deepseek_jax.parallel.peers import Peers
    from deepseek_jax.train.checkpoint.checkpointer import Checkpointer
    from deepseek_jax.train.metrics import Metrics
    from deepseek_jax.train.phases import Phases
    from deepseek_jax.train.step import Trainer
    from deepseek_jax.train.stop import StopRequest
    from deepseek_jax.train.wandb_run import WandbRun


Run = Callable[[ConfigDict, Any, "StopRequest", str, "Peers", "Phases"], bool]


def execute(config: ConfigDict, workdir: Place, *, sample: bool, again: str, run: Run | None = None) -> int:
    """Trains `config` in `workdir`; returns the exit code.

    `sample` ends it with a generated sample; `again` is the command that resumes this run, for messages. `run` takes
    the place of `train`.
    """
    from deepseek_jax.compat import keep_freed_memory, start_compilation_cache, start_processes
    from deepseek_jax.parallel.peers import LOST, Peers
    from deepseek_jax.train.checkpoint.checkpointer import print_warning
    from deepseek_jax.train.mirror import mirrored, upload
    from deepseek_jax.train.phases import Phases
    from deepseek_jax.train.stop import StopRequest
    from deepseek_jax.train.watchdog import Limits, Watchdog

    keep_freed_memory()
    watch, phases = config.watch, Phases()
    limits = Limits(watch.alone, watch.step_s, watch.long_s, watch.stop_s)
    start_processes(watch.heartbeat_s)
    with streams.forgiving(), StopRequest() as stop:
        start_compilation_cache(config.run.compilation_cache)
        try:
            with (
                # Before the files of an earlier start are fetched, for that may take longer than a beat may be late.
                Peers(lambda: advice(workdir, again), heartbeat_s=watch.heartbeat_s) as peers,
                mirrored(workdir, print_warning) as folder,
                Watchdog(limits, phases, stop, peers, folder, lambda: upload(workdir)),
            ):
                is_saved = (run or train)(config, workdir, stop, again, peers, phases)
        except KeyboardInterrupt:
            reason = "broken off" if stop.is_running else "stopped before training began: nothing was to be saved"
            streams.note(f"\n{reason}. {advice(workdir, again)}")
            return 130 if stop.is_running else stop.exit_code
        if not is_saved:
            return 1
        if stop.signal is not None:
            return 130 if stop.signal == signal.SIGINT else 0
        if stop.ends_early:
            return LOST  # the signal was another process's: this one is not done, and may be started again
        if sample:
            show_sample(config, workdir)
    return 0


def advice(workdir: Place, again: str) -> str:
    """Returns where the newest checkpoint is and how to resume, as this process alone sees it."""
    from deepseek_jax.train.checkpoint.manifest import committed_steps

    then = f"Start again with: {again}"
    checkpoints = workdir / "checkpoints"
    try:
        steps = committed_steps(checkpoints)
    except StorageError:
        return f"The bucket does not answer, so the newest checkpoint in {checkpoints} is not known. {then}"
    newest = f"The newest checkpoint is of step {steps[-1]}" if steps else "There is no checkpoint"
    return f"{newest} in {checkpoints}. {then}"


def train(
    config: ConfigDict, workdir: Place, stop: "StopRequest", again: str, peers: "Peers", phases: "Phases"
) -> bool:
    """Trains until the last step or until `stop` is asked for; returns whether the last state has been saved."""
    import jax

    from deepseek_jax import run
    from deepseek_jax.saved_config import to_json
    from deepseek_jax.train.hosts import Hosts
    from deepseek_jax.train.ledger import Ledger
    from deepseek_jax.train.loop import Loop, LoopConfig
    from deepseek_jax.train.metrics import Metrics
    from deepseek_jax.train.mirror import local
    from deepseek_jax.train.phases import RESTORE, SAVE
    from deepseek_jax.train.profiles import Profiles

    trainer, ramp, training, held_out = prepare(config, workdir, phases)
    folder = local(workdir)
    meta = {"config": to_json(config), "text": training.fingerprint()}
    with (
        open_checkpoints(config, workdir) as checkpoints,
        peers.guard(stop),
    ):
        with phases.of(RESTORE):
            start, state, average, changed = resumed(config, trainer, checkpoints, meta["text"], workdir)
        metrics = Metrics(
            folder,
            config.loop.steps,
            start_step=start,
            flops_per_token=trainer.flops_per_token(config.data.seq_len),
            device_kind=jax.devices()[0].device_kind,
            n_devices=trainer.mesh.size,
            enabled=jax.process_index() == 0,
            charts=charts(config, folder),
        )
        with metrics:
            metrics.message(headline(config, trainer, training, held_out, workdir, start))
            for change in changed:
                metrics.message(f"changed since the checkpoint: config.{change}")
            if start >= config.loop.steps:
                metrics.message(f"This run has reached step {start}. To continue: --config.loop.steps={2 * start}")
                return True
            when = LoopConfig(**config.loop, checkpoint_every=config.checkpoint.every)
            kept: dict[str, Any] = {"checkpoints": checkpoints, "metrics": metrics, "meta": meta}
            state = state or run.first_state(config, trainer, folder, metrics.message)
            kept |= {"average": run.average(config, trainer, state, average), "judge_average": config.ema.evaluate}
            kept["ledger"] = ledger = Ledger(folder, phases, start, enabled=metrics.enabled)
            kept["hosts"] = Hosts(folder, phases, config.watch.slow, metrics.message)
            with Profiles(folder, **config.profile) as kept["profiles"]:
                loop = Loop(trainer, ramp, when, training=training, held_out=held_out, phases=phases, **kept)
                state = loop.run(state, stop)
            done = int(state["step"])
            with phases.of(SAVE):
                is_saved = report_end(done, config.loop.steps, checkpoints, metrics, again)
            ledger.close(done, metrics.message)
            return is_saved


def open_checkpoints(config: ConfigDict, workdir: Place) -> "Checkpointer":
    """Returns the checkpoints of a run; all processes call it together."""
    from deepseek_jax.train.checkpoint.checkpointer import Checkpointer
    from deepseek_jax.train.mirror import upload

    chosen = config.checkpoint
    here = Path(chosen.local).expanduser() if chosen.local else None
    return Checkpointer(workdir / "checkpoints", chosen.keep, committed=lambda: upload(workdir), local=here)


def charts(config: ConfigDict, workdir: Path) -> "Callable[[], WandbRun] | None":
    """Returns what makes the run of another service that shows the charts, None if the config names none."""
    from deepseek_jax.saved_config import to_json
    from deepseek_jax.train.wandb_run import WandbRun

    project = config.wandb.project
    return (lambda: WandbRun(workdir, project, to_json(config))) if project else None


def resumed(
    config: ConfigDict, trainer: "Trainer", checkpoints: "Checkpointer", text: str, workdir: Place
) -> tuple[int, dict | None, dict | None, list[str]]:
    """Returns the step of the latest checkpoint, its state, its moving average, what the config has changed since.

    The average is None where the checkpoint has none, or the run keeps none. Without a checkpoint: (0, None, None, []).
    """
    from deepseek_jax import run
    from deepseek_jax.saved_config import completed, from_json
    from deepseek_jax.train.loop import EMA

    if checkpoints.latest() is None:
        return 0, None, None, []
    saved = checkpoints.read_meta()[1]
    run.check_same_run(config, text, saved, workdir)
    expected = trainer.stored | ({EMA: trainer.stored["params"]} if config.ema.decay else {})
    start, stored, _ = checkpoints.restore(expected, optional=(EMA,))
    average = stored.pop(EMA, None)
    return start, trainer.load(stored), average, run.differences(completed(from_json(saved["config"])), config)


def prepare(config: ConfigDict, workdir: Place, phases: "Phases") -> tuple:
    """The trainer, the batch ramp and both sides of the text; fills in the keys of `config` that the text decides.

    The text comes last, for to tokenise it may take long: what is wrong elsewhere is reported before. `phases`
    hears of its progress.
    """
    from deepseek_jax import run
    from deepseek_jax.data.pipeline import open_splits, settled
    from deepseek_jax.data.tokenizer import open_tokenizer
    from deepseek_jax.parallel.mesh import SEQUENCES, make_mesh, size

    settle_products(config)
    mesh = make_mesh(**config.mesh)
    ramp = run.batch_ramp(config, size(mesh, SEQUENCES))
    _beginning.check_sizes(config)
    config.data.update(settled(config.data))
    data = {**config.data, "tokenizer": open_tokenizer(config.data.tokenizer)}
    run.check_vocabulary(config, data["tokenizer"])
    trainer = run.trainer(config, mesh)
    if isinstance(workdir, Path):
        check_writable(workdir, "--workdir")
    watch = functools.partial(Progress, heard=phases.excuse)
    return trainer, ramp, *open_splits(seed=config.seed, watch=watch, **data)


def settle_products(config: ConfigDict) -> None:
    """Settles how products of float32 are rounded from here on, also after a run of another precision.

    In precision fp32 not at all, where GPUs and TPUs would round the operands; in others as jax does.
    """
    import jax

    usual = os.environ.get("JAX_DEFAULT_MATMUL_PRECISION")
    jax.config.update("jax_default_matmul_precision", "highest" if config.precision == "fp32" else usual)


def report_end(done: int, steps: int, checkpoints: "Checkpointer", metrics: "Metrics", again: str) -> bool:
    """Reports where the checkpoint is and how to resume; returns whether the last step has been saved."""
    is_saved = checkpoints.wait() and checkpoints.latest() == done
    if is_saved:
        metrics.message(f"checkpoint of step {done}: {checkpoints.directory}")
    elif done:
        newest = checkpoints.latest()
        there = "there is no checkpoint" if newest is None else f"the newest checkpoint is of step {newest}"
        metrics.message(f"step {done} could not be saved; {there} in {checkpoints.directory}")
    if done < steps:
        metrics.message(f"stopped on request; resume with: {again}")
    return is_saved or not done
