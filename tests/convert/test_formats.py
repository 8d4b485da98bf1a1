"""Models in other formats are named, with what to do, wherever they are given."""

import json
import shutil
from pathlib import Path

import pytest

import deepseek_jax
from deepseek_jax.convert import formats
from deepseek_jax.convert.hf_config import from_hf
from deepseek_jax.errors import UserError
from deepseek_jax.launch import convert, inspect

GOLDEN = Path(__file__).parent.parent / "golden"
LORA = {"peft_type": "LORA", "base_model_name_or_path": "deepseek-ai/deepseek-llm-7b-base"}

FOLDERS = [
    ({"adapter_config.json": LORA, "adapter_model.safetensors": ""}, r"an adapter \(LORA\) of deepseek-ai.*merge"),
    ({"adapter_config.json": {}, "adapter_model.bin": ""}, r"an adapter \(LoRA\), not a model on its own"),
    ({"model-q4_k_m.gguf": "GGUF", "README.md": ""}, "model-q4_k_m.gguf is a GGUF file"),
    ({"params.json": {}, "consolidated.00.pth": "", "tokenizer.model": ""}, "makers' own layout"),
    ({"pytorch_model-00001-of-00002.bin": "", "tokenizer.json": {}}, "pickled by PyTorch.*save_pretrained"),
    ({"model.pth": ""}, "pickled by PyTorch"),
    ({"checkpoint.pt": "", "notes.txt": ""}, "pickled by PyTorch"),
    ({"model.onnx": "", "tokenizer.json": {}}, "ONNX"),
    ({"model_index.json": {}, "unet.txt": ""}, "diffusers"),
    ({"weights.npz": ""}, "numpy or MLX"),
    ({"tf_model.h5": "", "vocab.txt": ""}, "TensorFlow"),
    ({"blobs/0": "", "snapshots/abc/config.json": {}}, "the hub's cache.*Give .*abc"),
]


def made(folder: Path, files: dict) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


@pytest.mark.parametrize(("files", "said"), FOLDERS)
def test_a_folder_is_named_as_what_it_is(tmp_path, files, said):
    folder = made(tmp_path / "model", files)
    for ask in (
        lambda: deepseek_jax.load(folder),
        lambda: convert.main([f"--from={folder}", f"--workdir={tmp_path / 'run'}"]),
        lambda: inspect.main([f"--config={folder}"]),
    ):
        with pytest.raises(UserError, match=said) as error:
            ask()
        assert str(folder) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("model.gguf", "a GGUF file"),
        ("model.safetensors", "Give its directory"),
        ("config.json", "Give its directory"),
        ("pytorch_model.bin", "pickled"),
        ("model.pth", "pickled"),
        ("notes.txt", "a file. Give a directory with config.json and safetensors"),
    ],
)
def test_a_file_is_named_as_what_it_is(tmp_path, name, said):
    made(tmp_path, {name: ""})
    with pytest.raises(UserError, match=said):
        deepseek_jax.load(tmp_path / name)
    with pytest.raises(UserError, match=said):
        convert.main([f"--from={tmp_path / name}", f"--workdir={tmp_path / 'run'}"])


@pytest.mark.parametrize(
    ("added", "said"),
    [
        ({"quantization_config": {"quant_method": "awq", "bits": 4}}, "AWQ weights in 4 bits"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 8}}, "GPTQ weights in 8 bits"),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "bitsandbytes weights, which are not supported"),
        ({"quantization_config": {"quant_method": "compressed-tensors"}}, "vLLM's"),
        ({"quantization": {"group_size": 64, "bits": 4}}, "MLX weights in 4 bits"),
        ({"quantization_config": {"quant_method": "unheard-of"}}, "quantization_config.quant_method='unheard-of'"),
    ],
)
def test_weights_of_few_bits_are_named(added, said):
    config = json.loads((GOLDEN / "llm" / "config.json").read_text())
    with pytest.raises(UserError, match=said):
        from_hf(config | added)


def test_what_is_ours_is_left_alone(tmp_path):
    shutil.copytree(GOLDEN / "llm", tmp_path / "with_more")
    made(tmp_path / "with_more", {"adapter_config.json": LORA, "model.gguf": "", "pytorch_model.bin": ""})
    for path in (GOLDEN / "llm", tmp_path / "with_more", tmp_path / "nowhere", made(tmp_path / "a", {"notes.txt": ""})):
        formats.check_path(path)
