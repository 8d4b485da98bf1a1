"""A language model in one line: call it, generate with it, look inside. No mesh, no ceremony.

    import deepseek_jax as dsj

    model = dsj.build("tiny_v3")            # fresh weights
    model = dsj.load("runs/tiny_v3")        # those of a run
    model = dsj.load("DeepSeek-V2-Lite")    # those of a Hugging Face directory, or a hub id: deepseek-ai/…
    logits = model([[1, 2, 3]])             # float32, (1, 3, V)
    model.complete("def main(")             # text
    model.module.moe_blocks                 # the network itself
    dsj.save_pretrained(model, "out")       # a Hugging Face directory

The weights are plain nested dicts, `model.params` and `model.router_bias`: replace a leaf, and the next call uses it.
"""

import functools
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jax.typing import ArrayLike
from ml_collections import ConfigDict

from deepseek_jax import on_device, release, run_config
from deepseek_jax.abstract_model import (
    abstract_module,
    abstract_weights,
    check_memory,
    count_parameters,
    module,
    run_as,
    with_routes,
)
from deepseek_jax.bounds import one_of
from deepseek_jax.compat import quick_compile
from deepseek_jax.convert import fp8_weights, hf
from deepseek_jax.data.tokenizer import Tokenizer, open_tokenizer
from deepseek_jax.errors import UserError
from deepseek_jax.kernels import XLA
from deepseek_jax.layers.base import Tree, bind, split
from deepseek_jax.precision.policy import policy
from deepseek_jax.seeds import random_key
from deepseek_jax.serve.batches import LEAST_PAGES, bucket
from deepseek_jax.serve.engine import Engine
from deepseek_jax.serve.offline import Completion, complete, stream
from deepseek_jax.serve.pages import PAGE_SIZE
from deepseek_jax.serve.programs import form
from deepseek_jax.serve.prompts import check_prompts
from deepseek_jax.serve.sampling import Sampling
from deepseek_jax.storage import Remote
from deepseek_jax.units import binary
from deepseek_jax.weights import FORMATS, export, open_weights, with_peft

if TYPE_CHECKING:
    from deepseek_jax.on_mesh import Redundant

MOST_ROWS = 256  # prompts that `generate` continues at the same time
# of engines whose prompts are all known, and which compile what these need
OFFLINE: dict[str, Any] = {"n_steps": 8, "n_prompts": 8, "least_pages": 2}
GENERATE: dict[str, Any] = {"n_steps": 32, "n_prompts": 32}  # where they begin together too


@dataclass(eq=False)
class Kept:
    """An engine that later calls use again, what it was made with, and the leaves of its weights."""

    made_with: tuple  # its options, `n_positions`, the form of the weights
    weights: list[jax.Array]
    engine: Engine
    taken: threading.Lock = field(default_factory=threading.Lock)  # by the call that runs it


