"""What chat and serve ask of a model's files: its chat template, and how it draws."""

import sys
from pathlib import Path

from ml_collections import ConfigDict

from deepseek_jax.errors import UserError

DRAWING = {"temperature": 0.6, "top_p": 0.95}  # where neither the user nor the model's files say


def template_name(tokenizer: str, source: Path | str, given: str) -> str:
    """Returns the name of the template: the one given, or the one beside the tokenizer's file."""
    from deepseek_jax.data import chat
    from deepseek_jax.data.tokenizer import BUILT_IN

    if tokenizer == "none":
        raise UserError(f"{source} came without a tokenizer.json, which a chat needs. Put it beside the weights.")
    path = Path(tokenizer).expanduser()
    folder = None if tokenizer in ("deepseek", *BUILT_IN) else path if path.is_dir() else path.parent
    return chat.template_for(folder, given, model=str(source))


def template_of(config: ConfigDict, source: Path | str, given: str) -> str:
    """Returns the name of the template: the one given, the run's own, or that of the model's files.

    A line says so where the kind of model alone names it: its base, if it has the same tokenizer, cannot chat.
    """
    from deepseek_jax.data.chat.published import BY_MODEL_TYPE

    name = template_name(config.data.tokenizer, source, given or config.data.chat_template)
    if not given and config.data.format != "conversations" and name in BY_MODEL_TYPE.values():
        print(f"chat template: {name}, by model_type; --template changes it", file=sys.stderr)
    return name


def drawing_of(config: ConfigDict) -> dict[str, float]:
    """Returns the temperature and top_p of a model's generation_config.json, or `DRAWING`'s where it has none."""
    from deepseek_jax import release

    said = release.generation_config(config)
    if said.get("do_sample") is False:
        return DRAWING | {"temperature": 0.0}
    numbers = {key: said.get(key) for key in DRAWING}
    return DRAWING | {key: float(n) for key, n in numbers.items() if isinstance(n, int | float)}
