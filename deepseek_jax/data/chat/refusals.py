"""Errors for input that a generation was not trained on."""

from collections.abc import Sequence

from deepseek_jax.errors import UserError


def refuse(name: str, **given: object) -> None:
    """Raises UserError if something is given that the template cannot express."""
    for what, value in given.items():
        if value:
            raise UserError(f"the chat template {name!r} has no {what.replace('_', ' ')}. Remove it.")


def check_user_spoke(messages: Sequence[dict]) -> None:
    """Raises UserError if the last message is not the user's, so that the prompt cannot open a thought."""
    if messages[-1]["role"] != "user":
        raise UserError("thinking = True, but the last message is not the user's. Set thinking = False.")
