"""A row of a file as a document."""

import json

import pytest

from deepseek_jax.data.corpus import open_corpus
from deepseek_jax.data.rows import conversation_text
from deepseek_jax.errors import UserError

TALK = [{"role": "user", "content": "深?"}, {"role": "assistant", "content": "b"}]
TOOL = {"type": "function", "function": {"name": "f"}}


def test_a_conversation_is_written_in_one_way():
    """With other fields in the row, and with lists and missing values as tables store them."""
    rows = [
        {"messages": TALK, "tools": [TOOL], "source": "web"},
        {"tools": json.dumps([TOOL]), "messages": [{**message, "tool_calls": None} for message in TALK]},
        {"messages": json.dumps(TALK), "tools": [TOOL], "thinking": None},
    ]
    texts = {conversation_text(row, "row") for row in rows}
    assert [json.loads(text) for text in texts] == [{"messages": TALK, "tools": [TOOL]}] and "深" in texts.pop()
    assert json.loads(conversation_text({"messages": TALK, "tools": [], "thinking": False}, "row")) == {
        "messages": TALK,
        "thinking": False,
    }


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "a"}, r"here has no messages \(fields text\)"),
        ("a", r"here has no messages \(str\)"),
        ({"messages": "a"}, "here has messages that are not JSON"),
        ({"messages": {"role": "user"}}, "here has a dict as messages. Give a list"),
        ({"messages": TALK, "tools": "f"}, "here has tools that are not JSON"),
        ({"messages": [{"role": "bot", "content": "a"}]}, r"here: messages\[0\] has role 'bot'"),
        ({"messages": [*TALK, TALK[1]]}, r"here: messages\[2\] has role 'assistant' after assistant"),
        ({"messages": TALK[:1]}, "here has no answer of the assistant to learn"),
        ({"messages": [TALK[0], {**TALK[1], "weight": 0}]}, "here has no answer of the assistant to learn"),
        ({"messages": [TALK[0], {**TALK[1], "weight": 0.5}]}, r"here: messages\[1\] has weight 0.5. Give 1, or 0"),
        ({"messages": TALK, "thinking": "yes"}, "here has 'yes' as thinking. Give true or false"),
        ({"messages": []}, "here: the messages end after the start"),
    ],
)
def test_what_is_no_conversation_is_named(row, message):
    with pytest.raises(UserError, match=message):
        conversation_text(row, "here")


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_the_first_row_tells_the_format(tmp_path):
    talks, texts = write(tmp_path / "a.jsonl", [{"messages": TALK}]), write(tmp_path / "b.jsonl", [{"text": "a"}])
    assert open_corpus(talks, "text").format == "conversations"
    assert [json.loads(text)["messages"] for text in open_corpus(talks, "text").documents()] == [TALK]
    assert open_corpus(texts, "text").format == open_corpus("stdlib", "text").format == "text"
    assert open_corpus(talks, "text").fingerprint() != open_corpus(talks, "text", "text").fingerprint()
    other = write(tmp_path / "d.jsonl", [{"conversations": [{"from": "human", "value": "a"}]}])
    with pytest.raises(UserError, match='has "conversations". Rename it to "messages"'):
        open_corpus(other, "text")
    both = write(tmp_path / "c.jsonl", [{"text": "a", "messages": TALK}])
    with pytest.raises(UserError, match="a text in 'text' and messages too. Set data.format"):
        open_corpus(both, "text")
    assert list(open_corpus(both, "text", "text").documents()) == ["a"]
    assert open_corpus(both, "text", "conversations").format == open_corpus(both, "body").format == "conversations"


def test_conversations_in_tables(tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows = [{"messages": TALK, "tools": None, "id": 3}, {"messages": TALK[:1] + TALK[1:], "tools": "[]", "id": 4}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    corpus = open_corpus(str(tmp_path / "a.parquet"), "text")
    assert [json.loads(text) for text in corpus.documents()] == [{"messages": TALK}] * 2


def test_wrong_formats_are_named(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(UserError, match="data.format = 'chat' does not exist. Choose one of auto, text, conversations"):
        open_corpus(str(tmp_path / "a.txt"), "text", "chat")
    with pytest.raises(UserError, match="a.txt is plain text and holds no conversations"):
        open_corpus(str(tmp_path / "a.txt"), "text", "conversations")
    write(tmp_path / "b.jsonl", [{"messages": TALK}, {"text": "a"}])
    with pytest.raises(UserError, match="b.jsonl, line 2 has no messages"):
        list(open_corpus(str(tmp_path / "b.jsonl"), "text").documents())
