"""Reinforcement learning as verbs use it: the programs of a run, and the run from its config to its last checkpoint."""

from typing import TYPE_CHECKING, Any

from ml_collections import ConfigDict

from deepseek_jax.errors import UserError
from deepseek_jax.launch import _beginning
from deepseek_jax.launch._training import charts, open_checkpoints, report_end, settle_products
from deepseek_jax.storage import Place

if TYPE_CHECKING:
    from deepseek_jax.parallel.peers import Peers
    from deepseek_jax.rl.distillation import Teacher
    from deepseek_jax.rl.engine_rollout import EngineRoller
    from deepseek_jax.rl.problems import Problems
    from deepseek_jax.rl.rewards import Rewards
    from deepseek_jax.rl.step import Learner
    from deepseek_jax.rl.turns import Turns
    from deepseek_jax.train.checkpoint.checkpointer import Checkpointer
    from deepseek_jax.train.phases import Phases
    from deepseek_jax.train.step import Trainer
    from deepseek_jax.train.stop import StopRequest

FIXED: tuple[str, ...] = ("family", "model.", "seed", "lora.rank", "lora.alpha", "lora.targets")
FIXED += ("rl.teacher", "rl.problems", "rl.holdout_rate", "rl.questions", "rl.answers", "rl.updates")


def inherit_template(config: ConfigDict) -> None:
    """Takes the chat template of the run to begin with, unless one is named; published weights bring theirs."""
    from deepseek_jax.weights import is_published, open_weights

    if not config.data.chat_template and not is_published(config.run.init_from):
        config.data.chat_template = open_weights(config.run.init_from).config.data.chat_template


def open_problems(config: ConfigDict) -> "Problems":
    """Returns the problems of a run."""
    from deepseek_jax.rl import problems

    return problems.open_problems(config.rl.problems, config.seed, config.rl.holdout_rate)


def train(
    config: ConfigDict, workdir: Place, stop: "StopRequest", again: str, peers: "Peers", phases: "Phases"
) -> bool:
    """Trains until the last step or until `stop` is asked for; returns whether the last state has been saved."""
    import jax

    from deepseek_jax.rl.loop import Loop, LoopConfig
    from deepseek_jax.rl.rewards import Rewards
    from deepseek_jax.saved_config import to_json
    from deepseek_jax.train.ledger import Ledger
    from deepseek_jax.train.metrics import Metrics
    from deepseek_jax.train.mirror import local
    from deepseek_jax.train.phases import RESTORE, SAVE
    from deepseek_jax.train.profiles import Profiles

    rl, folder = config.rl, local(workdir)
    with (
        Rewards(used(rl.rewards), rl.verifiers, rl.verify_s) as rewards,
        open_checkpoints(config, workdir) as checkpoints,
        peers.guard(stop),
    ):
        learner = prepare(config, rewards)
        meta = {"config": to_json(config), "problems": learner.problems.fingerprint}
        with phases.of(RESTORE):
            start, state = resumed(config, learner, checkpoints, workdir)
        kind, n_devices = jax.devices()[0].device_kind, learner.trainer.mesh.size
        of: dict[str, Any] = {"device_kind": kind, "n_devices": n_devices, "enabled": jax.process_index() == 0}
        of["charts"] = charts(config, folder)
        with Metrics(folder, config.loop.steps, start_step=start, verb="rl", **of) as metrics:
            metrics.message(headline(config, learner, workdir, start))
            if start >= config.loop.steps:
                metrics.message(f"This run has reached step {start}. To continue: --config.loop.steps={2 * start}")
                return True
            when = LoopConfig(
                **{key: config.loop[key] for key in ("steps", "log_every", "eval_every", "max_skipped")},
                checkpoint_every=config.checkpoint.every,
                refresh_every=rl.refresh_every,
                eval_problems=rl.eval_problems,
            )
            ledger = Ledger(folder, phases, start, enabled=metrics.enabled)
            kept: dict[str, Any] = {"checkpoints": checkpoints, "metrics": metrics, "meta": meta, "ledger": ledger}
            with Profiles(folder, **config.profile) as profiles:
                loop = Loop(learner, when, **kept, workdir=folder, phases=phases, profiles=profiles)
                if state is None:
                    from deepseek_jax import run

                    state = loop.begin(run.first_state(config, learner.trainer, folder, metrics.message))
                _, done = loop.run(state, start, stop)
            with phases.of(SAVE):
                is_saved = report_end(done, config.loop.steps, checkpoints, metrics, again)
            ledger.close(done, metrics.message)
            return is_saved


