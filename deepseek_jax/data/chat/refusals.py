"""What a generation was not trained on is refused in words."""

from collections.abc import Sequence

from deepseek_jax.errors import UserError


def refuse(name: str, **given) -> None:
    """Raises UserError if any of what the template has no place for is given."""
    for what, value in given.items():
        if value:
            raise UserError(f"the chat template {name!r} has no {what.replace('_', ' ')}. Leave it out.")


def check_user_spoke(messages: Sequence[dict]) -> None:
    """Raises UserError if a thought is to be opened where none is: after tool outputs, or with nothing left to say."""
    if messages[-1]["role"] != "user":
        raise UserError("thinking = True, but the last message is not the user's. Set thinking = False.")
