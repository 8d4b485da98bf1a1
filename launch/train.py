"""Train a model, or go on with a run that was stopped or killed.

    deepseek-jax train                                        # a small DeepSeek-V3 on Python's own library
    deepseek-jax train --config=tiny_v3 --workdir=runs/a --config.train.steps=2000
    deepseek-jax train --workdir=runs/a                       # goes on from the last checkpoint of runs/a
    deepseek-jax train --config=DIR --config.data.source='mine/*.txt'      # fine-tunes the model in DIR

DIR holds published weights (config.json and safetensors files) or is the workdir of a run.  Family, sizes, tokenizer
and context length come from it; the recipe is a constant rate of 1e-5 after 20 steps of warm-up, batches of 8 sequences
of 2,048 tokens at most, 200 steps; any key of it can be set.  --config.train.init_from=DIR alone does the same, and
beside a --config of your own it takes only weights, tokenizer and marks from DIR.

The workdir (runs/NAME by default) receives checkpoints/, metrics.jsonl and tensorboard/.  SIGTERM, SIGHUP or Ctrl-C
saves and ends; started again with the same words, the run goes on as if nothing had happened, on any mesh that fits.

A signal to any process of several stops all of them within the step in flight and 5 s, and the time of a save.  A
process that is lost is noticed within 45 s; the others say so and end with exit code 75 (if it is process 0, JAX may
end them first, within a second and in its own words).  A second Ctrl-C ends without saving the present step.  Exit
codes: 0 done, or saved after SIGTERM or SIGHUP; 130 saved after Ctrl-C, or broken off; 1 not saved; 2 something to
correct; 75 another process was lost; 128 + the signal's number: stopped before training.
"""

import os
import shlex
import signal
from pathlib import Path

from ml_collections import ConfigDict

from deepseek_jax import streams
from deepseek_jax.errors import UserError
from deepseek_jax.launch import _beginning, _bounds, _options
from deepseek_jax.launch._progress import Progress

DEFAULT = "tiny_v3"
EXTRA = {"sample": (bool, True, "end with a generated sample")}
# What may not change within a run: the network, and what decides the order of its samples.  The text itself is compared
# by its fingerprint.
FIXED = ("family", "model", "seed", "data.seq_len", "data.fim_rate", "data.mask_documents", "data.holdout_rate")
FIXED += ("train.batch_size", "train.batch_size_start", "train.batch_ramp_steps")
SAMPLE = "    def __init__(self"  # what the model goes on from when a run has ended


def main(argv: list[str]) -> int:
    """Runs the verb; returns the exit code."""
    options = _options.parse(argv, DEFAULT, EXTRA)
    config = options.config
    workdir = options.workdir or Path("runs") / config.name
    leave_own_text(config, options.overrides)
    _options.validate(config, CHECKS)
    _beginning.inherit(config, options.overrides, workdir)
    if Path(config.data.tokenizer).exists():  # so that the run's model finds it from anywhere
        config.data.tokenizer = os.path.abspath(config.data.tokenizer)
    again = argv if options.workdir else [*argv, f"--workdir={workdir}"]
    return run(config, workdir, sample=options.sample, again=shlex.join(["deepseek-jax", "train", *again]))


def leave_own_text(config: ConfigDict, overrides: dict[str, str]) -> None:
    """Turns fill-in-the-middle off for text that the user names: a recipe's share is for the recipe's own text.

    Whoever wants it gives the share as well.  `headline` says which it is.
    """
    if "data.source" in overrides and overrides["data.source"] != "stdlib" and "data.fim_rate" not in overrides:
        config.data.fim_rate = 0.0


def run(config: ConfigDict, workdir: Path, *, sample: bool, again: str) -> int:
    """Trains `config` in `workdir`; returns the exit code.

    Args:
        config: the resolved config.
        workdir: where the run is kept.
        sample: whether to end with a generated sample.
        again: the command that goes on with this run, for messages.
    """
    from deepseek_jax.compat import keep_freed_memory, start_compilation_cache, start_processes
    from deepseek_jax.parallel.peers import Peers
    from deepseek_jax.train.stop import StopRequest

    keep_freed_memory()
    start_processes()
    with streams.forgiving(), StopRequest() as stop:
        start_compilation_cache(config.train.compilation_cache)
        try:
            with Peers(lambda: advice(workdir, again)) as peers:
                is_saved = train(config, workdir, stop, again, peers)
        except KeyboardInterrupt:
            reason = "broken off" if stop.is_running else "stopped before training began: nothing was to be saved"
            streams.note(f"\n{reason}. {advice(workdir, again)}")
            return 130 if stop.is_running else stop.exit_code
        if not is_saved:
            return 1
        if stop.signal is not None:
            return 130 if stop.signal == signal.SIGINT else 0
        if sample:
            show_sample(config, workdir)
    return 0


