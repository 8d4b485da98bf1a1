"""A run assembled from its config: trainer, batch ramp, first state; and which keys may not change within it.

    config = run_config.load("tiny_v3")
    trainer = run.trainer(config, make_mesh(**config.mesh))
    state = trainer.init(config.seed)

Groups of a config are the arguments of what they describe: `Schedule(**config.schedule)`, `BatchRamp(**config.batch)`.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.traverse_util import flatten_dict
from jax.sharding import Mesh
from ml_collections import ConfigDict

from deepseek_jax import release
from deepseek_jax.abstract_model import AHEAD, abstract_weights
from deepseek_jax.convert import peft
from deepseek_jax.convert.hf import copy_files
from deepseek_jax.data.pipeline import Batch
from deepseek_jax.data.tokenizer import Tokenizer
from deepseek_jax.errors import UserError
from deepseek_jax.kernels import Kernels
from deepseek_jax.layers import lora
from deepseek_jax.layers.base import Execution, Tree
from deepseek_jax.layers.divided_attention import implementation
from deepseek_jax.models import family
from deepseek_jax.parallel.context import CONTEXT, check_chunks
from deepseek_jax.parallel.mesh import PIPE, batch_shape
from deepseek_jax.parallel.sharding import is_axes
from deepseek_jax.plan import flops
from deepseek_jax.plan.layout import end_in_layers
from deepseek_jax.plan.network import Network, describe
from deepseek_jax.precision.policy import IN_CODES, policy
from deepseek_jax.run_bounds import default_values
from deepseek_jax.saved_config import completed, from_json, leaves
from deepseek_jax.storage import Place
from deepseek_jax.train import trainable
from deepseek_jax.train.anticipated import Anticipating
from deepseek_jax.train.average import MovingAverage
from deepseek_jax.train.loss import PreTraining
from deepseek_jax.train.optimizers import OF_MUON, Schedule, by_name
from deepseek_jax.train.pipelined import Pipeline
from deepseek_jax.train.ramp import BatchRamp
from deepseek_jax.train.step import State, StepConfig, Trainer
from deepseek_jax.train.trainable import Trainable, everything
from deepseek_jax.weights import WEIGHTS, lora_of, open_weights

# What may not change within a run: the network, and what decides the order of its samples. The text itself is compared
# by its fingerprint.
FIXED: tuple[str, ...] = ("family", "model", "seed", "batch")
FIXED += ("data.seq_len", "data.fim_rate", "data.mask_documents", "data.holdout_rate")
FIXED += ("lora.rank", "lora.alpha", "lora.targets", "loss.trained", "optimizer.method")


def trainer(
    config: ConfigDict, mesh: Mesh, objective: Any = None, learnt: Trainable = everything, **options: Any
) -> Trainer:
    """Returns the `Trainer` of a run. Raises UserError for a key that was set and has no effect on its model.

    `objective` takes the place of that of pre-training and fine-tuning; `learnt` says which weights are trained, and of
    a run with adapters which of these; `options` are more arguments of `Trainer`.
    """
    module, run, precision = family(config.family), config.run, policy(config.precision, config.fp8)
    sizes = module.Config.from_config(config.model)
    check_context(config, mesh)
    check_exchange(config, mesh)
    check_adapters(config, mesh)
    loss = config.loss.to_dict() | {"auxiliary": auxiliary(config)}
    step = {name: loss.pop(name) for name in ("clip_norm", "balance_rate", "balance_rate_stop")}
    network = network_of(config)
    adapters, chosen = lora_of(config), trainable.named(loss.pop("trained"))
    check_named(config)

    def is_trained(path: trainable.Path) -> bool:
        return chosen(path) and learnt(path) and (adapters is None or lora.is_adapter(path))

    def build(run: Execution, rngs: nnx.Rngs) -> nnx.Module:
        run = replace(run, index_rests=index_rests(config))
        if adapters is None:
            return module.Model(sizes, run, rngs=rngs)
        return lora.attach(module.Model(sizes, replace(run, adapt=lora.add), rngs=rngs), adapters, rngs=rngs)

    kind: type[PreTraining] = PreTraining
    if config.loop.routing_delay:
        check_routing(config, mesh, objective)
        kind, options = Anticipating, options | {"routes": True}
    made = Trainer(
        build,
        mesh,
        config.sharding.to_dict(),
        objective or kind(mask_documents=config.data.mask_documents, **loss),
        by_name(**config.optimizer),
        StepConfig(rate=Schedule(**config.schedule), micro_batches=config.pipeline.micro_batches, **step),
        pipeline=pipeline(config, network),
        trainable=is_trained,
        compute=precision.compute,
        matmul=precision.matmul,
        weights=precision.weights,
        kernels=Kernels(**config.kernels),
        remat=run.remat,
        unroll=run.unroll,
        exchange_groups=config.exchange.groups,
        exchange_kind=config.exchange.kind,
        flops_per_token=lambda seq_len: flops.training(network, seq_len),
        **options,
    )
    check_effects(config, made)
    return made


def auxiliary(config: ConfigDict) -> dict[str, float]:
    """Returns the weights of a run's auxiliary losses. Beside adapters indexers are frozen, so that theirs are 0."""
    weights = config.loss.auxiliary.to_dict()
    if config.lora.rank:
        weights |= {name: 0.0 for name in weights if name.startswith("index_")}
    return weights