def used(rewards: ConfigDict) -> dict[str, float]:
    """Returns the weights of rewards; accuracy and format are reported even at weight 0."""
    return {name: weight for name, weight in rewards.items() if weight or name in ("accuracy", "format")}


def prepare(config: ConfigDict, rewards: "Rewards") -> "Learner":
    """Returns the programs of a run. Raises UserError for settings that do not suit one another."""
    from deepseek_jax import release, run
    from deepseek_jax.data.conversations import template_name
    from deepseek_jax.data.tokenizer import open_tokenizer
    from deepseek_jax.parallel.mesh import make_mesh
    from deepseek_jax.rl.grpo import GRPO
    from deepseek_jax.rl.objective import PolicyGradient, learnt
    from deepseek_jax.rl.step import Learner, StepSizes
    from deepseek_jax.rl.turns import Turns

    settle_products(config)
    rl = config.rl
    check_sizes(config)
    _beginning.check_sizes(config)
    tokenizer = open_tokenizer(config.data.tokenizer)
    run.check_vocabulary(config, tokenizer)
    name = template_name(config.data.chat_template, config.data.tokenizer)
    ends = release.marks(config, tokenizer).end_ids
    turns = Turns(tokenizer, name, rl.thinking, rl.longest_prompt, rl.longest_answer, ends)
    objective = PolicyGradient(GRPO(**rl.grpo), rl.temperature, config.loss.chunk, run.auxiliary(config))
    trainer = run.trainer(config, make_mesh(**config.mesh), objective, learnt, routes=rl.keep_routing)
    sizes = StepSizes(rl.questions, rl.answers, rl.updates, rl.temperature, rl.top_p, rl.rows_at_once)
    check_rows(config, trainer.mesh.size)
    teacher = open_teacher(config, trainer) if rl.teacher else None
    problems, roll = open_problems(config), engine_roller(config, trainer, turns)
    learner = Learner(trainer, turns, problems, rewards, sizes, config.seed, teacher, roll)
    learner.check()
    return learner


def engine_roller(config: ConfigDict, trainer: "Trainer", turns: "Turns") -> "EngineRoller | None":
    """Returns what draws the answers of a step where config.rl.rollout is engine; None where one program does.

    Raises UserError for draws whose log-probabilities the engine does not report, and for several devices.
    """
    if config.rl.rollout != "engine":
        return None
    from deepseek_jax import on_device
    from deepseek_jax.abstract_model import abstract_module
    from deepseek_jax.kernels import XLA
    from deepseek_jax.language_model import OFFLINE
    from deepseek_jax.layers.base import split
    from deepseek_jax.rl.engine_rollout import EngineRoller
    from deepseek_jax.serve.engine import Engine

    check_engine(config, trainer.mesh.size)
    rl = config.rl
    n_positions, n_rows = rl.longest_prompt + rl.longest_answer, rl.rows_at_once or rl.questions * rl.answers
    options: dict[str, Any] = {"chunk": on_device.chunk(), "compiler_options": on_device.compiler_options()}
    options |= {"ends_early": on_device.ends_early(), "n_rows": n_rows} | OFFLINE
    options["matmul_precision"] = "highest" if config.precision == "fp32" else None
    definition = on_device.definition(config, split(abstract_module(config, XLA))[0])
    return EngineRoller(
        lambda weights: Engine(definition, weights, n_positions, **options),
        on_device.Prepared(config),
        turns.longest_answer,
        turns.end_ids,
    )