def advice(workdir: Path, again: str) -> str:
    """Returns where the newest checkpoint is and how to go on, as this process alone sees it."""
    from deepseek_jax.train.manifest import committed_steps

    checkpoints = workdir / "checkpoints"
    steps = committed_steps(checkpoints)
    newest = f"The newest checkpoint is of step {steps[-1]}" if steps else "There is no checkpoint"
    return f"{newest} in {checkpoints}. Start again with: {again}"


def train(config: ConfigDict, workdir: Path, stop, again: str, peers) -> bool:
    """Trains until the last step or until `stop` is asked for; returns whether the last state has been saved."""
    import jax

    from deepseek_jax.train.checkpoint import Checkpointer
    from deepseek_jax.train.loop import Loop
    from deepseek_jax.train.metrics import Metrics

    trainer, ramp, training, held_out = prepare(config, workdir)
    meta = {"config": _options.to_json(config), "text": training.fingerprint()}
    with Checkpointer(workdir / "checkpoints", config.checkpoint.keep) as checkpoints, peers.guard(stop):
        start, state, changed = 0, None, []
        if checkpoints.latest() is not None:
            saved = checkpoints.read_meta()[1]
            if "text" not in saved:
                raise UserError(
                    f"{workdir} holds converted weights, not a run. Give the run a --workdir of its own and "
                    f"--config.train.init_from={workdir}."
                )
            check_same_run(config, meta["text"], saved, workdir)
            changed = differences(_options.from_json(saved["config"]), config)
            start, state, _ = checkpoints.restore(trainer.abstract)
        metrics = Metrics(
            workdir,
            config.train.steps,
            start_step=start,
            flops_per_token=trainer.flops_per_token(config.data.seq_len),
            device_kind=jax.devices()[0].device_kind,
            n_devices=trainer.mesh.size,
            enabled=jax.process_index() == 0,
        )
        with metrics:
            metrics.message(headline(config, trainer, training, held_out, workdir, start))
            for change in changed:
                metrics.message(f"changed since the checkpoint: config.{change}")
            if start >= config.train.steps:
                metrics.message(f"This run has reached step {start}. To continue: --config.train.steps={2 * start}")
                return True
            loop = Loop(
                trainer,
                ramp,
                loop_config(config),
                training=training,
                held_out=held_out,
                checkpoints=checkpoints,
                metrics=metrics,
                meta=meta,
            )
            state = loop.run(first_state(config, trainer, workdir, metrics) if state is None else state, stop)
            return tell_end(int(state["step"]), config.train.steps, checkpoints, metrics, again)


def prepare(config: ConfigDict, workdir: Path) -> tuple:
    """The trainer, the batch ramp and both sides of the text; fills in the keys of `config` that the text decides.

    The text comes last, for to tokenise it may take long: what is wrong elsewhere is reported before.
    """
    import jax

    from deepseek_jax.data.pipeline import open_splits, settled
    from deepseek_jax.data.tokenizer import open_tokenizer
    from deepseek_jax.parallel.mesh import make_mesh

    if config.precision == "fp32":  # GPUs and TPUs would otherwise round the operands of a matmul
        jax.config.update("jax_default_matmul_precision", "highest")
    mesh = make_mesh(**config.mesh)
    ramp = batch_ramp(config, mesh.size)
    _beginning.check_sizes(config)
    config.data.update(settled(config.data))
    data = {**config.data, "tokenizer": open_tokenizer(config.data.tokenizer)}
    check_vocabulary(config, data["tokenizer"])
    trainer = build_trainer(config, mesh)
    check_writable(workdir)
    return trainer, ramp, *open_splits(seed=config.seed, watch=Progress, **data)


def check_vocabulary(config: ConfigDict, tokenizer) -> None:
    """Raises UserError if the tokenizer has more ids than the model."""
    if tokenizer.vocab_size > config.model.vocab_size:
        raise UserError(
            f"config.model.vocab_size={config.model.vocab_size} is smaller than the {tokenizer.vocab_size} ids of "
            f"tokenizer {config.data.tokenizer!r}. Set --config.model.vocab_size={tokenizer.vocab_size} or more."
        )


