"""`bench requests`: the work of both sides, and the lines that it prints."""

from types import SimpleNamespace

import pytest

from deepseek_jax.errors import UserError
from deepseek_jax.launch import _bench_requests
from deepseek_jax.launch._bench_requests import Work, report, work


def test_one_request_has_all_tokens_and_many_have_half_of_them_or_more():
    model = SimpleNamespace(config=SimpleNamespace(model=SimpleNamespace(vocab_size=50)))
    options = SimpleNamespace(prompt_tokens=9, new_tokens=7, seed=3)
    one, many = work(model, 1, options), work(model, 40, options)
    assert (len(one.prompts[0]), one.n_new) == (9, [7])
    assert {len(prompt) for prompt in many.prompts} == {5, 6, 7, 8, 9} and set(many.n_new) == {4, 5, 6, 7}
    assert max(max(prompt) for prompt in many.prompts) < 50 and many == work(model, 40, options)


def test_rates_are_medians_beside_those_of_the_better_peer(capsys):
    seconds = iter([9.0, 9.0, 9.0, 0.2, 0.5, 1.0, 0.1, 0.5, 1.0, 0.4, 0.5, 1.0])
    sides = {name: lambda _, ids=ids: (next(seconds), [[ids], [2]]) for name, ids in SIDES.items()}
    report({"2 requests": Work([[1], [2]], [4, 6])}, sides, 3)
    title, *lines = capsys.readouterr().out.splitlines()
    assert title == "  2 requests" and len(lines) == 3
    assert "50 tokens/CPU s, 2.50 of the peer; 2 of 2 texts" in lines[0]
    assert "20 tokens/CPU s; 1 of 2 texts" in lines[1] and "10 tokens/CPU s; 2 of 2" in lines[2]


SIDES = {"deepseek_jax, 8 per program": 1, "transformers, one batch": 3, "transformers, one by one": 1}


def test_arguments():
    with pytest.raises(UserError, match="--steps=1,x: expected numbers"):
        _bench_requests._numbers("1,x")
