"""The HTTP server's routes.

    POST /chat/completions   a message, whole or streamed, with thought and tool calls
    POST /completions        the continuation of a text or of ids; with `suffix` what is between the two
    POST /tokenize, /detokenize, GET /tokenizer_info
    GET  /models
    GET  /                   a page to chat with the model
    GET  /experts            loads of its experts
    GET  /metrics, /health

The last four stand here only, the others below /v1 and /beta as well; all but /health and the page need a key, if there
are keys, which is looked at before the body. Answers and errors have the form that DeepSeek's and OpenAI's clients
expect: 400 for a request that cannot be served, 401 for a missing or wrong key, 413 for a body that is too long, 422
for a field out of range, 429 when the queue is full (`refusals`), 503 when the engine is down. A client that leaves
ends its request. Nothing in a request makes the server fetch, import or render anything.
"""

import contextlib
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import APIRouter, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response
from starlette.exceptions import HTTPException as AnyHTTPException

from deepseek_jax.errors import UserError
from deepseek_jax.serve.api import answers
from deepseek_jax.serve.api.completions import completion_routes
from deepseek_jax.serve.api.door import PREFIXES, Connection, Door, failed
from deepseek_jax.serve.api.service import Service
from deepseek_jax.serve.api.tokens import token_routes
from deepseek_jax.serve.worker import Busy, Dead

MOST_FAULTS = 10  # that an answer lists
PAGE = Path(__file__).with_name("page.html")
POLICY = (  # the page is whole: nothing is loaded but what the server itself answers
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


def create_app(service: Service) -> Door:
    """Returns the application behind its door; the worker runs while the application does."""

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.worker.start()
        yield
        service.worker.stop()

    app = FastAPI(title="deepseek_jax", lifespan=lifespan, openapi_url=None)
    for prefix in PREFIXES:
        for routes in (_models(service), completion_routes(service), token_routes(service)):
            app.include_router(routes, prefix=prefix)

    @app.get("/")
    async def page() -> Response:
        return HTMLResponse(PAGE.read_text(encoding="utf-8"), headers={"Content-Security-Policy": POLICY})

    @app.get("/experts")
    def experts() -> dict[str, Any]:
        return {"layers": [layer._asdict() for layer in service.loads.measure()]}

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4")

    @app.get("/health")
    async def health() -> Response:
        state = {"requests": service.worker.n_open}
        return JSONResponse(state, status_code=200 if service.worker.is_alive else 503)

    for kind, status in {UserError: 400, Busy: 429, Exception: 500, Dead: 503}.items():
        app.add_exception_handler(kind, _handler(status))
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(AnyHTTPException, _refused)
    return Door(app, service)


class _Server(uvicorn.Server):
    """Answers who is held at the door before it waits for requests that run."""

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Ends."""
        self.config.app.refusals.end()  # type: ignore[union-attr]
        await super().shutdown(sockets)


def make_server(service: Service, **options: Any) -> uvicorn.Server:
    """Returns the server of the application; `options` as for `uvicorn.Config`.

    It runs in asyncio's own loop, which accepts all connections that wait in one turn. uvloop accepts one per turn:
    under load, requests would wait for seconds before they are read, and those with a place among them.
    """
    config = uvicorn.Config(
        create_app(service),
        http=Connection,
        ws="none",
        loop="asyncio",
        log_level="warning",
        access_log=False,
        proxy_headers=False,
        **options,
    )
    return _Server(config)


def _models(service: Service) -> APIRouter:
    router = APIRouter()

    @router.get("/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [{"id": service.name, "object": "model", "owned_by": "deepseek_jax"}]}

    return router


def _handler(status: int) -> Any:
    async def handle(_: Request, error: Exception) -> Response:
        return failed(status, str(error))

    return handle


async def _invalid(_: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    faults = error.errors()[:MOST_FAULTS]
    found = [f"{'.'.join(map(str, fault['loc'][1:])) or 'body'}: {fault['msg']}" for fault in faults]
    return JSONResponse(answers.error("; ".join(found)), status_code=422)


async def _refused(_: Request, error: Exception) -> Response:
    assert isinstance(error, AnyHTTPException)
    return JSONResponse(answers.error(str(error.detail)), status_code=error.status_code)