def index_rests(config: ConfigDict) -> bool:
    """Returns whether nobody learns from a run's indexers, so that they rest where attention is dense."""
    return auxiliary(config).get("index_kl") == 0.0


def network_of(config: ConfigDict) -> Network:
    """Returns the network of a run as the planner sees it."""
    module = family(config.family)
    return describe(module, module.Config.from_config(config.model), index_rests(config))


def is_sparse(config: ConfigDict) -> bool:
    """Returns whether the tokens of a run's training sequences attend to a part of the positions before them."""
    m = config.model
    return "index_top_k" in m and not m.index_dense and config.data.seq_len > m.index_top_k


def pipeline(config: ConfigDict, network: Network) -> Pipeline:
    """Returns how a run divides its layers along the pipeline, if its mesh has one: as `deepseek-jax plan` does."""
    end = end_in_layers(network, config.data.seq_len, slow=1.0, has_head=False)
    return Pipeline(config.pipeline.schedule, end, put_off=config.pipeline.put_off)


def check_context(config: ConfigDict, mesh: Mesh) -> None:
    """Raises UserError if the sequences of a run cannot be divided over the context axis of its mesh."""
    n_devices = mesh.shape[CONTEXT]
    if n_devices > 1:
        check_chunks(config.data.seq_len, n_devices)
        if not is_sparse(config):
            implementation(config.kernels.attention)


def check_exchange(config: ConfigDict, mesh: Mesh) -> None:
    """Raises UserError if the devices of a mesh do not have the exchange that a run names."""
    if config.exchange.kind == "ragged" and mesh.devices.flat[0].platform == "cpu":
        raise UserError(
            "config.exchange.kind='ragged' on CPUs: XLA has no ragged_all_to_all for them. Set "
            "config.exchange.kind=padded, or run on GPUs or TPUs."
        )


def check_adapters(config: ConfigDict, mesh: Mesh) -> None:
    """Raises UserError for settings that do not go with `config.lora`."""
    if not config.lora.rank:
        if config.lora.init_from:
            raise UserError("config.lora.init_from is given, and config.lora.rank=0. Give the adapters' rank as well.")
        return
    if not config.run.init_from:
        raise UserError(
            f"config.lora.rank={config.lora.rank} trains adapters beside frozen weights, and none are named. "
            "Give config.run.init_from=DIR, a run's or published weights."
        )
    for key, value, allowed in (
        ("precision", config.precision, ("fp32", "bf16")),
        ("loss.balance_rate", config.loss.balance_rate, (0.0,)),
        ("mesh.pipe", mesh.shape[PIPE], (1,)),
    ):
        if value not in allowed:
            expected = " or ".join(map(str, allowed))
            raise UserError(f"config.{key}={value} does not go with adapters (config.lora.rank). Set it to {expected}.")


def check_routing(config: ConfigDict, mesh: Mesh, objective: Any) -> None:
    """Raises UserError where experts cannot be chosen ahead (`loop.routing_delay`)."""
    delay = config.loop.routing_delay
    if objective is not None:
        raise UserError(
            f"config.loop.routing_delay={delay}: reinforcement learning, and other objectives, choose experts in the "
            "step. Set it to 0 (there is config.rl.keep_routing)."
        )
    if "expert_width" not in config.model:
        raise UserError(
            f"config.loop.routing_delay={delay}: the model of {config.name} has no routed experts. Set it to 0."
        )
    if mesh.shape[PIPE] > 1:
        raise UserError(
            f"config.loop.routing_delay={delay} with config.mesh.pipe={mesh.shape[PIPE]}: stages of a pipeline choose "
            "experts as they run. Set routing_delay to 0, or pipe to 1."
        )


