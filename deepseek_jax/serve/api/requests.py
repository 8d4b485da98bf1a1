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
from deepseek_jax.serve.sampling import MOST_BIASES, MOST_TOP

MOST_CHOICES = 16
MOST_STOPS = 16
PENALTIES = ("presence_penalty", "frequency_penalty", "repetition_penalty")
DRAWING = ("temperature", "top_p", "top_k", "min_p", "logit_bias", *PENALTIES)

Bias = Annotated[float, Field(ge=-100, le=100, allow_inf_nan=False)]
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
    logit_bias: dict[int, Bias] | None = Field(None, max_length=MOST_BIASES)
    presence_penalty: float | None = Field(None, ge=-2, le=2, allow_inf_nan=False)
    frequency_penalty: float | None = Field(None, ge=-2, le=2, allow_inf_nan=False)
    repetition_penalty: float | None = Field(None, gt=0, le=10, allow_inf_nan=False)
    top_k: int | None = Field(None, ge=-1, le=10**6)
    min_p: float | None = Field(None, ge=0, le=1, allow_inf_nan=False)

    @property
    def n_top(self) -> int | None:
        """The number of likeliest tokens that are reported with each one; None for no log-probabilities."""
        raise NotImplementedError

    @property
    def shows_prompt(self) -> bool:
        """Whether the answer begins with the prompt."""
        return False

    def samplings(self, n_free: int, defaults: dict[str, float], stop_ids: tuple[int, ...]) -> list[Sampling]:
        """How each of the `n` choices draws; at most `n_free` new tokens."""
        seed = secrets.randbits(62) if self.seed is None else self.seed
        given = {name: getattr(self, name) for name in DRAWING if getattr(self, name) is not None}
        given["top_k"] = max(0, given.get("top_k", 0))  # -1 is all of them, as in other servers
        scores_prompt = self.n_top is not None and self.shows_prompt
        options: dict[str, Any] = {"logprobs": self.n_top, "prompt_logprobs": scores_prompt}
        options = defaults | given | options
        options |= {"stop_ids": stop_ids, "salt": (self.user_id or self.user or "").encode(errors="replace")}
        n_new = n_free if self.max_tokens is None else min(max(1, self.max_tokens), n_free)
        return [Sampling(n_new, seed=(seed + number) % 2**63, **options) for number in range(self.n)]

    @property
    def includes_usage(self) -> bool:
        """Whether a streamed answer ends with a chunk of token counts."""
        return bool(self.stream_options and self.stream_options.include_usage)


class ChatBody(_Common):
    """The body of POST /chat/completions."""

    messages: list[dict[str, Any]] = Field(min_length=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MOST_TOP)
    max_completion_tokens: int | None = Field(None, ge=1)
    tools: list[dict[str, Any]] | None = None
    tool_choice: Literal["auto", "none", "required"] | ToolChoice | None = None
    thinking: Thinking | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    response_format: ResponseFormat | None = None

    def check(self) -> None:
        """Raises UserError for settings that contradict each other."""
        if self.top_logprobs and not self.logprobs:
            raise UserError(f"top_logprobs={self.top_logprobs} without logprobs: expected logprobs=true.")
        if self.max_tokens is None:
            self.max_tokens = self.max_completion_tokens

    @property
    def n_top(self) -> int | None:
        """See `_Common`."""
        return self.top_logprobs or 0 if self.logprobs else None

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
    max_tokens: int | None = Field(None, ge=0)  # 0 is for `echo`
    logprobs: int | None = Field(None, ge=0, le=MOST_TOP)
    best_of: int | None = None

    def check(self) -> None:
        """Raises UserError for what is not implemented, and for settings that contradict each other."""
        refuse({"best_of": self.best_of not in (None, 1) and self.best_of})
        if self.max_tokens == 0 and not self.echo:
            raise UserError("max_tokens=0: expected 1 or more, or echo=true.")
        if self.echo and self.suffix is not None:
            raise UserError("echo with suffix: expected one of them.")

    @property
    def n_top(self) -> int | None:
        """See `_Common`."""
        return self.logprobs

    @property
    def shows_prompt(self) -> bool:
        """See `_Common`."""
        return self.echo

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
