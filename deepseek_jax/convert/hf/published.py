"""A directory of published weights: config.json and the headers of its files, checked."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from deepseek_jax.convert import fetched, formats, hf_config, safetensors
from deepseek_jax.convert.safetensors import Tensors
from deepseek_jax.errors import UserError
from deepseek_jax.storage import Place, Remote, place

CONFIG, GENERATION_CONFIG = "config.json", "generation_config.json"
EMBEDDINGS = ("model.embed_tokens.weight", "embed.weight")  # the names that an embedding may have
EMBEDDING = EMBEDDINGS[0]

Warn = Callable[[str], None]


def warn_on_stderr(message: str) -> None:
    """Prints a warning."""
    print(f"warning: {message}", file=sys.stderr)


@dataclass(frozen=True)
class Published:
    """A directory of published weights, checked as far as possible without reading them."""

    # family, numbers: see `hf_config.from_hf`
    family: str
    numbers: dict[str, Any]
    facts: hf_config.ConfigFacts
    tensors: Tensors | None  # the files; None if only config.json and the index were read
    config: dict[str, Any]  # content of config.json
    generation_eos_ids: tuple[int, ...]  # end-of-sequence tokens in generation_config.json

    @property
    def is_wide(self) -> bool:
        """Whether the weights are in float32: that of the embedding if files were opened, else as in config.json."""
        if self.tensors is not None:
            found = [name for name in EMBEDDINGS if name in self.tensors]
            return self.tensors.info(found[0] if found else EMBEDDING).dtype == "F32"
        return "float32" in (self.config.get("torch_dtype"), self.config.get("dtype"))


def open_published(directory: str | PathLike | Remote, warn: Warn = warn_on_stderr) -> Published:
    """Returns a directory of published weights, or a place in a bucket, after reading config.json and the headers.

    Multi-token prediction that the config names and the files do not contain (transformers saves such files) is left
    out, with a warning. Raises UserError if it is not such a directory, the model is of no known family, or files are
    damaged.
    """
    where = place(directory)
    if not isinstance(where, Remote):
        return _opened(where.expanduser(), where, warn)
    folder = fetched.fetch(where)
    try:
        return _opened(folder, where, warn)
    except UserError as error:  # the small files are read in the cache, and are to be corrected in the bucket
        raise type(error)(str(error).replace(str(folder), str(where))) from error


def _opened(directory: Path, where: Place, warn: Warn) -> Published:
    """Returns what the small files in a directory and the weights in a place are."""
    formats.check_path(directory)
    if not directory.is_dir():
        raise UserError(f"{directory}: no such directory. Give a directory with {CONFIG} and safetensors files.")
    if not (directory / CONFIG).is_file():
        raise UserError(f"{directory}: no {CONFIG}. Give a directory with {CONFIG} and safetensors files.")
    config = safetensors.read_json(directory / CONFIG)
    family, numbers = hf_config.from_hf(config)
    tensors = safetensors.open_directory(directory, where if isinstance(where, Remote) else None)
    first_ahead = _first_ahead(numbers)
    if numbers.get("mtp_depth") and not any(name.startswith(first_ahead) for name in tensors.names()):
        warn(f"{where}: {CONFIG} names multi-token prediction, but the files do not contain it: it is left out.")
        numbers["mtp_depth"] = 0
    return Published(family, numbers, hf_config.facts(config), tensors, config, _generation_eos_ids(directory))


def _first_ahead(numbers: dict[str, Any]) -> tuple[str, str]:
    """Returns what the names of the first depth of multi-token prediction begin with, in either spelling."""
    return f"model.layers.{numbers['n_layers']}.", "mtp.0."


def announced(directory: Path) -> Published:
    """Returns what `open_published` does, from config.json and the index of the weights alone."""
    config = safetensors.read_json(directory / CONFIG)
    family, numbers = hf_config.from_hf(config)
    index = directory / safetensors.INDEX
    named = safetensors.read_json(index).get("weight_map") if index.is_file() else None
    first_ahead = _first_ahead(numbers)
    if numbers.get("mtp_depth") and isinstance(named, dict) and not any(name.startswith(first_ahead) for name in named):
        numbers["mtp_depth"] = 0
    return Published(family, numbers, hf_config.facts(config), None, config, _generation_eos_ids(directory))


def _generation_eos_ids(directory: Path) -> tuple[int, ...]:
    file = directory / GENERATION_CONFIG
    return hf_config.eos_ids(safetensors.read_json(file), str(file)) if file.is_file() else ()
