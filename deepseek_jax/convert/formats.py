"""Directories that are not a published model we can read: what they contain, and what to do.

Only file names are examined, and the small JSON files that describe an adapter or a low-bit format.
"""

import fnmatch
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deepseek_jax.convert import safetensors
from deepseek_jax.errors import UserError
from deepseek_jax.paths import check_local

CONFIG, ADAPTER = "config.json", "adapter_config.json"
NEEDED = f"a directory with {CONFIG} and safetensors files"
ORIGINAL = f"Give the original model instead, {NEEDED}."
PICKLED = (
    "Opening a pickle can run arbitrary code, so it is not read: load it in transformers and call save_pretrained, "
    "which writes safetensors."
)
# The first pattern that matches a name decides.
FORMATS = (
    (ADAPTER, ""),
    ("*.gguf", f"a GGUF file, the format of llama.cpp, which stores weights in other blocks. {ORIGINAL}"),
    ("params.json", f"a model in its makers' own layout (params.json). Convert it to {NEEDED}."),
    ("model_index.json", "an image pipeline of diffusers. This project runs language models."),
    *((name, f"weights pickled by PyTorch. {PICKLED}") for name in ("pytorch_model*.bin", "*.pth", "*.pt", "*.ckpt")),
    ("*.bin", f"weights pickled by PyTorch, or in an unknown format. {PICKLED}"),
    ("*.onnx", f"an ONNX graph. {ORIGINAL}"),
    ("*.h5", f"weights of TensorFlow. {ORIGINAL}"),
    ("*.msgpack", f"weights of Flax as transformers used to store them. {ORIGINAL}"),
    ("*.npz", f"arrays of numpy or MLX. {ORIGINAL}"),
    ("*.mlpackage", f"a model for Core ML. {ORIGINAL}"),
    ("*.engine", f"an engine of TensorRT. {ORIGINAL}"),
)
# quant_method of config.json -> name.
FEW_BITS = {
    "awq": "AWQ",
    "gptq": "GPTQ",
    "bitsandbytes": "bitsandbytes",
    "compressed-tensors": "compressed-tensors, vLLM's",
    "mxfp4": "MXFP4",
    "hqq": "HQQ",
    "quanto": "Quanto",
    "aqlm": "AQLM",
    "torchao": "torchao",
    "modelopt": "NVIDIA's ModelOpt",
}


def check_path(path: str | os.PathLike) -> None:
    """Raises UserError if a path is something known other than a directory of published weights or of a run."""
    check_local(path)
    path = Path(path)
    if path.is_file():
        known = _first([path.name])
        inside = f"Give its directory, {path.parent}." if path.suffix == ".safetensors" or path.name == CONFIG else ""
        raise UserError(f"{path}: {known or inside or f'a file. Give {NEEDED}.'}")
    if not path.is_dir() or (path / CONFIG).is_file() or (path / "checkpoints").is_dir():
        return
    if (path / "snapshots").is_dir() and (path / "blobs").is_dir():
        found = sorted(os.listdir(path / "snapshots"))
        hint = f"Give {path / 'snapshots' / found[-1]}." if found else "It is still empty."
        raise UserError(f"{path}: a folder of the hub's cache, whose models are in snapshots/. {hint}")
    if text := describe(sorted(os.listdir(path)), path):
        raise UserError(f"{path}: {text}")


def describe(names: list[str], folder: Path) -> str:
    """Returns what files with these names are, if there is no config.json; "" if that is not known.

    Of an adapter the file that describes it is read, if `folder` has it.
    """
    if ADAPTER not in names:
        return _first(names)
    adapter = safetensors.read_json(folder / ADAPTER) if (folder / ADAPTER).is_file() else {}
    kind, base = adapter.get("peft_type") or "LoRA", adapter.get("base_model_name_or_path")
    base = f" of {base}" if isinstance(base, str) and base else ""
    return (
        f"an adapter ({str(kind)[:40]}){base[:200]}, not a model on its own. Merge it with its model in peft: "
        "AutoPeftModelForCausalLM.from_pretrained(…).merge_and_unload().save_pretrained(…), and give the result."
    )


def check_bits(config: Mapping[str, Any]) -> None:
    """Raises UserError for a config.json whose weights are in a low-bit format other than DeepSeek's FP8."""
    if isinstance(found := config.get("quantization"), dict) and "bits" in found:
        bits = str(found["bits"])[:9]
        raise UserError(f"{CONFIG}: quantization: MLX weights in {bits} bits, which are not supported. {ORIGINAL}")
    found = config.get("quantization_config")
    method = found.get("quant_method") if isinstance(found, dict) else None
    if isinstance(found, dict) and isinstance(method, str) and method in FEW_BITS:
        n_bits = found.get("bits") or found.get("w_bit")
        bits = f" in {n_bits} bits" if isinstance(n_bits, int) else ""
        given = f"quantization_config.quant_method={method!r}: {FEW_BITS[method]} weights{bits}"
        raise UserError(f"{CONFIG}: {given}, which are not supported. {ORIGINAL}")


def _first(names: list[str]) -> str:
    for pattern, text in FORMATS[1:]:
        if found := sorted(fnmatch.filter(names, pattern)):
            return f"{found[0]} is {text}" if len(names) > 1 else text
    return ""
