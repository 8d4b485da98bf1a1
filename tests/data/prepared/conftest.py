"""A corpus of texts, and a function that prepares it in this process."""

from pathlib import Path

import pytest

from deepseek_jax.data.prepared.plan import Plan, make_plan
from deepseek_jax.data.prepared.workers import make_shards
from deepseek_jax.data.tokenizer import open_tokenizer
from deepseek_jax.data.watch import unwatched
from deepseek_jax.storage import Remote


@pytest.fixture
def prepare(tmp_path, settings):
    """Returns the plan of `tmp_path/name`, or of a place in a bucket, after its shards are made, or some of them."""
    settings.update(source=str(tmp_path / "??.txt"), holdout_rate=0.2)

    def made(name: str | Remote = "tokens", n_shards: int = 5, numbers=None, n_workers: int = 1, **change) -> Plan:
        tokenizer = open_tokenizer("bytes")
        folder = name if isinstance(name, Remote) else tmp_path / name
        plan = make_plan(folder, tokenizer, n_shards, **{**settings, **change})
        plan.begin()
        with unwatched("", 0) as counter:
            make_shards(plan, range(plan.n_shards) if numbers is None else numbers, tokenizer, n_workers, counter)
        plan.finish()
        return plan

    return made


@pytest.fixture(scope="session")
def contents():
    """Returns the files of a folder, without those that are being made."""

    def read(folder: Path) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}

    return read
