"""Chat and text completions: the requests of an answer opened, its pieces joined or streamed."""

import asyncio
import contextlib
import functools
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from deepseek_jax.errors import UserError
from deepseek_jax.serve.api import answers
from deepseek_jax.serve.api.answers import Usage, chat_delta, piece_delta, text_choice
from deepseek_jax.serve.api.choice import Choice
from deepseek_jax.serve.api.metrics import Clock
from deepseek_jax.serve.api.prompts import Prompt, chat_prompt, text_prompt
from deepseek_jax.serve.api.requests import ChatBody, TextBody
from deepseek_jax.serve.api.service import Service
from deepseek_jax.serve.engine import Sampling
from deepseek_jax.serve.grammar import Constrained
from deepseek_jax.serve.reply import PLAIN, Piece, Reply
from deepseek_jax.serve.worker import Dead, Inbox, Stream

SHORT_BYTES = 2048  # of a request that is read in less time than a thread takes to begin and to hand over
T = TypeVar("T")
Tell = Callable[[Choice], dict[str, Any]]  # what a client asked for besides the text
Arrived = tuple[Choice, list[Piece], str]  # a choice, its new pieces, and why it ended with them, if it did


def completion_routes(service: Service) -> APIRouter:
    """Returns POST /chat/completions and /completions."""
    router = APIRouter()

    @router.post("/chat/completions")
    async def chat(body: ChatBody, request: Request) -> Response:
        service.check_model(body.model)
        template, tokenizer = service.template, service.tokenizer
        if template is None:
            raise UserError(f"{service.name} has no chat template: it continues texts. Use /completions.")
        service.check_choices(body.n)
        prompt = await _aside(request, chat_prompt, template, tokenizer, body, grows=bool(body.tools))
        samplings = body.samplings(service.n_free(prompt.ids), service.drawing, service.end_ids, request.state.tenant)
        form = await _aside(request, body.form, template, tokenizer)
        if form:
            samplings = _constrained(service, prompt, samplings, await service.compiling(form))
        choices = []
        for n, sampling in enumerate(samplings):
            reply = Reply(template, tokenizer, prompt.thinking, body.stop, prompt.continues)
            choices.append(Choice(n, prompt.ids, sampling, reply, shows_ids=body.return_token_ids))
        return await _answer(service, request, body, choices, is_chat=True)

    @router.post("/completions")
    async def complete(body: TextBody, request: Request) -> Response:
        service.check_model(body.model)
        choices, prompts = list[Choice](), body.prompts()
        service.check_choices(len(prompts) * body.n)
        for given in prompts:
            prompt = await _aside(request, text_prompt, service.tokenizer, given, body.suffix)
            n_free, tenant = service.n_free(prompt), request.state.tenant
            for sampling in body.samplings(n_free, service.drawing, service.end_ids, tenant):
                choice = Choice(len(choices), prompt, sampling, Reply(PLAIN, service.tokenizer, stop=body.stop))
                choice.is_empty, choice.shows_ids = body.max_tokens == 0, body.return_token_ids
                if body.echo:
                    choice.echo = given if isinstance(given, str) else spell(service, prompt)
                choices.append(choice)
        return await _answer(service, request, body, choices, is_chat=False)

    return router


async def _aside(request: Request, function: Callable[..., T], *arguments: Any, grows: bool = False) -> T:
    """Calls a function that reads all of a request: in a thread if that could keep others waiting.

    `grows`: it may read far more than was sent, as of tools, which templates indent.
    """
    if len(await request.body()) <= SHORT_BYTES and not grows:
        return function(*arguments)
    return await asyncio.to_thread(function, *arguments)


def spell(service: Service, ids: Sequence[int]) -> str:
    """Returns the text of ids, special tokens included."""
    return service.tokenizer.decode(ids, specials=True)


def _constrained(service: Service, prompt: Prompt, samplings: list[Sampling], matcher: Any) -> list[Sampling]:
    """The same choices, each with a grammar of its own to follow."""
    assert service.template
    grammars, may_think = service.grammars, prompt.may_think(service.template, service.tokenizer)
    return [
        replace(
            one,
            constraint=Constrained(grammars, matcher.deep_copy(), in_thought=prompt.thinking, may_think=may_think),
        )
        for one in samplings
    ]


async def _answer(
    service: Service, request: Request, body: ChatBody | TextBody, choices: list[Choice], *, is_chat: bool
) -> Response:
    """Opens the request's streams, so that it is refused before anything is sent, and answers it."""
    stack, inbox = contextlib.AsyncExitStack(), Inbox()
    try:
        clocks = [service.metrics.clock() for _ in choices]
        places = [request.state.place, *[None] * (len(choices) - 1)]
        opening = [
            stack.enter_async_context(service.worker.open(one.prompt, one.sampling, inbox, place))
            for one, place in zip(choices, places, strict=True)
        ]
        streams = await asyncio.gather(*opening, return_exceptions=True)
        for failure in (one for one in streams if isinstance(one, BaseException)):
            raise failure
        number = f"{'chatcmpl' if is_chat else 'cmpl'}-{uuid.uuid4().hex}"
        kind = ("chat.completion" if is_chat else "text_completion") + (".chunk" if is_chat and body.stream else "")
        head = answers.head(kind, number, service.name, int(time.time()))
        both = zip(choices, clocks, strict=True)
        opened = {stream: one for stream, one in zip(streams, both, strict=True) if isinstance(stream, Stream)}
        pieces = _pieces(service, stack, inbox, opened)
        told = functools.partial(Choice.told, is_chat=is_chat, spell=service.spelling)
        if body.stream:
            events = _events(pieces, head, choices, told, is_chat=is_chat, includes_usage=body.includes_usage)
            return _Streamed(events, stack)
        return await _whole(request, pieces, head, choices, told, is_chat=is_chat)
    except BaseException:
        await stack.aclose()
        raise


