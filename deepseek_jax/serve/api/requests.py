"""What clients send, checked: bodies of chat and text completions.

Keys that are not known are ignored, as by DeepSeek's server.
"""

import json
import secrets
from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, Field, model_validator

from deepseek_jax.data.chat import Template
from deepseek_jax.data.tokenizer import Tokenizer
from deepseek_jax.errors import UserError
from deepseek_jax.serve.grammar import json_schema, tool_calls
from deepseek_jax.serve.sampling import MOST_BIASES, MOST_TOP, Sampling

MOST_CHOICES = 16
MOST_STOPS = 16
MOST_DEPTH, MOST_CHARACTERS = 64, 1_000_000  # of tools and schemas

Bias = Annotated[float, Field(ge=-100, le=100, allow_inf_nan=False)]
Penalty = Annotated[float, Field(ge=-2, le=2, allow_inf_nan=False)]
Text = Annotated[str, Field(max_length=10_000_000)]
Ids = Annotated[list[int], Field(fail_fast=True)]


def _as_list(stop: object) -> object:
    return [] if stop is None else [stop] if isinstance(stop, str) else stop


def _few(biases: object) -> object:
    """Refuses many biases before each of them is looked at."""
    if isinstance(biases, dict) and len(biases) > MOST_BIASES:
        raise ValueError(f"{len(biases)} biases: expected at most {MOST_BIASES}")
    return biases


def _bounded(value: Any) -> Any:
    """Refuses JSON that is deep or long: templates indent it, so a few nested bytes would make a long prompt."""
    layer, depth = [value], 0
    while layer:
        depth += 1
        if depth > MOST_DEPTH:
            raise ValueError(f"nested deeper than {MOST_DEPTH}")
        layer = [child for one in layer for child in (one.values() if isinstance(one, dict) else one)]
        layer = [child for child in layer if isinstance(child, dict | list)]
    if len(json.dumps(value)) > MOST_CHARACTERS:
        raise ValueError(f"longer than {MOST_CHARACTERS} characters as JSON")
    return value


Tools = Annotated[list[dict[str, Any]], Field(fail_fast=True), AfterValidator(_bounded)]


class StreamOptions(BaseModel):
    """Options of a streamed answer."""

    include_usage: bool = False


class Thinking(BaseModel):
    """Whether the model thinks before it answers."""

    type: Literal["enabled", "disabled"]


class JsonSchema(BaseModel):
    """A named schema."""

    name: Text = ""
    schema_: Annotated[dict[str, Any], AfterValidator(_bounded)] | None = Field(None, alias="schema")


class ResponseFormat(BaseModel):
    """The form of the answer: text, any JSON object, or JSON that follows a schema."""

    type: Literal["text", "json_object", "json_schema"] = "text"
    json_schema: JsonSchema | None = None


class ToolName(BaseModel):
    """A tool by its name."""

    name: Text


class ToolChoice(BaseModel):
    """The tool that must be called."""

    type: Literal["function"] = "function"
    function: ToolName


class _Common(BaseModel):
    """What both kinds of completions take."""

    model: Text = ""
    temperature: float | None = Field(None, ge=0, le=2, allow_inf_nan=False)
    top_p: float | None = Field(None, gt=0, le=1, allow_inf_nan=False)
    n: int = Field(1, ge=1, le=MOST_CHOICES)
    seed: int | None = Field(None, ge=0, lt=2**63)
    stop: Annotated[list[Text], Field(fail_fast=True, max_length=MOST_STOPS), BeforeValidator(_as_list)] = []
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: Text | None = None
    user_id: Text | None = None
    top_k: int = Field(0, ge=-1, le=2**24)  # -1 as 0: all
    min_p: float = Field(0, ge=0, le=1, allow_inf_nan=False)
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: float = Field(1, gt=0, le=10, allow_inf_nan=False)
    logit_bias: Annotated[dict[int, Bias] | None, BeforeValidator(_few)] = None
    ignore_eos: bool = False
    return_token_ids: bool = False

    @model_validator(mode="before")
    @classmethod
    def without_nulls(cls, given: Any) -> Any:
        """A key that is null is one that is missing."""
        return {key: value for key, value in given.items() if value is not None} if isinstance(given, dict) else given

    def n_new(self, n_free: int) -> int:
        """The largest number of new tokens, one or more, of `n_free` that the model has place for."""
        raise NotImplementedError

    def n_top(self) -> int | None:
        """Likeliest tokens to be reported with each new one; None reports no log-probabilities."""
        raise NotImplementedError

    def samplings(
        self, n_free: int, defaults: dict[str, float], stop_ids: tuple[int, ...], tenant: bytes
    ) -> list[Sampling]:
        """How each of the `n` choices draws; at most `n_free` new tokens. Pages are shared by a user of one tenant."""
        seed = secrets.randbits(62) if self.seed is None else self.seed
        drawing = {name: getattr(self, name) for name in ("temperature", "top_p")}
        drawing = {name: defaults[name] if value is None else value for name, value in drawing.items()}
        one = Sampling(
            self.n_new(n_free),
            top_k=max(0, self.top_k),
            min_p=self.min_p,
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            repetition_penalty=self.repetition_penalty,
            logit_bias=self.logit_bias or {},
            stop_ids=() if self.ignore_eos else stop_ids,
            salt=tenant + (self.user_id or self.user or "").encode(errors="replace"),
            logprobs=self.n_top(),
            prompt_logprobs=getattr(self, "echo", False) and self.n_top() is not None,
            **drawing,
        )
        return [replace(one, seed=(seed + number) % 2**63) for number in range(self.n)]

    @property
    def includes_usage(self) -> bool:
        """Whether a streamed answer ends with a chunk of token counts."""
        return bool(self.stream_options and self.stream_options.include_usage)


