r"""Serve a model over HTTP, for OpenAI's and DeepSeek's clients.

    deepseek-jax serve --from=DeepSeek-V2-Lite-Chat                 # a directory of published weights, or a hub id
    deepseek-jax serve --workdir=runs/tiny_v3 --port=8001           # a run of yours
    curl localhost:8000/v1/chat/completions -H 'Content-Type: application/json' \
         -d '{"messages": [{"role": "user", "content": "Hello!"}], "stream": true}'

Requests are batched continuously, and prompts with the same beginning are computed once. Chat needs the model's chat
template, which is found beside its tokenizer; --template names it where there is none. Keys that clients must have are
read from the environment variable DEEPSEEK_JAX_API_KEYS, separated by commas. Needs pip install deepseek_jax[serve].
"""

import gc
import os
import socket
import sys
from typing import TYPE_CHECKING, Any

from deepseek_jax.bounds import whole
from deepseek_jax.errors import UserError
from deepseek_jax.launch import _options, _serving
from deepseek_jax.launch._talking import drawing_of, template_of
from deepseek_jax.storage import Place, Remote, place

if TYPE_CHECKING:
    from deepseek_jax.data.chat import Template
    from deepseek_jax.language_model import LanguageModel
    from deepseek_jax.serve.api.service import Service

FLAGS = _serving.FLAGS | {
    "template": (str, "", "chat template, where the model's own is not found beside its tokenizer"),
    "name": (str, "", "name of the model for clients (default: that of its directory)"),
    "queue": (int, 256, "requests that run or wait; more are refused with status 429", whole(1, 10**6)),
    "host": (str, "127.0.0.1", "address to listen on; 0.0.0.0 for every network"),
    "port": (int, 8000, "port to listen on; 0 takes a free one", whole(0, 65535)),
}
BACKLOG = 2048  # connections that wait to be accepted
DRAIN_S = 30  # seconds that answers may still take after SIGTERM
KEYS = "DEEPSEEK_JAX_API_KEYS"
SHARED = socket.SOL_SOCKET, socket.SO_REUSEADDR


def main(argv: list[str]) -> int:
    """Runs the verb; returns the exit code."""
    options = _options.parse(argv, extra=FLAGS, config=False, in_bucket=True)
    source = _serving.source_of(options)
    try:
        from deepseek_jax.serve.api.app import make_server
    except ModuleNotFoundError as error:
        raise UserError(f"{error.name} is not installed. Run pip install 'deepseek_jax[serve]'.") from None
    keys = tuple(key.strip() for key in os.environ.get(KEYS, "").split(",") if key.strip())
    with bound(options.host, options.port) as listener:  # before minutes are spent on the model
        service = open_service(options, source, keys)
        with _serving.compiling(service.worker.engine, keep):
            listen(listener)
            host, port = listener.getsockname()[:2]
            print(f"{service.name} at http://{host}:{port}/v1 (Ctrl-C stops)", file=sys.stderr, flush=True)
            make_server(service, timeout_graceful_shutdown=DRAIN_S).run(sockets=[listener])
    return 0


def open_service(options: Any, source: Place | str, keys: tuple[str, ...]) -> "Service":
    """Loads what the routes need."""
    from deepseek_jax.serve.api.service import Service
    from deepseek_jax.serve.worker import Worker

    model, engine = _serving.open_engine(options, source)
    return Service(
        worker=Worker(engine, options.queue),
        name=options.name or _name(source),
        tokenizer=model.tokenizer,
        template=_template(model, str(source), options.template),
        end_ids=model.end_ids,
        n_positions=engine.most_positions,
        drawing=drawing_of(model.config),
        keys=keys,
    )


def keep() -> None:
    """Spares the garbage collector what is there by now, which stays: modules, the model, programs.

    To search all of it stops every thread for half a second, several times a minute under load.
    """
    gc.collect()
    gc.freeze()


def bound(host: str, port: int) -> socket.socket:
    """Returns a socket with this address, which does not listen yet, and which no other socket can have meanwhile.

    Raises UserError if the address is taken or not of this machine.
    """
    listener = socket.socket()
    try:
        try:
            listener.bind((host, port))
        except OSError:  # perhaps by connections of an earlier server, which have ended
            listener.setsockopt(*SHARED, 1)
            listener.bind((host, port))
        listener.setsockopt(*SHARED, 0)  # Linux lets two sockets bind one address if both have it and neither listens
    except OSError as error:
        listener.close()
        raise UserError(
            f"cannot listen on {host}:{port} ({error.strerror}). Choose --port (0 takes a free one) or --host."
        ) from None
    return listener


def listen(listener: socket.socket) -> None:
    """Lets clients connect to a socket of `bound`; the next server need not wait until their connections have ended."""
    listener.setsockopt(*SHARED, 1)
    listener.listen(BACKLOG)


def _name(source: Place | str) -> str:
    """Returns the name of the directory of a model."""
    where = place(source)
    return (where if isinstance(where, Remote) else where.resolve()).name


def _template(model: "LanguageModel", source: str, given: str) -> "Template | None":
    """The model's chat template; None for a base model, which a message says."""
    from deepseek_jax.data import chat

    try:
        return chat.template(template_of(model.config, source, given))
    except UserError as error:
        if given or model.config.data.chat_template:
            raise
        print(f"no chat: {error}", file=sys.stderr)
        return None
