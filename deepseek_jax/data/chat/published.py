"""Which of our templates a published Jinja template is, by what distinguishes them.

No template is run: each generation has something in its text that no other has.  A text with none of it is not
recognised, rather than taken for the nearest.
"""

import json
from pathlib import Path

from deepseek_jax.errors import UserError

_SPEAKERS = ("<｜User｜>", "<｜Assistant｜>")
_SPLIT = "'</think>' in content"
# (name, what its text has, what it has not); the first that fits is taken
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


def recognise(text: str) -> str:
    """Returns the name of our template for the text of a Jinja template; "" if it is none of ours."""
    return next((name for name, has, hasnt in TRAITS if _all_in(has, text) and not _any_in(hasnt, text)), "")


def _all_in(words: tuple[str, ...], text: str) -> bool:
    return all(word in text for word in words)


def _any_in(words: tuple[str, ...], text: str) -> bool:
    return any(word in text for word in words)


def published_template(folder: Path) -> str:
    """Returns the text of the Jinja template that a model's folder holds; "" if there is none.

    ``chat_template.jinja`` counts before ``chat_template`` in tokenizer_config.json, of which a list names several and
    "default" is taken.
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
