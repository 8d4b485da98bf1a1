r"""Serve a model over HTTP, for OpenAI's and DeepSeek's clients.

    deepseek-jax serve --from=DeepSeek-V2-Lite-Chat                 # a directory of published weights, or a hub id
    deepseek-jax serve --workdir=runs/tiny_v3 --port=8001           # a run of yours
    curl localhost:8000/v1/chat/completions -H 'Content-Type: application/json' \
         -d '{"messages": [{"role": "user", "content": "Hello!"}], "stream": true}'

Requests are batched continuously, and prompts with the same beginning are computed once. Chat needs the model's chat
template, which is found beside its tokenizer; --template names it where there is none. Keys that clients must have are
read from the environment variable DEEPSEEK_JAX_API_KEYS, separated by commas. Needs pip install deepseek_jax[serve].
"""

import os
import socket
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from deepseek_jax.bounds import path, whole
from deepseek_jax.errors import UserError
from deepseek_jax.launch import _options
from deepseek_jax.launch._talking import drawing_of, template_name

if TYPE_CHECKING:
    from deepseek_jax.data.chat import Template
    from deepseek_jax.language_model import LanguageModel

FLAGS = {
    "from": (str, "", "directory of published weights, or their id on the hub", path()),
    "template": (str, "", "chat template, where the model's own is not found beside its tokenizer"),
    "name": (str, "", "name of the model for clients (default: that of its directory)"),
    "host": (str, "127.0.0.1", "address to listen on; 0.0.0.0 for every network"),
    "port": (int, 8000, "port to listen on; 0 takes a free one", whole(0, 65535)),
    "rows": (int, 16, "requests that run at the same time", whole(1, 4096)),
    "queue": (int, 256, "requests that run or wait; more are refused with status 429", whole(1, 10**6)),
    "pages": (int, 0, "pages of 64 tokens in the cache (default: enough for all rows at full length)", whole(0, 10**8)),
    "data": (int, 1, "devices with requests and pages of their own, that hold the same experts", whole(1, 2**16)),
    "expert": (int, 1, "devices with requests and pages of their own, over which experts are divided", whole(1, 2**16)),
    "drafts": (int, 0, "1: multi-token prediction drafts a second token for each; the text is the same", whole(0, 1)),
    "chunk": (int, 256, "tokens of a prompt that one step computes", whole(1, 10**6)),
}
DRAIN_S = 30  # seconds that answers may still take after SIGTERM
KEYS = "DEEPSEEK_JAX_API_KEYS"


def main(argv: list[str]) -> int:
    """Runs the verb; returns the exit code."""
    options = _options.parse(argv, extra=FLAGS, config=False)
    source = getattr(options, "from") or options.workdir
    if not source or (getattr(options, "from") and options.workdir):
        raise UserError("expected --from=DIR for published weights, or --workdir=RUN for a run of yours: one of them.")
    try:
        import uvicorn

        from deepseek_jax.serve.api.app import create_app
        from deepseek_jax.serve.api.service import Service
    except ModuleNotFoundError as error:
        raise UserError(f"{error.name} is not installed. Run pip install 'deepseek_jax[serve]'.") from None
    from deepseek_jax.compat import start_compilation_cache
    from deepseek_jax.language_model import load
    from deepseek_jax.parallel.mesh import make_mesh
    from deepseek_jax.serve.worker import Worker

    start_compilation_cache("")
    model = load(source)
    name = options.name or Path(source).resolve().name
    started = time.monotonic()
    engine = model.engine(
        make_mesh(options.data, options.expert) if options.data * options.expert > 1 else None,
        n_rows=options.rows,
        n_pages=options.pages or None,
        chunk=options.chunk,
        n_drafts=options.drafts,
    )
    n_programs = engine.compile()
    print(f"compiled {n_programs} programs in {time.monotonic() - started:.1f} s", file=sys.stderr)
    service = Service(
        worker=Worker(engine, options.queue),
        name=name,
        tokenizer=model.tokenizer,
        template=_template(model, str(source), options.template),
        end_ids=model.end_ids,
        n_positions=model.n_positions,
        drawing=drawing_of(model.config),
        keys=tuple(key.strip() for key in os.environ.get(KEYS, "").split(",") if key.strip()),
    )
    with _listen(options.host, options.port) as listener:
        config = uvicorn.Config(create_app(service), log_level="warning", timeout_graceful_shutdown=DRAIN_S)
        host, port = listener.getsockname()[:2]
        print(f"{name} at http://{host}:{port}/v1 (Ctrl-C stops)", file=sys.stderr, flush=True)
        uvicorn.Server(config).run(sockets=[listener])
    return 0


def _listen(host: str, port: int) -> socket.socket:
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
