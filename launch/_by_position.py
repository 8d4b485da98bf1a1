"""What `deepseek-jax evaluate --by-position` does: a model's loss on text, by the positions of the tokens."""

import sys
from typing import Any

from ml_collections import ConfigDict

from deepseek_jax.errors import UserError
from deepseek_jax.launch._tables import print_table
from deepseek_jax.storage import Place

TOKENS = 8192  # of a batch, at least one sequence
SEQUENCES = 64  # that are read without --limit


def evaluate(options: Any, source: Place | str) -> dict[str, Any]:
    """Returns the results as JSON. Raises UserError for text that is not there, or longer sequences than it has."""
    import jax
    import numpy as np

    from deepseek_jax.compat import start_compilation_cache
    from deepseek_jax.language_model import load
    from deepseek_jax.layers.base import bind, split
    from deepseek_jax.train import by_position
    from deepseek_jax.weights import is_published

    start_compilation_cache("")
    model = load(source)
    print(model, file=sys.stderr)
    config, length = model.config, options.length or model.config.data.seq_len
    text = held_out(config, options.text, length, is_published(source))
    lengths_V = np.zeros(config.model.vocab_size, np.int64)
    lengths_V[: text.vocab_size] = text.tokenizer.byte_lengths()
    sums, count = by_position.ByPosition(length, lengths_V), min(text.n_samples, options.limit or SEQUENCES)
    chunk, mask = config.loss.chunk, config.data.mask_documents
    definition, *weights = split(model.module)

    @jax.jit
    def run(params: Any, bias: Any, batch: Any) -> jax.Array:
        with jax.default_matmul_precision("highest" if config.precision == "fp32" else None):
            return by_position.nll(bind(definition, params, bias), batch, chunk=chunk, mask=mask)

    size = min(max(TOKENS // length, 1), count)
    for start in range(0, count, size):
        batch = text.rows(start, size)
        is_new_B = np.arange(start, start + size) < count  # what comes after the last begins anew
        batch = batch._replace(weights_BT=batch.weights_BT * is_new_B[:, None])
        sums.add(np.asarray(run(*weights, batch)), batch)
    about = {"model": model.source, "text": config.data.source, "length": length, "sequences": count}
    return about | {"ranges": [each._asdict() for each in sums.ranges()]}


def held_out(config: ConfigDict, source: str, length: int, is_weights: bool) -> Any:
    """Returns the text to judge, in sequences of `length` tokens: all of `source`, or what a run has held out.

    `is_weights`: the model is published weights, not a run.

    `config.data` becomes what was read.
    """
    from deepseek_jax.data.pipeline import open_splits, settled

    data = config.data
    if source:
        data.source, data.format, data.holdout_rate, data.fim_rate, data.workers = source, "auto", 0.0, 0.0, 0
    elif is_weights and data.source == "stdlib":
        raise UserError("--by-position: published weights have no text of their own. Give --text=FILES.")
    data.seq_len = length
    data.update(settled(data))
    training, held = open_splits(seed=config.seed, **data)
    if not source and held is None:
        raise UserError("--by-position: the run has held out no text (config.data.holdout_rate=0). Give --text=FILES.")
    return training if source else held


def report(found: dict[str, Any]) -> None:
    """Prints the results."""
    print(f"{found['sequences']:,} sequences of {found['length']:,} tokens: {found['text']}")
    header = ("positions", "targets", "nats/token", "bits/byte")
    cells = [
        (
            f"{one['start']:,} to {one['end'] - 1:,}",
            f"{one['weight']:,.0f}",
            f"{one['nats']:.4f}",
            f"{one['bits_per_byte']:.4f}",
        )
        for one in found["ranges"]
    ]
    print_table(header, cells, right=header)
