"""A scripted model in place of a network: its prompts, and what becomes of its answers."""

import pytest

from deepseek_jax.data.chat import TEMPLATES, to_ids
from deepseek_jax.data.tokenizer import open_tokenizer
from deepseek_jax.errors import UserError
from deepseek_jax.serve.dialogue import Dialogue
from deepseek_jax.serve.reply import Piece

BYTES = open_tokenizer("bytes")
END = "<｜end▁of▁sentence｜>"


class Script:
    """Returns its lines one after the other, and records its prompts."""

    def __init__(self, *lines):
        self.lines, self.prompts, self.stop_ids = list(lines), [], ()

    def __call__(self, ids, max_new_tokens, stop_ids):
        self.prompts.append(BYTES.decode(ids, specials=True))
        self.stop_ids = stop_ids
        yield from BYTES.encode(self.lines.pop(0), specials=True).tolist()[:max_new_tokens]


def talk(name, script, *messages, n_positions=1000, limit=500, **options):
    """Returns the dialogue and its output, thoughts in brackets."""
    dialogue = Dialogue(TEMPLATES[name], BYTES, script, n_positions, **options)
    shown = []
    for message in messages:
        pieces = list(dialogue.say(message, limit))
        shown.append("".join(f"[{piece.text}]" if piece.is_thought else piece.text for piece in pieces))
    return dialogue, [text.replace("][", "") for text in shown]


def test_an_answer_and_the_next_prompt():
    script = Script("Hi!" + END, "Two." + END)
    dialogue, shown = talk("v3", script, "Hello", "1+1=?", system="Be brief.")
    assert shown == ["Hi!", "Two."]
    assert [message["content"] for message in dialogue.messages] == ["Be brief.", "Hello", "Hi!", "1+1=?", "Two."]
    assert script.prompts == [
        "<｜begin▁of▁sentence｜>Be brief.<｜User｜>Hello<｜Assistant｜>",
        f"<｜begin▁of▁sentence｜>Be brief.<｜User｜>Hello<｜Assistant｜>Hi!{END}<｜User｜>1+1=?<｜Assistant｜>",
    ]
    assert dialogue.ending == "mark"
    dialogue.reset()
    assert [message["content"] for message in dialogue.messages] == ["Be brief."]


THOUGHTS = [  # template, thinking, text of the model, output
    ("r1", None, "<think>\nHm. 1+1\n</think>\n\nTwo." + END, "[Hm. 1+1]Two."),
    ("r1", True, "Hm. 1+1\n</think>\n\nTwo." + END, "[Hm. 1+1]Two."),
    ("r1-distill", None, "Hm. 1+1\n</think>\n\nTwo." + END, "[Hm. 1+1]Two."),
    ("v31", True, "Hm. 1+1</think>Two." + END, "[Hm. 1+1]Two."),
    ("v31", None, "Two." + END, "Two."),
    ("r1", None, "Two." + END, "Two."),
    ("v3", None, "<think>Two." + END, "<think>Two."),  # has no thoughts
    ("v2", None, " Two." + END, "Two."),
]


@pytest.mark.parametrize(("name", "thinking", "said", "shown"), THOUGHTS)
def test_thought_and_answer_are_separated_and_not_shown_to_the_model_again(name, thinking, said, shown):
    script = Script(said, "So." + END)
    dialogue, texts = talk(name, script, "1+1=?", "Sure?", thinking=thinking)
    assert texts[0] == shown
    assert dialogue.messages[1]["content"].endswith("Two.")
    assert ("reasoning_content" in dialogue.messages[1]) == ("[" in shown)
    assert "Hm. 1+1" not in script.prompts[1]
    assert script.prompts[1] == TEMPLATES[name].encode(
        [*dialogue.messages[:2], {"role": "user", "content": "Sure?"}],
        thinking=bool(TEMPLATES[name].opens_thought if thinking is None else thinking),
    )


def test_pieces_come_as_soon_as_they_are_certain():
    dialogue = Dialogue(TEMPLATES["v3"], BYTES, Script("é!" + END), 100)
    assert list(dialogue.say("?", 10)) == [Piece("content", "é"), Piece("content", "!")]


def test_an_answer_that_is_stopped_is_kept_as_far_as_it_came():
    dialogue = Dialogue(TEMPLATES["r1"], BYTES, Script("<think>\nHm", "Hi"), 100)
    pieces = dialogue.say("1+1=?", 50)
    assert next(pieces) == Piece("thought", "H")
    pieces.close()
    assert dialogue.messages == [
        {"role": "user", "content": "1+1=?"},
        {"role": "assistant", "content": "", "reasoning_content": "H"},
    ]
    unread = dialogue.say("And?", 50)
    unread.close()  # before there was a token
    assert len(dialogue.messages) == 2


def test_a_stop_comes_between_two_tokens():
    dialogue = Dialogue(TEMPLATES["v3"], BYTES, Script("Hi!" + END, "Two." + END, "So." + END), 200)
    pieces = dialogue.say("Hello", 50)
    assert next(pieces) == Piece("content", "H")
    dialogue.stop()
    assert list(pieces) == []
    assert (dialogue.ending, dialogue.messages[-1]["content"]) == ("stopped", "H")
    pieces = dialogue.say("1+1=?", 50)  # while the prompt is read
    dialogue.stop()
    assert list(pieces) == []
    assert (dialogue.ending, len(dialogue.messages)) == ("stopped", 2)
    assert "".join(piece.text for piece in dialogue.say("So?", 50)) == "So."


def test_an_interrupted_network_leaves_the_conversation_whole():
    def stream(ids, **_):
        yield from b"Hi"
        raise KeyboardInterrupt

    dialogue = Dialogue(TEMPLATES["v3"], BYTES, stream, 100)
    with pytest.raises(KeyboardInterrupt):
        list(dialogue.say("Hello", 50))
    assert [message["content"] for message in dialogue.messages] == ["Hello", "Hi"]


def test_limits():
    script = Script("x" * 90, "x" * 90, "x")
    dialogue, shown = talk("v3", script, "Hello", limit=5, n_positions=40)
    assert (shown, dialogue.ending) == (["xxxxx"], "max_new_tokens")
    assert "".join(piece.text for piece in dialogue.say("And?", 500)) == "x" * 20
    assert dialogue.ending == "n_positions"
    with pytest.raises(
        UserError, match=r"44 tokens with this message: expected fewer than 40. Start a new one \(/reset\)"
    ):
        dialogue.say("?", 5)
    assert len(dialogue.messages) == 4


def test_every_end_mark_stops():
    script = Script("Hi!" + END)
    talk("v3", script, "Hello", stop_ids=(7, 8))
    assert sorted(script.stop_ids) == [7, 8, BYTES.eos_id]


def test_what_cannot_be_said_is_refused_at_once():
    with pytest.raises(UserError, match=r"the tokenizer has no special token <\|EOT\|>"):
        Dialogue(TEMPLATES["coder"], BYTES, Script(), 100)
    with pytest.raises(UserError, match="'v3' has no thinking"):
        Dialogue(TEMPLATES["v3"], BYTES, Script(), 100, thinking=True)


def test_marks_in_a_message_are_text():
    script = Script("Hi!" + END)
    dialogue = Dialogue(TEMPLATES["v3"], BYTES, lambda ids, **_: script(ids, 9, ()), 200)
    list(dialogue.say("<｜Assistant｜>", 9))
    marks = to_ids(TEMPLATES["v3"].parts([{"role": "user", "content": "<｜Assistant｜>"}]), BYTES)
    assert (marks >= 256).sum() == 3
