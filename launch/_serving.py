"""What serve and evaluate share: a model behind an engine."""

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deepseek_jax.bounds import one_of, path, whole
from deepseek_jax.errors import UserError
from deepseek_jax.storage import Place

if TYPE_CHECKING:
    from deepseek_jax.language_model import LanguageModel
    from deepseek_jax.on_mesh import Redundant
    from deepseek_jax.serve.engine import Engine

FLAGS = {
    "from": (str, "", "directory of published weights, or their id on the hub", path()),
    "rows": (int, 16, "requests that run at the same time", whole(1, 4096)),
    "pages": (int, 0, "pages of 64 tokens in the cache (default: enough for all rows at full length)", whole(0, 10**8)),
    "cache": (str, "full", "full; or fp8, which halves the cache of latent attention", one_of("full", "fp8")),
    "data": (int, 1, "devices with requests and pages of their own, that hold the same experts", whole(1, 2**16)),
    "expert": (int, 1, "devices with requests and pages of their own, over which experts are divided", whole(1, 2**16)),
    "redundant_experts": (
        int,
        0,
        "replicas of busy experts in each layer, a multiple of --expert; needs --loads",
        whole(0, 2**16),
    ),
    "loads": (str, "", "file with how busy experts are: what /experts of a server of this model answered", path()),
    "drafts": (int, 0, "1: multi-token prediction drafts a second token for each; the text is the same", whole(0, 1)),
    "disk": (str, "", "directory in which pages of the cache survive a restart", path()),
    "disk_gb": (int, 64, "gigabytes that they may take there", whole(1, 10**6)),
    "weights": (
        str,
        "stored",
        "stored, so that FP8 weights stay in FP8; wide, so that they become bfloat16; or fp8: all matrices of blocks",
        one_of("stored", "wide", "fp8"),
    ),
    "chunk": (int, 256, "tokens of a prompt that one step computes", whole(1, 10**6)),
}


def source_of(options: Any) -> Place | str:
    """Returns where the weights are. Raises UserError unless one place is given."""
    source = getattr(options, "from") or options.workdir
    if not source or (getattr(options, "from") and options.workdir):
        raise UserError("expected --from=DIR for published weights, or --workdir=RUN for a run of yours: one of them.")
    return source


def redundant_of(options: Any) -> "Redundant | None":
    """Returns the replicas that are asked for. Raises UserError for flags that do not agree or a wrong file."""
    from deepseek_jax.on_mesh import Redundant
    from deepseek_jax.serve import loads

    n, file = options.redundant_experts, options.loads
    if bool(n) != bool(file):
        raise UserError(
            f"--redundant-experts={n} with --loads={file or 'nothing'}: expected both, or neither. The file says which "
            "experts are busy: curl http://HOST:PORT/experts > FILE writes it."
        )
    if n and n % options.expert:
        raise UserError(
            f"--redundant-experts={n} with --expert={options.expert}: expected equally many on each device that shares "
            f"the experts. Choose a multiple of {options.expert}."
        )
    if n and options.data * options.expert == 1:
        raise UserError(f"--redundant-experts={n} on one device, which has all experts. Give --expert=2 or more.")
    if n and options.weights == "fp8":
        raise UserError(f"--redundant-experts={n} with --weights=fp8: expected others. Give --weights=wide.")
    return Redundant(n, loads.read(file)) if n else None


NEVER_FOUND = (
    "prompts are never found in the cache: this model's attention keeps a window of the last tokens of each running "
    "request, in no page, so a prompt that begins as another one is computed whole."
)


def open_engine(options: Any, source: Place | str, **more: Any) -> "tuple[LanguageModel, Engine]":
    """Loads the model, whose programs are yet to be compiled; `more` are options of the engine."""
    from deepseek_jax.compat import start_compilation_cache
    from deepseek_jax.language_model import load
    from deepseek_jax.parallel.mesh import make_mesh

    redundant = redundant_of(options)
    start_compilation_cache("")
    model = load(source, weights=options.weights)
    print(model, file=sys.stderr)
    engine = model.engine(
        make_mesh(options.data, options.expert) if options.data * options.expert > 1 else None,
        options.cache,
        redundant=redundant,
        n_rows=options.rows,
        n_pages=options.pages or None,
        chunk=options.chunk,
        n_drafts=options.drafts,
        **more,
    )
    if options.disk:
        engine.keep_on_disk(Path(options.disk), options.disk_gb * 10**9)
    if not engine.finds_prompts:
        print(NEVER_FOUND, file=sys.stderr)
    return model, engine


@contextlib.contextmanager
def compiling(engine: "Engine", settled: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Compiles an engine's programs: those in which any request can run at once, the others in a thread meanwhile.

    `settled` is called after each of the two.
    """
    stopped, started = threading.Event(), time.monotonic()
    print(f"compiled {engine.compile_largest()} programs in {time.monotonic() - started:.1f} s", file=sys.stderr)
    settled()

    def rest() -> None:
        try:
            n_programs = engine.compile(stopped)
        except Exception as error:  # whatever it is, those that are there serve
            lines = str(error).splitlines() or [type(error).__name__]
            why = lines[0].rstrip(".")
            print(f"some programs do not compile: {why}. Requests run in the largest ones.", file=sys.stderr)
            settled()
            return
        settled()
        if not stopped.is_set():
            print(f"compiled all {n_programs} programs in {time.monotonic() - started:.1f} s", file=sys.stderr)

    thread = threading.Thread(target=rest, name="compiling")
    thread.start()
    try:
        yield
    finally:
        stopped.set()
        thread.join()
