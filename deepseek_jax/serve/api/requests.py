"""What clients send, checked: bodies of chat and text completions.

Keys that are not known are ignored, as by DeepSeek's server; keys that would change the answer and are not implemented
are refused.
"""

import secrets
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, Field

from deepseek_jax.data.chat import Template
from deepseek_jax.data.tokenizer import Tokenizer
from deepseek_jax.errors import UserError
from deepseek_jax.serve.engine import Sampling
from deepseek_jax.serve.grammar import json_schema, tool_calls

MOST_CHOICES = 16
MOST_STOPS = 16

Text = Annotated[str, Field(max_length=10_000_000)]


def _as_list(stop: object) -> object:
    return [] if stop is None else [stop] if isinstance(stop, str) else stop


class StreamOptions(BaseModel):
    """Options of a streamed answer."""

    include_usage: bool = False


class Thinking(BaseModel):
    """Whether the model thinks before it answers."""

    type: Literal["enabled", "disabled"]


class JsonSchema(BaseModel):
    """A named schema."""

    name: Text = ""
    schema_: dict[str, Any] | None = Field(None, alias="schema")


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
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2, allow_inf_nan=False)
    top_p: float | None = Field(None, gt=0, le=1, allow_inf_nan=False)
    n: int = Field(1, ge=1, le=MOST_CHOICES)
    seed: int | None = Field(None, ge=0, lt=2**63)
    stop: Annotated[list[Text], BeforeValidator(_as_list), Field(max_length=MOST_STOPS)] = []
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: Text | None = None
    user_id: Text | None = None
    logprobs: Any = None
    logit_bias: Any = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None

    def refused(self) -> dict[str, Any]:
        """Settings by name that would change the answer and are not implemented."""
        names = ("logprobs", "logit_bias", "presence_penalty", "frequency_penalty")
        return {name: getattr(self, name) for name in names}

    def samplings(self, n_free: int, defaults: dict[str, float], stop_ids: tuple[int, ...]) -> list[Sampling]:
        """How each of the `n` choices draws; at most `n_free` new tokens."""
        seed = secrets.randbits(62) if self.seed is None else self.seed
        drawing = {name: getattr(self, name) for name in ("temperature", "top_p")}
        drawing = {name: defaults[name] if value is None else value for name, value in drawing.items()}
        salt = (self.user_id or self.user or "").encode(errors="replace")
        n_new = min(self.max_tokens or n_free, n_free)
        return [
            Sampling(n_new, seed=(seed + number) % 2**63, stop_ids=stop_ids, salt=salt, **drawing)
            for number in range(self.n)
        ]

    @property
    def includes_usage(self) -> bool:
        """Whether a streamed answer ends with a chunk of token counts."""
        return bool(self.stream_options and self.stream_options.include_usage)


class ChatBody(_Common):
    """The body of POST /chat/completions."""

    messages: list[dict[str, Any]] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    tools: list[dict[str, Any]] | None = None
    tool_choice: Literal["auto", "none", "required"] | ToolChoice | None = None
    thinking: Thinking | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    response_format: ResponseFormat | None = None

    def check(self) -> None:
        """Raises UserError for what is not implemented."""
        refuse(self.refused())
        if self.max_tokens is None:
            self.max_tokens = self.max_completion_tokens

    def thinks(self, template: Template) -> bool:
        """Whether the prompt opens a thought, as asked for, or else as the template does."""
        if self.thinking:
            return self.thinking.type == "enabled"
        if self.reasoning_effort and template.thinks:  # there is one kind of thought, whatever its effort
            return self.reasoning_effort != "none"
        return template.opens_thought

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

    prompt: Text | list[int] | list[Text] | list[list[int]]
    suffix: Text | None = None
    echo: bool = False
    best_of: int | None = None

    def check(self) -> None:
        """Raises UserError for what is not implemented."""
        refuse(self.refused() | {"echo": self.echo, "best_of": self.best_of not in (None, 1) and self.best_of})

    def prompts(self) -> list[str | list[int]]:
        """Each prompt: a text, or ids."""
        given: Any = self.prompt
        is_one = isinstance(given, str) or (given and isinstance(given[0], int))
        return [given] if is_one else given


def refuse(settings: dict[str, Any]) -> None:
    """Raises UserError if one of the settings is set."""
    for name, value in settings.items():
        if value:
            raise UserError(f"{name}={value!r}: not implemented by this server. Leave {name} out.")
