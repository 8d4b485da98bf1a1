"""Low-rank adapters in PEFT's file format: adapter_config.json, adapter_model.safetensors.

    base_model.model.model.layers.3.self_attn.q_proj.lora_A.weight    A [r, in]
    base_model.model.model.layers.3.self_attn.q_proj.lora_B.weight    B [out, r]

Adapters may belong to the matrices of attention and, in a model without routed experts, of feed-forwards. transformers
holds routed experts fused, and PEFT takes the name of a feed-forward's matrix in such a model for all of them; so there
no feed-forward has adapters. Neither have embedding, head, routers and multi-token prediction. V4's matrices have the
names of transformers here, with a pattern for PEFT, for its compressors and indexers have matrices of the same names.
Its grouped output projection (wo_a) takes none: PEFT multiplies with that as with a matrix that has no groups.

Source: PEFT 0.21, `peft.LoraConfig`.
"""

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from deepseek_jax.convert import names, safetensors
from deepseek_jax.convert.hf import Get
from deepseek_jax.errors import UserError
from deepseek_jax.files import write_atomically
from deepseek_jax.layers.base import Tree
from deepseek_jax.layers.lora import ADAPTERS, Lora, Target
from deepseek_jax.tree import size

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX, SIDES = "base_model.model.", {"down": "lora_A", "up": "lora_B"}
ALL = "all-linear"
LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)\.weight$")
ATTENTION = re.compile(r"self_attn\.(\w+_proj|kv_a_proj_with_mqa)$")
ALL_OF_DENSE = re.compile(rf"mlp\.\w+_proj$|{ATTENTION.pattern}")
# V4's own names of matrices, and those of transformers
OWN_LAYER = re.compile(r"layers\.(\d+)\.attn\.(wq_a|wq_b|wkv|wo_b)\.weight$")
OWN = {"wq_a": "q_a_proj", "wq_b": "q_b_proj", "wkv": "kv_proj", "wo_b": "o_b_proj"}
SAVED = re.compile(rf"{re.escape(PREFIX)}(model\.layers\.\d+\.(?:.+\.)?(\w+))\.(lora_A|lora_B)\.weight$")
# What adapter_config.json says of adapters of this kind. Any other key that is set is of another kind, but for `ANY`.
PLAIN: dict[str, tuple] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    # Others, such as pissa and olora, change the weights that the adapters stand beside.
    "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal"),
}
UNSET: tuple = (None, False, "", [], {})
ANY = {"r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"}
ANY |= {"base_model_name_or_path", "task_type", "inference_mode", "revision", "auto_mapping", "peft_version"}
ANY |= {"megatron_config", "megatron_core", "runtime_config", "eva_config", "loftq_config", "qalora_group_size"}


def lora(shapes: Tree, rank: int, alpha: float, chosen: str) -> Lora:
    """Returns the adapters of a model.

    Args:
        shapes: {"params", "router_bias"} of anything with a shape.
        rank, alpha: of all adapters.
        chosen: last parts of the names of matrices, with commas between ("q_proj,v_proj"), or "all-linear".

    Raises UserError for a name that none of the matrices has, and for a model whose matrices take none.
    """
    found: dict[tuple, list[Target]] = {}
    known: set[str] = set()
    words = {word.strip() for word in chosen.split(",")}
    for block, name, tensor in _matrices(shapes):
        known.add(name.rpartition(".")[2])
        if tensor.places[0][1] == (0,) and (chosen == ALL or name.rpartition(".")[2] in words):
            found.setdefault(block, []).append(_target(name, tensor, len(block)))
    if not known:
        raise UserError(
            f"lora.rank={rank}: no matrix of this model takes adapters, which are for those published under names such "
            "as model.layers.0.self_attn.o_proj. Train all weights: lora.rank=0."
        )
    if unknown := sorted(words - known) if chosen != ALL else []:
        raise UserError(
            f"lora.targets={chosen}: this model has no matrix {unknown[0]} that takes adapters. Give {ALL}, or some of "
            f"{', '.join(sorted(known))}, with commas between. Beside routed experts, only attention takes adapters."
        )
    return Lora(rank, alpha, tuple((block, tuple(targets)) for block, targets in found.items()))