class _Streamed(Response):
    """Server-sent events; the requests end with the connection, also if nothing was read."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[str], stack: contextlib.AsyncExitStack):
        super().__init__(headers={"Cache-Control": "no-cache"})
        del self.headers["content-length"]
        self.events, self.stack = events, stack

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends the events, until their end or the connection's."""
        sending, has_left = asyncio.current_task(), False
        assert sending

        async def watch() -> None:
            nonlocal has_left
            while (await receive())["type"] != "http.disconnect":
                pass
            has_left = True
            sending.cancel()

        watching = asyncio.create_task(watch())
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            async for text in self.events:
                await send({"type": "http.response.body", "body": text.encode(), "more_body": True})
            await send({"type": "http.response.body", "body": b""})
        except asyncio.CancelledError:
            if not has_left:
                raise
            sending.uncancel()
        finally:
            watching.cancel()
            await self.events.aclose()  # type: ignore[attr-defined]
            await self.stack.aclose()


async def _pieces(
    service: Service, stack: contextlib.AsyncExitStack, inbox: Inbox, opened: dict[Stream, tuple[Choice, Clock]]
) -> AsyncIterator[Arrived | None]:
    """Yields pieces of the choices as they come, and None where nothing more has come.

    Ends their requests at the end, however that is.
    """

    def end(choice: Choice, clock: Clock) -> None:
        clock.end(choice.usage, choice.reason)
        service.loads.note([*choice.prompt, *choice.new_ids])

    try:
        while opened:
            for stream, output in await inbox.read():
                if stream not in opened:  # a stop string has ended it
                    continue
                choice, clock = opened[stream]
                clock.token()
                pieces = choice.push(output)
                choice.usage.prompt, choice.usage.cached = len(choice.prompt), output.request.n_cached
                if choice.reason:
                    end(*opened.pop(stream))
                yield choice, pieces, choice.reason
            if not opened:
                await stack.aclose()  # others may come before the last of it is sent
            yield None
    finally:
        for choice, clock in opened.values():
            end(choice, clock)
        await stack.aclose()


async def _whole(
    request: Request, pieces: AsyncIterator, head: dict[str, Any], choices: list[Choice], told: Tell, *, is_chat: bool
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
        body = (
            answers.chat_choice(choice.index, message, choice.reason, calls)
            if is_chat
            else text_choice(choice.index, choice.echo + message["content"], choice.reason)
        )
        prompt = {"prompt_token_ids": choice.prompt} if choice.shows_ids else {}
        found.append(body | told(choice) | prompt)
    return JSONResponse(head | {"choices": found, "usage": _total(choices).as_dict()})


async def _events(
    pieces: AsyncIterator[Arrived | None],
    head: dict[str, Any],
    choices: list[Choice],
    told: Tell,
    *,
    is_chat: bool,
    includes_usage: bool,
) -> AsyncIterator[str]:
    """The chunks of a streamed answer, in one text those that come together: each sending costs as much as a chunk."""
    begun = answers.dumps(head)[:-1]  # of all chunks

    def event(choice: Choice, step: dict[str, Any]) -> str:
        return f'data: {begun}, "choices": [{answers.dumps(step | told(choice))}]}}\n\n'

    def events(choice: Choice, found: list[Piece], reason: str) -> Iterator[str]:
        for piece in found:
            delta = piece_delta(piece, _calls(head, choice)) if is_chat else {}
            text = piece.text
            yield event(choice, chat_delta(choice.index, delta) if is_chat else text_choice(choice.index, text, None))
        if reason:
            last = chat_delta(choice.index, {}, reason) if is_chat else text_choice(choice.index, "", reason)
            yield event(choice, last)

    try:
        for choice in choices if is_chat else ():
            first = chat_delta(choice.index, {"role": "assistant", "content": ""})
            yield answers.event(head | {"choices": [first]})
        for choice in (one for one in choices if one.echo):
            yield answers.event(head | {"choices": [text_choice(choice.index, choice.echo, None)]})
        waiting: list[str] = []
        async for arrived in pieces:
            if arrived:
                waiting += events(*arrived)
            elif waiting:
                yield "".join(waiting)
                waiting.clear()
        usage = answers.event(head | {"choices": [], "usage": _total(choices).as_dict()}) if includes_usage else ""
        yield usage + answers.event("[DONE]")
    except Dead as error:
        yield answers.event(answers.error(str(error), "server_error"))
    finally:
        await pieces.aclose()  # type: ignore[attr-defined]


def _calls(head: dict[str, Any], choice: Choice) -> str:
    """The beginning of the ids of a choice's tool calls."""
    return f"call_{head['id'][-16:]}_{choice.index}_"


def _total(choices: list[Choice]) -> Usage:
    """A prompt that several choices share counts once."""
    prompts = {id(choice.prompt): choice.usage for choice in reversed(choices)}.values()
    return Usage(
        sum(usage.prompt for usage in prompts),
        sum(usage.cached for usage in prompts),
        sum(choice.usage.completion for choice in choices),
        sum(choice.usage.reasoning for choice in choices),
    )
