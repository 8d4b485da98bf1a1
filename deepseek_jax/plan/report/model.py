"""The model: its parameters, its cache, and the operations per token."""

from collections.abc import Sequence

from deepseek_jax.plan import figures, flops, step_time
from deepseek_jax.plan.figures import DERIVED, GIGA, Column, Figure, Row, Section
from deepseek_jax.plan.job import Job
from deepseek_jax.plan.network import LONG, Network, Reading
from deepseek_jax.plan.report.inputs import PlannedModel


def parameters(model: PlannedModel) -> Section:
    """Returns the parameter counts and the size of the cache."""
    c, count = model.counts, figures.count
    published = count("active_parameters_without_embedding", c.active_without_embedding)
    rows = [
        ("total", count("total_parameters", c.total), "main model, embedding and head included"),
        ("active per token", count("active_parameters", c.active), "top_k of the routed experts, and all the rest"),
        ("active, without the embedding", published, "the convention of the numbers published for V2 and V3"),
        ("embedding", count("embedding_parameters", c.embedding), "a table: one row is read per token"),
        ("head", count("head_parameters", c.head), ""),
    ]
    if c.experts:
        rows.append(("routed experts", count("expert_parameters", c.experts), ""))
    if c.mtp_total:
        note = "in addition; without the embedding and head that it shares"
        rows.append(("multi-token prediction", count("mtp_parameters", c.mtp_total), note))
        rows.append(("  active per token", count("mtp_active_parameters", c.mtp_active), ""))
    if c.router_biases:
        rows.append(("router biases", figures.plain("router_biases_count", c.router_biases), ""))
    cache = Figure("kv_cache_bytes_per_token", model.cache_bytes, f"{model.cache_bytes:,} B", DERIVED)
    kept = "" if all(reading.tokens_per_key == 1 for reading in model.network.layers) else f", for {LONG:,} tokens"
    rows.append(("key-value cache per token", cache, f"bfloat16, from the shapes that prefill keeps{kept}"))
    if model.fp8_cache_bytes:
        coded = Figure("fp8_cache_bytes_per_token", model.fp8_cache_bytes, f"{model.fp8_cache_bytes:,} B", DERIVED)
        rows.append(("  in FP8", coded, "cache=fp8"))
    return figures.column("parameters", "parameters", rows)


CONTEXTS = {"4K": 2**12, "32K": 2**15, "128K": 2**17, "1M": 2**20}  # tokens in the cache


def generation(network: Network) -> Section:
    """Returns the operations of a new token over the length of its context, beside those of dense attention."""
    columns = (Column("sparse", DERIVED, "sparse"), Column("dense", DERIVED, "dense"))
    rows = []
    for name, n_before in CONTEXTS.items():
        costs = [flops.next_token(network, n_before, dense=dense) for dense in (False, True)]
        note = f"{costs[1] / costs[0]:,.1f} times as many with dense attention"
        rows.append(_pair(f"after_{name}", f"{name} tokens before it", costs, note))
    return Section("generation", "operations of a new token", tuple(rows), columns)


def operations(network: Network, job: Job) -> Section:
    """Returns the operations per token, with attention counted in full and causally."""
    columns = (Column("full", DERIVED, "full"), Column("causal", DERIVED, "causal"))
    rows = [*_forward(network, job.layout.seq_len), *_training(network, job)]
    return Section("operations", "operations per token", tuple(rows), columns)


def _pair(key: str, label: str, values: Sequence[float], note: str = "") -> Row:
    """Returns a row of two numbers of operations: with full and with causal attention."""
    cells = (Figure(f"{key}_gflop_per_token", v / GIGA, figures.metric(v, "FLOP"), DERIVED) for v in values)
    return Row(label, tuple(cells), note)


def _forward(network: Network, seq_len: int) -> list[Row]:
    """Returns the parts of the forward pass that are not empty."""
    full, causal = (flops.forward(network, seq_len, causal=causal) for causal in (False, True))
    pairs = "; ".join(_read(reading, n, network.n_layers, seq_len) for reading, n in network.layers.items())
    rows = [
        _pair("forward_blocks", "forward: matrices of the blocks", (full.blocks, causal.blocks), "2 per parameter"),
        _pair("forward_head", "forward: head", (full.head, causal.head)),
        _pair("forward_attention", "forward: attention", (full.attention, causal.attention), pairs),
        _pair("forward_router", "forward: routers", (full.router, causal.router)),
        _pair("forward_mtp", "forward: multi-token prediction", (full.mtp, causal.mtp)),
    ]
    return [row for row in rows if any(figure.value for figure in row.figures)]


def _read(reading: Reading, n: int, n_layers: int, seq_len: int) -> str:
    """Says what `n` of the layers read."""
    words = f"{reading.flops_per_pair:,} per pair and layer; " if n == n_layers else f"{n} layers: "
    keys = "" if reading.most_keys == 0 else f"{seq_len // reading.tokens_per_key:,} keys, causally half"
    if reading.most_keys:
        keys += f", {reading.most_keys:,} at most; {reading.flops_per_index:,} for all, to choose these"
    window = f"a window of {reading.window:,}" if reading.window else ""
    return words + ", ".join(part for part in (window, keys) if part)


def _training(network: Network, job: Job) -> list[Row]:
    """Returns the sums for training: everything, the published convention, and what is recomputed."""
    main, everything = (
        [flops.training(network, job.layout.seq_len, causal=causal, **parts) for causal in (False, True)]
        for parts in (flops.PUBLISHED_MFU, {})
    )
    rows = []
    if everything != main:
        note = "3 x forward, as the training log counts"
        rows.append(_pair("training_all", "training: all of these", everything, note))
    rows.append(_pair("training", "training", main, "blocks, head and attention only: the published convention"))
    again = step_time.recomputed_flops(job)
    note = f"policy {job.recipe.remat}; not part of any MFU"
    return [*rows, _pair("recomputed", "recomputed in addition", (again, again), note)]
