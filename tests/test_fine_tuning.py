"""From a downloaded directory and a file of conversations to a directory that answers: three commands."""

import json
import random
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

import deepseek_jax as dsj
from deepseek_jax import run, run_config
from deepseek_jax.data import chat
from deepseek_jax.data.conversations import Encoder, unflatten
from deepseek_jax.errors import UserError
from deepseek_jax.launch import _beginning, _reinforcement, export, sft
from deepseek_jax.parallel.mesh import make_mesh
from deepseek_jax.weights import WEIGHTS, open_weights

TEMPLATE = "{# is_last_user #}<｜User｜><｜Assistant｜>"  # what tells V3's from the others
NANO = str(Path(__file__).parent / "train" / "nano_v3.py")


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """The folder of all: `published` as downloaded, the run, and `out` as exported."""
    folder = tmp_path_factory.mktemp("tuned")
    config = run_config.load(NANO)
    config.data.seq_len, config.model.mtp_depth, config.model.n_dense_layers = 64, 0, 0  # compiles less
    dsj.save_pretrained(dsj.build(config, seed=0), folder / "published", dtype="fp32")
    (folder / "published" / "chat_template.jinja").write_text(TEMPLATE)
    dice = random.Random(0)
    rows = []
    for _ in range(80):
        messages = []
        for _ in range(dice.randrange(1, 3)):
            word = "".join(dice.choices("abcdefgh", k=dice.randrange(2, 9)))
            messages += [{"role": "user", "content": word}, {"role": "assistant", "content": "yes, yes"}]
        rows.append({"messages": messages})
    (folder / "talks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = [f"--config={folder}/published", f"--workdir={folder}/run", f"--config.data.source={folder}/talks.jsonl"]
    words += ["--config.data.holdout_rate=0.2", "--config.data.seq_len=64", f"--config.data.cache_dir={folder}/cache"]
    words += ["--config.loop.steps=40", "--config.loop.eval_every=20", "--config.loop.log_every=10"]
    words += ["--config.schedule.peak_rate=1e-2", "--config.schedule.warmup_steps=5"]
    words += ["--config.mesh.data=1", "--no-sample"]
    assert sft.main(words) == 0
    assert export.main([f"--workdir={folder}/run", f"--to={folder}/out", "--dtype=fp32"]) == 0
    return folder


def examples(folder: Path, tokenizer) -> list:
    """What is learnt of the first two conversations."""
    lines = (folder / "talks.jsonl").read_text().splitlines()[:2]
    encoder = Encoder(tokenizer, chat.template_for(folder / "published"), "answers")
    return [example for array in encoder.encode_batch(lines) for example in unflatten(array)]


def loss(logits_TV: np.ndarray, example) -> float:
    """Mean over what is learnt of -log p."""
    logits_TV = np.float64(logits_TV[:-1])
    log_p = logits_TV - np.log(np.exp(logits_TV).sum(-1, keepdims=True))
    return -log_p[np.arange(len(log_p)), example.ids[1:]][example.is_learnt[1:]].mean()


@pytest.mark.slow
def test_a_fine_tuned_directory_answers(tuned):
    """The loss on held-out answers falls, prompts are not learnt, and the export says what it was taught."""
    lines = [json.loads(line) for line in (tuned / "run" / "metrics.jsonl").read_text().splitlines()]
    held_out = [line["main"] for line in lines if line["split"] == "held_out"]
    assert held_out[0] > 5 and held_out[-1] < 0.3
    model = dsj.load(tuned / "out")
    prompt = chat.to_ids(chat.template("v3").parts([{"role": "user", "content": "hgfe"}]), model.tokenizer)
    assert model.tokenizer.decode(model.generate(prompt, 20)) == "yes, yes"
    for name, bounds in (("published", (5, 7)), ("out", (0, 0.3))):
        model = dsj.load(tuned / name)
        losses = [loss(model([example.ids.tolist()])[0], example) for example in examples(tuned, model.tokenizer)]
        assert bounds[0] < np.mean(losses) < bounds[1]


@pytest.mark.slow
def test_transformers_opens_what_was_fine_tuned(tuned):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tuned / "out", dtype=torch.float32)
    ours = dsj.load(tuned / "out")
    for example in examples(tuned, ours.tokenizer):
        with torch.no_grad():
            logits = theirs(torch.tensor(example.ids[None].astype(np.int64))).logits[0].numpy()
        assert loss(logits, example) == pytest.approx(loss(ours([example.ids.tolist()])[0], example), abs=1e-4)
        assert loss(logits, example) < 0.5