def check_named(config: ConfigDict) -> None:
    """Raises UserError for a name of weights (`loss.trained`, `run.anew`) that the model has none of.

    So for `loss.trained` where router biases would move, or where none of the adapters has the name.
    """
    if not config.loss.trained and not config.run.anew:
        return
    trained, adapters, shapes = config.loss.trained, lora_of(config), abstract_weights(config)["params"]
    for key, name in (("loss.trained", trained), ("run.anew", config.run.anew)):
        if name and not any(name in path for path in flatten_dict(shapes)):
            raise UserError(f"config.{key}={name!r}: no weight of {config.name} has this in its path. Leave it empty.")
    if trained and config.loss.balance_rate:
        raise UserError(
            f"config.loss.balance_rate={config.loss.balance_rate:g} moves router biases, and with config.loss.trained="
            f"{trained!r} all else is frozen. Set config.loss.balance_rate=0.0."
        )
    if trained and adapters and not any(trained in path for path in lora.abstract_adapters(shapes, adapters)):
        raise UserError(
            f"config.loss.trained={trained!r} with config.lora.rank={config.lora.rank}: adapters alone are trained, "
            "and none has this in its path. Leave one of the two out."
        )
    if config.run.anew and not config.run.init_from:
        raise UserError(
            f"config.run.anew={config.run.anew!r} is initialised beside other weights, and none are named. Give "
            "config.run.init_from=DIR, a run's or published weights."
        )


def check_effects(config: ConfigDict, trainer: Trainer) -> None:
    """Raises UserError for a key that was set, though the model has nothing that it is about.

    The weights of auxiliary losses are not looked at here, but where the losses are summed (`train.loss`). Kernels are
    chosen for the operations that occur, whichever these are; but that of attention is the one of a headline.
    """
    axes = {axis for leaf in jax.tree.leaves(trainer.axes, is_leaf=is_axes) for axis in leaf}
    absent = {f"sharding.{axis}": f"weight with the axis {axis}" for axis in config.sharding if axis not in axes}
    if not jax.tree.leaves(trainer.abstract["params"].get(AHEAD)):
        absent |= {f"loss.{key}": "multi-token prediction" for key in ("mtp_weight", "mtp_weight_final")}
    if not jax.tree.leaves(trainer.abstract["router_bias"]):
        absent["loss.balance_rate"] = "router biases"
    if is_sparse(config) and isinstance(trainer.objective, PreTraining):
        absent["kernels.attention"] = "attention to all positions: tokens choose theirs (kernels.indexed_attention)"
    if not config.ema.decay:
        absent["ema.evaluate"] = "average of its weights (config.ema.decay)"
    if config.precision not in IN_CODES:
        absent |= {f"fp8.{key}": "products in FP8 (config.precision=fp8)" for key in config.fp8}
    if config.optimizer.method != "muon":
        absent |= {f"optimizer.{key}": "matrices that Muon updates (config.optimizer.method=muon)" for key in OF_MUON}
    values, defaults = leaves(config), default_values()
    for key, what in absent.items():
        if values[key] and values[key] != defaults[key]:
            raise UserError(
                f"config.{key}={values[key]!r} has no effect: the model of {config.name} has no {what}. "
                f"Set it to {defaults[key] if isinstance(values[key], str) else 0!r}."
            )


def batch_ramp(config: ConfigDict, n_replicas: int) -> BatchRamp:
    """Returns how the batch grows. Raises UserError if it does not divide over the devices and micro-batches.

    `n_replicas` are the devices among which its sequences are split (`mesh.SEQUENCES`).
    """
    ramp, multiple = BatchRamp(**config.batch), n_replicas * config.pipeline.micro_batches
    for key, size in (("size", ramp.size), ("size_start", ramp.start)):
        if size % multiple:
            raise UserError(
                f"config.batch.{key}={size} does not divide over {n_replicas} devices x "
                f"{config.pipeline.micro_batches} micro-batches. Choose a multiple of {multiple}."
            )
    return ramp


def abstract_batch(config: ConfigDict, mesh: Mesh) -> Batch:
    """Returns the samples of a step after the ramp as shapes, laid out on a mesh.

    Raises UserError where experts are chosen ahead of the step, by a program besides it.
    """
    if config.loop.routing_delay:
        raise UserError(
            f"config.loop.routing_delay={config.loop.routing_delay}: a step alone has no batches that wait with their "
            "experts. Set it to 0; in a run a forward pass per step comes on top."
        )
    shape = config.batch.size, config.data.seq_len
    ids = batch_shape(shape, jnp.int32, mesh)
    return Batch(ids, ids, ids, ids, batch_shape(shape, jnp.float32, mesh))


