"""Answers in a given form: any JSON, JSON of a schema, calls of given tools.

    grammars = Grammars(tokenizer, end_ids)
    Sampling(…, constraint=Constrained(grammars.compile(json_schema(schema)), …))

A grammar is a text in the Lark dialect of llguidance, which turns it, token by token, into the set of tokens that may
follow. When the grammar is complete, only the ids that end an answer may. What fails on the way also allows only those:
an answer may end early, but nothing illegal is drawn. A thought is free; the grammar begins after it.
"""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from llguidance import LLMatcher, LLTokenizer

from deepseek_jax.bounds import shown
from deepseek_jax.data.chat import END_THINK, THINK, Template, to_ids
from deepseek_jax.data.chat.marks import DSML, Part
from deepseek_jax.data.messages import functions
from deepseek_jax.data.tokenizer import ByteTokenizer, FileTokenizer, Tokenizer
from deepseek_jax.errors import UserError

BLANKS = r"\n? {0,40}"  # between two symbols of JSON; without a bound a model may write blanks for ever
MOST_CHARACTERS = 200_000  # of a schema
MOST_IN_ALL = 10 * MOST_CHARACTERS  # of a grammar of calls
MOST_PATTERNS = 16  # regular expressions of a schema: whether all of them can hold may take exponential time
HOLE = "\0arguments\0"  # stands for a call's arguments while its format is written
# of a schema of parameters in DSML, and of one without a bound on its values
OBJECT, DEFINITIONS = ("type", "properties", "required", "additionalProperties"), ("$defs", "definitions")
REMARKS = ("title", "description", "default", "examples", "$schema", "$id", "$comment")


def json_schema(schema: dict[str, Any] | None = None) -> str:
    """Returns the grammar of JSON that follows a schema; without one, of any JSON object."""
    return f"start: {_json({'type': 'object'} if schema is None else schema)}\n"


def tool_calls(template: Template, tokenizer: Tokenizer, tools: Sequence[dict], name: str = "") -> str:
    """Returns the grammar of one call of one of the `tools`, or of the one with that name."""
    found = [one for one in functions(tools) if name in ("", one["name"])]
    if not found or not template.has_calls:
        names = [one["name"] for one in functions(tools)]
        whose = "" if template.has_calls else ", and a model whose format has calls"
        raise UserError(f"tool_choice asks for a call of {name or 'a tool'}: expected one of {names}{whose}.")
    form = _dsml_call if template.call_block else _call
    forms, n_characters = list[str](), 0
    for one in found:
        forms.append(form(template, tokenizer, one["name"], one.get("parameters") or {"type": "object"}))
        n_characters += len(forms[-1])
        if n_characters > MOST_IN_ALL:
            raise UserError(
                f"the grammar of {len(forms)} of {len(found)} tools has {n_characters} characters: expected at most "
                f"{MOST_IN_ALL} for all of them. Give fewer tools, or shorter schemas."
            )
    return "start: " + " | ".join(f"call_{n}" for n in range(len(forms))) + "\n" + _rules("call", forms)


def _rules(name: str, forms: Sequence[str]) -> str:
    return "".join(f"{name}_{n}: {form}\n" for n, form in enumerate(forms))


def _call(template: Template, tokenizer: Tokenizer, name: str, parameters: dict[str, Any]) -> str:
    """A call as the template writes it, with a schema in the place of its arguments."""
    call = {"type": "function", "function": {"name": name, "arguments": HOLE}}
    symbols = []
    for text, is_mark in template.reply({"role": "assistant", "content": None, "tool_calls": [call]}):
        if is_mark and text != template.end.text:
            symbols.append(f"<[{to_ids([Part(text, True)], tokenizer)[0]}]>")
        elif not is_mark:
            before, hole, after = text.partition(HOLE)
            symbols += [json.dumps(before)] if before else []
            symbols += [_json(parameters)] if hole else []
            symbols += [json.dumps(after)] if after else []
    return " ".join(symbols)


