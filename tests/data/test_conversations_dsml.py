"""The learnt tokens of V3.2's and V4's conversations, against an independent definition."""

import json
import random

import pytest

from deepseek_jax.data.chat import TEMPLATES, marks
from deepseek_jax.data.conversations import Encoder, answers, join, unflatten
from deepseek_jax.data.rows import conversation_text
from deepseek_jax.errors import UserError

WORDS = ("", "a", " hello", "\n", "深度", "🐋", "<｜User｜>", "</think>", "<｜DSML｜invoke", "'")
TOOLS = [{"type": "function", "function": {"name": "f", "description": "d"}}]
ROLES = {"user": "@USER", "developer": "@USER"}


def text(dice: random.Random) -> str:
    return "".join(dice.choices(WORDS, k=dice.randrange(4)))


def row_of(name: str, dice: random.Random) -> dict:
    """A random row: rounds with or without thoughts (separate or spelled out), calls, developers, reminders, tasks."""
    row: dict = {"messages": [{"role": "system", "content": text(dice)}] * dice.randrange(2)}
    if dice.random() < 0.3:
        row["tools"] = TOOLS
    if dice.random() < 0.2:
        row["thinking"] = True
    if name == "v4" and dice.random() < 0.2:
        row["reasoning_effort"] = "max"
    for _ in range(dice.randrange(1, 4)):
        thinks, asked = dice.random() < 0.5, {"role": "user", "content": text(dice)}
        if dice.random() < 0.2:
            asked = {"role": "developer", "content": text(dice), "tools": dice.choice(([], TOOLS))}
        if name == "v4" and dice.random() < 0.2:
            row["messages"].append({"role": "latest_reminder", "content": text(dice)})
        task = name == "v4" and asked["role"] == "user" and dice.random() < 0.2
        row["messages"].append(asked | ({"task": dice.choice(("title", "action"))} if task else {}))
        while not task and dice.random() < 0.3:
            calls = [
                {"id": f"c{n}", "function": {"name": "f", "arguments": json.dumps({"x": text(dice), "y": n})}}
                for n in range(dice.randrange(1, 3))
            ]
            row["messages"].append(answer(dice, thinks) | {"tool_calls": calls})
            row["messages"] += [{"role": "tool", "tool_call_id": one["id"], "content": text(dice)} for one in calls]
        row["messages"].append(answer(dice, thinks and not task))
    return row


def answer(dice: random.Random, thinks: bool) -> dict:
    message = {"role": "assistant", "content": text(dice)}
    kind = dice.randrange(3) if thinks else 0
    if kind == 1:
        message["reasoning_content"] = "hm" + text(dice)
    if kind == 2:
        message["content"] = f"<think>\nso {dice.randrange(9)}\n</think>\n\n{message['content']}"
    return message


