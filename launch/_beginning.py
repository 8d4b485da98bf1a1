"""Weights to begin with: what a run takes from the directory that `run.init_from` or `--config` names.

    deepseek-jax train --config=DIR                       # everything comes from DIR: see `fine_tuning`
    deepseek-jax train --config=deepseek-ai/deepseek-llm-7b-base          # likewise, from the hub
    deepseek-jax train --config.run.init_from=DIR       # the same
    deepseek-jax train --config=mine.py --config.run.init_from=DIR      # the recipe of mine.py, DIR's weights

In all three the tokenizer is the one beside the weights, and marks of end, context length, settings for generation and
chat template are inherited, so that an export has them.
"""

import os
from collections.abc import Mapping

from ml_collections import ConfigDict

from deepseek_jax.errors import UserError
from deepseek_jax.storage import Place, Remote, open_store, place

SEQ_LEN = 2048  # tokens of a training sequence, if the model is meant for as many
RATE = 1e-5
TUNED = "_tuned"  # how names of runs with the recipe of `fine_tuning` end
FOREVER = 1_000_000_000  # steps at the peak rate, which so is the only rate to set
PREDICTION = 0.1  # lambda of multi-token prediction, its last value in pre-training (V3 section 4.2)
# alpha of the balance loss, as in pre-training, of every family with routed experts
BALANCE = {"v4": 1e-4, "v3": 1e-4, "v32": 1e-4, "v2": 1e-3, "moe": 1e-3}
# What two tokenizers must read as the same ids to be taken for the same.
SAMPLE = """\
def main(argv: list[str]) -> int:\n\treturn 3 * len(argv)  # TODO\r\n
The quick brown fox, 1234567890 times: "naïve" café, don't – 東京の城, 深度求索, привет, שלום, नमस्ते, 🙂👍🏽 \u0000\u200b
"""


def check_bucket(workdir: Place) -> None:
    """Raises UserError, or PassingError, where a workdir in a bucket cannot be listed."""
    if isinstance(workdir, Remote):
        open_store(workdir).check()


def is_origin(name: str) -> bool:
    """Whether this names a directory here, a place in a bucket or, being no path, a model of the hub."""
    from deepseek_jax.convert import hub

    is_there = isinstance(place(name), Remote) or os.path.isdir(os.path.expanduser(name))
    return is_there or (hub.is_id(name) and not name.endswith(".py"))


def directory(name: str, flag: str) -> str:
    """Returns the absolute path of a directory, a place in a bucket or an id of the hub; UserError for others."""
    if isinstance(where := place(name), Remote):
        return str(where)
    if not os.path.isdir(os.path.expanduser(name)) and is_origin(name):
        return name
    path = os.path.abspath(os.path.expanduser(name))
    if not os.path.isdir(path):
        raise UserError(f"{flag}={name}: no such directory. Give a run's, published weights, or an id of the hub.")
    return path


def fine_tuning(origin: str, config: ConfigDict) -> ConfigDict:
    """Returns the config of a run that begins with a directory of weights, a published one or a run's.

    From the directory come the family, the sizes, the tokenizer, the precision and the context length; sequences are
    of 2,048 tokens, or of the model's own length if that is less. The recipe is one for fine-tuning: AdamW at a
    constant 1e-5 after 20 steps of warm-up (the rate of DeepSeek LLM's supervised fine-tuning, section 4.1; V3 ends at
    1e-6), batches of 8 sequences, 200 steps. The rate stays constant so that any number of steps is a whole run.
    Router biases are frozen, as at the end of V3's pre-training; the balance loss and the loss of multi-token
    prediction keep their last weights.

    The directory becomes `run.init_from`; `config` holds the defaults of `configs/base.py`, which are filled in.
    """
    from deepseek_jax.weights import open_weights

    source = open_weights(origin).config
    config.name = f"{source.name}{TUNED}"
    for key in ("family", "precision", "model", "release"):
        config[key] = source[key]
    config.data.seq_len = min(SEQ_LEN, source.data.seq_len)
    config.data.tokenizer = source.data.tokenizer
    config.data.fim_rate = 0.0
    config.run.init_from = origin
    config.loop.steps, config.loop.eval_every, config.checkpoint.every = 200, 50, 100
    config.run.remat = "block"
    config.loss.mtp_weight = config.loss.mtp_weight_final = PREDICTION if source.model.get("mtp_depth") else 0.0
    config.loss.balance_rate = 0.0
    config.loss.auxiliary.expert_balance = BALANCE[source.family] if "expert_width" in source.model else 0.0
    if "index_top_k" in source.model:  # its indexer continues to learn, but beside adapters (`run.auxiliary`)
        config.model = source.model.copy_and_resolve_references()
        config.model.index_dense = False  # the warm-up is over
        with config.unlocked():
            config.loss.auxiliary.update(index_kl=1.0, index_recall=0.0)
    schedule = config.schedule
    schedule.warmup_steps, schedule.constant_steps = 20, FOREVER
    schedule.peak_rate = schedule.tail_rate = schedule.final_rate = RATE
    return config


def of_run(workdir: Place) -> str:
    """Returns `run.init_from` of the run that a workdir holds; "" before its first checkpoint, or if it has a base."""
    from deepseek_jax.train.checkpoint.manifest import committed_steps
    from deepseek_jax.weights import open_weights

    if committed_steps(workdir / "base" / "checkpoints") or not committed_steps(workdir / "checkpoints"):
        return ""
    return open_weights(workdir).config.run.init_from