class ChatBody(_Common):
    """The body of POST /chat/completions."""

    messages: Annotated[list[dict[str, Any]], Field(fail_fast=True)] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MOST_TOP)
    tools: Tools | None = None
    tool_choice: Literal["auto", "none", "required"] | ToolChoice | None = None
    thinking: Thinking | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    response_format: ResponseFormat | None = None

    def n_new(self, n_free: int) -> int:
        """As `_Common` says."""
        return min(self.max_tokens or self.max_completion_tokens or n_free, n_free)

    def n_top(self) -> int | None:
        """As `_Common` says."""
        if self.top_logprobs and not self.logprobs:
            raise UserError(f"top_logprobs={self.top_logprobs} without logprobs: expected logprobs=true.")
        return (self.top_logprobs or 0) if self.logprobs else None

    def thinks(self, template: Template) -> bool:
        """Whether the prompt opens a thought, as asked for, or else as the template does."""
        if self.thinking:
            return self.thinking.type == "enabled"
        if self.reasoning_effort and template.thinks:
            return self.reasoning_effort != "none"
        return template.opens_thought

    @property
    def effort(self) -> str:
        """How much the model is to think, as DeepSeek's server reads it: the most, or as ever."""
        return "max" if self.reasoning_effort in ("xhigh", "max") else ""

    def form(self, template: Template, tokenizer: Tokenizer) -> str:
        """Returns the grammar that the answer must follow; "" for none."""
        choice, wanted = self.tool_choice, self.response_format
        if isinstance(choice, ToolChoice) or choice == "required":
            name = choice.function.name if isinstance(choice, ToolChoice) else ""
            return tool_calls(template, tokenizer, self.tools or [], name)
        if wanted is None or wanted.type == "text":
            return ""
        if wanted.type == "json_object":
            return json_schema()
        if wanted.json_schema is None:
            raise UserError("response_format.type json_schema: expected the schema in response_format.json_schema.")
        return json_schema(wanted.json_schema.schema_)


class TextBody(_Common):
    """The body of POST /completions."""

    prompt: Text | Ids | Annotated[list[Text], Field(fail_fast=True)] | Annotated[list[Ids], Field(fail_fast=True)]
    suffix: Text | None = None
    max_tokens: int | None = Field(None, ge=0)
    logprobs: int | None = Field(None, ge=0, le=MOST_TOP)
    echo: bool = False
    best_of: int | None = None

    def n_new(self, n_free: int) -> int:
        """As `_Common` says; with `echo` there may be none, of which the engine draws one."""
        if self.max_tokens == 0 and not self.echo:
            raise UserError("max_tokens=0: expected 1 or more, or echo=true.")
        return min(n_free if self.max_tokens is None else max(1, self.max_tokens), n_free)

    def n_top(self) -> int | None:
        """As `_Common` says."""
        return self.logprobs

    def prompts(self) -> list[str | list[int]]:
        """Each prompt: a text, or ids."""
        given: Any = self.prompt
        if given == []:
            raise UserError("the prompt is an empty list: expected one token or more.")
        is_one = isinstance(given, str) or isinstance(given[0], int)
        if self.echo and self.suffix is not None:
            raise UserError("echo with suffix: expected one of them.")
        if self.best_of not in (None, self.n):
            raise UserError(f"best_of={self.best_of}: expected {self.n}, as many as n. No choice is left out.")
        return [given] if is_one else given
