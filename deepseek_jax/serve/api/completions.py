"""Chat and text completions: the requests of an answer opened, its pieces joined or streamed."""

import asyncio
import contextlib
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from deepseek_jax.data.chat import TEMPLATES
from deepseek_jax.errors import UserError
from deepseek_jax.serve.api import answers
from deepseek_jax.serve.api.answers import Usage, chat_delta, piece_delta
from deepseek_jax.serve.api.logprobs import Decode, Scored, chat_logprobs, text_logprobs
from deepseek_jax.serve.api.metrics import Clock
from deepseek_jax.serve.api.prompts import Prompt, chat_prompt, text_prompt
from deepseek_jax.serve.api.requests import ChatBody, TextBody
from deepseek_jax.serve.api.service import Service
from deepseek_jax.serve.engine import Logprob, Output, Sampling
from deepseek_jax.serve.grammar import Constrained
from deepseek_jax.serve.reply import Piece, Reply
from deepseek_jax.serve.worker import Dead

PLAIN = replace(TEMPLATES["v3"], call_format=None)  # a text without thought and calls


@dataclass
class _Choice:
    """One of the answers to a request, as far as it is. `echo` is what is shown before it."""

    index: int
    prompt: list[int]
    sampling: Sampling
    reply: Reply
    usage: Usage
    decode: Decode
    echo: str = ""
    is_shown: bool = True  # False: nothing but `echo`
    reason: str = ""
    scored: list[Scored] = field(default_factory=list)  # tokens with their log-probabilities, if they are reported
    n_sent: int = 0  # of these, in chunks of a stream
    n_characters: int = 0  # of those

    def push(self, output: Output) -> list[Piece]:
        """Adds what the model has given; `reason` is set by its last ids."""
        pieces = [] if self.usage.completion or not self.echo else [Piece("content", self.echo)]
        self.scored += map(Scored, self.prompt, output.prompt_logprobs)
        scores: Sequence[Logprob | None] = output.logprobs or [None] * len(output.ids)
        for token, score in zip(output.ids, scores, strict=True) if self.is_shown else ():
            if self.reply.has_stopped:
                break
            is_thought = self.reply.is_in_thought
            self.usage.completion += 1
            self.usage.reasoning += is_thought
            self.scored += [Scored(token, score, is_thought)] if score else []
            pieces += [] if token in self.sampling.stop_ids else self.reply.push([token])
        if output.ending:
            pieces += self.reply.finish()
        if output.ending or self.reply.has_stopped:
            is_call = "tool_calls" in self.reply.message() and output.ending == "stop"
            is_cut = output.ending == "length" and not self.reply.has_stopped
            self.reason = "length" if is_cut or not self.is_shown else "tool_calls" if is_call else "stop"
        return answers.joined(pieces)

    def logprobs(self, is_chat: bool) -> dict[str, Any] | None:
        """The log-probabilities of tokens that no chunk had; None if none are reported."""
        if self.sampling.logprobs is None:
            return None
        found, offset = self.scored[self.n_sent :], self.n_characters
        self.n_sent = len(self.scored)
        if is_chat:
            return chat_logprobs(found, self.decode)
        self.n_characters += sum(len(self.decode(one.token)) for one in found)
        return text_logprobs(found, self.decode, offset)


Arrived = tuple[_Choice, list[Piece], str]  # a choice, its new pieces, and why it ended with them, if it did


