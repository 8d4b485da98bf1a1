"""What a published model says of itself besides its weights, so that exports of it and of its children say it again.

`config.release` holds the numbers (longest sequence, marks of begin and end) and the folder in which the files stand:
tokenizer, chat template, settings for generation, licence, and code where transformers has no class. A run that begins
with published weights inherits all of it and keeps copies of the files in its workdir. A tokenizer of the user's own
replaces the release's, and its marks.
"""

import fnmatch
import json
import os
import sys
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from deepseek_jax.convert import hf, hf_config, safetensors
from deepseek_jax.data.chat import jinja, published_name, published_template, recognise
from deepseek_jax.data.chat.published import BY_MODEL_TYPE
from deepseek_jax.data.tokenizer import Tokenizer
from deepseek_jax.data.tokenizer_files import CONFIG, PATTERNS, TOKENIZER, files_of, is_path
from deepseek_jax.errors import UserError

KEPT = (hf.GENERATION_CONFIG, "LICENSE*")  # besides the tokenizer's files


class Marks(NamedTuple):
    """Ids with a meaning."""

    # bos_id, pad_id: begin of a text and padding, None where there is none
    bos_id: int | None
    pad_id: int | None
    eos_ids: tuple[int, ...]  # what config.json names as the end
    end_ids: tuple[int, ...]  # all at which generation stops, ascending


def of_published(published: hf.Published, folder: Path) -> dict[str, Any]:
    """`config.release` of a published directory."""
    facts = published.facts
    return {
        "folder": os.path.abspath(folder),
        "n_positions": facts.n_positions,
        "bos_id": facts.bos_id,
        "pad_id": facts.pad_id,
        "eos_ids": facts.eos_ids,
        "end_ids": tuple(sorted({*facts.eos_ids, *published.generation_eos_ids})),
    }


def chat_template(published: hf.Published, folder: Path) -> str:
    """`config.data.chat_template` of a published directory: "" stands for the one beside its tokenizer."""
    name = published_name(folder) if published.config["model_type"] in BY_MODEL_TYPE else ""
    return name if name in BY_MODEL_TYPE.values() else ""


def n_positions(config: ConfigDict) -> int:
    """Tokens of the longest sequence that a model is meant for: its release's, or those it was trained on if more."""
    return max(config.release.n_positions, config.data.seq_len)


def has_own_tokenizer(config: ConfigDict) -> bool:
    """Whether the tokenizer is the release's (or there is no release): its marks then are the release's too."""
    folder = config.release.folder
    return not folder or config.data.tokenizer == (kept_tokenizer(folder) or "none")


def marks(config: ConfigDict, tokenizer: Tokenizer) -> Marks:
    """The ids with a meaning of a config's model; those of the release count beside the tokenizer's."""
    own = () if tokenizer.eos_id is None else (tokenizer.eos_id,)
    if not has_own_tokenizer(config):
        return Marks(tokenizer.bos_id, tokenizer.pad_id, own, own)
    release = config.release
    return Marks(
        bos_id=tokenizer.bos_id if release.bos_id is None else release.bos_id,
        pad_id=release.pad_id,
        eos_ids=tuple(release.eos_ids) or own,
        end_ids=tuple(sorted({*release.end_ids, *release.eos_ids, *own})),
    )


def kept_tokenizer(folder: str | os.PathLike) -> str:
    """The path of the tokenizer that is kept beside weights, "" if there is none."""
    path = os.path.join(os.path.abspath(folder), TOKENIZER)  # not where a link leads: its neighbours count as well
    return path if os.path.isfile(path) else ""


def kept_files(folder: str | os.PathLike, patterns: tuple[str, ...] = (*PATTERNS, *KEPT)) -> dict[str, Path]:
    """The files beside weights that exports and runs keep, by name."""
    try:
        names = sorted(os.listdir(folder))
    except OSError as error:
        raise UserError(
            f"{folder}: cannot be read ({error.strerror}). The tokenizer and other files of this model were there: put "
            "them back, or load the model from where it is now."
        ) from None
    paths = {name: Path(folder) / name for name in names if any(fnmatch.fnmatch(name, p) for p in patterns)}
    return {name: path for name, path in paths.items() if path.is_file()}


