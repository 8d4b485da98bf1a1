"""Which of our templates a published Jinja template is, recognised by distinctive text.

No template is executed: the template of each generation contains text that no other has. A template without any of it
is not recognised. V3.2 and V4 come without one: the model_type in their config.json tells, if their tokenizer has the
special tokens of the format.
"""

import json
from pathlib import Path

from deepseek_jax.data.chat.marks import ASSISTANT, DSML, END_THINK, THINK, USER
from deepseek_jax.errors import UserError

_SPEAKERS = ("<｜User｜>", "<｜Assistant｜>")
_SPLIT = "'</think>' in content"
# (name, text it contains, text it does not contain); the first match is used
TRAITS = (
    ("coder", ("### Instruction:", "### Response:", "<|EOT|>"), ()),
    ("v2", ("'User: '", "'Assistant: '", "'Assistant:'"), ("<｜",)),
    ("v31", (*_SPEAKERS, "<｜Assistant｜></think>", "thinking"), ("DSML",)),
    ("r1", (*_SPEAKERS, _SPLIT, "is_last_user"), ("<｜Assistant｜></think>", "DSML")),
    ("r1-0120", (*_SPEAKERS, _SPLIT, "is_first_sp"), ("<｜Assistant｜></think>", "DSML")),
    ("r1-distill", (*_SPEAKERS, _SPLIT), ("<｜Assistant｜></think>", "DSML")),
    ("v3", (*_SPEAKERS, "is_last_user"), ("think>", "DSML")),
    ("v3-1226", (*_SPEAKERS, "is_first_sp"), ("think>", "DSML")),
    ("v2.5", (*_SPEAKERS, "is_first"), ("think>", "DSML")),
)

BY_MODEL_TYPE = {"deepseek_v32": "v32", "deepseek_v4": "v4"}  # of models whose files have no template
NEEDED = {mark.text for mark in (USER, ASSISTANT, THINK, END_THINK, DSML)}  # by those templates


def published_name(folder: Path) -> str:
    """Returns the name of our template for the model in a folder; "" if it has none, or an unknown one."""
    text, config = published_template(folder), folder / "config.json"
    if text or not config.is_file():
        return recognise(text)
    try:
        model_type = json.loads(config.read_text(encoding="utf-8")).get("model_type")
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{config} cannot be read ({error}). Download it again.") from error
    name = BY_MODEL_TYPE.get(model_type, "") if isinstance(model_type, str) else ""
    return name if name and _special_tokens(folder) >= NEEDED else ""


def _special_tokens(folder: Path) -> set[str]:
    """Returns the tokens that a tokenizer.json adds to its vocabulary; none if there is no such file."""
    file = folder / "tokenizer.json"
    try:
        found = json.loads(file.read_text(encoding="utf-8")).get("added_tokens") if file.is_file() else None
        return {one["content"] for one in found or ()}
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(f"{file} cannot be read ({error}). Download it again.") from error


def recognise(text: str) -> str:
    """Returns the name of our template for the text of a Jinja template; "" if it is unknown."""
    for name, has, hasnt in TRAITS:
        if all(words in text for words in has) and not any(words in text for words in hasnt):
            return name
    return ""


def published_template(folder: Path) -> str:
    """Returns the text of the Jinja template in a model's folder; "" if there is none.

    `chat_template.jinja` takes precedence over `chat_template` in tokenizer_config.json; from a list of several the one
    called "default" is used.
    """
    jinja, config = folder / "chat_template.jinja", folder / "tokenizer_config.json"
    try:
        if jinja.is_file():
            return jinja.read_text(encoding="utf-8")
        found = json.loads(config.read_text(encoding="utf-8")).get("chat_template") if config.is_file() else None
        if isinstance(found, list):
            found = {one["name"]: one["template"] for one in found}.get("default")
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(f"the chat template in {folder} cannot be read ({error}). Download its files again.") from error
    return found if isinstance(found, str) else ""
