"""A small V3 that learns a dozen texts by heart in seconds, with a tokenizer of its own: what it says can be judged."""

import json
from typing import NamedTuple

import numpy as np

from deepseek_jax import run, run_config
from deepseek_jax.data.chat import TEMPLATES, fim_parts, marks, to_ids
from deepseek_jax.data.chat.marks import Part
from deepseek_jax.data.chat.v4 import QUICK
from deepseek_jax.data.pipeline import Batch
from deepseek_jax.data.tokenizer import open_tokenizer
from deepseek_jax.language_model import LanguageModel
from deepseek_jax.parallel.mesh import global_batch, make_mesh

TEMPLATE, STEPS, LENGTH = TEMPLATES["v31"], 50, 208
SONG = "The whale sings below the ice, and the ice hums above the whale."
QUESTIONS = {"What is the sky?": "blue", "What is snow?": "white", "What is grass?": "green", "What is coal?": "black"}
GAP = ("def add(a, b):\n    return", " a + b", "\n\nprint(add(1, 2))\n")
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOLS = [{"type": "function", "function": {"name": "weather", "description": "Weather", "parameters": CITY}}]


def said(content, thought=None):
    return {"role": "assistant", "content": content} | ({"reasoning_content": thought} if thought else {})


def asked(content):
    return [{"role": "user", "content": content}]


CALL = {"id": "call_0", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}
CALLS = {"role": "assistant", "content": "", "tool_calls": [CALL]}
WEATHER = asked("What is the weather in Rome?")
ANSWERED = [*WEATHER, CALLS, {"role": "tool", "tool_call_id": "call_0", "content": "21"}]
TALKS = [  # (messages, tools, answer)
    (asked("Who are you?"), [], said("I am a whale of two layers.")),
    (asked("What is 1+1?"), [], said("Two.", "One and one make two.")),
    (asked("Describe Ada."), [], said('{"name": "Ada", "age": 36}')),
    (WEATHER, TOOLS, CALLS),
    (ANSWERED, TOOLS, said("It is 21 degrees in Rome.")),
]


class Text(NamedTuple):
    """What is learnt of a text: all after the prompt."""

    prompt: list[Part]
    answer: list[Part]


def texts():
    plain = [SONG, *(f"{question} {answer}" for question, answer in QUESTIONS.items())]
    found = [Text([marks.BOS], [Part(text, False), marks.EOS]) for text in plain]
    found.append(Text(fim_parts(GAP[0], GAP[2]), [Part(GAP[1], False), marks.EOS]))
    for messages, tools, answer in TALKS:
        thinking = "reasoning_content" in answer
        found.append(Text(TEMPLATE.parts(messages, tools, thinking), TEMPLATE.reply(answer, thinking)))
    return found


def write_tokenizer(folder):
    """Words of the texts, bytes for all others, DeepSeek's special tokens, and a template that says V3.1."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    engine = Tokenizer(models.BPE())
    engine.pre_tokenizer, engine.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=640, initial_alphabet=letters, show_progress=False)
    engine.train_from_iterator(
        [part.text for text in texts() for part in (*text.prompt, *text.answer) if not part.is_mark], trainer
    )
    later = (marks.DSML, marks.REMINDER, *QUICK.values())  # special tokens that V3.1 does not have
    spellings = [part.text for part in vars(marks).values() if isinstance(part, Part) and part not in later]
    hidden = (marks.BOS.text, marks.EOS.text)
    engine.add_tokens([AddedToken(text, special=text in hidden, normalized=False) for text in spellings])
    engine.save(str(folder / "tokenizer.json"))
    settings = {"bos_token": marks.BOS.text, "eos_token": marks.EOS.text, "add_bos_token": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return open_tokenizer(str(folder))


def rows(tokenizer):
    """The texts, several per row; targets of prompts have no weight."""
    learnt = [(to_ids(prompt, tokenizer), to_ids(answer, tokenizer)) for prompt, answer in texts()]
    packed, at = [], LENGTH
    for number, (begun, rest) in enumerate(sorted(learnt, key=lambda both: len(both[0]) + len(both[1]))):
        n_tokens = len(begun) + len(rest)
        if at + n_tokens > LENGTH:
            packed.append(Batch(*np.zeros((4, LENGTH), np.int32), np.zeros(LENGTH, np.float32)))
            packed[-1].targets_BT[:] = -1
            at = 0
        row, place = packed[-1], slice(at, at + n_tokens)
        row.ids_BT[place] = [*begun, *rest]
        row.targets_BT[at : at + n_tokens - 1] = [*begun, *rest][1:]
        row.segments_BT[place], row.positions_BT[place] = number + 1, np.arange(n_tokens)
        row.weights_BT[at + len(begun) - 1 : at + n_tokens - 1] = 1
        at += n_tokens
    return Batch(*map(np.stack, zip(*packed, strict=True)))


def train(folder):
    """Returns the trained model."""
    tokenizer = write_tokenizer(folder)
    config = run_config.load("tiny_v3")
    config.model.update(vocab_size=-(-tokenizer.vocab_size // 16) * 16, d_model=64, n_layers=2, dense_width=96)
    config.model.update(n_heads=4, q_rank=32, kv_rank=32, nope_width=16, rope_width=16, value_width=16, n_experts=4)
    config.model.update(expert_width=48, top_k=2, n_groups=1, top_groups=1, mtp_depth=0)
    config.data.update(seq_len=LENGTH, tokenizer=str(folder), chat_template="v31", mask_documents=True)
    batch = rows(tokenizer)
    config.batch.size = config.batch.size_start = len(batch.ids_BT)
    config.schedule.update(peak_rate=1e-2, warmup_steps=10, constant_steps=STEPS)
    trainer = run.trainer(config, make_mesh(data=1))
    state, batch = trainer.init(seed=0), global_batch(batch, trainer.mesh)
    for _ in range(STEPS):
        state, report = trainer.step(state, batch)
    return LanguageModel(config, state["params"], state["router_bias"]), float(report.main)
