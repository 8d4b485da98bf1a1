"""The lines that a run prints before its first step."""

from typing import TYPE_CHECKING

from ml_collections import ConfigDict

from deepseek_jax.storage import Place

if TYPE_CHECKING:
    from deepseek_jax.data.pipeline import Split
    from deepseek_jax.train.step import Trainer


def headline(
    config: ConfigDict, trainer: "Trainer", training: "Split", held_out: "Split | None", workdir: Place, start: int
) -> str:
    """The lines printed before the first step."""
    import jax

    mesh = " x ".join(f"{axis} {n}" for axis, n in trainer.mesh.shape.items() if axis != "context" or n > 1)
    begin = f"resuming from step {start}" if start else "from the beginning"
    return "\n".join(
        [
            f"{config.name}: {trainer.n_params / 1e6:,.1f}M parameters, {config.precision}, mesh {mesh} "
            f"({jax.devices()[0].device_kind}), {begin} in {workdir}",
            f"attention: {attention(config)}",
            *about_adapters(config, trainer),
            *about_text(config, training, held_out),
            "the first step compiles for a while",
        ]
    )


def attention(config: ConfigDict) -> str:
    """What computes the attention of training."""
    from deepseek_jax.layers.attention import computed_by
    from deepseek_jax.run import is_sparse

    if is_sparse(config):
        return f"{config.kernels.indexed_attention}, to {config.model.index_top_k:,} positions of an indexer's choice"
    return computed_by(config.kernels.attention, config.data.seq_len)


def about_adapters(config: ConfigDict, trainer: "Trainer") -> list[str]:
    """The line on low-rank adapters, if there are any: which, and that they alone are trained."""
    from deepseek_jax.layers.lora import is_adapter
    from deepseek_jax.train.trainable import divide
    from deepseek_jax.tree import size
    from deepseek_jax.weights import lora_of

    found = lora_of(config)
    if found is None:
        return []
    trained, _ = divide(trainer.abstract["params"], is_adapter)
    names = sorted({target.name for _, targets in found.blocks for target in targets})
    return [f"adapters alone are trained: {size(trained):,} parameters of rank {found.rank}, at {', '.join(names)}"]


def about_text(config: ConfigDict, training: "Split", held_out: "Split | None") -> list[str]:
    """The lines on the text: how much there is, what is held out, and of a user's own text what is done with it."""
    from deepseek_jax.data.prepared.source import sources

    data = config.data
    size = f"{training.n_tokens / 1e6:,.1f}M" if training.n_tokens >= 1e5 else f"{training.n_tokens:,}"
    lines = [f"text: {data.source}, {size} tokens per epoch, {training.summary}"]
    n_epochs = config.loop.steps * config.batch.size * data.seq_len / training.n_tokens
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
    if sources(data.source):
        lines.append(f"fill-in-the-middle: {data.fim_rate:.0%} of the documents, as prepared")
    elif data.fim_rate:
        lines.append(
            f"fill-in-the-middle: {data.fim_rate:.0%} of the documents (--config.data.fim_rate=0 turns it off)"
        )
    else:
        lines.append("fill-in-the-middle: off (--config.data.fim_rate=0.1 trains a tenth of the documents that way)")
    return lines