def check_engine(config: ConfigDict, n_devices: int) -> None:
    """Raises UserError for settings with which the engine does not draw."""
    for key, expected in (("rl.temperature", 1.0), ("rl.top_p", 1.0), ("rl.keep_routing", False), ("lora.rank", 0)):
        group, name = key.split(".")
        if (found := config[group][name]) != expected:
            raise UserError(
                f"config.{key}={found} with config.rl.rollout=engine: expected {expected}, for the engine reports the "
                "log-probabilities of the weights themselves, and no routes. Set that, or config.rl.rollout=batch."
            )
    if n_devices > 1:
        raise UserError(
            f"config.rl.rollout=engine on {n_devices} devices: expected one. Set config.mesh.data=1, or "
            "config.rl.rollout=batch."
        )


def open_teacher(config: ConfigDict, student: "Trainer") -> "Teacher":
    """Returns the teacher of a run, computed as its student is. Raises UserError if it reads text as other ids."""
    from deepseek_jax import run
    from deepseek_jax.rl.distillation import Teacher
    from deepseek_jax.rl.objective import learnt, measurer
    from deepseek_jax.weights import WEIGHTS, open_weights

    source, own = open_weights(config.rl.teacher), for_answers(config)
    if source.tokenizer != "none":
        _beginning.checked(config.data.tokenizer, source.tokenizer, config.rl.teacher)
    else:
        print(
            f"warning: {config.rl.teacher} brings no tokenizer; that its ids are those of {config.data.tokenizer} has "
            "not been checked",
            flush=True,
        )
    own.name, own.family, own.model = source.config.name, source.config.family, source.config.model
    own.loss.auxiliary.update(dict.fromkeys(own.loss.auxiliary, 0.0))
    if own.model.vocab_size < config.model.vocab_size:
        raise UserError(
            f"config.rl.teacher={config.rl.teacher}: {own.model.vocab_size:,} ids, expected at least the student's "
            f"{config.model.vocab_size:,}. Give a teacher with the student's tokenizer."
        )
    trainer = run.trainer(own, student.mesh, student.objective, learnt)
    state = source.read({name: trainer.stored[name] for name in WEIGHTS})
    return Teacher(state, trainer.with_model(measurer(config.rl.temperature, config.loss.chunk)))


def for_answers(config: ConfigDict) -> ConfigDict:
    """Returns the config with which the weights of a run answer: without what matters while they are trained alone.

    Weights are read with what adapters have learnt in them (`RunWeights.read`), so none are beside them.
    """
    config = config.copy_and_resolve_references().unlock()
    config.lora.rank, config.lora.init_from = 0, ""
    config.loss.balance_rate = config.loss.mtp_weight = config.loss.mtp_weight_final = config.ema.decay = 0.0
    config.rl.keep_routing, config.rl.teacher = False, ""
    return config


def check_sizes(config: ConfigDict) -> None:
    """Raises UserError for meshes on which answers cannot be drawn, and for what no run can do."""
    from deepseek_jax.abstract_model import why_no_routes

    for axis in ("pipe", "context"):
        if config.mesh[axis] > 1:
            raise UserError(
                f"config.mesh.{axis}={config.mesh[axis]}: answers are drawn on whole models and sequences. Set "
                f"config.mesh.{axis}=1, and spread the experts (config.mesh.expert) or the answers (config.mesh.data)."
            )
    if config.loss.trained:
        raise UserError(
            f"config.loss.trained={config.loss.trained!r}: reinforcement learning trains all weights, or adapters "
            "(config.lora.rank). Leave it empty."
        )
    if config.ema.decay:
        raise UserError(
            f"config.ema.decay={config.ema.decay:g}: reinforcement learning keeps no average of weights. Set it to 0."
        )
    if config.rl.keep_routing and (why := why_no_routes(config)):
        raise UserError(f"config.rl.keep_routing=True: {why}. Set it to False.")
    if config.rl.keep_routing and config.loss.balance_rate:
        raise UserError(
            f"config.rl.keep_routing=True with config.loss.balance_rate={config.loss.balance_rate:g}: router biases "
            "would follow choices that are not the routers' own. Set config.loss.balance_rate=0.0."
        )