class Oracle:
    """The two templates defined again: what each message is in a prompt that asks for a given answer."""

    def __init__(self, name: str, row: dict, tokenizer):
        self.is_v4, self.block = name == "v4", {"v4": "tool_calls", "v32": "function_calls"}[name]
        self.row, self.tokenizer, self.examples = row, tokenizer, []
        self.messages = [self.apart(message) for message in row["messages"]]
        asks = [n for n, message in enumerate(self.messages) if message["role"] in ROLES]
        for n, message in enumerate(self.messages):
            if message["role"] == "assistant":
                self.learn(n, max(a for a in asks if a < n), next((a for a in asks if a > n), len(self.messages)))

    def apart(self, message: dict) -> dict:
        content = message["content"]
        if message["role"] != "assistant" or not content.startswith("<think>\n"):
            return message
        thought, content = content.removeprefix("<think>\n").split("\n</think>\n\n", 1)
        return message | {"content": content, "reasoning_content": thought}

    def learn(self, n: int, start: int, end: int) -> None:
        said, asked = self.messages[:n], self.messages[n - 1]
        thinks = self.row.get("thinking", any(m.get("reasoning_content") for m in self.messages[start + 1 : end]))
        has_tools = self.is_v4 and bool(self.row.get("tools") or any(m.get("tools") for m in said))
        if self.is_v4 and asked["role"] == "tool":  # results are the user's
            start = n - [m["role"] for m in reversed(said)].index("assistant")
        if thinks and not has_tools:
            said = [m for k, m in enumerate(said) if k >= start or m["role"] != "developer"]
            start -= n - len(said)
        prompt = ["@BOS"]
        if self.is_v4 and thinks and self.row.get("reasoning_effort") == "max":
            prompt += [EFFORT]
        prompt += [m["content"] for m in said if m["role"] == "system"]
        prompt += self.tools(self.row.get("tools"))
        for k, message in enumerate(said):
            keeps = thinks and (has_tools or k >= start)
            opening = "@THINK" if keeps else "@END_THINK"
            before, after = (said[k - 1]["role"] if k else ""), (said[k + 1]["role"] if k + 1 < len(said) else "")
            prompt += getattr(self, message["role"])(message, opening, keeps, thinks, before, after, said[:k])
        reply = self.answered(self.messages[n], thinks and "task" not in asked)
        self.extend(self.ids(prompt), self.ids(reply))

    def ids(self, pieces: list[str]) -> list[int]:
        """Texts and, written @NAME, special tokens; neighbouring texts are one."""
        found: list[int] = []
        for piece in pieces:
            is_mark = piece.startswith("@")
            found += self.tokenizer.encode(
                getattr(marks, piece[1:]).text if is_mark else piece, specials=is_mark
            ).tolist()
        return found

    def system(self, message, *_) -> list[str]:
        return []  # written before

    def latest_reminder(self, message, *_) -> list[str]:
        return ["@REMINDER", message["content"]]

    def user(self, message, opening, keeps, thinks, *_) -> list[str]:
        task = message.get("task")
        if task == "title":
            return ["@USER", message["content"], "@TITLE"]
        if task == "action":
            return ["@USER", message["content"], "@ASSISTANT", "@THINK" if thinks else "@END_THINK", "@ACTION"]
        return ["@USER", message["content"], "@ASSISTANT", opening]

    def developer(self, message, opening, *_) -> list[str]:
        tools, content = self.tools(message["tools"]), message["content"]
        said = [content, *tools] if self.is_v4 else [*tools, f"\n\n# The user's message is: {content}"]
        return ["@USER", *said, "@ASSISTANT", opening]

    def tool(self, message, opening, keeps, thinks, before, after, earlier) -> list[str]:
        content = message["content"]
        if self.is_v4:
            head = ["\n\n"] if before == "tool" else ["@USER"]
            return [
                *head,
                f"<tool_result>{content}</tool_result>",
                *([] if after == "tool" else ["@ASSISTANT", opening]),
            ]
        head = "" if before == "tool" else "\n\n<function_results>"
        tail = [] if after == "tool" else ["\n</function_results>\n\n", opening]
        return [f"{head}\n<result>{content}</result>", *tail]

    def assistant(self, message, opening, keeps, thinks, before, after, earlier) -> list[str]:
        return self.answered(message, keeps and not (earlier and "task" in earlier[-1]))

    def answered(self, message: dict, thinks: bool) -> list[str]:
        pieces = [message.get("reasoning_content") or "", "@END_THINK"] if thinks else []
        pieces += [message["content"]]
        calls = [json.loads(call["function"]["arguments"]) for call in message.get("tool_calls", ())]
        if calls:
            pieces += ["\n\n<", "@DSML", f"{self.block}>\n"]
        for call in calls:
            pieces += ["<", "@DSML", 'invoke name="f">\n', "<", "@DSML", 'parameter name="x" string="true">', call["x"]]
            pieces += [
                "</",
                "@DSML",
                "parameter>\n",
                "<",
                "@DSML",
                'parameter name="y" string="false">',
                str(call["y"]),
            ]
            pieces += ["</", "@DSML", "parameter>\n", "</", "@DSML", "invoke>\n"]
        return [*pieces, *(["</", "@DSML", f"{self.block}>"] if calls else []), "@EOS"]

    def tools(self, tools: list | None) -> list[str]:
        """The description, found in the prompt of the template itself: its words are tested elsewhere."""
        template = TEMPLATES["v4" if self.is_v4 else "v32"]
        parts = template.parts([{"role": "user", "content": ""}], tools or [])
        names = {value.text: name for name, value in vars(marks).items() if isinstance(value, marks.Part)}
        return [f"@{names[part.text]}" if part.is_mark else part.text for part in parts[1:-3]] if tools else []

    def extend(self, prompt: list[int], reply: list[int]) -> None:
        ids, is_learnt = self.examples[-1] if self.examples else ([], [])
        if not ids or prompt[: len(ids)] != ids:
            ids, is_learnt = [], []
            self.examples.append((ids, is_learnt))
        rest = prompt[len(ids) :]
        ids += rest + reply
        is_learnt += [False] * len(rest) + [True] * len(reply)


