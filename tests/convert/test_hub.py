"""Models of the hub by their ids: against a hub on loopback, in processes of their own (the library reads its settings
when it is imported)."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from deepseek_jax.convert import hub as hubs
from deepseek_jax.errors import UserError

GOLDEN = Path(__file__).parent.parent / "golden"
_spec = importlib.util.spec_from_file_location("hub_server", Path(__file__).with_name("hub_server.py"))
hub_server = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(hub_server)

# Prints a JSON line per argument: the files of that model, or the message for the user.
CLIENT = """
import json, os, sys
from huggingface_hub import constants
from deepseek_jax.convert import hub
from deepseek_jax.errors import UserError
constants.DOWNLOAD_CHUNK_SIZE = 1000
for word in sys.argv[1:]:
    name, _, small = word.partition("?")
    try:
        found = hub.local(name, weights=not small)
        print(json.dumps({file: (found / file).stat().st_size for file in sorted(os.listdir(found))}))
    except UserError as error:
        print(json.dumps(str(error)))
"""


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub")
    shutil.copytree(GOLDEN / "llm", folder / "llm")
    (folder / "llm" / "onnx").mkdir()
    for name in ("pytorch_model.bin", "README.md", "onnx/config.json", "model.gguf"):
        (folder / "llm" / name).write_bytes(b"not to be fetched")
    (folder / "llm" / "tokenizer_config.json").write_text("{}")
    for name, files in {
        "lora": {"adapter_config.json": '{"peft_type": "LORA", "base_model_name_or_path": "who/what"}'},
        "gguf": {"model-q4.gguf": "GGUF", "README.md": ""},
        "bert": {"config.json": '{"model_type": "bert"}', "model.safetensors": "never fetched"},
    }.items():
        (folder / name).mkdir()
        for file, content in files.items():
            (folder / name / file).write_text(content)
    with hub_server.Hub() as server:
        server.repositories |= {f"some/{path.name}": path for path in folder.iterdir()}
        server.statuses |= {"some/gated": (403, "GatedRepo"), "some/asked": (401, "GatedRepo")}
        server.statuses |= {"some/missing": (404, "RepoNotFound"), "some/down": (503, ""), "some/denied": (403, "")}
        yield server


@pytest.fixture
def client(hub, tmp_path):
    """A function that asks for models in its own process, and returns a result per argument."""

    def ask(*words: str, **environment: str) -> list:
        settings = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "JAX_PLATFORMS": "cpu"} | environment
        own = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "TRANSFORMERS_"))}
        found = subprocess.run(
            [sys.executable, "-c", CLIENT, *words],
            env=own | settings,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert found.returncode == 0, found.stderr
        return [json.loads(line) for line in found.stdout.splitlines()]

    return ask


SIZES = {name: (GOLDEN / "llm" / name).stat().st_size for name in ("config.json", "model.safetensors")}
WHOLE = SIZES | {"tokenizer_config.json": 2}


@pytest.mark.slow
def test_an_id_is_downloaded_once_resumed_and_then_there_without_a_connection(hub, client):
    hub.cut["model.safetensors"] = 2
    hub.sent.clear()
    small, whole, again = client("some/llm?small", "some/llm", "some/llm@main")
    assert "model.safetensors" not in small and "config.json" in small
    assert whole == again == WHOLE
    assert "pytorch_model.bin" not in hub.sent and "model.gguf" not in hub.sent
    # what was written before a connection broke is not sent again
    assert SIZES["model.safetensors"] <= hub.sent["model.safetensors"] <= SIZES["model.safetensors"] + 2 * 1000
    asked = len(hub.asked)
    assert client("some/llm", HF_HUB_OFFLINE="1") == [WHOLE]
    assert client("some/llm", HF_ENDPOINT="http://127.0.0.1:9") == [WHOLE]
    assert len(hub.asked) == asked
    assert client("some/llm")[0] == WHOLE and hub.sent["config.json"] == SIZES["config.json"]


def test_a_failed_download_is_reported_in_a_line_with_what_to_do(hub, client):
    hub.sent.clear()
    words = ("gated", "asked", "denied", "missing", "unheard-of", "down", "lora", "gguf", "bert")
    lines = dict(zip(words, client(*(f"some/{word}" for word in words)), strict=True))
    assert all(isinstance(line, str) and "\n" not in line and len(line) < 420 for line in lines.values()), lines
    for word in ("gated", "asked", "denied"):
        assert (
            f"on request only: request access on {hub.url}/some/{word}, then log in with hf auth login" in lines[word]
        )
    for word in ("missing", "unheard-of"):
        assert lines[word].startswith(f"some/{word}: no such directory here, and {hub.url} has no model of that name")
    assert "answers with status 503. Try again later" in lines["down"]
    assert "an adapter (LORA) of who/what" in lines["lora"] and "model-q4.gguf is a GGUF file" in lines["gguf"]
    assert "model_type='bert'" in lines["bert"] and "model.safetensors" not in hub.sent


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE is set and .* does not contain all of it"),
        ({"HF_ENDPOINT": "http://127.0.0.1:9"}, "http://127.0.0.1:9 cannot be reached .*refused.*Check the connection"),
    ],
)
def test_a_missing_connection_is_reported(client, settings, said):
    (line,) = client("some/llm", **settings)
    assert re.search(said, line) and "hf download some/llm --local-dir=DIR" in line


def test_only_owner_and_name_that_are_no_path_are_an_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here" / "model").mkdir(parents=True)
    (tmp_path / "here" / "dead").symlink_to("nowhere")
    for name in ("deepseek-ai/DeepSeek-V2-Lite", "a/b", "a/b@v1.0", "here/other"):
        assert hubs.is_id(name) and hubs.is_id(Path(name))
    for name in (
        "here/model",
        "here/dead",
        "DeepSeek-V2-Lite",
        "/a/b",
        "a/b/c",
        "./a",
        "../a",
        "~/a",
        "a/",
        "a/b@",
        "",
    ):
        assert not hubs.is_id(name)
    assert hubs.local("here/model") == Path("here/model")


def test_a_disk_too_small_is_lines_before_the_weights_are_fetched(tmp_path, monkeypatch):
    directory = tmp_path / "models--a--b" / "snapshots" / "0"
    directory.mkdir(parents=True)
    index = {"metadata": {"total_size": 10**12}, "weight_map": {}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(hubs.shutil, "disk_usage", lambda _: usage._replace(free=10**9))
    with pytest.raises(UserError, match=r"a/b: 1,000.1 GB to download, 1.0 GB free"):
        hubs._check_space("a/b", directory)
