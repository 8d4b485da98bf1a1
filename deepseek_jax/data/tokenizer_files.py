"""The files from which a tokenizer can be opened again, here and by others: they are written beside published weights.

Bytes become a `tokenizer.json` as well: a BPE without merges over GPT-2's byte alphabet, in which byte b has id b,
followed by the special tokens as added tokens.
"""

import json
from pathlib import Path
from typing import Any

from deepseek_jax.data.tokenizer import BUILT_IN, BYTE_HIDDEN, BYTE_SPECIALS, ByteTokenizer, deepseek_folder

TOKENIZER = "tokenizer.json"
CONFIG = "tokenizer_config.json"
# Patterns of names; the first is the tokenizer itself.
PATTERNS: tuple[str, ...] = (TOKENIZER, CONFIG, "special_tokens_map.json", "added_tokens.json", "chat_template.jinja")
PATTERNS += ("chat_template.json", "tokenizer.model", "vocab.json", "merges.txt", "tokenization_*.py")


def is_path(name: str) -> bool:
    """Returns whether the name of a tokenizer, as for `open_tokenizer`, is that of a file or folder."""
    return name != "deepseek" and name not in BUILT_IN


def files_of(name: str) -> dict[str, Path | bytes]:
    """Returns the files of a tokenizer that `open_tokenizer` takes: name -> its path or its content."""
    if name == "none":
        return {}
    if name == "bytes":
        return {TOKENIZER: _text(byte_tokenizer()), CONFIG: _text(byte_settings())}
    path = Path(name).expanduser() if is_path(name) else deepseek_folder()
    file = path / TOKENIZER if path.is_dir() else path
    found = [path for pattern in PATTERNS for path in sorted(file.parent.glob(pattern))]
    return {**{path.name: path for path in found}, TOKENIZER: file}


def byte_tokenizer() -> dict[str, Any]:
    """Returns the `tokenizer.json` of `ByteTokenizer`: the same ids for the same text."""
    added = [
        {"id": 256 + i, "content": mark, "special": mark in BYTE_HIDDEN, "normalized": False}
        | dict.fromkeys(("single_word", "lstrip", "rstrip"), False)
        for i, mark in enumerate(BYTE_SPECIALS)
    ]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    model = {"type": "BPE", "vocab": {letter: i for i, letter in enumerate(byte_alphabet())}, "merges": []}
    return {"version": "1.0", "added_tokens": added, "model": model} | dict.fromkeys(
        ("pre_tokenizer", "decoder"), byte_level
    )


def byte_settings() -> dict[str, Any]:
    """Returns the `tokenizer_config.json` of `ByteTokenizer`."""
    return dict(zip(("bos_token", "eos_token", "pad_token"), BYTE_SPECIALS, strict=False)) | {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": ByteTokenizer.add_bos,
        "clean_up_tokenization_spaces": False,
    }


def byte_alphabet() -> list[str]:
    """Returns GPT-2's letter for each byte: printable bytes as in Latin-1, the rest from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def _text(content: dict) -> bytes:
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()