def files(config: ConfigDict) -> dict[str, Path | bytes]:
    """The files that belong beside the weights of a config's model: name -> where it is, or what is in it."""
    folder, kept = config.release.folder, (*KEPT, *hf_config.code(config.family))
    if folder and has_own_tokenizer(config):
        found: dict[str, Path | bytes] = dict(kept_files(folder, (*PATTERNS, *kept)))
    else:
        found = {**(kept_files(folder, kept) if folder else {}), **files_of(config.data.tokenizer)}
    return _with_template(config, found)


def _tuned_with(config: ConfigDict) -> str:
    return config.data.chat_template if config.data.format == "conversations" else ""


def _with_template(config: ConfigDict, found: dict[str, Path | bytes]) -> dict[str, Path | bytes]:
    """Returns the files with the chat_template.jinja of a model tuned with a named template that they do not hold.

    V3.2's and V4's have no such file; a template of another model is left out, and a line says so.
    """
    name = _tuned_with(config)
    if name in BY_MODEL_TYPE.values():
        left = _without_template(found)
        if left != found:
            print(f"chat template: the files' own is left out, since the model is tuned with {name}", file=sys.stderr)
        return left
    beside = [found[file] for file in (jinja.NAME, CONFIG) if file in found]
    held = {recognise(published_template(path.parent)) for path in beside if isinstance(path, Path)}
    if name not in jinja.TEXTS or jinja.TEXTS[name] in {jinja.TEXTS.get(other) for other in held}:
        return found
    return found | {jinja.NAME: jinja.TEXTS[name].encode()}


def _without_template(found: dict[str, Path | bytes]) -> dict[str, Path | bytes]:
    left = {name: content for name, content in found.items() if name not in (jinja.NAME, "chat_template.json")}
    path = found.get(CONFIG)
    settings = safetensors.read_json(path) if isinstance(path, Path) else {}
    if settings.pop("chat_template", None) is not None:
        left[CONFIG] = (json.dumps(settings, indent=2, ensure_ascii=False) + "\n").encode()
    return left


def remark(config: ConfigDict) -> str:
    """Returns a line about an export whose files do not name the chat template that it is tuned with; "" if they do."""
    name = _tuned_with(config)
    if name not in BY_MODEL_TYPE.values():
        return ""
    kind = hf_config.model_type(config.family, config.model)
    told = f"model_type {kind} stands for {BY_MODEL_TYPE.get(kind) or 'no template'}"
    return "" if BY_MODEL_TYPE.get(kind) == name else f"chat template: {told}: give --template={name} to chat and serve"


def files_to_keep(config: ConfigDict) -> dict[str, Path | bytes]:
    """Those of `files` that a run copies to its workdir: all but what a built-in tokenizer is made of."""
    return {} if not config.release.folder and not is_path(config.data.tokenizer) else files(config)


def generation_config(config: ConfigDict) -> dict[str, Any]:
    """The release's generation_config.json, {} if there is none."""
    file = Path(config.release.folder or os.devnull) / hf.GENERATION_CONFIG
    return safetensors.read_json(file) if file.is_file() else {}


def generation_config_to_write(config: ConfigDict, said: Marks) -> dict[str, Any]:
    """The release's generation_config.json, with other marks where the user has changed those; one of marks without."""
    found, is_own = generation_config(config), has_own_tokenizer(config)
    ends = {*config.release.end_ids, *config.release.eos_ids} if is_own else set()
    if found and is_own and ends == {*hf_config.eos_ids(found), *config.release.eos_ids}:
        return found
    changed = {"bos_token_id": said.bos_id, "eos_token_id": hf_config.one_or_list(sorted(ends) or said.eos_ids)}
    return (found or {"_from_model_config": True}) | changed | ({} if is_own else {"pad_token_id": said.pad_id})


def moved(config: ConfigDict, workdir: Path) -> ConfigDict:
    """The config of a run whose workdir is now this one: files that it keeps are found there."""
    here, release = os.path.abspath(workdir), config.release
    kept, named = kept_tokenizer(here), config.data.tokenizer
    with config.unlocked():
        if release.folder and (kept_files(here) or not os.path.isdir(release.folder)):
            if named in (os.path.join(release.folder, TOKENIZER), "none"):
                config.data.tokenizer = kept or named
            release.folder = here
        named = config.data.tokenizer
        if kept and is_path(named) and not Path(named).expanduser().exists():
            config.data.tokenizer = kept
    return config
