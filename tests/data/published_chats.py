"""Random conversations, and their text in the published Jinja templates, as one digest per template.

    python tests/data/published_chats.py NAME DIR      the digest of the template in DIR, a model's folder

renders them with Jinja as transformers does, or with the encoder that V3.2 and V4 have in place of a template. NAME is
one of ours; "r1" is DeepSeek-R1-0528, "v3" DeepSeek-V3-0324, and so on as at the top of `deepseek_jax/data/chat`. The
texts are full of special cases: special tokens, fences, line breaks, empty strings, other alphabets.
"""

import functools
import hashlib
import importlib
import json
import random
import sys

BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
N_CONVERSATIONS = 200
WORDS = (
    "",
    " ",
    "\n",
    "a",
    "hello",
    "深度求索",
    "🐋",
    "<think>",
    "</think>",
    "<think>\nHm\n</think>\n\n",
    "<｜User｜>",
)
WORDS += ("User: ", "\n\n", "### Response:\n", "{}", "`", "'", '"')
WITHOUT_TOOLS = ("v1", "v2", "coder")
CALLS_ALONE = ("v2.5", "v3-1226", "r1-distill")  # templates that write calls or content
ALWAYS_TEXT = ("r1",)  # a template that fails without content
ENCODERS = {"v32": "encoding_dsv32", "v4": "encoding_dsv4"}

# blake2b, made by the command above from the models' own files
DIGESTS = {
    "v1": "15daf79a5198c68dc9f88025d2d07616",
    "v2": "c2278250de34c98b5efc9914cbfca877",
    "coder": "c12ca61c5006ae87406ba494171f04cd",
    "v2.5": "55fe191a6b5ec16858ba1a0186ae3480",
    "v3-1226": "d79e4aedc7c39d2866b4cd2a235fa3ea",
    "v3": "8f004e29ae5bf28df3c7be9bf9b7630b",
    "r1-0120": "12bd9b54a0d6eb23c5daaeecbe00bb9e",
    "r1-distill": "b3f828f3b79dfa11a6898d888b76b798",
    "r1": "7651e3d9b50649a4fa8bd554307901dd",
    "v31": "05238fee7a806776c99830363e88052a",
    "v32": "240f75fad9183123973daa5b5b2bc631",
    "v4": "827f24219f2887da282f83be68dca950",
}


def conversations(name: str) -> list[list[dict]]:
    """Returns the conversations for a template, half of them whole, half up to the assistant's turn."""
    return [_conversation(random.Random(f"{name} {n}"), name) for n in range(N_CONVERSATIONS)]


def digest(renderings: list[str]) -> str:
    """Returns a digest of strings and their boundaries."""
    return hashlib.blake2b(json.dumps(renderings).encode(), digest_size=16).hexdigest()


def render(template: str, messages: list[dict], **more) -> str:
    """Returns the text of messages in a Jinja template, in the environment that transformers provides."""
    prompted = messages[-1]["role"] != "assistant"
    given = {"messages": messages, "bos_token": BOS, "eos_token": EOS, "add_generation_prompt": prompted}
    return _compiled(template).render(**given, **more)


def encoder(name: str, folder: str):
    """Returns the function that writes messages by the encoder in a model's folder; V4 thinks before it answers."""
    sys.path.insert(0, f"{folder}/encoding")
    module = importlib.import_module(ENCODERS[name])

    def write(messages: list[dict]) -> str:
        is_thinking = name == "v4" and messages[-1]["role"] == "user"
        return module.encode_messages(messages, "thinking" if is_thinking else "chat")

    return write


@functools.cache
def _compiled(template: str):
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.filters["tojson"] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)
    return environment.from_string(template)


def _conversation(dice: random.Random, name: str) -> list[dict]:
    messages = [{"role": "system", "content": _text(dice)} for _ in range(dice.choice([0, 0, 1, 1, 2]))]
    n_rounds = 0
    for _ in range(dice.randrange(1, 4)):
        messages.append({"role": "user", "content": _text(dice)})
        while name not in WITHOUT_TOOLS and dice.random() < 0.4:
            has_text = name in ALWAYS_TEXT or dice.random() < 0.6
            loses_text = name in CALLS_ALONE or (name == "r1-0120" and n_rounds)
            messages += _calls_and_outputs(dice, _text(dice) if has_text and not loses_text else None)
            n_rounds += 1
        messages.append({"role": "assistant", "content": _text(dice)})
    return messages[:-1] if dice.random() < 0.5 else messages


def _calls_and_outputs(dice: random.Random, content: str | None) -> list[dict]:
    ids = [f"call_{n}" for n in range(dice.randrange(1, 4))]
    calls = [{"id": i, "type": "function", "function": {"name": dice.choice("f天"), **_arguments(dice)}} for i in ids]
    outputs = [{"role": "tool", "tool_call_id": i, "content": _text(dice)} for i in ids]
    return [{"role": "assistant", "content": content, "tool_calls": calls}, *outputs]


def _arguments(dice: random.Random) -> dict:
    return {"arguments": json.dumps({"城市": _text(dice)}, ensure_ascii=False)}


def _text(dice: random.Random) -> str:
    return "".join(dice.choices(WORDS, k=dice.randrange(6)))


if __name__ == "__main__":
    from pathlib import Path

    from deepseek_jax.data.chat import published_template

    name, folder = sys.argv[1:]
    published = published_template(Path(folder))
    write = encoder(name, folder) if name in ENCODERS else functools.partial(render, published)
    print(digest([write(messages) for messages in conversations(name)]))
