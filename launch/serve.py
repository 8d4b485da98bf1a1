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
import sys

from deepseek_jax.bounds import whole
from deepseek_jax.launch import _options, _serving

FLAGS = _serving.FLAGS | {
    "host": (str, "127.0.0.1", "address to listen on; 0.0.0.0 for every network"),
    "port": (int, 8000, "port to listen on; 0 takes a free one", whole(0, 65535)),
}
DRAIN_S = 30  # seconds that answers may still take after SIGTERM
KEYS = "DEEPSEEK_JAX_API_KEYS"


def main(argv: list[str]) -> int:
    """Runs the verb; returns the exit code."""
    options = _options.parse(argv, extra=FLAGS, config=False)
    source = _serving.source_of(options)
    from deepseek_jax.serve.api.app import make_server

    keys = tuple(key.strip() for key in os.environ.get(KEYS, "").split(",") if key.strip())
    service = _serving.open_service(options, source, keys)
    with _serving.listen(options.host, options.port) as listener:
        host, port = listener.getsockname()[:2]
        print(f"{service.name} at http://{host}:{port}/v1 (Ctrl-C stops)", file=sys.stderr, flush=True)
        make_server(service, timeout_graceful_shutdown=DRAIN_S).run(sockets=[listener])
    return 0