@pytest.mark.slow
def test_adapters_from_start_to_export(tmp_path, capsys):
    """Resumed is not interrupted; the base rests; the run loads, exports and goes to PEFT's files and back."""
    config = run_config.load("tiny_v1")
    config.data.seq_len = 64
    config.model.update(d_model=32, n_layers=2, dense_width=48, n_heads=4, n_kv_heads=2, head_width=8)
    dsj.save_pretrained(dsj.build(config, seed=0), tmp_path / "published", dtype="fp32")
    row = {"messages": [{"role": "user", "content": "say"}, {"role": "assistant", "content": "yes, yes"}]}
    rows = [{**row, "messages": [{"role": "system", "content": f"{n}"}, *row["messages"]]} for n in range(60)]
    (tmp_path / "talks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = [f"--config={tmp_path}/published", f"--config.data.source={tmp_path}/talks.jsonl", "--no-sample"]
    words += ["--config.data.chat_template=v2", "--config.data.holdout_rate=0", "--config.data.seq_len=64"]
    words += [f"--config.data.cache_dir={tmp_path}/cache", "--config.mesh.data=1", "--config.loop.eval_every=0"]
    words += ["--config.schedule.peak_rate=1e-2", "--config.schedule.warmup_steps=1"]
    adapted = ["--config.lora.rank=4", "--config.lora.alpha=8"]
    for workdir, steps in (("whole", 8), ("parts", 4), ("parts", 8)):
        assert sft.main([*words, *adapted, f"--workdir={tmp_path}/{workdir}", f"--config.loop.steps={steps}"]) == 0
    assert "adapters alone are trained" in capsys.readouterr().out
    base, whole, parts = (dsj.load(tmp_path / workdir) for workdir in ("published", "whole", "parts"))
    jax.tree.map(np.testing.assert_array_equal, whole.params, parts.params)
    ids, given, ours = [list(range(8))], *(np.asarray(model([list(range(8))])) for model in (base, whole))
    np.testing.assert_array_equal(whole.params["head"]["weight_DV"], base.params["head"]["weight_DV"])
    assert np.abs(ours - given).max() > 0.1 * np.abs(given).max()

    assert export.main([f"--workdir={tmp_path}/whole", f"--to={tmp_path}/merged", "--dtype=fp32"]) == 0
    assert export.main([f"--workdir={tmp_path}/whole", f"--to={tmp_path}/adapters", "--adapters"]) == 0
    for other in (dsj.load(tmp_path / "merged"), dsj.load(tmp_path / "published", adapters=tmp_path / "adapters")):
        np.testing.assert_allclose(other(ids), ours, atol=1e-6 * np.abs(ours).max())
    begin = [f"--config.lora.init_from={tmp_path}/adapters", f"--workdir={tmp_path}/again", "--config.loop.steps=1"]
    assert sft.main([*words, *begin]) == 0  # the rate of the first step is 0
    np.testing.assert_allclose(dsj.load(tmp_path / "again")(ids), ours, atol=1e-6 * np.abs(ours).max())

    answering = _reinforcement.for_answers(open_weights(tmp_path / "whole").config)  # as sample and r1 read them
    stored = run.trainer(answering, make_mesh(data=1)).stored
    read = open_weights(tmp_path / "whole").read({name: stored[name] for name in WEIGHTS})
    jax.tree.map(np.testing.assert_array_equal, read["params"], whole.params)
    answering.lora.init_from = f"{tmp_path}/adapters"
    shutil.rmtree(tmp_path / "adapters")
    with pytest.raises(UserError, match="no such directory"):
        _beginning.inherit_adapters(answering, {}, tmp_path / "new")
    _beginning.inherit_adapters(answering, {}, tmp_path / "again")
    assert answering.lora.rank == 4 and answering.lora.alpha == 8.0
