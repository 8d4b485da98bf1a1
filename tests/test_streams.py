"""Broken output: what is written is dropped, nothing is raised, and no file takes the place of a closed stream."""

import io
import os
import subprocess
import sys

import pytest

from deepseek_jax import streams


def broken_pipe() -> io.TextIOWrapper:
    """A stream whose reader has gone."""
    reader, writer = os.pipe()
    os.close(reader)
    return os.fdopen(writer, "w", encoding="utf-8")


def closed() -> io.StringIO:
    stream = io.StringIO()
    stream.close()
    return stream


@pytest.mark.parametrize("make", [broken_pipe, closed, lambda: open("/dev/full", "w"), lambda: None])
def test_writing_never_raises(make, monkeypatch):
    monkeypatch.setattr(sys, "stdout", make())
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with streams.forgiving():
        for _ in range(3):
            print("a line", flush=True)
            print("x" * 100_000)
            sys.stdout.flush()
    assert not isinstance(sys.stdout, streams.Forgiving)
    if sys.stdout is not None and not sys.stdout.closed:
        sys.stdout.close()  # what it held has been given up


def test_a_stream_of_few_characters_gets_what_it_can():
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    streams.Forgiving(stream).write("loss ▁█\n")
    stream.flush()
    assert stream.buffer.getvalue() == b"loss ??\n"


def test_a_sound_stream_is_as_before(capsys):
    with streams.forgiving():
        print("said")
        assert sys.stdout.encoding.lower() == "utf-8"
    assert capsys.readouterr().out == "said\n"


def test_closed_descriptors_are_taken_before_a_file_can_take_them(tmp_path):
    """Native code prints to descriptors 1 and 2, whatever file has been opened there."""
    script = (
        "from deepseek_jax import cli\nimport os\n"
        "code = cli.main(['--version'])\n"
        f"file = open({str(tmp_path / 'data')!r}, 'w')\nassert file.fileno() > 2, file.fileno()\n"
        "os.write(1, b'noise')\nos.write(2, b'noise')\nraise SystemExit(code)\n"
    )
    (tmp_path / "script.py").write_text(script)
    done = subprocess.run(["bash", "-c", f"{sys.executable} {tmp_path / 'script.py'} <&- >&- 2>&-"])
    assert done.returncode == 0
    assert (tmp_path / "data").read_bytes() == b""


def test_a_verb_whose_reader_has_gone_ends_quietly():
    command = f"({sys.executable} -m deepseek_jax --help; echo code $? >&2) | true"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert done.stderr in ("code 0\n", "code 1\n")


def test_what_a_model_prints_moves_no_cursor():
    assert streams.printable("a\x1b[2J\tb\n\x9bc\r") == "a\ufffd[2J\tb\n\ufffdc\ufffd"
