"""Tokenise and pack a corpus once, into shards from which training reads by number.

    deepseek-jax prepare --config=v3_671b --to=tokens --config.data.source='corpus/*.jsonl.gz'
    deepseek-jax prepare --config=v3_671b --to=/shared/tokens --worker=3/64     # on the fourth of 64 hosts
    deepseek-jax train --config=v3_671b --config.data.source=tokens                 # or gs://bucket/tokens

Shard i is a function of the corpus, the config and i: whoever makes it, and however often it is killed, its bytes are
the same. --workers processes of this machine make shards at once (all cores by default); a host with --worker=I/N makes
the shards i with i mod N = I, into a common folder or into its own, to be copied together. The same command continues
after a kill. Whoever completes the last shard writes the manifest, and training can begin.

Decided here, of config.data: tokenizer, seq_len, fim_rate, holdout_rate, add_bos, special_tokens. As in training,
--config.data.source turns fill-in-the-middle off unless --config.data.fim_rate is given; what is done is printed.
Documents are shuffled within a shard, training shuffles windows over all shards. A shard is made from 64 MiB of files,
or the corpus is divided into --shards; JSONL, parquet and ArrayRecord files are divided, others and compressed ones are
not. A worker holds the tokens of one shard in memory. --beam=OPTIONS runs the same function on Apache Beam (pip install
apache-beam, in an environment of its own): --beam='--runner=FlinkRunner --flink_master=...'.
"""

import re
import shlex
import time
from pathlib import Path
from typing import TYPE_CHECKING

from ml_collections import ConfigDict

from deepseek_jax import run_config
from deepseek_jax.bounds import Bound, text, whole
from deepseek_jax.launch import _beginning, _options
from deepseek_jax.launch._progress import Progress
from deepseek_jax.paths import check_writable
from deepseek_jax.storage import place
from deepseek_jax.units import duration

if TYPE_CHECKING:
    from deepseek_jax.data.prepared.plan import Plan
    from deepseek_jax.data.tokenizer import Tokenizer

DEFAULT = "tiny_v3"
SHARE = re.compile(r"(\d{1,7})/(\d{1,7})")


def _is_share(value: str) -> bool:
    """Returns whether a value is I/N with I < N, or empty."""
    found = SHARE.fullmatch(value) if isinstance(value, str) else None
    return value == "" or (found is not None and int(found[1]) < int(found[2]))


FLAGS = {
    "to": (place, _options.REQUIRED, "folder for the shards, here or gs://, s3://"),
    "shards": (int, 0, "number of shards, at most; 0: one per 64 MiB of files", whole(0, 10_000_000)),
    "workers": (int, 0, "processes on this machine; 0: one per core", whole(0, 1024)),
    "worker": (str, "", "I/N: only every N-th shard, from I on", Bound("I/N with I below N, like 0/4", _is_share)),
    "beam": (str, "", "options of an Apache Beam pipeline that makes the shards", text(0, 10_000)),
}


def main(argv: list[str]) -> int:
    """Runs the verb; returns the exit code."""
    from deepseek_jax.data.prepared.plan import make_plan
    from deepseek_jax.data.tokenizer import open_tokenizer

    options = _options.parse(argv, DEFAULT, FLAGS, workdir=False)
    config, folder = options.config, options.to
    _beginning.leave_own_text(config, options.overrides)
    run_config.validate(config)
    _beginning.check_bucket(folder)
    if isinstance(folder, Path):
        check_writable(folder, "--to")
    tokenizer = open_tokenizer(config.data.tokenizer)
    plan = make_plan(folder, tokenizer, options.shards, seed=config.seed, **config.data)
    plan.begin()
    print("\n".join(about_text(config)), flush=True)
    first, step = map(int, (options.worker or "0/1").split("/"))
    markers = plan.markers()
    numbers = [number for number in range(first, plan.n_shards, step) if markers[number] is None]
    if options.beam:
        from deepseek_jax.data.prepared.beam import make_shards_on_beam

        make_shards_on_beam(plan, numbers, shlex.split(options.beam))
    elif numbers:
        _make_here(plan, numbers, tokenizer, options.workers)
    return _report(plan, config, argv)


def about_text(config: ConfigDict) -> list[str]:
    """The lines on what is decided here of the documents, in the words in which a run says it."""
    rate, held_out = (f"{100 * config.data[key]:g}% of the documents" for key in ("fim_rate", "holdout_rate"))
    lines = [f"fill-in-the-middle: {rate} (--config.data.fim_rate=0 turns it off)"]
    if not config.data.fim_rate:
        lines = ["fill-in-the-middle: off (--config.data.fim_rate=0.1 prepares a tenth of the documents that way)"]
    return [*lines, f"held out to evaluate on: {held_out} (--config.data.holdout_rate)"]


def _make_here(plan: "Plan", numbers: list[int], tokenizer: "Tokenizer", n_workers: int) -> None:
    """Makes shards in processes of this machine, and shows how fast."""
    from deepseek_jax.data.prepared.workers import make_shards, n_cores

    n_bytes, begin = sum(map(plan.n_bytes, numbers)), time.monotonic()
    with Progress("prepare", n_bytes) as progress:
        cpu_s = make_shards(plan, numbers, tokenizer, n_workers or n_cores(), progress)
    seconds = time.monotonic() - begin
    print(
        f"{len(numbers):,} shards from {n_bytes / 1e6:,.1f} MB of files in {duration(seconds)}: "
        f"{n_bytes / 1e6 / seconds:.2f} MB/s, {n_bytes / 1e6 / max(cpu_s, 1e-9):.2f} MB per CPU second"
    )


def _report(plan: "Plan", config: ConfigDict, argv: list[str]) -> int:
    """Writes the manifest if all shards are there, and prints what there is and what to do next."""
    manifest = plan.finish()
    if manifest is None:
        missing = [number for number, marker in enumerate(plan.markers()) if marker is None]
        print(
            f"{plan.folder}: {plan.n_shards - len(missing):,} of {plan.n_shards:,} shards; missing: "
            f"{', '.join(map(str, missing[:5]))}{', ...' if len(missing) > 5 else ''}. The worker that completes the "
            "last one writes the manifest."
        )
        return 0
    train, holdout = (manifest["sides"][side] for side in ("train", "holdout"))
    n_windows, seq_len = sum(train["windows"]), config.data.seq_len
    left = 1 - n_windows * seq_len / max(train["tokens"], 1)
    print(
        f"{plan.folder}: {plan.n_shards:,} shards, {train['documents'] + holdout['documents']:,} documents; "
        f"{n_windows:,} windows of {seq_len:,} tokens to train on ({left:.1%} of the tokens are left out at the ends "
        f"of shards), {sum(holdout['windows']):,} held out"
    )
    kept = [word for word in argv if word.startswith("--config") and not word.startswith("--config.data.source")]
    print(f"train from it: deepseek-jax train {shlex.join([*kept, f'--config.data.source={plan.folder}'])}")
    return 0
