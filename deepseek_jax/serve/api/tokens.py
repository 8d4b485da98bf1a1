"""The tokenizer over HTTP: clients that count or send ids need no files of the model.

POST /tokenize         {"prompt": text} or {"messages": […]} -> {"tokens", "count", "max_model_len"}
POST /detokenize       {"tokens": ids} -> {"prompt": text}
GET  /tokenizer_info   the special tokens that the tokenizer names
"""

from typing import Annotated, Any

from fastapi import APIRouter
from pydantic import BaseModel, Field

from deepseek_jax.data.tokenizer import Tokenizer
from deepseek_jax.errors import UserError
from deepseek_jax.serve.api.prompts import begin, chat_prompt, checked_ids
from deepseek_jax.serve.api.requests import ChatBody, Ids, Text, Tools
from deepseek_jax.serve.api.service import Service


class Detokenize(BaseModel):
    """The body of POST /detokenize."""

    tokens: Ids


class Tokenize(BaseModel):
    """The body of POST /tokenize."""

    prompt: Text | None = None
    messages: Annotated[list[dict[str, Any]], Field(fail_fast=True)] | None = None
    tools: Tools | None = None
    add_special_tokens: bool = True


def token_routes(service: Service) -> APIRouter:
    """Returns the routes above."""
    router, tokenizer = APIRouter(), service.tokenizer

    @router.post("/tokenize")
    def tokenize(body: Tokenize) -> dict[str, Any]:
        ids = _ids(service, body)
        return {"tokens": ids, "count": len(ids), "max_model_len": service.n_positions}

    @router.post("/detokenize")
    def detokenize(body: Detokenize) -> dict[str, Any]:
        return {"prompt": tokenizer.decode(checked_ids(tokenizer, body.tokens), specials=True)}

    @router.get("/tokenizer_info")
    def tokenizer_info() -> dict[str, Any]:
        named = {role: getattr(tokenizer, f"{role}_id") for role in ("bos", "eos", "pad")}
        info: dict[str, Any] = {
            f"{role}_token": tokenizer.decode([token], specials=True)
            for role, token in named.items()
            if token is not None
        }
        return info | {
            "tokenizer_class": type(tokenizer).__name__,
            "vocab_size": tokenizer.vocab_size,
            "add_bos_token": tokenizer.add_bos,
        }

    return router


def _ids(service: Service, body: Tokenize) -> list[int]:
    if body.messages:
        if service.template is None:
            raise UserError(f"{service.name} has no chat template. Give a prompt.")
        return chat_prompt(service.template, service.tokenizer, ChatBody.model_validate(body.model_dump())).ids
    if body.prompt is None:
        raise UserError("neither prompt nor messages: expected one of them.")
    alone = _special(service.tokenizer, body.prompt)
    return alone or [
        *(begin(service.tokenizer) if body.add_special_tokens else []),
        *service.tokenizer.encode(body.prompt).tolist(),
    ]


def _special(tokenizer: Tokenizer, text: str) -> list[int]:
    """The id of a text that is one special token and nothing else: how clients ask for it."""
    if len(text) > 100 or len(ids := tokenizer.encode(text, specials=True).tolist()) != 1:
        return []
    return ids if tokenizer.encode(text).tolist() != ids else []
