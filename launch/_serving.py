"""What serve and evaluate share: a model behind an engine, its server, and where that listens."""

import contextlib
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deepseek_jax.bounds import one_of, path, whole
from deepseek_jax.errors import UserError
from deepseek_jax.launch._talking import drawing_of, template_name

if TYPE_CHECKING:
    from deepseek_jax.data.chat import Template
    from deepseek_jax.language_model import LanguageModel
    from deepseek_jax.serve.api.service import Service

FLAGS = {
    "from": (str, "", "directory of published weights, or their id on the hub", path()),
    "template": (str, "", "chat template, where the model's own is not found beside its tokenizer"),
    "name": (str, "", "name of the model for clients (default: that of its directory)"),
    "rows": (int, 16, "requests that run at the same time", whole(1, 4096)),
    "queue": (int, 256, "requests that run or wait; more are refused with status 429", whole(1, 10**6)),
    "pages": (int, 0, "pages of 64 tokens in the cache (default: enough for all rows at full length)", whole(0, 10**8)),
    "cache": (str, "full", "full; or fp8, which halves the cache of latent attention", one_of("full", "fp8")),
    "data": (int, 1, "devices with requests and pages of their own, that hold the same experts", whole(1, 2**16)),
    "expert": (int, 1, "devices with requests and pages of their own, over which experts are divided", whole(1, 2**16)),
    "drafts": (int, 0, "1: multi-token prediction drafts a second token for each; the text is the same", whole(0, 1)),
    "disk": (str, "", "directory in which pages of the cache survive a restart", path()),
    "disk_gb": (int, 64, "gigabytes that they may take there", whole(1, 10**6)),
    "chunk": (int, 256, "tokens of a prompt that one step computes", whole(1, 10**6)),
}


def source_of(options: Any) -> Path | str:
    """Returns where the weights are. Raises UserError unless one place is given, and if packages are missing."""
    source = getattr(options, "from") or options.workdir
    if not source or (getattr(options, "from") and options.workdir):
        raise UserError("expected --from=DIR for published weights, or --workdir=RUN for a run of yours: one of them.")
    try:
        from deepseek_jax.serve.api import app  # noqa: F401
    except ModuleNotFoundError as error:
        raise UserError(f"{error.name} is not installed. Run pip install 'deepseek_jax[serve]'.") from None
    return source


def open_service(options: Any, source: Path | str, keys: tuple[str, ...] = ()) -> "Service":
    """Loads the model and compiles its programs."""
    from deepseek_jax.compat import start_compilation_cache
    from deepseek_jax.language_model import load
    from deepseek_jax.parallel.mesh import make_mesh
    from deepseek_jax.serve.api.service import Service
    from deepseek_jax.serve.worker import Worker

    start_compilation_cache("")
    model = load(source)
    started = time.monotonic()
    engine = model.engine(
        make_mesh(options.data, options.expert) if options.data * options.expert > 1 else None,
        options.cache,
        n_rows=options.rows,
        n_pages=options.pages or None,
        chunk=options.chunk,
        n_drafts=options.drafts,
    )
    if options.disk:
        engine.keep_on_disk(Path(options.disk), options.disk_gb * 10**9)
    n_programs = engine.compile()
    print(f"compiled {n_programs} programs in {time.monotonic() - started:.1f} s", file=sys.stderr)
    return Service(
        worker=Worker(engine, options.queue),
        name=options.name or Path(source).resolve().name,
        tokenizer=model.tokenizer,
        template=_template(model, str(source), options.template),
        end_ids=model.end_ids,
        n_positions=engine.most_positions,
        drawing=drawing_of(model.config),
        keys=keys,
    )


@contextlib.contextmanager
def in_thread(service: "Service") -> Iterator[str]:
    """The server in a thread, on a port of this machine that is free, for as long as the block runs; its address."""
    from deepseek_jax.serve.api.app import make_server

    with listen("127.0.0.1", 0) as listener:
        server = make_server(service)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        try:
            yield "http://{}:{}".format(*listener.getsockname()[:2])
        finally:
            server.should_exit = True
            thread.join()


def listen(host: str, port: int) -> socket.socket:
    """Returns a socket that listens. Raises UserError if the address is taken or not of this machine."""
    try:
        return socket.create_server((host, port), backlog=2048)
    except OSError as error:
        raise UserError(
            f"cannot listen on {host}:{port} ({error.strerror}). Choose --port (0 takes a free one) or --host."
        ) from None


def _template(model: "LanguageModel", source: str, given: str) -> "Template | None":
    """The model's chat template; None for a base model, which a message says."""
    from deepseek_jax.data import chat

    try:
        given = given or model.config.data.chat_template
        return chat.template(template_name(model.config.data.tokenizer, source, given))
    except UserError as error:
        if given:
            raise
        print(f"no chat: {error}", file=sys.stderr)
        return None