class LanguageModel:
    """A network with its weights, on one device.

    Several threads may generate with one model, each with an engine and a cache of its own. Weights that were replaced
    stay in memory until the next call of `generate` and of `serve`, where these have been called before.

    Args:
        config: the resolved config of a run.
        params: trained weights, a nested dict of arrays.
        router_bias: the routers' balancing biases, likewise.
        source: where the weights are from, for `repr`.

    Attributes:
        n_positions: tokens, prompt and new ones, that a generated sequence may have: those that a published model is
            meant for, or the length of the training sequences if that is more. Rotary positions know no bound, so it
            may be raised; what comes of it is another matter.
    """

    def __init__(self, config: ConfigDict, params: Tree, router_bias: Tree, source: str = ""):
        self.config, self.params, self.router_bias, self.source = config, params, router_bias, source
        self.n_positions: int = release.n_positions(config)
        self._definition, _, _ = split(abstract_module(config, XLA))  # runs anywhere, also where a run did not
        self._generating = on_device.definition(config, self._definition)
        # GPUs and TPUs would otherwise round the operands of a matmul in float32
        self._matmul_precision = "highest" if config.precision == "fp32" else None
        self._prepared = on_device.Prepared(config)
        self._kept: dict[str, Kept] = {}  # by what they are for

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of `config.data.tokenizer`."""
        return open_tokenizer(self.config.data.tokenizer)

    @property
    def end_ids(self) -> tuple[int, ...]:
        """The ids at which generation stops, ascending.

        They are the tokenizer's end token and all that the published model names in config.json and
        generation_config.json.
        """
        return release.marks(self.config, self.tokenizer).end_ids

    @property
    def generation_config(self) -> dict[str, Any]:
        """What the published model's generation_config.json says, such as temperature; {} if there is none."""
        return release.generation_config(self.config)

    @property
    def module(self) -> nnx.Module:
        """The network as a Flax module that holds the present weights.

        Blocks of one kind are stacked: their weights have a leading axis, one entry a layer. To take out layer 2:

            definition, weights = nnx.split(model.module.moe_blocks)
            block = nnx.merge(definition, jax.tree.map(lambda w: w[2], weights))
            block.attention(x_BTD)
        """
        return bind(self._definition, self.params, self.router_bias)

    def __call__(self, ids: ArrayLike) -> jax.Array:
        """float32 logits of the next token at every position.

        Args:
            ids: token ids, a batch (B, T) or one sequence (T,); lists and numpy arrays are fine. A new shape compiles.

        Returns logits_BTV for a batch, (T, V) for one sequence.
        """
        try:
            ids = np.asarray(ids)
        except ValueError:
            raise UserError("sequences of different lengths: expected ids of shape (B, T). Pad at the end.") from None
        if ids.ndim not in (1, 2) or not ids.size or not np.issubdtype(ids.dtype, np.integer):
            raise UserError(f"ids of shape {ids.shape} and dtype {ids.dtype}: expected integers, (B, T) or (T,).")
        if ids.min() < 0 or ids.max() >= self.config.model.vocab_size:
            raise UserError(f"ids from {ids.min()} to {ids.max()}: expected 0 to {self.config.model.vocab_size - 1}.")
        weights, ids_BT = (self.params, self.router_bias), np.atleast_2d(ids).astype(np.int32)
        logits_BTV = _logits(self._definition, self._matmul_precision, *weights, ids_BT)
        return logits_BTV if ids.ndim == 2 else logits_BTV[0]

    def generate(
        self,
        ids: Sequence[int] | Sequence[Sequence[int]],
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        stop_ids: Sequence[int] | None = None,
        **options: Any,
    ) -> list[int] | list[list[int]]:
        """Continues one prompt or a batch of prompts of any lengths.

        Args:
            ids: token ids of a prompt, or a list of those.
            max_new_tokens: at most so many.
            temperature: 0 takes the likeliest token each time.
            top_p: draws from the fewest likeliest tokens whose probabilities add up to it.
            seed: same seed, same tokens, but for rounding; 0 to 2^64 - 1. A batch's prompts draw as alone with the
                seeds `seed`, `seed` + 1, and so on.
            stop_ids: ids that end a sequence; `end_ids` by default, () for none.
            options: as for `engine`. The engine and its programs are kept for later calls.

        Returns the new ids, with the stop id at the end if there was one: a list, or a list of lists for a batch.

        Raises UserError: prompt and new tokens exceed `n_positions`; an id or the seed out of range; an empty prompt.
        """
        if not hasattr(ids, "__len__"):
            raise UserError(f"generate({ids!r}): expected ids of one prompt, like [1, 2, 3], or a list of prompts.")
        is_batch = not isinstance(ids, str) and len(ids) > 0 and (isinstance(ids[0], str) or np.ndim(ids[0]) > 0)
        prompts: Any = ids if is_batch else [ids]
        prompts, sampling = self._checked(prompts, max_new_tokens, temperature, top_p, seed, stop_ids)
        samplings = [replace(sampling, seed=(sampling.seed + row) % 2**64) for row in range(len(prompts))]
        with self._large_enough(prompts, sampling.max_new_tokens, options) as engine:
            rows = [found.ids for found in complete(engine, prompts, samplings)]
        return rows if is_batch else rows[0]

    def stream(
        self,
        ids: Sequence[int],
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        stop_ids: Sequence[int] | None = None,
        **options: Any,
    ) -> Iterator[int]:
        """`generate` for one prompt, each id as soon as it is there."""
        prompts, sampling = self._checked([ids], max_new_tokens, temperature, top_p, seed, stop_ids)

        def tokens() -> Iterator[int]:
            with self._large_enough(prompts, sampling.max_new_tokens, options) as engine:
                yield from stream(engine, prompts[0], sampling)

        return tokens()

    def engine(
        self,
        mesh: Mesh | None = None,
        cache: str = "full",
        routes: bool = False,
        redundant: "Redundant | None" = None,
        **options: Any,
    ) -> Engine:
        """Returns an engine that runs many requests at once.

        Args:
            mesh: devices that have requests of their own and share the routed experts: `parallel.mesh.make_mesh` with
                sizes of `data` and `expert`. The weights are copied there. None: one device.
            cache: "full", in the dtype of the activations, or "fp8", which halves the cache of latent attention.
            routes: whether requests report the experts that their tokens chose.
            redundant: replicas of busy experts on a mesh (`on_mesh.Redundant`); the results are the same.
            options: as for `serve.engine.Engine`; rows and pages are those of each device.

        Raises UserError: an unknown cache, or a model or mesh for which there is none.
        """
        one_of("full", "fp8").check("cache", cache)
        definition, weights = self._generating, (self._as_read(divided=mesh is not None), self.router_bias)
        if cache == "fp8" or routes:
            alone: Any = bind(definition, *weights)
            run = replace(alone.run, cache=cache)
            run = with_routes(self.config, run) if routes else run
            definition = split(run_as(self.config, run))[0]
        compiled: dict[str, Any] = {
            "compiler_options": on_device.compiler_options(),
            "ends_early": on_device.ends_early(),
        }
        options = compiled | {"matmul_precision": self._matmul_precision} | options
        if mesh is None and redundant is not None:
            raise UserError("redundant experts on one device: it has all experts. Give a mesh, or leave them out.")
        if mesh is not None:
            from deepseek_jax import on_mesh  # which brings much that one device does without

            options["replicas"] = on_mesh.replicas(self.config, definition, weights, mesh, redundant)
            if redundant is not None:
                definition = on_mesh.with_slots(self.config, definition, weights, redundant)
            weights = options["replicas"].place(weights)
        return Engine(definition, weights, self.n_positions, **options)

    def _as_read(self, divided: bool) -> Tree:
        """Returns the trained weights as this device reads them; in stacks where they are `divided` over several."""
        prepared = on_device.Prepared(self.config, for_gpu=False) if divided else self._prepared
        return prepared(self.params)

    def serve(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling | Sequence[Sampling], **options: Any
    ) -> list[Completion]:
        """Continues many prompts, batched continuously: ids in; ids, log-probabilities and routes out.

        Args:
            prompts: token ids of each prompt.
            sampling: how they are continued: one for all, or one for each.
            options: as for `engine`, by default with 8 tokens per step, of 8 prompts at once, over two pages or more.
                The engine and its programs are kept for calls with the same options, its cache for calls with the same
                weights.

        Raises UserError as `serve.offline.complete` does.
        """
        options = OFFLINE | options
        samplings = [sampling] * len(prompts) if isinstance(sampling, Sampling) else list(sampling)
        with self._idle_engine("serve", options) as engine:
            return complete(engine, prompts, samplings)

    def complete(self, text: str | Sequence[str], max_new_tokens: int = 64, **options: Any) -> str | list[str]:
        """Returns the continuation of a text, or a list of those of several; `options` as for `generate`."""
        texts = [text] if isinstance(text, str) else list(text)
        if not all(isinstance(one, str) for one in texts):
            raise UserError(
                f"complete({str(text)[:60]}): expected a text or a list of texts. For ids there is model.generate(ids)."
            )
        rows: Any = self.generate([self.prompt(one) for one in texts], max_new_tokens, **options) if texts else []
        completions = [self.tokenizer.decode(row) for row in rows]
        return completions[0] if isinstance(text, str) else completions

    def prompt(self, text: str) -> list[int]:
        """The ids of a text to continue, after a begin mark if the tokenizer's settings ask for one."""
        begin = [self.tokenizer.bos_id] if self.tokenizer.add_bos else []
        return [*begin, *self.tokenizer.encode(text).tolist()]

    def _checked(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        temperature: float,
        top_p: float,
        seed: int,
        stop_ids: Sequence[int] | None,
    ) -> tuple[list[list[int]], Sampling]:
        """Returns prompts, and how the first one is continued; raises UserError as `generate`."""
        if any(isinstance(prompt, str) for prompt in prompts):
            raise UserError(
                "a prompt is text: expected ids. Use model.complete(text), or model.tokenizer.encode(text) first."
            )
        numbers = map(_plain, (max_new_tokens, temperature, top_p, seed))
        given = dict(zip(("max_new_tokens", "temperature", "top_p", "seed"), numbers, strict=True))
        sampling = Sampling(**given, stop_ids=self.end_ids if stop_ids is None else stop_ids)
        vocab_size = self.config.model.vocab_size
        sampling.check(vocab_size)
        return check_prompts(prompts, sampling.max_new_tokens, self.n_positions, vocab_size), sampling

    def _large_enough(
        self, prompts: list[list[int]], max_new_tokens: int, options: dict[str, Any]
    ) -> AbstractContextManager[Engine]:
        """An idle engine with rows for these prompts, and with pages for as many as run at the same time, or more."""
        n_devices = options["mesh"].size if options.get("mesh") else 1
        n_rows = bucket(min(-(-len(prompts) // n_devices), MOST_ROWS), 1)
        pages = [-(-(len(prompt) + max_new_tokens) // PAGE_SIZE) for prompt in prompts]
        pages = sorted(pages)[-MOST_ROWS * n_devices :]
        n_pages = 1 + bucket(max(-(-sum(pages) // n_devices), pages[-1]), LEAST_PAGES)
        kept = self._kept.get("generate")
        had = kept.made_with[0] if kept else {}
        sizes = {"n_rows": max(n_rows, had.get("n_rows", 0)), "n_pages": max(n_pages, had.get("n_pages", 0))}
        sizes["chunk"] = on_device.chunk()
        return self._idle_engine("generate", sizes | OFFLINE | GENERATE | options)

    @contextmanager
    def _idle_engine(self, purpose: str, options: dict[str, Any]) -> Iterator[Engine]:
        """An engine with these options and the model's present weights, which no other call runs meanwhile."""
        kept = self._taken(purpose, options)
        try:
            yield kept.engine
        finally:
            kept.taken.release()

    def _taken(self, purpose: str, options: dict[str, Any]) -> Kept:
        """The engine of the last call, if nobody runs it and it can take the weights, or a new one; `taken` is held."""
        stored = self.params, self.router_bias
        leaves, made_with = jax.tree.leaves(stored), (options, self.n_positions, form(stored))
        kept = self._kept.get(purpose)
        if kept and kept.engine.is_idle and kept.made_with == made_with and kept.taken.acquire(blocking=False):
            if any(old is not new for old, new in zip(kept.weights, leaves, strict=True)):
                replicas = kept.engine.replicas
                weights = (self._as_read(divided=replicas is not None), self.router_bias)
                kept.engine.replace_weights(replicas.place(weights) if replicas else weights)
                kept.weights = leaves
            return kept
        del kept  # its memory is freed before the other's is taken
        self._kept.pop(purpose, None)
        made = Kept(made_with, leaves, self.engine(**options))
        made.taken.acquire()
        self._kept[purpose] = made
        return made

    def _format(self) -> str:
        """What is computed in, and how many bytes of weights are held in FP8."""
        sizes = fp8_weights.n_bytes(self.params)
        return self.config.precision + (f", {binary(sizes['FP8'])} of weights in FP8" if sizes["FP8"] else "")

    def __repr__(self) -> str:
        m = self.config.model
        main, ahead = count_parameters(self.params)
        more = f" + {_millions(ahead)} for multi-token prediction" if ahead else ""
        return (
            f"LanguageModel({self.config.name}: family {self.config.family}, {m.n_layers} layers of width {m.d_model}, "
            f"vocabulary {m.vocab_size:,}, {_millions(main)} parameters{more}, {self._format()}; "
            f"{self.source or 'weights given'})"
        )


def build(config: str | ConfigDict, seed: int = 0) -> LanguageModel:
    """A model with fresh weights, those that a run of this config and seed begins with.

    Args:
        config: a name in `deepseek_jax.configs`, a .py file with get_config(), or a config.
        seed: of the initialisers, 0 to 2^64 - 1.

    Raises UserError: no such config, or a model larger than this machine's memory.
    """
    key = random_key(seed)
    config = run_config.load(config) if isinstance(config, str) else config
    check_memory(config.name, abstract_weights(config))

    def init(key: jax.Array) -> tuple[Tree, Tree]:
        return split(module(config, key))[1:]

    # One program: run operation by operation, initialisers take many times longer.
    params, router_bias = quick_compile(init)(key)
    return LanguageModel(config, params, router_bias, source=f"fresh, seed {seed}")


def load(
    path: str | os.PathLike | Remote,
    precision: str | None = None,
    weights: str = "wide",
    adapters: str | os.PathLike | None = None,
) -> LanguageModel:
    """The model of a run, from its newest intact checkpoint, or of published weights, which may be on the hub.

    Weights keep the dtypes in which they are stored, but for 8-bit ones, which become bfloat16.

    Args:
        path: the workdir of a run, its directory of checkpoints, a directory with config.json and safetensors files, or
            the id of such a model on the Hugging Face hub (owner/name), which is downloaded to the hub's cache; gs://
            and s3:// for those in a bucket.
        precision: what to compute in, "fp32" or "bf16"; by default that of the run, or of most published weights.
        weights: "wide"; "stored", so that 8-bit weights stay in FP8 (`precision.fp8_weight`), in half the memory; or
            "fp8", so that the others are quantised as well, by V3's rule.
        adapters: directory of low-rank adapters that PEFT has written, which are merged into the weights.

    Raises UserError: no such directory, no intact checkpoint in it, a published model of no known family, weights
    that do not fit the memory, or adapters of another model.
    """
    one_of(*FORMATS).check("weights", weights)
    if adapters is not None and weights != "wide":
        raise UserError(f"weights={weights!r} with adapters: expected 'wide', since codes take no sum.")
    loaded = open_weights(path).load(weights)
    config, state = loaded.config, loaded.state
    if adapters is not None:
        state = with_peft(config, state, adapters)
    if weights == "fp8" and config.precision == "fp8":
        config.precision = "bf16"  # of a run in FP8: what multiplies weights in FP8 takes activations of more bits
    if precision:
        policy(precision)  # refuses an unknown one
        config.precision = precision
    return LanguageModel(config, state["params"], state["router_bias"], loaded.source)


def save_pretrained(model: LanguageModel, directory: str | os.PathLike, dtype: str = "bf16") -> None:
    """Writes a model as a Hugging Face directory: config.json, safetensors files with an index, its tokenizer.

    Of a published model, marks of begin and end, longest sequence, settings for generation, chat template and licence
    are written as they were, but for what `model.config` says otherwise by now.

    Args:
        model: of any family but those that nobody publishes.
        directory: made if need be; must hold no weights yet.
        dtype: "bf16"; "fp8", "fp8_ue8m0" or "fp8_e8m0", E4M3 in blocks of 128 x 128, or "fp4" (`hf.write`); "fp32"; or
            "keep" for the dtypes that the weights have.

    Raises UserError: an unknown dtype, or a directory that holds weights already or cannot be written.
    """
    weights = {"params": model.params, "router_bias": model.router_bias}
    export(model.config, directory, weights, hf.from_tree(weights), dtype)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _logits(
    definition: nnx.GraphDef, matmul_precision: str | None, params: Tree, router_bias: Tree, ids_BT: jax.Array
) -> jax.Array:
    with jax.default_matmul_precision(matmul_precision):
        model: Any = bind(definition, params, router_bias)
        return model(ids_BT)


def _plain(value: Any) -> Any:
    """A number of numpy's as one of Python's; anything else as it is."""
    return value.item() if isinstance(value, np.generic) else value


def _millions(count: int) -> str:
    return f"{count / 1e6:,.1f}M" if count < 1e10 else f"{count / 1e6:,.0f}M"
