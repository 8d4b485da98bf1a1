"""What stands in a directory that is no published model this project reads: named as what it is, with what to do.

Only names of files are looked at, and the small JSON files that describe an adapter or a way of storing few bits.
"""

import fnmatch
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from deepseek_jax.convert import safetensors
from deepseek_jax.errors import UserError
from deepseek_jax.paths import check_local

CONFIG, ADAPTER = "config.json", "adapter_config.json"
NEEDED = f"a directory with {CONFIG} and safetensors files"
ORIGINAL = f"Give the original model instead, {NEEDED}."
PICKLED = (
    "Pickles can run any code when they are opened, so they are not: let transformers load it and save_pretrained it, "
    "which writes safetensors."
)
# The first pattern that some name matches decides.
FORMATS = (
    (ADAPTER, ""),
    ("*.gguf", f"a GGUF file, the format of llama.cpp, whose weights are stored in other blocks. {ORIGINAL}"),
    (
        "params.json",
        f"a model in the layout of its makers (params.json). Convert it: {NEEDED} is read.",
    ),
    ("model_index.json", "a pipeline of diffusers, which makes pictures. This project runs language models."),
    ("pytorch_model*.bin", f"weights pickled by PyTorch. {PICKLED}"),
    ("*.pth", f"weights pickled by PyTorch. {PICKLED}"),
    ("*.pt", f"weights pickled by PyTorch. {PICKLED}"),
    ("*.ckpt", f"weights pickled by PyTorch. {PICKLED}"),
    ("*.bin", f"weights pickled by PyTorch, or in a format unknown here. {PICKLED}"),
    ("*.onnx", f"an ONNX graph. {ORIGINAL}"),
    ("*.h5", f"weights of TensorFlow. {ORIGINAL}"),
    ("*.msgpack", f"weights of Flax as transformers used to store them. {ORIGINAL}"),
    ("*.npz", f"arrays of numpy or MLX. {ORIGINAL}"),
    ("*.mlpackage", f"a model for Core ML. {ORIGINAL}"),
    ("*.engine", f"an engine of TensorRT. {ORIGINAL}"),
)
# quant_method of config.json -> what it is.
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
    """Raises UserError if a path leads to something known that is no directory of published weights or of a run."""
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
        hint = f"Give {path / 'snapshots' / found[-1]}." if found else "Nothing is in it yet."
        raise UserError(f"{path}: a folder of the hub's cache, whose models are in snapshots/. {hint}")
    adapter = path / ADAPTER
    names = sorted(os.listdir(path))
    if said := describe(names, safetensors.read_json(adapter) if adapter.is_file() else {}):
        raise UserError(f"{path}: {said}")


def describe(names: Iterable[str], adapter: Mapping[str, Any]) -> str:
    """What files of these names are, without a config.json beside them; "" if that is not known.

    Args:
        names: of the files.
        adapter: what adapter_config.json says, {} if there is none.
    """
    names = list(names)
    if ADAPTER not in names:
        return _first(names)
    kind, base = adapter.get("peft_type") or "LoRA", adapter.get("base_model_name_or_path")
    base = f" of {base}" if isinstance(base, str) and base else ""
    return (
        f"an adapter ({str(kind)[:40]}){base[:200]}, which is no model by itself. Merge it with its model, with peft: "
        "AutoPeftModelForCausalLM.from_pretrained(…).merge_and_unload().save_pretrained(…), and give the result."
    )


def check_bits(config: Mapping[str, Any]) -> None:
    """Raises UserError for a config.json whose weights are stored in a way other than DeepSeek's FP8."""
    if isinstance(found := config.get("quantization"), dict) and "bits" in found:
        raise UserError(f"{CONFIG}: quantization: weights of MLX in {str(found['bits'])[:9]} bits. {ORIGINAL}")
    found = config.get("quantization_config")
    method = found.get("quant_method") if isinstance(found, dict) else None
    if isinstance(method, str) and method in FEW_BITS:
        bits = found.get("bits") or found.get("w_bit")
        bits = f" in {bits} bits" if isinstance(bits, int) else ""
        said = f"quantization_config.quant_method={method!r}: weights stored by {FEW_BITS[method]}{bits}"
        raise UserError(f"{CONFIG}: {said}, which is not read here. {ORIGINAL}")


def _first(names: list[str]) -> str:
    for pattern, said in FORMATS[1:]:
        if found := sorted(fnmatch.filter(names, pattern)):
            return f"{found[0]} is {said}" if len(names) > 1 else said
    return ""
