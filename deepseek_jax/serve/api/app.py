"""The HTTP server's routes.

    POST /chat/completions   a message, whole or streamed, with thought and tool calls
    POST /completions        the continuation of a text or of ids; with `suffix` what is between the two
    GET  /models, /health

All but /health stand below /v1 and /beta as well. Answers and errors have the form that DeepSeek's and OpenAI's clients
expect: 400 for a request that cannot be served, 401 for a missing or wrong key, 422 for a field out of range, 429 when
the queue is full, 503 when the engine is down. A client that leaves ends its request. Nothing in a request makes the
server fetch, import or render anything.
"""

import asyncio
import contextlib
import hmac
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from fastapi import APIRouter, Depends, FastAPI, Header, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException as AnyHTTPException
from starlette.types import Receive, Scope, Send

from deepseek_jax.data.chat import TEMPLATES, Template, fim_parts, to_ids
from deepseek_jax.data.tokenizer import Tokenizer
from deepseek_jax.errors import UserError
from deepseek_jax.serve.api import answers
from deepseek_jax.serve.api.answers import Usage, chat_delta, piece_delta
from deepseek_jax.serve.api.requests import ChatBody, TextBody
from deepseek_jax.serve.engine import Sampling
from deepseek_jax.serve.reply import Piece, Reply
from deepseek_jax.serve.worker import Busy, Dead, Worker

PLAIN = replace(TEMPLATES["v3"], call_format=None)  # a text without thought and calls


@dataclass(frozen=True)
class Service:
    """What the routes need.

    `template` is None for a base model, which continues texts; `drawing` are temperature and top_p of requests that do
    not say; `keys` are those of which a client must have one, if there are any.
    """

    worker: Worker
    name: str
    tokenizer: Tokenizer
    template: Template | None
    end_ids: tuple[int, ...]
    n_positions: int
    drawing: dict[str, float] = field(default_factory=lambda: {"temperature": 1.0, "top_p": 1.0})
    keys: tuple[str, ...] = ()


@dataclass
class _Choice:
    """One of the answers to a request, as far as it is."""

    index: int
    prompt: list[int]
    sampling: Sampling
    reply: Reply
    usage: Usage
    reason: str = ""

    def push(self, ids: Sequence[int], ending: str) -> list[Piece]:
        """Adds ids of the model; `reason` is set by the last ones."""
        shown = [token for token in ids if token not in self.sampling.stop_ids]
        self.usage.completion += len(ids)
        self.usage.reasoning += len(ids) if self.reply.is_in_thought else 0
        pieces = self.reply.push(shown)
        if ending:
            pieces += self.reply.finish()
        if ending or self.reply.has_stopped:
            is_call = "tool_calls" in self.reply.message() and ending == "stop"
            self.reason = "length" if ending == "length" else "tool_calls" if is_call else "stop"
        return answers.joined(pieces)


Arrived = tuple[_Choice, list[Piece], str]  # a choice, its new pieces, and why it ended with them, if it did


def create_app(service: Service) -> FastAPI:
    """Returns the application; its worker runs while the application does."""

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.worker.start()
        yield
        service.worker.stop()

    app = FastAPI(title="deepseek_jax", lifespan=lifespan, openapi_url=None)
    routes = _routes(service)
    for prefix in ("", "/v1", "/beta"):
        app.include_router(routes, prefix=prefix, dependencies=[Depends(_guard(service.keys))])

    @app.get("/health")
    async def health() -> Response:
        state = {"requests": service.worker.n_open}
        return JSONResponse(state, status_code=200 if service.worker.is_alive else 503)

    for kind, status in {UserError: 400, Busy: 429, Exception: 500, Dead: 503}.items():
        app.add_exception_handler(kind, _handler(status))
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(AnyHTTPException, _refused)
    return app