def check_writable(workdir: Path) -> None:
    """Raises UserError if the directory of a run, or the nearest above it that exists, cannot be written."""
    nearest = next(path for path in (workdir.absolute(), *workdir.absolute().parents) if path.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        reason = "you may not write there" if nearest.is_dir() else "it is no directory"
        raise UserError(f"--workdir={workdir} cannot be used: {nearest}: {reason}. Choose another --workdir.")


def first_state(config: ConfigDict, trainer, workdir: Path, metrics) -> dict:
    """The state before the first step; with `train.init_from`, the weights of another run or published ones, whose
    tokenizer and other small files are copied to the workdir."""
    state = trainer.init(config.seed)
    if not config.train.init_from:
        return state
    import jax

    from deepseek_jax import release
    from deepseek_jax.convert.hf import copy_files
    from deepseek_jax.stored import WEIGHTS, read_weights

    if jax.process_index() == 0:
        copy_files(release.files_to_keep(config), workdir)
    for name in WEIGHTS:
        del state[name]  # makes room
    source, weights = read_weights(config.train.init_from, {name: trainer.abstract[name] for name in WEIGHTS})
    metrics.message(f"weights of {config.train.init_from}")
    for change in differences(source.model, config.model):
        metrics.message(f"other than there: config.model.{change}")
    return state | weights


def tell_end(done: int, steps: int, checkpoints, metrics, again: str) -> bool:
    """Says where the state is and how to go on; returns whether the last step has been saved."""
    is_saved = checkpoints.wait() and checkpoints.latest() == done
    if is_saved:
        metrics.message(f"checkpoint of step {done}: {checkpoints.directory}")
    elif done:
        newest = checkpoints.latest()
        there = "there is no checkpoint" if newest is None else f"the newest checkpoint is of step {newest}"
        metrics.message(f"step {done} could not be saved; {there} in {checkpoints.directory}")
    if done < steps:
        metrics.message(f"stopped on request; go on with: {again}")
    return is_saved or not done


def build_trainer(config: ConfigDict, mesh):
    """The `Trainer` of a run."""
    from deepseek_jax.layers.router import Balance
    from deepseek_jax.models import family
    from deepseek_jax.plan import flops
    from deepseek_jax.plan.network import describe
    from deepseek_jax.precision.policy import policy
    from deepseek_jax.train.optim import OptimizerConfig
    from deepseek_jax.train.step import StepConfig, Trainer

    module, train = family(config.family), config.train
    sizes = module.Config.from_config(config.model)
    step_config = StepConfig(
        micro_batches=train.micro_batches,
        loss_chunk=train.loss_chunk,
        mask_documents=config.data.mask_documents,
        mtp_weight=train.mtp_weight,
        mtp_weight_final=train.mtp_weight_final,
        mtp_weight_switch=train.mtp_weight_switch,
        balance_rate=train.balance_rate,
        balance_rate_stop=train.balance_rate_stop,
        balance_loss=Balance(train.balance_loss, train.device_balance_loss, train.communication_balance_loss),
    )
    return Trainer(
        lambda run, rngs: module.Model(sizes, run, rngs=rngs),
        mesh,
        config.sharding.to_dict(),
        step_config,
        OptimizerConfig(**config.optimizer),
        compute=policy(config.precision).compute,
        remat=train.remat,
        unroll=train.unroll,
        flops_per_token=lambda seq_len: flops.training(describe(module, sizes), seq_len),
    )


def batch_ramp(config: ConfigDict, n_devices: int):
    """How the batch grows. Raises UserError if it does not divide over the devices and micro-batches."""
    from deepseek_jax.train.ramp import BatchRamp

    train = config.train
    multiple = n_devices * train.micro_batches
    for key in ("batch_size", "batch_size_start"):
        if train[key] % multiple:
            raise UserError(
                f"config.train.{key}={train[key]} does not divide over {n_devices} devices x {train.micro_batches} "
                f"micro-batches. Choose a multiple of {multiple}."
            )
    ramp_steps = train.batch_ramp_steps if train.batch_size_start != train.batch_size else 0
    return BatchRamp(train.batch_size_start, train.batch_size, ramp_steps)


def loop_config(config: ConfigDict):
    """When the loop does what."""
    from deepseek_jax.train.loop import LoopConfig

    train = config.train
    return LoopConfig(
        steps=train.steps,
        log_every=train.log_every,
        eval_every=train.eval_every,
        eval_batches=train.eval_batches,
        checkpoint_every=config.checkpoint.every,
        max_skipped=train.max_skipped,
    )


def check_same_run(config: ConfigDict, text: str, saved: dict, workdir: Path) -> None:
    """Raises UserError if `config` and the text's fingerprint cannot go on with the run whose meta is `saved`."""
    for change in differences(_options.from_json(saved["config"]), config):
        if change.startswith(tuple(f"{path}{end}" for path in FIXED for end in (".", ":"))):
            raise UserError(
                f"{workdir} holds a run of other settings: config.{change}. "
                "Give the same value to go on with it, or another --workdir to start anew."
            )
    if saved["text"] != text:
        raise UserError(
            f"{workdir} holds a run on other text than config.data.source={config.data.source!r} is now (or on another "
            "tokenizer's tokens).\nGive the same text to go on with it, or another --workdir to start anew."
        )


def differences(old: ConfigDict, new: ConfigDict, path: str = "") -> list[str]:
    """The keys in which two configs differ, as "path.key: old -> new"."""
    found = []
    for key in sorted({*old, *new}):
        before, after = old.get(key), new.get(key)
        if isinstance(before, ConfigDict) and isinstance(after, ConfigDict):
            found += differences(before, after, f"{path}{key}.")
        elif before != after:
            found.append(f"{path}{key}: {before!r} -> {after!r}")
    return found


def headline(config: ConfigDict, trainer, training, held_out, workdir: Path, start: int) -> str:
    """The lines printed before the first step."""
    import jax

    mesh = " x ".join(f"{axis} {n}" for axis, n in trainer.mesh.shape.items())
    begin = f"going on from step {start}" if start else "from the beginning"
    return "\n".join(
        [
            f"{config.name}: {trainer.n_params / 1e6:,.1f}M parameters, {config.precision}, mesh {mesh} "
            f"({jax.devices()[0].device_kind}), {begin} in {workdir}",
            *about_text(config, training, held_out),
            "the first step compiles for a while",
        ]
    )


def about_text(config: ConfigDict, training, held_out) -> list[str]:
    """The lines on the text: how much there is, what is held out, and of a user's own text what is done with it."""
    data = config.data
    size = f"{training.n_tokens / 1e6:,.1f}M" if training.n_tokens >= 1e5 else f"{training.n_tokens:,}"
    lines = [f"text: {data.source}, {size} tokens an epoch, {training.summary}"]
    n_epochs = config.train.steps * config.train.batch_size * data.seq_len / training.n_tokens
    lines[0] += f", read {n_epochs:,.0f} times" if n_epochs >= 2 else ""
    if held_out is not None:
        end = "the end of the document" if held_out.n_documents == 1 else "the end of each long document"
        which = held_out.summary if held_out.has_whole_documents else end
        lines.append(f"held out to evaluate on: {which}, {held_out.n_tokens:,} tokens")
    if data.source == "stdlib" or data.format == "conversations":
        return lines
    if training.passed_over:
        names = ", ".join(sorted({path.suffix or path.name for path in training.passed_over})[:5])
        lines.append(f"files passed over: {len(training.passed_over):,} of other types ({names})")
    if data.fim_rate:
        lines.append(
            f"fill-in-the-middle: {data.fim_rate:.0%} of the documents (--config.data.fim_rate=0 turns it off)"
        )
    else:
        lines.append("fill-in-the-middle: off (--config.data.fim_rate=0.1 trains a tenth of the documents that way)")
    return lines


def show_sample(config: ConfigDict, workdir: Path) -> None:
    """Prints the command that speaks with the model, and what it says; a run that has ended well ends well without."""
    import jax

    from deepseek_jax.launch import generate

    if jax.process_count() > 1:
        return
    if config.data.format == "conversations":
        print(f"talk with it: deepseek-jax chat --workdir={workdir}", flush=True)
        return
    print(f"speak with it: deepseek-jax generate --workdir={workdir} --prompt='def '\n", flush=True)
    prompt = SAMPLE[: config.data.seq_len // 2] or " "
    try:
        generate.main([f"--workdir={workdir}", f"--prompt={prompt}", "--max-tokens=220", "--temperature=0.8"])
    except UserError as error:
        print(f"no sample: {error}")


CHECKS = (_bounds.check_keys, _bounds.check_model)