def _dsml_call(template: Template, tokenizer: Tokenizer, name: str, parameters: Any) -> str:
    """A call whose arguments are not JSON but parameters: the schema's in its order, then others that it requires."""
    properties, required, shared = _properties(name, parameters)
    symbols = [_written(f'\n\n<｜DSML｜{template.call_block}>\n<｜DSML｜invoke name="{name}">\n')]
    for key, schema in properties.items():
        head, tail = _written(f'<｜DSML｜parameter name="{key}" string="'), _written("｜DSML｜parameter>\n")
        symbols.append(f"({head} ({' | '.join(_values(schema, shared))}) {tail}){'' if key in required else '?'}")
    symbols.append(_written(f"</｜DSML｜invoke>\n</｜DSML｜{template.call_block}>"))
    return " ".join(symbols).replace(DSML.text, f"<[{to_ids([DSML], tokenizer)[0]}]>")


def _properties(name: str, parameters: Any) -> tuple[dict[str, Any], list[str], dict[str, Any]]:
    """The schemas of parameters, the names of those that must be there, and the definitions that schemas refer to."""
    text = _json(parameters)  # checks its bounds too
    unknown = [key for key in parameters if key not in OBJECT + DEFINITIONS + REMARKS]
    if unknown or parameters.get("type", "object") != "object":
        raise UserError(
            f"the parameters of {shown(name)} have {', '.join(unknown) or 'a type that is not object'}: expected "
            "properties and required alone, since this model writes parameters one by one."
        )
    required, properties = parameters.get("required") or [], parameters.get("properties") or {}
    if not isinstance(properties, dict) or not isinstance(required, list) or set(map(type, required)) - {str}:
        raise UserError(f"the parameters of {shown(name)}: expected properties as an object and required as names.")
    shared = {key: parameters[key] for key in DEFINITIONS if key in parameters}
    if len(json.dumps(shared)) * text.count("{") > MOST_IN_ALL:  # they are written with each value
        raise UserError(f"the parameters of {shown(name)} have definitions that are too long: expected shorter ones.")
    return properties | {key: {} for key in required if key not in properties}, required, shared


def _written(text: str) -> str:
    """Literal symbols, between which `｜DSML｜` is left to be replaced."""
    pieces = [json.dumps(piece) if piece else "" for piece in text.split(DSML.text)]
    return f" {DSML.text} ".join(pieces)


def _values(schema: Any, shared: dict[str, Any]) -> list[str]:
    """The ways to write a value and the `</` after it: a string as it is, all others, and bounded strings, as JSON.

    `shared` are the definitions that a schema may refer to.
    """
    json_way = f'"false\\">" {_json(schema | shared if isinstance(schema, dict) else schema)} "</"'
    bounds = {key: value for key, value in schema.items() if key not in REMARKS}
    allowed = bounds.get("enum", [bounds["const"]] if "const" in bounds else [])
    if not bounds.keys() - {"enum", "const", "type"} and isinstance(allowed, list) and set(map(type, allowed)) == {str}:
        return [json.dumps(f'true">{one}</') for one in allowed]
    if bounds.keys() == {"anyOf"} and isinstance(bounds["anyOf"], list):
        return list(dict.fromkeys(way for one in bounds["anyOf"] for way in _values(one, shared)))
    types = bounds["type"] if bounds.keys() == {"type"} else ""
    types = types if isinstance(types, list) else [types]  # any other kind of type is JSON's to refuse
    text_way = r'"true\">" /(?s:.*)<\//'
    return [text_way] if types == ["string"] else [text_way, json_way] if "string" in types else [json_way]


def _json(schema: Any) -> str:
    if not isinstance(schema, dict):
        raise UserError(f"a schema is {shown(schema)}: expected an object.")
    n_patterns = _n_patterns(schema)
    if n_patterns > MOST_PATTERNS:
        raise UserError(f"a schema with {n_patterns} regular expressions: expected at most {MOST_PATTERNS}.")
    text = json.dumps({**schema, "x-guidance": {"whitespace_pattern": BLANKS}})
    if len(text) > MOST_CHARACTERS:
        raise UserError(f"a schema of {len(text)} characters: expected at most {MOST_CHARACTERS}.")
    return f"%json {text}"