def check_rows(config: ConfigDict, n_devices: int) -> None:
    """Raises UserError unless the answers of an update divide over the devices and micro-batches."""
    rl = config.rl
    multiple = rl.updates * n_devices * config.pipeline.micro_batches
    if rl.questions * rl.answers % multiple:
        raise UserError(
            f"config.rl: {rl.questions} questions x {rl.answers} answers do not divide into {rl.updates} updates on "
            f"{n_devices} devices with {config.pipeline.micro_batches} micro-batches. Choose a multiple of {multiple}."
        )
    if rl.rows_at_once and (rl.questions * rl.answers % rl.rows_at_once or rl.rows_at_once % n_devices):
        raise UserError(
            f"config.rl.rows_at_once={rl.rows_at_once}: expected a number that divides {rl.questions} questions x "
            f"{rl.answers} answers, and a multiple of {n_devices} devices; or 0, for all of them at once."
        )


def resumed(
    config: ConfigDict, learner: "Learner", checkpoints: "Checkpointer", workdir: Place
) -> tuple[int, dict | None]:
    """Returns the step of the latest checkpoint and its state; (0, None) without one."""
    from deepseek_jax.rl.loop import REFERENCE, TAKEN_AT

    if checkpoints.latest() is None:
        return 0, None
    check_same_run(config, learner.problems.fingerprint, checkpoints.read_meta()[1], workdir)
    expected = learner.trainer.stored
    if config.rl.grpo.beta > 0:
        expected = expected | {REFERENCE: expected["params"], TAKEN_AT: expected["step"]}
    start, stored, _ = checkpoints.restore(expected)
    return start, learner.trainer.load(stored)


def check_same_run(config: ConfigDict, problems: str, saved: dict, workdir: Place) -> None:
    """Raises UserError unless `config` and the fingerprint of its problems can continue the run in `workdir`.

    `saved` is what is kept beside the state in its checkpoint.
    """
    from deepseek_jax.run import differences
    from deepseek_jax.saved_config import completed, from_json

    if "problems" not in saved:
        raise UserError(f"{workdir} holds another kind of run. Give this one a --workdir of its own.")
    before = completed(from_json(saved["config"]))
    if (before.rl.grpo.beta > 0) != (config.rl.grpo.beta > 0):
        raise UserError(
            f"{workdir} holds a run {'with' if before.rl.grpo.beta else 'without'} a reference (config.rl.grpo.beta: "
            f"{before.rl.grpo.beta:g} -> {config.rl.grpo.beta:g}). Give the same value to continue it, or start anew: "
            f"--config.run.init_from={workdir} and another --workdir."
        )
    for change in differences(before, config):
        if change.startswith(FIXED):
            raise UserError(
                f"{workdir} holds a run of other settings: config.{change}. "
                "Give the same value to continue it, or another --workdir to start anew."
            )
    if saved["problems"] != problems:
        raise UserError(f"{workdir} holds a run on other problems. Give the same ones, or another --workdir.")


def headline(config: ConfigDict, learner: "Learner", workdir: Place, start: int) -> str:
    """Returns the lines that a run prints before its first step."""
    rl, begin = config.rl, f"resuming from step {start}" if start else f"from {config.run.init_from}"
    rewards = ", ".join(f"{weight:g} x {name}" for name, weight in rl.rewards.items() if weight)
    judged_by = f"judged by {rl.teacher}" if rl.teacher else f"reward: {rewards}"
    return "\n".join(
        [
            f"{config.name}: {learner.trainer.n_params:,} parameters, {config.precision}, {begin}, in {workdir}",
            f"{rl.questions} problems of {rl.problems} x {rl.answers} answers per step, {judged_by}",
            "the first step compiles for a while",
        ]
    )