def _matrices(shapes: Tree) -> Iterator[tuple[tuple[str, ...], str, names.Tensor]]:
    """Yields (path of its block, name in its layer, tensor) of every matrix that takes adapters."""
    blocks = {block for block, _ in names.layers(names.flatten(shapes))}
    tensors = list(names.tensors(shapes))
    has_experts = any(len(tensor.places[0][1]) > 1 for tensor in tensors)
    for tensor in (tensor._replace(name=_known_as(tensor.name)) for tensor in tensors):
        layer = LAYER.match(tensor.name)
        path, index = tensor.places[0]
        if layer and (ATTENTION if has_experts else ALL_OF_DENSE).match(layer[2]) and len(index) == 1:
            yield next(path[1:n] for n in range(2, len(path)) if path[1:n] in blocks), layer[2], tensor


def _known_as(name: str) -> str:
    """Returns what transformers calls a matrix of V4's attention; other names are as published."""
    own = OWN_LAYER.match(name)
    return f"model.layers.{own[1]}.self_attn.{OWN[own[2]]}.weight" if own else name


def _target(name: str, tensor: names.Tensor, depth: int) -> Target:
    """Returns the target of a tensor whose block is at a path of this many keys."""
    return Target(
        name=name.replace(".", "_"),
        shape=(tensor.shape[0], tensor.shape[1]),
        weights=tuple(path[1 + depth :] for path, _ in tensor.places),
        theirs=tensor.theirs,
        ours=tensor.ours,
        sizes=tuple(sorted(tensor.sizes.items())),
        cut=tensor.cut,
    )


def _adapters(shapes: Tree, found: Lora) -> Iterator[tuple[str, tuple[str, ...], int]]:
    """Yields (published name of its matrix, path of its two weights, layer in them) of every adapter of every layer."""
    adapted = {(block, target.name) for block, targets in found.blocks for target in targets}
    for block, name, tensor in _matrices(shapes):
        if (block, name.replace(".", "_")) in adapted:
            place = (*block, ADAPTERS, name.replace(".", "_"))
            yield tensor.name.removesuffix(".weight"), place, tensor.places[0][1][0]


def write(directory: str | os.PathLike, base: str, shapes: Tree, found: Lora, get: Any) -> None:
    """Writes adapters as PEFT does, in float32.

    Args:
        directory: to write, without weights yet.
        base: name of the model that they belong to, or its directory.
        shapes: {"params", "router_bias"} of that model, anything with a shape.
        found: the adapters.
        get: `get(path below params, layer)` returns a layer of an array.

    Raises UserError if the directory holds weights or cannot be written.
    """
    entries, adapted = [], list(_adapters(shapes, found))
    targets = {(block, target.name): target for block, targets in found.blocks for target in targets}
    for name, place, layer in adapted:
        for side, shape in targets[place[:-2], place[-1]].sides(found.rank).items():

            def make(place: tuple = (*place, side), layer: int = layer) -> np.ndarray:
                return np.asarray(get(place, layer), np.float32).T

            entries.append(safetensors.Entry(f"{PREFIX}{name}.{SIDES[side]}.weight", shape[::-1], "F32", make))
    config = {
        "base_model_name_or_path": base,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": found.alpha,
        "lora_dropout": 0.0,
        "peft_type": "LORA",
        "r": found.rank,
        "target_modules": _pattern(shapes, sorted({name.rpartition(".")[2] for name, _, _ in adapted})),
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": False,
    }
    n_bytes = 4 * size(entries)
    safetensors.write_directory(directory, entries, n_bytes, WEIGHTS)
    write_atomically(Path(directory) / CONFIG, (json.dumps(config, indent=2) + "\n").encode())


def _pattern(shapes: Tree, ends: list[str]) -> list[str] | str:
    """Returns how PEFT finds matrices by the ends of their names; V4 has others with the same ends, so by a pattern."""
    return ends if names.spelling(shapes) is not names.V4 else rf".*\.self_attn\.({'|'.join(ends)})"


