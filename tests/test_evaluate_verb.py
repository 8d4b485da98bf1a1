"""deepseek-jax evaluate, with lm-eval unmodified: its scores are those of the model's own log-probabilities."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from deepseek_jax import cli
from deepseek_jax.errors import UserError
from deepseek_jax.language_model import load
from deepseek_jax.launch import evaluate
from tests.test_serve_verb import folder  # noqa: F401  the tiny model, as published

pytest.importorskip("lm_eval", reason="lm-eval is not installed (extra evaluate)")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("default"),  # of lm-eval and what it imports
]

QUESTIONS = [
    {"question": "Two and two?", "choices": [" four", " five"], "label": 0},
    {"question": "The sky is", "choices": [" blue", " a fish"], "label": 1},
    {"question": "Warm?", "choices": [" yes", " no"], "label": 0},
]
COMMON = """
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
doc_to_text: "{{{{question}}}}"
"""
CHOOSE = """
task: choose
output_type: multiple_choice
doc_to_choice: choices
doc_to_target: label
metric_list: [{metric: acc}]
"""
CONTINUE = """
task: continue
output_type: generate_until
doc_to_target: "{{choices[0]}}"
generation_kwargs: {until: ["\\n\\n"], max_gen_toks: 6, do_sample: false}
metric_list: [{metric: exact_match}]
"""


def log_probability(model, prompt, text):
    ids = [*prompt, *model.tokenizer.encode(text).tolist()]
    logits = np.asarray(model([ids])[0], np.float64)
    logits -= np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    return sum(logits[place - 1, ids[place]] for place in range(len(prompt), len(ids)))


def test_the_scores_are_those_of_the_model(folder, tmp_path):  # noqa: F811
    (tmp_path / "questions.jsonl").write_text("\n".join(map(json.dumps, QUESTIONS)))
    common = COMMON.format(file=tmp_path / "questions.jsonl")
    (tmp_path / "choose.yaml").write_text(CHOOSE + common)
    (tmp_path / "continue.yaml").write_text(CONTINUE + common)
    out = tmp_path / "out.json"
    arguments = [f"--from={folder}", "--tasks=choose,continue", f"--tasks-dir={tmp_path}", f"--out={out}", "--rows=4"]
    environment = os.environ | {"HF_HOME": str(tmp_path / "hf")}
    command = [sys.executable, "-P", "-m", "deepseek_jax", "evaluate", *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    model = load(folder)
    right = 0
    for question in QUESTIONS:
        prompt = model.prompt(question["question"])
        scores = [log_probability(model, prompt, choice) for choice in question["choices"]]
        right += int(np.argmax(scores)) == question["label"]
    found = json.loads(out.read_text())
    assert found["choose"]["acc,none"] == pytest.approx(right / 3)
    assert 0 <= found["continue"]["exact_match,none"] <= 1
    assert "|choose" in done.stdout


def test_what_is_missing_is_said(capsys):
    assert cli.main(["evaluate", "--from=x"]) == 2
    assert "expected --tasks=NAME" in capsys.readouterr().err
    with (
        pytest.raises(UserError, match="--url beside --from"),
        evaluate._address(SimpleNamespace(**{"from": "x", "url": "y"})),
    ):
        pass