def _n_patterns(schema: Any) -> int:
    """The regular expressions in a schema, of values and of keys."""
    if isinstance(schema, list):
        return sum(map(_n_patterns, schema))
    if not isinstance(schema, dict):
        return 0
    named = schema.get("patternProperties")
    own = isinstance(schema.get("pattern"), str) + (len(named) if isinstance(named, dict) else 0)
    return own + sum(map(_n_patterns, schema.values()))


class Grammars:
    """Compiles grammars for one vocabulary; `end_ids` may follow a complete answer."""

    def __init__(self, tokenizer: Tokenizer, end_ids: Sequence[int]):
        self.tokenizer, self.end_ids = tokenizer, list(end_ids)
        vocabulary: Any = tokenizer.as_json() if isinstance(tokenizer, FileTokenizer) else _Bytes()
        self._vocabulary = LLTokenizer(vocabulary, n_vocab=tokenizer.vocab_size, eos_token=self.end_ids)

    def compile(self, grammar: str) -> Any:
        """Returns a matcher at the start of the grammar. Raises UserError for one that is invalid or too large."""
        matcher = LLMatcher(self._vocabulary, LLMatcher.grammar_from_lark(grammar), log_level=0)
        if matcher.is_error():
            reason = matcher.get_error().split("\n   ")[0].rpartition("JSON schema: ")[2]
            raise UserError(f"the schema cannot be followed: {reason[:300]}")
        return matcher


class _Bytes:
    """The vocabulary of `ByteTokenizer`, as llguidance reads one."""

    is_tokenizer_wrapper = True
    bos_token_id, eos_token_id = ByteTokenizer.bos_id, ByteTokenizer.eos_id
    special_token_ids = range(256, ByteTokenizer.vocab_size)

    def __init__(self) -> None:
        self.tokens = [bytes([n]) if n < 256 else f"<{n}>".encode() for n in range(ByteTokenizer.vocab_size)]

    def __call__(self, text: str) -> list[int]:
        return list(text.encode())


class Constrained:
    """What one request may draw (`engine.Constraint`).

    Args:
        grammars: that compiled the matcher.
        matcher: at the start of a grammar, of this request alone.
        in_thought: whether the prompt has opened a thought.
        may_think: whether the answer may open one.
    """

    def __init__(self, grammars: Grammars, matcher: Any, *, in_thought: bool = False, may_think: bool = False):
        self._matcher, self._in_thought, self._may_think = matcher, in_thought, may_think
        encode = grammars.tokenizer.encode
        self._think, self._end_think = (int(encode(mark.text, specials=True)[0]) for mark in (THINK, END_THINK))
        self._ends = _bits(grammars.end_ids, grammars.tokenizer.vocab_size)

    def allowed(self) -> np.ndarray | None:
        """Returns the next tokens as bits; None in a thought, where all are allowed."""
        if self._in_thought:
            return None
        words = np.frombuffer(self._matcher.compute_bitmask(), np.uint32)
        if self._matcher.is_error() or not words.any():
            return self._ends
        return words | _bits([self._think], 32 * len(words)) if self._may_think else words

    @property
    def has_failed(self) -> bool:
        """Whether the answer was ended before the grammar was complete, by a wrong token or the compiler's limits."""
        return self._matcher.is_error()

    def push(self, token: int) -> None:
        """Takes the next token; a wrong one ends the grammar."""
        if self._in_thought or (self._may_think and token == self._think):
            self._in_thought = token != self._end_think
        else:
            self._matcher.consume_token(token)
        self._may_think = False


def _bits(tokens: Sequence[int], n_tokens: int) -> np.ndarray:
    """Returns uint32 words in which the bits of these tokens are set."""
    bits = np.zeros(-(-n_tokens // 32) * 32, bool)
    bits[list(tokens)] = True
    return np.packbits(bits, bitorder="little").view(np.uint32)