def first_state(config: ConfigDict, trainer: Trainer, workdir: Path, report: Callable[[str], None]) -> State:
    """Returns the state before the first step.

    With `run.init_from` its weights are those of another run or published ones, whose tokenizer and other small files
    are copied to `workdir`; `report` is given lines that say so.
    """
    if not config.run.init_from:
        return trainer.init(config.seed)
    if jax.process_index() == 0:
        copy_files(release.files_to_keep(config), workdir)
    source, adapters = open_weights(config.run.init_from), lora_of(config)
    shapes = {name: trainer.stored[name] for name in WEIGHTS}
    if adapters:
        shapes["params"] = trainable.divide(shapes["params"], lora.is_adapter)[1]
    if config.run.anew:
        shapes["params"] = trainable.divide(shapes["params"], trainable.named(config.run.anew))[1]
    weights = source.read(shapes)
    if config.run.anew:
        made = jax.jit(lambda: trainer.first_weights(config.seed, trainable.named(config.run.anew)))()
        weights["params"] = trainable.join(jax.device_get(made), weights["params"])
        report(f"initialised at random: {config.run.anew}")
    if adapters:
        weights["params"] = lora.beside(weights["params"], first_adapters(config, trainer, adapters))
    report(f"weights of {config.run.init_from}")
    for change in differences(source.config.model, config.model):
        report(f"other than there: config.model.{change}")
    return trainer.init(config.seed, **weights)


def first_adapters(config: ConfigDict, trainer: Trainer, adapters: lora.Lora) -> dict:
    """Returns path -> array of the adapters of a run before its first step: those of `lora.init_from`, or B = 0."""
    if config.lora.init_from:
        return peft.read(config.lora.init_from, abstract_weights(config), adapters)
    made = jax.jit(lambda: trainer.first_weights(config.seed, lora.is_adapter))()
    return flatten_dict(jax.device_get(made))  # host arrays, which every process lays out on its own devices


def average(config: ConfigDict, trainer: Trainer, state: State, stored: Tree | None) -> MovingAverage | None:
    """Returns the moving average of the weights, as `config.ema` says; None without one.

    It continues `stored`, that of the checkpoint that `state` is from, or begins with the weights of `state`.
    """
    if not config.ema.decay:
        return None
    params = state["params"] if stored is None else trainer.load({"params": stored})["params"]
    return MovingAverage(config.ema.decay, params)


def check_vocabulary(config: ConfigDict, tokenizer: Tokenizer) -> None:
    """Raises UserError if the tokenizer has more ids than the model."""
    if tokenizer.vocab_size > config.model.vocab_size:
        raise UserError(
            f"config.model.vocab_size={config.model.vocab_size} is smaller than the {tokenizer.vocab_size} ids of "
            f"tokenizer {config.data.tokenizer!r}. Set --config.model.vocab_size={tokenizer.vocab_size} or more."
        )


def check_same_run(config: ConfigDict, text: str, saved: dict, workdir: Place) -> None:
    """Raises UserError unless `config` and the fingerprint `text` can continue the run in `workdir`.

    `saved` is what is kept beside the state in its checkpoint.
    """
    if "text" not in saved:
        raise UserError(
            f"{workdir} holds converted weights, not a run. Give the run a --workdir of its own and "
            f"--config.run.init_from={workdir}."
        )
    for change in differences(*map(with_plain_batch, (completed(from_json(saved["config"])), config))):
        if change.startswith(tuple(f"{path}{end}" for path in FIXED for end in (".", ":"))):
            raise UserError(
                f"{workdir} holds a run of other settings: config.{change}. "
                "Give the same value to continue it, or another --workdir to start anew."
            )
    if saved["text"] != text:
        raise UserError(
            f"{workdir} holds a run on other text than config.data.source={config.data.source!r} is now (or on another "
            "tokenizer's tokens).\nGive the same text to continue it, or another --workdir to start anew."
        )


def with_plain_batch(config: ConfigDict) -> ConfigDict:
    """Returns a copy in which the first batch is stated in one way of the several that mean the same."""
    config, ramp = config.copy_and_resolve_references(), BatchRamp(**config.batch)
    config.batch.size_start = ramp.start if ramp.ramp_steps else ramp.size
    return config


def differences(old: ConfigDict, new: ConfigDict, path: str = "") -> list[str]:
    """Returns the keys in which two configs differ, as "path.key: old -> new"."""
    found = []
    for key in sorted({*old, *new}):
        before, after = old.get(key), new.get(key)
        if isinstance(before, ConfigDict) and isinstance(after, ConfigDict):
            found += differences(before, after, f"{path}{key}.")
        elif before != after:
            found.append(f"{path}{key}: {before!r} -> {after!r}")
    return found
