"""JSON with something broken, and JSON that is far too large."""

import json
import random
import re

from deepseek_jax.convert.safetensors import DTYPES, INDEX, SINGLE
from malformed.directories import CONFIG

PATHS = (
    *("../{}", "/{}", "./{}", "a/../{}", "{}/", "{}\0", "{}\n", "file:///{}", "..\\{}", "~/{}", "{} ", "sub/{}"),
    *(
        "",
        ".",
        "..",
        "/",
        "/dev/zero",
        "/dev/stdin",
        "/proc/self/mem",
        INDEX,
        SINGLE,
        CONFIG,
        "\ud800",
        "ü",
        "a" * 5000,
    ),
)
TEXTS = (
    *("", "x", "\0", "a\nb", "\ud800", "\U0001f600", "a" * 300, "__metadata__", "w.F32", "q.0", "q.0_scale_inv", "NaN"),
    *(*DTYPES, "F4", "f32", "F32 ", "BF-16", "F8_E4M3FNUZ", "C64", "model.norm.weight", "llama", "yarn", "noaux_tc"),
)
NUMBERS = (
    *(
        "-1",
        "0",
        "1",
        "2",
        "3",
        "4",
        "7",
        "8",
        "12",
        "128",
        "1e0",
        "2.0",
        "1e400",
        "-0",
        "1E9",
        "0.5",
        "NaN",
        "Infinity",
    ),
    *("65536", "4294967296", "2147483647", "9223372036854775807", "9223372036854775808", "18446744073709551615"),
    *("9" * 40, "9" * 4000, "9" * 5000, "01", "+1", "0x10", "1_000", "-", "1e", "1.", "true", "null"),
)
VALUES = (*("[]", "{}", "[[]]", '[""]', '{"a": 1}', "null", "true", "false", '"1"', "[0, 0]", "[1, 2, 3]", "[1]"),)
NESTED = tuple(
    open_ * n + "1" + close * n for n in (40, 400, 900, 3000, 100_000) for open_, close in ("[]", ('{"":', "}"))
)
TOKEN = re.compile(rb'"(?:[^"\\]|\\.)*"|-?\d[\d.eE+-]*|true|false|null|\[|\{')


def mangle_json(text: bytes, rng: random.Random) -> bytes:
    """Returns JSON with one value, key, bracket or range of bytes replaced."""
    tokens = list(TOKEN.finditer(text)) or [re.match(b"", text)]
    token = rng.choice(tokens)
    at, end = token.span()
    strings = [match for match in tokens if match.group().startswith(b'"')]
    numbers = [match for match in tokens if match.group()[:1].isdigit()]
    kind = rng.randrange(17)
    if kind < 4 and numbers:
        (at, end), new = rng.choice(numbers).span(), rng.choice(NUMBERS).encode()
    elif kind < 7 and strings:
        at, end = (match := rng.choice(strings)).span()
        old = match.group()[1:-1].decode("utf-8", "replace")
        new = json.dumps(rng.choice((*TEXTS, *PATHS)).replace("{}", old)).encode()
    elif kind == 7:
        new = rng.choice((*VALUES, *NUMBERS, *NESTED[:4])).encode()
    elif kind == 8:  # a key twice
        pairs = [match for match in strings if text[match.end() : match.end() + 1] == b":"]
        key = rng.choice(pairs or tokens)
        at = end = key.start()
        new = key.group() + b":" + rng.choice((b"1", b"{}", b"null", b'"x"')) + b","
    elif kind == 9:
        new = rng.choice(NESTED).encode()
    elif kind == 10:  # bits flipped
        turned = bytearray(text)
        for _ in range(rng.randint(1, 4)):
            turned[rng.randrange(len(text))] ^= 1 << rng.randrange(8)
        return bytes(turned)
    elif kind == 11:  # bytes lost, added or doubled
        at = rng.randrange(len(text))
        end = min(len(text), at + rng.choice((0, 1, 2, 10)))
        new = rng.choice((b"", rng.randbytes(rng.randint(1, 4)), text[at:end] * 2, b",", b'"', b"\\", b"\xff", b"}"))
    elif kind == 12:
        return text[: rng.randrange(len(text))]
    elif kind == 13:
        return rng.choice(
            (b"\xef\xbb\xbf" + text, b" " + text, text + b"x", text + b"\0", text + text, b"", b"null", b"[]")
        )
    elif kind == 14:
        return text.decode("utf-8", "replace").encode(rng.choice(("utf-16", "utf-32", "utf-16-le", "utf-7")))
    elif kind == 15 and len(tokens) > 1:  # two exchanged
        first, second = sorted(rng.sample(tokens, 2), key=lambda match: match.start())
        between = text[first.end() : second.start()]
        return text[: first.start()] + second.group() + between + first.group() + text[second.end() :]
    else:
        new = b""
    return text[:at] + new + text[end:]


def enormous_json(rng: random.Random) -> bytes:
    """Returns text that is small on disk and large or slow for a trusting reader; up to the limit, and beyond."""
    n = rng.choice((1_000_000, 5_000_000, 23_900_000, 24_000_001))
    unit = rng.choice((b"[],", b"{},", b'{"a":1},', b"1e9,", b"12345678901,", b'"abcdefgh",', b"[[1],[2]],"))
    return rng.choice(
        (
            b'{"a":[' + unit * (n // len(unit)) + b"1]}",
            b'{"a":[' + unit * (249_000 // (1 + unit.count(b"[") + unit.count(b"{"))) + b"1]}",
            b"{" + b",".join(b'"%07d":1' % i for i in range(min(n // 12, 249_000))) + b"}",
            b'{"weight_map":{'
            + b",".join(b'"%d":"%d.safetensors"' % (i, i) for i in range(min(n // 30, 300_000)))
            + b"}}",
            b'{"' + b"a" * (n - 30) + b'":1}',
            b'{"' + b"a" * (n - 30) + b'\\ud83d\\ude00":1}',
            b'{"' + b"a" * (n // 4 - 30) + "\U0001f600".encode() + b'":1}',
            b'{"a":' + b"[" * min(n, 240_000),
            b'{"a":' * min(n // 5, 240_000),
            b'{"a":' + b"1" * n + b"}",
            b"{" + b" " * n + b"}",
            b'{"a":"' + b"\\u00e9" * (n // 6 - 10) + b'"}',
        )
    )


def enormous_header(rng: random.Random) -> bytes:
    """Returns as many valid tensors as a header may have, and more; only the last one has no data."""
    n = rng.choice((10_000, 31_000, 100_000))
    entry = b'"%06d":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'
    return b"{" + b"".join(entry % i + b"," for i in range(n)) + entry.replace(b"0]", b"1]") % n + b"}"