def _routes(service: Service) -> APIRouter:
    router = APIRouter()

    @router.get("/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [{"id": service.name, "object": "model", "owned_by": "deepseek_jax"}]}

    @router.post("/chat/completions")
    async def chat(body: ChatBody, request: Request) -> Response:
        body.check()
        _check_model(service, body.model)
        prompt, thinking = _chat_prompt(service, body)
        template = service.template or PLAIN
        choices = [
            _Choice(n, prompt, sampling, Reply(template, service.tokenizer, thinking, body.stop), Usage())
            for n, sampling in enumerate(body.samplings(_n_free(service, prompt), service.drawing, service.end_ids))
        ]
        return await _answer(service, request, body, choices, is_chat=True)

    @router.post("/completions")
    async def complete(body: TextBody, request: Request) -> Response:
        body.check()
        _check_model(service, body.model)
        choices: list[_Choice] = []
        for given in body.prompts():
            prompt = _text_prompt(service, given, body.suffix)
            for sampling in body.samplings(_n_free(service, prompt), service.drawing, service.end_ids):
                reply = Reply(PLAIN, service.tokenizer, stop=body.stop)
                choices.append(_Choice(len(choices), prompt, sampling, reply, Usage()))
        return await _answer(service, request, body, choices, is_chat=False)

    return router


def _chat_prompt(service: Service, body: ChatBody) -> tuple[list[int], bool]:
    """Returns the prompt's ids, and whether it has opened a thought."""
    template = service.template
    if template is None:
        raise UserError(f"{service.name} has no chat template: it continues texts. Use /completions.")
    if body.messages[-1].get("role") == "assistant":
        raise UserError("the last message is the assistant's: expected one of the user or of a tool.")
    thinking = template.opens_thought if body.thinking is None else body.thinking.type == "enabled"
    tools = [] if body.tool_choice == "none" else body.tools or []
    return to_ids(template.parts(body.messages, tools, thinking), service.tokenizer).tolist(), thinking


def _text_prompt(service: Service, given: str | list[int], suffix: str | None) -> list[int]:
    tokenizer = service.tokenizer
    if isinstance(given, str) and suffix is not None:
        parts = fim_parts(given, suffix)
        return to_ids(parts if tokenizer.add_bos else parts[1:], tokenizer).tolist()
    if suffix is not None:
        raise UserError("suffix with a prompt of ids: expected a prompt of text.")
    if not isinstance(given, str):
        if any(not 0 <= token < tokenizer.vocab_size for token in given):
            raise UserError(f"ids of a prompt: expected 0 to {tokenizer.vocab_size - 1}.")
        return given
    begin = [tokenizer.bos_id] if tokenizer.add_bos and tokenizer.bos_id is not None else []
    return [*begin, *tokenizer.encode(given).tolist()]


def _n_free(service: Service, prompt: list[int]) -> int:
    n_free = service.n_positions - len(prompt)
    if not prompt:
        raise UserError("the prompt is empty: expected one token or more.")
    if n_free < 1:
        raise UserError(
            f"a prompt of {len(prompt)} tokens: expected fewer than {service.n_positions}, the longest sequence of "
            "the model."
        )
    return n_free


def _check_model(service: Service, name: str) -> None:
    if name and name != service.name:
        raise UserError(f"model {name!r}: this server has {service.name!r}.")


async def _answer(
    service: Service, request: Request, body: ChatBody | TextBody, choices: list[_Choice], *, is_chat: bool
) -> Response:
    """Opens the request's streams, so that it is refused before anything is sent, and answers it."""
    stack = contextlib.AsyncExitStack()
    try:
        streams = [
            await stack.enter_async_context(service.worker.open(choice.prompt, choice.sampling)) for choice in choices
        ]
        number = f"{'chatcmpl' if is_chat else 'cmpl'}-{uuid.uuid4().hex}"
        kind = ("chat.completion" if is_chat else "text_completion") + (".chunk" if is_chat and body.stream else "")
        head = answers.head(kind, number, service.name, int(time.time()))
        pieces = _pieces(stack, list(zip(choices, streams, strict=True)))
        if body.stream:
            events = _events(pieces, head, choices, is_chat=is_chat, includes_usage=body.includes_usage)
            return _Streamed(events, stack)
        return await _whole(request, pieces, head, choices, is_chat=is_chat)
    except BaseException:
        await stack.aclose()
        raise


class _Streamed(StreamingResponse):
    """Server-sent events; the requests end with the connection, also if nothing was read."""

    def __init__(self, events: AsyncIterator[str], stack: contextlib.AsyncExitStack):
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self.stack = stack

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self.stack.aclose()


async def _pieces(stack: contextlib.AsyncExitStack, opened: list[tuple]) -> AsyncIterator[Arrived]:
    """Yields pieces of the choices as they come; ends their requests at the end, however that is."""
    arrived: asyncio.Queue[Arrived | Exception] = asyncio.Queue()

    async def read(choice: _Choice, stream: Any) -> None:
        try:
            async for output in stream:
                pieces = choice.push(output.ids, output.ending)
                choice.usage.prompt, choice.usage.cached = len(choice.prompt), stream.n_cached
                arrived.put_nowait((choice, pieces, choice.reason))
                if choice.reason:
                    return
        except Exception as error:  # handed to the reader of the pieces
            arrived.put_nowait(error)

    readers = [asyncio.create_task(read(choice, stream)) for choice, stream in opened]
    try:
        while not all(choice.reason for choice, _ in opened) or not arrived.empty():
            found = await arrived.get()
            if isinstance(found, Exception):
                raise found
            yield found
    finally:
        for reader in readers:
            reader.cancel()
        await stack.aclose()


async def _whole(
    request: Request, pieces: AsyncIterator, head: dict[str, Any], choices: list[_Choice], *, is_chat: bool
) -> Response:
    async def read() -> None:
        async for _ in pieces:
            pass

    reader = asyncio.create_task(read())
    try:
        while not (await asyncio.wait([reader], timeout=0.25))[0]:
            if await request.is_disconnected():
                return Response(status_code=499)
        reader.result()
    finally:
        reader.cancel()
        with contextlib.suppress(BaseException):
            await reader
        await pieces.aclose()  # type: ignore[attr-defined]
    found = []
    for choice in choices:
        message, calls = choice.reply.message(), _calls(head, choice)
        found.append(
            answers.chat_choice(choice.index, message, choice.reason, calls)
            if is_chat
            else answers.text_choice(choice.index, message["content"], choice.reason)
        )
    return JSONResponse(head | {"choices": found, "usage": _total(choices).as_dict()})


async def _events(
    pieces: AsyncIterator, head: dict[str, Any], choices: list[_Choice], *, is_chat: bool, includes_usage: bool
) -> AsyncIterator[str]:
    """The chunks of a streamed answer."""
    try:
        for choice in choices if is_chat else ():
            first = chat_delta(choice.index, {"role": "assistant", "content": ""})
            yield answers.event(head | {"choices": [first]})
        async for choice, found, reason in pieces:
            for piece in found:
                step = (
                    chat_delta(choice.index, piece_delta(piece, _calls(head, choice)))
                    if is_chat
                    else answers.text_choice(choice.index, piece.text, None)
                )
                yield answers.event(head | {"choices": [step]})
            if reason:
                last = (
                    chat_delta(choice.index, {}, reason) if is_chat else answers.text_choice(choice.index, "", reason)
                )
                yield answers.event(head | {"choices": [last]})
        if includes_usage:
            yield answers.event(head | {"choices": [], "usage": _total(choices).as_dict()})
        yield answers.event("[DONE]")
    except Dead as error:
        yield answers.event(answers.error(str(error), "server_error"))
    finally:
        await pieces.aclose()  # type: ignore[attr-defined]


def _calls(head: dict[str, Any], choice: _Choice) -> str:
    """The beginning of the ids of a choice's tool calls."""
    return f"call_{head['id'][-16:]}_{choice.index}_"


def _total(choices: list[_Choice]) -> Usage:
    """A prompt that several choices share counts once."""
    prompts = {id(choice.prompt): choice.usage for choice in reversed(choices)}.values()
    return Usage(
        sum(usage.prompt for usage in prompts),
        sum(usage.cached for usage in prompts),
        sum(choice.usage.completion for choice in choices),
        sum(choice.usage.reasoning for choice in choices),
    )


def _guard(keys: tuple[str, ...]) -> Any:
    """A dependency that refuses requests without a key; all keys are compared, in constant time."""

    async def check(authorization: str = Header("")) -> None:
        given = authorization.removeprefix("Bearer ").encode(errors="replace")
        found = [hmac.compare_digest(given, key.encode()) for key in keys]
        if keys and not any(found):
            raise HTTPException(401, "missing or wrong API key: expected Authorization: Bearer KEY")

    return check


def _handler(status: int) -> Any:
    async def handle(_: Request, error: Exception) -> Response:
        kind = "invalid_request_error" if status < 429 else "server_error"
        headers = {"Retry-After": "1"} if status in (429, 503) else None
        return JSONResponse(answers.error(str(error), kind), status_code=status, headers=headers)

    return handle


async def _invalid(_: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    found = [f"{'.'.join(map(str, fault['loc'][1:])) or 'body'}: {fault['msg']}" for fault in error.errors()]
    return JSONResponse(answers.error("; ".join(found)), status_code=422)


async def _refused(_: Request, error: Exception) -> Response:
    assert isinstance(error, AnyHTTPException)
    return JSONResponse(answers.error(str(error.detail)), status_code=error.status_code)