def inherit(config: ConfigDict, overrides: Mapping[str, str], workdir: Place) -> None:
    """Takes the tokenizer of the weights to begin with, and what their release says, into `config`.

    Raises UserError if there are no such weights, or if the tokenizer that the command line names reads text as other
    ids than theirs. Where a run has begun already, its own copies will do.
    """
    from deepseek_jax.train.checkpoint.manifest import committed_steps
    from deepseek_jax.weights import open_weights

    inherit_adapters(config, overrides, workdir)
    origin = config.run.init_from
    if not origin:
        return
    if os.path.realpath(os.path.expanduser(origin)) == os.path.realpath(str(workdir)):
        raise UserError(f"--workdir={workdir} holds the weights to begin with. Give the run a directory of its own.")
    try:
        directory(origin, "config.run.init_from")
        own = open_weights(origin).tokenizer
    except UserError:
        if not committed_steps(workdir / "checkpoints"):
            raise
        origin, own = str(workdir), open_weights(workdir).tokenizer
    named = config.data.tokenizer
    if own == "none" and named == "none":
        raise UserError(
            f"{origin} brings no tokenizer.json, so that text means nothing to its model. Put that file beside the "
            "weights, or name it: --config.data.tokenizer=PATH."
        )
    is_named = "data.tokenizer" in overrides
    if own != "none":
        config.data.tokenizer = checked(named, own, origin) if is_named else own
        print(f"tokenizer: {config.data.tokenizer}{'' if is_named else f', which comes with {origin}'}", flush=True)
    given = {key: config.release[key] for key in config.release if f"release.{key}" in overrides}
    with config.unlocked():
        config.release = ConfigDict({**open_weights(origin).config.release, **given})
        if config.data.tokenizer != own and own != "none":  # its marks are other ones, or are its own to name
            config.release.update({"bos_id": None, "pad_id": None, "eos_ids": (), "end_ids": ()} | given)


def inherit_adapters(config: ConfigDict, overrides: Mapping[str, str], workdir: Place) -> None:
    """Takes rank, alpha and targets of the adapters to begin with (`lora.init_from`), where they are not given.

    Raises UserError if others are given, or the directory holds no adapters. A run that has begun knows its own.
    """
    if not config.lora.init_from:
        return
    from deepseek_jax.convert import peft
    from deepseek_jax.train.checkpoint.manifest import committed_steps
    from deepseek_jax.weights import open_weights

    try:
        config.lora.init_from = directory(config.lora.init_from, "config.lora.init_from")
        found = peft.settings(config.lora.init_from)
    except UserError:
        if not committed_steps(workdir / "checkpoints"):
            raise
        saved = open_weights(workdir).config.lora
        found = {key: saved[key] for key in ("rank", "alpha", "targets")}
    for key, value in found.items():
        if f"lora.{key}" in overrides and config.lora[key] != value:
            raise UserError(
                f"config.lora.{key}={config.lora[key]}: the adapters in {config.lora.init_from} have {value}. Leave "
                "the key out."
            )
        config.lora[key] = value


def checked(named: str, own: str, origin: str) -> str:
    """Returns the tokenizer to use, of the one named by the user and the one that belongs to the weights."""
    from deepseek_jax.data.tokenizer import open_tokenizer

    theirs, ours = open_tokenizer(named), open_tokenizer(own)
    if theirs.fingerprint == ours.fingerprint:
        return own
    if theirs.encode(SAMPLE).tolist() != ours.encode(SAMPLE).tolist():
        raise UserError(
            f"config.data.tokenizer={named} reads text as other ids than {own}, the tokenizer of the weights in "
            f"{origin}: to them its ids mean other words. Leave --config.data.tokenizer out."
        )
    print(f"warning: {named} is not the tokenizer of {origin}, but reads a sample of text the same", flush=True)
    return named


def check_sizes(config: ConfigDict) -> None:
    """Raises UserError unless the weights to begin with are those of the config's model; reads headers only."""
    from deepseek_jax.abstract_model import abstract_weights
    from deepseek_jax.convert import hub
    from deepseek_jax.train.trainable import divide, named
    from deepseek_jax.tree import paths
    from deepseek_jax.weights import check_shapes, is_published, open_weights

    if config.run.init_from:
        if is_published(config.run.init_from):
            hub.local(config.run.init_from)  # a download comes before all that takes long
        source, needed = open_weights(config.run.init_from).config, abstract_weights(config)
        there = abstract_weights(source)
        if config.run.anew:
            needed["params"] = divide(needed["params"], named(config.run.anew))[1]
            if any(config.run.anew in path for path in paths(there["params"])):
                raise UserError(
                    f"config.run.anew={config.run.anew!r}: {config.run.init_from} has such weights, which would be "
                    "left out. Leave the key empty, to begin with them."
                )
        check_shapes(config.run.init_from, there, needed)


def leave_own_text(config: ConfigDict, overrides: dict[str, str]) -> None:
    """Turns fill-in-the-middle off for text that the user names: a recipe's share is for the recipe's own text.

    A share given as well turns it on. `headline` says which it is.
    """
    if "data.source" in overrides and overrides["data.source"] != "stdlib" and "data.fim_rate" not in overrides:
        config.data.fim_rate = 0.0


def check_prepared(config: ConfigDict, overrides: Mapping[str, str]) -> None:
    """Raises UserError for a key of the command line that was decided otherwise when `data.source` was prepared."""
    from deepseek_jax.data.prepared.mixture import settled_by
    from deepseek_jax.data.prepared.source import sources

    found = sources(config.data.source)
    for key, value in (settled_by(found) if found else {}).items():
        if f"data.{key}" in overrides and config.data[key] != value:
            raise UserError(
                f"config.data.{key}={config.data[key]}: data.source = {config.data.source!r} was prepared with "
                f"{value}. Leave the key out, or prepare the text again."
            )
