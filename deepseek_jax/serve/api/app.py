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
for a field out of range, 429 when the queue is full, 503 when the engine is down. A client that leaves ends its
request. Nothing in a request makes the server fetch, import or render anything.
"""

import contextlib
import hashlib
import hmac
import itertools
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import APIRouter, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response
from starlette.exceptions import HTTPException as AnyHTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deepseek_jax.errors import UserError
from deepseek_jax.serve.api import answers
from deepseek_jax.serve.api.completions import completion_routes
from deepseek_jax.serve.api.service import Service
from deepseek_jax.serve.api.tokens import token_routes
from deepseek_jax.serve.worker import Busy, Dead

MOST_BYTES = 32 * 2**20  # of a request's body
OPEN = ("/", "/health")  # routes that need no key
PREFIXES = ("", "/v1", "/beta")
COMPLETIONS = frozenset(itertools.chain(*((f"{one}/chat/completions", f"{one}/completions") for one in PREFIXES)))
MOST_FAULTS = 10  # that an answer lists
MOST_HEAD_BYTES = 2**16  # of its headers, where they do not arrive at once
PAGE = Path(__file__).with_name("page.html")
POLICY = (  # the page is whole: nothing is loaded but what the server itself answers
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


def create_app(service: Service) -> FastAPI:
    """Returns the application; its worker runs while the application does."""

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.worker.start()
        yield
        service.worker.stop()

    app = FastAPI(title="deepseek_jax", lifespan=lifespan, openapi_url=None)
    app.add_middleware(_Bounded, service=service)
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
    return app


def make_server(service: Service, **options: Any) -> uvicorn.Server:
    """Returns the server of the application; `options` as for `uvicorn.Config`."""
    app = create_app(service)
    config = uvicorn.Config(
        app, log_level="warning", http="h11", h11_max_incomplete_event_size=MOST_HEAD_BYTES, **options
    )
    return uvicorn.Server(config)


def _models(service: Service) -> APIRouter:
    router = APIRouter()

    @router.get("/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [{"id": service.name, "object": "model", "owned_by": "deepseek_jax"}]}

    return router


class _Bounded:
    """Refuses requests without a key, completions while the queue is full, and bodies of more than `MOST_BYTES`.

    It stands before whatever reads bodies, so that a refusal costs little and those who are served keep their times;
    what length headers state does not matter. It also counts responses.
    """

    def __init__(self, app: ASGIApp, service: Service):
        self.app, self.service, self.metrics = app, service, service.metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        n_bytes = 0

        async def bounded() -> Message:
            nonlocal n_bytes
            message = await receive()
            n_bytes += len(message.get("body", b""))
            if n_bytes > MOST_BYTES:
                raise AnyHTTPException(413, f"a body of more than {MOST_BYTES} bytes")
            return message

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._count(scope, message["status"])
            await send(message)

        if scope["type"] == "http" and (refusal := self._refusal(scope)):
            await refusal(scope, receive, counted)
            return
        try:
            await self.app(scope, bounded, counted)
        except Exception:
            self._count(scope, 500)  # what answers it stands outside
            raise

    def _refusal(self, scope: Scope) -> Response | None:
        """The answer to a request of which only the head is looked at."""
        tenant = _tenant(scope, self.service.keys)
        scope.setdefault("state", {})["tenant"] = tenant
        if tenant is None and scope["path"] not in OPEN:
            refusal = answers.error("missing or wrong API key: expected Authorization: Bearer KEY")
            return JSONResponse(refusal, 401, {"WWW-Authenticate": "Bearer"})
        if scope["path"] in COMPLETIONS:
            try:
                self.service.worker.check_place()
            except Busy as busy:
                return _failed(429, busy)
        return None

    def _count(self, scope: Scope, status: int) -> None:
        path = scope["path"] if scope["path"] in COMPLETIONS else getattr(scope.get("route"), "path", "none")
        route = path.removeprefix("/v1").removeprefix("/beta")
        self.metrics.responses.labels(route, status).inc()


def _tenant(scope: Scope, keys: tuple[str, ...]) -> bytes | None:
    """What stands for a request's key; b"" where none is needed, None if it is missing or wrong.

    All keys are compared, in constant time.
    """
    given = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
    given = given.removeprefix(b"Bearer ")
    found = [hmac.compare_digest(given, key.encode()) for key in keys]
    return hashlib.sha256(given).digest() if any(found) else None if keys else b""


def _handler(status: int) -> Any:
    async def handle(_: Request, error: Exception) -> Response:
        return _failed(status, error)

    return handle


def _failed(status: int, error: Exception) -> Response:
    kind = "invalid_request_error" if status < 429 else "server_error"
    headers = {"Retry-After": "1"} if status in (429, 503) else None
    text = "an error of the server: see its log" if status == 500 else str(error)  # which may say what others wrote
    return JSONResponse(answers.error(text, kind), status_code=status, headers=headers)


async def _invalid(_: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    faults = error.errors()[:MOST_FAULTS]
    found = [f"{'.'.join(map(str, fault['loc'][1:])) or 'body'}: {fault['msg']}" for fault in faults]
    return JSONResponse(answers.error("; ".join(found)), status_code=422)


async def _refused(_: Request, error: Exception) -> Response:
    assert isinstance(error, AnyHTTPException)
    return JSONResponse(answers.error(str(error.detail)), status_code=error.status_code)