EFFORT = TEMPLATES["v4"].prompt([{"role": "user", "content": ""}], (), True, "max")[1].text


@pytest.mark.parametrize("name", ["v32", "v4"])
def test_ids_and_masks_are_those_of_another_account(name, marked_bytes):
    dice = random.Random(name)
    rows = [row_of(name, dice) for _ in range(400)]
    stored = Encoder(marked_bytes, name, "answers").encode_batch([conversation_text(row, "row") for row in rows])
    n_examples = []
    for row, array in zip(rows, stored, strict=True):
        got = [(example.ids.tolist(), example.is_learnt.tolist()) for example in unflatten(array)]
        assert got == Oracle(name, row, marked_bytes).examples, row
        n_examples.append(len(got))
    assert n_examples.count(1) > 50 and n_examples.count(2) > 50


def test_a_round_of_calls_with_thoughts_is_one_example(marked_bytes):
    """As at inference: its thoughts stay until the user speaks again."""
    call = {"id": "c", "function": {"name": "f", "arguments": "{}"}}
    messages = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "", "reasoning_content": "one", "tool_calls": [call]},
        {"role": "tool", "content": "r"},
        {"role": "assistant", "content": "a", "reasoning_content": "two"},
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "b"},
    ]
    first, last = join(answers({"messages": messages}, TEMPLATES["v32"], "answers"), marked_bytes)
    said, learnt = (bytes(i for i in ids if i < 256) for ids in (first.ids, first.ids[first.is_learnt]))
    assert b"one" in learnt and b"two" in learnt and b"<result>r</result>" in said and b"result" not in learnt
    assert b"one" not in bytes(i for i in last.ids if i < 256)
    row = {"messages": messages, "tools": TOOLS, "thinking": True}
    (whole,) = join(answers(row, TEMPLATES["v4"], "answers"), marked_bytes)  # V4 keeps them beyond that, with tools
    learnt = bytes(i for i in whole.ids[whole.is_learnt] if i < 256)
    assert b"one" in learnt and b"two" in learnt and learnt.endswith(b"b")


def test_what_cannot_be_written_is_named():
    ask, said = {"role": "user", "content": "q", "task": "title"}, {"role": "assistant", "content": "a"}
    with pytest.raises(UserError, match=r"messages\[1\] has a thought, which the chat template does not write there"):
        answers({"messages": [ask, said | {"reasoning_content": "hm"}]}, TEMPLATES["v4"], "answers")
    with pytest.raises(
        UserError, match=r"messages\[0\] has role 'developer'. Expected a dict whose role is one of system"
    ):
        answers({"messages": [{"role": "developer", "content": "q"}, said]}, TEMPLATES["r1"], "answers")
    with pytest.raises(UserError, match="row has 5 as reasoning_effort. Give text"):
        conversation_text({"messages": [ask, said], "reasoning_effort": 5}, "row")