def settings(directory: str | os.PathLike) -> dict[str, Any]:
    """Returns the `rank`, `alpha` and `targets` of a directory of adapters.

    Raises UserError if it is none, or the adapters are of another kind.
    """
    path = Path(directory).expanduser() / CONFIG
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}). Give a directory that PEFT has written.") from error
    if not isinstance(said, dict):
        raise UserError(f"{path} holds no settings of adapters. Give a directory that PEFT has written.")
    for key in sorted(said.keys() - ANY):
        if said[key] not in PLAIN.get(key, UNSET):
            expected = repr(PLAIN[key][0]) if key in PLAIN else "it unset"
            raise UserError(
                f"{path}: {key}={said[key]!r}, expected {expected}. Adapters of other kinds are not supported."
            )
    rank, alpha = said.get("r"), said.get("lora_alpha")
    if not isinstance(rank, int) or rank < 1 or not isinstance(alpha, int | float):
        raise UserError(f"{path}: r={rank!r} and lora_alpha={alpha!r}, expected a rank from 1 on and a number.")
    ends = {_parsed(name, path)[1] for name in _open(directory).names()}
    return {"rank": rank, "alpha": float(alpha), "targets": ",".join(sorted(ends))}


def read(directory: str | os.PathLike, shapes: Tree, found: Lora) -> dict[tuple[str, ...], np.ndarray]:
    """Returns path below params -> float32 array of all layers, for the adapters of a directory.

    Raises UserError unless they are those of `found`.
    """
    tensors = _open(directory)
    left = set(tensors.names())
    layers: dict[tuple[str, ...], dict[int, np.ndarray]] = {}
    for name, place, layer in _adapters(shapes, found):
        for side, theirs in SIDES.items():
            key = f"{PREFIX}{name}.{theirs}.weight"
            if key not in tensors:
                raise UserError(f"{directory}: {key} is missing. Adapters must be in every layer of a stack.")
            left.remove(key)
            layers.setdefault((*place, side), {})[layer] = tensors.read(key).astype(np.float32).T
    if left:
        raise UserError(f"{directory}: {min(left)} belongs to no matrix of this model that takes adapters.")
    arrays = {path: np.stack([by_layer[n] for n in sorted(by_layer)]) for path, by_layer in layers.items()}
    _check_shapes(directory, arrays, found)
    return arrays


def _check_shapes(directory: str | os.PathLike, arrays: dict, found: Lora) -> None:
    """Raises UserError for an array of another shape than its adapter's."""
    for block, targets in found.blocks:
        for target in targets:
            for side, shape in target.sides(found.rank).items():
                given = arrays[*block, ADAPTERS, target.name, side].shape[1:]
                if given != shape:
                    raise UserError(
                        f"{directory}: {SIDES[side]} of {target.name} is {list(given[::-1])}, expected "
                        f"{list(shape[::-1])} for this model and rank. The adapters are those of another model."
                    )


def merging(get: Get, found: Lora) -> Get:
    """Returns the `get` of `hf.write` for a model with adapters: pieces with what the adapters have learnt."""
    at = {
        ("params", *block, *path): (block, target, part)
        for block, targets in found.blocks
        for target in targets
        for part, path in enumerate(target.weights)
    }

    def merged(path: names.Path, index: names.Index) -> np.ndarray:
        piece = get(path, index)
        if path not in at:
            return piece
        block, target, part = at[path]
        down, up = (get(("params", *block, ADAPTERS, target.name, side), index) for side in SIDES)
        update = target.parts(np.float32(found.scale) * (up.T @ down.T))[part]
        return (piece.astype(np.float32) + update).astype(piece.dtype)

    return merged


def _open(directory: str | os.PathLike) -> safetensors.Tensors:
    return safetensors.Tensors(Path(directory).expanduser(), {WEIGHTS: None})


def _parsed(name: str, path: Path) -> tuple[str, str]:
    """Returns the (module, last part of its name) of a tensor of an adapter."""
    match = SAVED.match(name)
    if not match:
        raise UserError(f"{path.parent}: {name} belongs to no adapter. Expected {PREFIX}….lora_A.weight.")
    return match[1], match[2]
