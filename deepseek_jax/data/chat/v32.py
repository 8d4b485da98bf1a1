r"""V3.2, which thinks between tool calls too; its calls are DSML (`dsml`).

    BOS system ( USER u ASSISTANT </think> a EOS )*, and for tools
    USER u ASSISTANT <think> t </think> a \n\n<DSMLfunction_calls> … </DSMLfunction_calls> EOS
    \n\n<function_results> ( \n<result>o</result> )* \n</function_results>\n\n <think> t </think> a EOS

With thinking, answers after the last message of the user keep their thoughts, across tools; earlier ones lose theirs,
and are written as if they had been given without. A developer's message stands where a user's does. It may have tools
and the form of the answer with it, and with thinking it is left out once it is no longer the last.
"""

from collections.abc import Sequence

from deepseek_jax.data.chat import marks
from deepseek_jax.data.chat.dsml import split_calls, write_calls
from deepseek_jax.data.chat.marks import Part
from deepseek_jax.data.chat.parts import Pieces, before, join, marked
from deepseek_jax.data.messages import (
    V32_ORDER,
    Assistant,
    Developer,
    Outputs,
    Turn,
    User,
    as_json,
    as_message,
    functions,
    read,
    read_answer,
)

BLOCK = "function_calls"
TOOLS = (
    """## Tools
You have access to a set of tools you can use to answer the user's question.
You can invoke functions by writing a "<｜DSML｜function_calls>" block like the following as part of your reply to the \
user:
<｜DSML｜function_calls>
<｜DSML｜invoke name="$FUNCTION_NAME">
<｜DSML｜parameter name="$PARAMETER_NAME" string="true|false">$PARAMETER_VALUE</｜DSML｜parameter>
...
</｜DSML｜invoke>
<｜DSML｜invoke name="$FUNCTION_NAME2">
...
</｜DSML｜invoke>
</｜DSML｜function_calls>
String and scalar parameters should be specified as is without any escaping or quotes, while lists and objects should \
use JSON format. The "string" attribute should be set to "true" for string type parameters and "false" for other types \
(numbers, booleans, arrays, objects).
If the thinking_mode is enabled, then after function results you should strongly consider outputting a thinking block. \
Here is an example:
<｜DSML｜function_calls>
...
</｜DSML｜function_calls>
<function_results>
...
</function_results>
<think>...thinking about results</think>
Here are the functions available in JSONSchema format:
<functions>
""",
    """
</functions>
""",
)
FORM = "\n\n## Response Format:\n\nYou MUST strictly adhere to the following schema to reply:\n"


def v32_parts(messages: Sequence[dict], tools: Sequence[dict] = (), thinking: bool = False) -> list[Part]:
    """Returns V3.2's prompt; it ends in `<think>`, also after tools, or in `</think>`."""
    conversation = read(messages, "".join, V32_ORDER)
    turns = without_developers(conversation.turns) if thinking else conversation.turns
    last = last_of_user(turns)
    pieces: Pieces = [marks.BOS, conversation.system, *written_tools(TOOLS, tools)]
    for n, turn in enumerate(turns):
        thinks = thinking and n >= last
        opening = marks.THINK if thinks else marks.END_THINK
        match turn:
            case User(content):
                pieces += [marks.USER, content, marks.ASSISTANT, opening]
            case Developer(content, its_tools, form):
                said = [
                    *written_tools(TOOLS, its_tools),
                    *written_form(form),
                    f"\n\n# The user's message is: {content}",
                ]
                pieces += [marks.USER, *said, marks.ASSISTANT, opening]
            case Assistant():
                pieces += written(turn, BLOCK, thinks)
            case Outputs(contents):
                results = "".join(f"\n<result>{content}</result>" for content in contents)
                pieces += [f"\n\n<function_results>{results}\n</function_results>\n\n", opening]
    return join(pieces)


def last_of_user(turns: Sequence[Turn]) -> int:
    """Returns the place of the last turn of the user or a developer."""
    return max(n for n, turn in enumerate(turns) if isinstance(turn, User | Developer))


def without_developers(turns: Sequence[Turn]) -> list[Turn]:
    """Returns turns without those of developers before the last turn of the user."""
    last = last_of_user(turns)
    return [turn for n, turn in enumerate(turns) if n >= last or not isinstance(turn, Developer)]


def written_tools(description: tuple[str, str], tools: Sequence[dict]) -> Pieces:
    """Returns the tools as JSON, one per line, between the two halves of their description; nothing for none."""
    if not tools:
        return []
    begin, end = (marked(text, marks.DSML, marks.THINK, marks.END_THINK) for text in description)
    described = "\n".join(as_json(function, function["name"]) for function in functions(tools))
    return ["\n\n", *begin, described, *end]


def written_form(form: object) -> Pieces:
    """Returns the JSON schema that an answer is asked to follow, nothing for none."""
    return [FORM, as_json(form, "response_format")] if form else []


def written(answer: Assistant, block: str, thinks: bool) -> Pieces:
    """Returns an answer: its thought, with `thinks`, content, calls, EOS."""
    thought: Pieces = [answer.thought, marks.END_THINK] if thinks else []
    return [*thought, answer.content, *write_calls(answer.calls, block), marks.EOS]


def v32_reply(message: dict, thinking: bool = False) -> list[Part]:
    """Returns the thought and `</think>` with `thinking`, then the answer, its calls, EOS."""
    return join(written(read_answer(message), BLOCK, thinking))


def v32_parse(text: str, thinking: bool = False) -> dict:
    """Returns the text before EOS, and the calls at its end, as a message; see `parse`."""
    return parse(text, BLOCK, thinking)


def parse(text: str, block: str, thinking: bool) -> dict:
    """Returns the answer of a model whose calls are in such a block.

    With `thinking` it begins with the thought, which is everything if it never ends.
    """
    text, thought = before(marks.EOS, text), ""
    if thinking:
        thought, _, text = text.partition(marks.END_THINK.text)
    content, calls = split_calls(text, block)
    return as_message(content, thought, calls)