def completion_routes(service: Service) -> APIRouter:
    """Returns POST /chat/completions and /completions."""
    router = APIRouter()

    @router.post("/chat/completions")
    async def chat(body: ChatBody, request: Request) -> Response:
        body.check()
        service.check_model(body.model)
        template, tokenizer = service.template, service.tokenizer
        if template is None:
            raise UserError(f"{service.name} has no chat template: it continues texts. Use /completions.")
        prompt = await asyncio.to_thread(chat_prompt, template, tokenizer, body)
        samplings = body.samplings(service.n_free(prompt.ids), service.drawing, service.end_ids)
        form = body.form(template, tokenizer)
        if form:
            samplings = await asyncio.to_thread(_constrained, service, prompt, samplings, form)
        choices = [
            _Choice(
                n,
                prompt.ids,
                one,
                Reply(template, tokenizer, prompt.thinking, body.stop, prompt.continues),
                Usage(),
                _decoder(service),
            )
            for n, one in enumerate(samplings)
        ]
        return await _answer(service, request, body, choices, is_chat=True)

    @router.post("/completions")
    async def complete(body: TextBody, request: Request) -> Response:
        body.check()
        service.check_model(body.model)
        choices: list[_Choice] = []
        for given in body.prompts():
            prompt = await asyncio.to_thread(text_prompt, service.tokenizer, given, body.suffix)
            for sampling in body.samplings(service.n_free(prompt), service.drawing, service.end_ids):
                reply = Reply(PLAIN, service.tokenizer, stop=body.stop)
                shown = _echo(service, given) if body.echo else "", body.max_tokens != 0
                choices.append(_Choice(len(choices), prompt, sampling, reply, Usage(), _decoder(service), *shown))
        return await _answer(service, request, body, choices, is_chat=False)

    return router


def _decoder(service: Service) -> Decode:
    return lambda token: service.tokenizer.decode([token], specials=True)


def _echo(service: Service, given: str | list[int]) -> str:
    """A prompt as it was given, as text."""
    return given if isinstance(given, str) else service.tokenizer.decode(given, specials=True)


def _constrained(service: Service, prompt: Prompt, samplings: list[Sampling], form: str) -> list[Sampling]:
    """The same choices, each with a grammar of its own to follow."""
    assert service.template
    grammars, may_think = service.grammars, prompt.may_think(service.template, service.tokenizer)
    matcher = grammars.compile(form)
    return [
        replace(
            one,
            constraint=Constrained(grammars, matcher.deep_copy(), in_thought=prompt.thinking, may_think=may_think),
        )
        for one in samplings
    ]


async def _answer(
    service: Service, request: Request, body: ChatBody | TextBody, choices: list[_Choice], *, is_chat: bool
) -> Response:
    """Opens the request's streams, so that it is refused before anything is sent, and answers it."""
    stack = contextlib.AsyncExitStack()
    try:
        clocks = [service.metrics.clock() for _ in choices]
        streams = [
            await stack.enter_async_context(service.worker.open(choice.prompt, choice.sampling)) for choice in choices
        ]
        number = f"{'chatcmpl' if is_chat else 'cmpl'}-{uuid.uuid4().hex}"
        kind = ("chat.completion" if is_chat else "text_completion") + (".chunk" if is_chat and body.stream else "")
        head = answers.head(kind, number, service.name, int(time.time()))
        pieces = _pieces(
            stack, [(one, stream, clock) for one, stream, clock in zip(choices, streams, clocks, strict=True)]
        )
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

    async def read(choice: _Choice, stream: Any, clock: Clock) -> None:
        try:
            async for output in stream:
                clock.token()
                pieces = choice.push(output)
                choice.usage.prompt, choice.usage.cached = len(choice.prompt), stream.n_cached
                arrived.put_nowait((choice, pieces, choice.reason))
                if choice.reason:
                    return
        except Exception as error:  # handed to the reader of the pieces
            arrived.put_nowait(error)
        finally:
            clock.end(choice.usage, choice.reason)

    readers = [asyncio.create_task(read(*one)) for one in opened]
    try:
        while not all(choice.reason for choice, *_ in opened) or not arrived.empty():
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
            answers.chat_choice(choice.index, message, choice.reason, calls, choice.logprobs(True))
            if is_chat
            else answers.text_choice(
                choice.index, choice.echo + message["content"], choice.reason, choice.logprobs(False)
            )
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
                scores = choice.logprobs(is_chat)
                step = (
                    chat_delta(choice.index, piece_delta(piece, _calls(head, choice)), logprobs=scores)
                    if is_chat
                    else answers.text_choice(choice.index, piece.text, None, scores)
                )
                yield answers.event(head | {"choices": [step]})
            if reason:
                scores = choice.logprobs(is_chat)
                last = (
                    chat_delta(choice.index, {}, reason, scores)
                    if is_chat
                    else answers.text_choice(choice.index, "", reason, scores)
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
