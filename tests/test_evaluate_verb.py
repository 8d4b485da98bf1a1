"""What deepseek-jax evaluate says where something is missing; its figures are tested beside the server's clients."""

import pytest

from deepseek_jax import cli


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--from=x"], "expected --tasks=NAME"),
        (["--from=x", "--tasks=piqa", "--problems=sums"], "or --problems=SOURCE: one of them"),
        (["--problems=sums"], "expected --from=DIR for published weights"),
        (["--url=x", "--problems=sums"], "--url beside --problems: expected --from=DIR or --workdir=RUN"),
        (["--from=x", "--tasks=piqa", "--url=y"], "--url beside --from or --workdir"),
        (["--tasks=piqa"], "expected --from=DIR for published weights"),
    ],
)
def test_what_is_missing_is_said(capsys, words, message):
    assert cli.main(["evaluate", *words]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # of lm-eval and what it imports
def test_an_unknown_task_is_said(capsys):
    pytest.importorskip("lm_eval", reason="lm-eval is not installed (extra evaluate)")
    assert cli.main(["evaluate", "--from=x", "--tasks=piqa,no_task_of_this_name"]) == 2
    assert "lm-eval has no no_task_of_this_name" in capsys.readouterr().err
