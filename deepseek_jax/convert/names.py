"""Which published tensor becomes which of our weights: one table, read in both directions.

A rule gives the axes of the published tensor; the axes of ours are the letters at the end of its name. So

    "self_attn.q_b_proj.weight", "(H Q) R", "attention.q_up_RHQ"

says that the rows of q_b_proj run over heads, then over a head's width, and that our array has the axes R, H, Q. If
one tensor holds two of our weights side by side, a bar separates the two on the axis along which they are joined:

    "self_attn.kv_b_proj.weight", "(H N|U) C", "attention.k_up_CHN", "attention.v_up_CHU"

An axis that only our weight has numbers published tensors: X counts the experts, which are published one by one. The
layers of a stack are numbered too, on a leading axis that names do not show; where a stack repeats a group of different
blocks, its axis counts the repeats, and each layer is a block of the group. `deepseek_jax.shapes` explains the letters.

No family is named here: a rule applies to every model that has its weights.
Source of the published names: the config and index files of the releases, and DeepSeek-V3's inference/convert.py.
"""

import math
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from einops import rearrange

from deepseek_jax.tree import paths

Path = tuple[str, ...]  # where a weight is in a tree: ("params", "moe_blocks", "attention", "k_up_CHN")
Index = tuple[int, ...]  # position of a piece in it: (), (layer,) or (layer, expert)


class Rule(NamedTuple):
    """One line of the table, with its axes parsed."""

    theirs: str  # published name after the prefix of its layer; "{X}" in it numbers the experts
    ours: tuple[str, ...]  # names of our weights in it: two if an axis holds both side by side
    dimensions: tuple[tuple[str, ...], ...]  # axes of each published dimension, such as (("H", "N|U"), ("C",))
    letters: tuple[tuple[str, ...], ...]  # axes of each of our weights, "X" included
    joint: str | None  # the axis on which two weights are side by side, such as "N|U"; None for a single weight

    @property
    def whole(self) -> tuple[str, ...]:
        """Axes of our weights before they are cut apart, without "X"."""
        letters = [letter for letter in self.letters[0] if letter != "X"]
        return tuple(self.joint if self.joint and letter == self.joint[0] else letter for letter in letters)

    def sizes(self, shapes: Sequence[tuple[int, ...]]) -> dict[str, int]:
        """Returns the size of each axis, given the shapes of our weights."""
        sizes: dict[str, int] = {}
        for letters, shape in zip(self.letters, shapes, strict=True):
            sizes |= zip(letters, shape, strict=True)
        return sizes | ({self.joint: sum(sizes[part] for part in self.joint.split("|"))} if self.joint else {})


def _rule(theirs: str, axes: str, *ours: str) -> Rule:
    """Returns a rule; `axes`: of the published tensor, as einops spells them, with "N|U" for two side by side."""
    dimensions = tuple(tuple(text.strip("()").split()) for text in re.findall(r"\(.*?\)|\S+", axes))
    flat = tuple(axis for dimension in dimensions for axis in dimension)
    letters = tuple(tuple(letters_of(name)) or flat for name in ours)
    return Rule(theirs, ours, dimensions, letters, next((axis for axis in flat if "|" in axis), None))


def letters_of(name: str) -> str:
    """Returns the axes of one of our weights, the capitals its name ends in; "" for a gain."""
    suffix = name.rpartition("_")[2]
    return suffix if suffix.isupper() else ""


BEFORE = (_rule("model.embed_tokens.weight", "V D", "embedding.table_VD"),)
AFTER = (
    _rule("model.norm.weight", "D", "final_norm.gain"),
    _rule("lm_head.weight", "V D", "head.weight_DV"),
)

# Names after `model.layers.N.`; the stacks of a model follow each other in the order of STACKS.
STACKS = ("blocks", "dense_blocks", "moe_blocks")
BLOCK = (
    _rule("input_layernorm.weight", "D", "attention_norm.gain"),
    # grouped-query attention (LLM, Coder, Math, MoE-16B, the students of R1)
    _rule("self_attn.q_proj.weight", "(H Q) D", "attention.q_DHQ"),
    _rule("self_attn.k_proj.weight", "(Z Q) D", "attention.k_DZQ"),
    _rule("self_attn.v_proj.weight", "(Z U) D", "attention.v_DZU"),
    _rule("self_attn.q_proj.bias", "(H Q)", "attention.q_bias_HQ"),
    _rule("self_attn.k_proj.bias", "(Z Q)", "attention.k_bias_ZQ"),
    _rule("self_attn.v_proj.bias", "(Z U)", "attention.v_bias_ZU"),
    _rule("self_attn.q_norm.weight", "Q", "attention.q_head_norm.gain"),
    _rule("self_attn.k_norm.weight", "Q", "attention.k_head_norm.gain"),
    # latent attention (V2, V3); V2-Lite and Moonlight use the q_proj above
    _rule("self_attn.q_a_proj.weight", "R D", "attention.q_down_DR"),
    _rule("self_attn.q_a_layernorm.weight", "R", "attention.q_norm.gain"),
    _rule("self_attn.q_b_proj.weight", "(H Q) R", "attention.q_up_RHQ"),
    _rule("self_attn.kv_a_proj_with_mqa.weight", "C|P D", "attention.kv_down_DC", "attention.k_rope_DP"),
    _rule("self_attn.kv_a_layernorm.weight", "C", "attention.kv_norm.gain"),
    _rule("self_attn.kv_b_proj.weight", "(H N|U) C", "attention.k_up_CHN", "attention.v_up_CHU"),
    # and its indexer (V3.2)
    _rule("self_attn.indexer.wq_b.weight", "(H Q) R", "attention.indexer.q_up_RHQ"),
    _rule("self_attn.indexer.wk.weight", "Q D", "attention.indexer.key.down_DQ"),
    _rule("self_attn.indexer.k_norm.weight", "Q", "attention.indexer.key.norm.gain"),
    _rule("self_attn.indexer.k_norm.bias", "Q", "attention.indexer.key.norm.bias"),
    _rule("self_attn.indexer.weights_proj.weight", "H D", "attention.indexer.weight_DH"),
    # both
    _rule("self_attn.o_proj.weight", "D (H U)", "attention.out_HUD"),
    # a dense feed-forward
    _rule("post_attention_layernorm.weight", "D", "mlp_norm.gain"),
    _rule("mlp.gate_proj.weight", "F D", "mlp.gate_DF"),
    _rule("mlp.up_proj.weight", "F D", "mlp.up_DF"),
    _rule("mlp.down_proj.weight", "D F", "mlp.down_FD"),
    # or a mixture of experts
    _rule("post_attention_layernorm.weight", "D", "experts_norm.gain"),
    _rule("mlp.gate.weight", "E D", "experts.router.centroids_DE"),
    _rule("mlp.gate.e_score_correction_bias", "E", "experts.router.bias_E"),
    _rule("mlp.shared_experts.gate_proj.weight", "F D", "experts.shared.gate_DF"),
    _rule("mlp.shared_experts.up_proj.weight", "F D", "experts.shared.up_DF"),
    _rule("mlp.shared_experts.down_proj.weight", "D F", "experts.shared.down_FD"),
    _rule("mlp.experts.{X}.gate_proj.weight", "F D", "experts.gate_XDF"),
    _rule("mlp.experts.{X}.up_proj.weight", "F D", "experts.up_XDF"),
    _rule("mlp.experts.{X}.down_proj.weight", "D F", "experts.down_XFD"),
)

# Multi-token prediction: depth K is `model.layers.N.` with N = number of layers + K, and includes a block.
MTP = (
    _rule("enorm.weight", "D", "embedding_norm.gain"),
    _rule("hnorm.weight", "D", "hidden_norm.gain"),
    _rule("eh_proj.weight", "D Y", "join_YD"),
    *(rule._replace(ours=tuple(f"block.{name}" for name in rule.ours)) for rule in BLOCK),
    _rule("shared_head.norm.weight", "D", "final_norm.gain"),
)
# Copies of the main model's tensors in a layer of multi-token prediction.
COPIES = {"embed_tokens.weight": "model.embed_tokens.weight", "shared_head.head.weight": "lm_head.weight"}

# Found in old files. These are not weights: they follow from the config.
IGNORED = re.compile(r"\.rotary_emb\.inv_freq$")
# What FP8 releases store in FP8: the matrices of blocks except routers and the weights of an indexer's heads (not
# embedding, head, norms and eh_proj).
QUANTIZED = re.compile(
    r"\.(self_attn|mlp)\.(?!indexer\.)(.*\.)?\w+_proj(_with_mqa)?\.weight$|\.indexer\.(wq_b|wk)\.weight$"
)
ROUTER = ".gate.weight"  # end of a router's name
FLOAT32 = re.compile(r"\.e_score_correction_bias$")  # in float32 in every release


class Tensor(NamedTuple):
    """A published tensor and where its parts go."""

    # name, shape: as published
    name: str
    shape: tuple[int, ...]
    places: tuple[tuple[Path, Index], ...]  # (path, index) of each of our weights in it
    # theirs, ours: axes, as einops spells them; "N_U" is an axis on which N and U are side by side
    theirs: str
    ours: str
    sizes: dict[str, int]  # sizes of the axes that share a dimension
    cut: tuple[int, int] | None  # (axis, position) at which ours is split in two; None for a single weight

    def to_ours(self, array: np.ndarray) -> list[np.ndarray]:
        """Returns our weights in a published tensor, as views of it."""
        whole = rearrange(array, f"{self.theirs} -> {self.ours}", **self.sizes)
        return np.split(whole, [self.cut[1]], self.cut[0]) if self.cut else [whole]

    def to_theirs(self, parts: list[np.ndarray]) -> np.ndarray:
        """Returns the published tensor: the inverse of `to_ours`."""
        whole = np.concatenate(parts, self.cut[0]) if self.cut else parts[0]
        return rearrange(whole, f"{self.ours} -> {self.theirs}")


def tensors(shapes: dict) -> Iterator[Tensor]:
    """Yields every published tensor of a model, layer by layer, without copies (see `copies`).

    `shapes`: {"params": tree, "router_bias": tree} of anything with a shape, as from `layers.base.split`.
    """
    flat = flatten(shapes)
    depths: list[tuple[Path, Index]] = [(("mtp", module), ()) for module in mtp_depths(shapes)]
    for rule in BEFORE:
        yield from _apply(rule, flat, "", ())
    for number, (block, index) in enumerate([*layers(flat), *depths]):
        for rule in BLOCK if index else MTP:
            yield from _apply(rule, flat, f"model.layers.{number}.", block, index)
    for rule in AFTER:
        yield from _apply(rule, flat, "", ())


def layers(flat: dict[Path, tuple[int, ...]]) -> Iterator[tuple[Path, Index]]:
    """Yields the main model's layers in the order of running: (path of a block below its root, index in its weights).

    The blocks of a group (`layers.block.Group`) run one after the other, once per repeat of their stack.
    """
    for stack in STACKS:
        repeats = next((shape[0] for path, shape in flat.items() if path[1] == stack), 0)
        group = {path[1:4] for path in flat if path[1:3] == (stack, "blocks")}
        blocks = sorted(group, key=lambda path: int(path[2])) or [(stack,)]
        yield from ((block, (index,)) for index in range(repeats) for block in blocks)


def _apply(rule: Rule, flat: dict[Path, tuple], prefix: str, ours: Path, index: Index = ()) -> Iterator[Tensor]:
    """Yields the tensors of a rule, one per expert if it numbers them; none if the model does not have its weights."""
    ends = [(*ours, *name.split(".")) for name in rule.ours]
    paths = [(root, *end) for end in ends for root in ("params", "router_bias") if (root, *end) in flat]
    if len(paths) < len(ends):
        return
    sizes = rule.sizes([flat[path][len(index) :] for path in paths])
    tensor = _tensor(rule, sizes)
    for piece in [(x,) for x in range(sizes["X"])] if "X" in sizes else [()]:
        name = prefix + rule.theirs.format(X=piece[0] if piece else "")
        yield tensor._replace(name=name, places=tuple((path, index + piece) for path in paths))


def _tensor(rule: Rule, sizes: dict[str, int]) -> Tensor:
    """Returns a rule's tensor with axes of these sizes, without its name and places."""
    dimensions = [[axis.replace("|", "_") for axis in dimension] for dimension in rule.dimensions]
    sizes = {axis.replace("|", "_"): size for axis, size in sizes.items()}
    theirs = " ".join(axes[0] if len(axes) == 1 else f"({' '.join(axes)})" for axes in dimensions)
    return Tensor(
        name="",
        shape=tuple(math.prod(sizes[axis] for axis in axes) for axes in dimensions),
        places=(),
        theirs=theirs,
        ours=" ".join(rule.whole).replace("|", "_"),
        sizes={axis: sizes[axis] for axes in dimensions if len(axes) > 1 for axis in axes},
        cut=(rule.whole.index(rule.joint), sizes[rule.joint[0]]) if rule.joint else None,
    )


def mtp_depths(shapes: dict) -> list[str]:
    """Returns the keys of the multi-token-prediction modules, in order."""
    return sorted(shapes["params"].get("mtp", {}), key=int)


def copies(shapes: dict) -> dict[str, str]:
    """Returns published names of copies -> names of their originals."""
    n_layers = len(list(layers(flatten(shapes))))
    prefixes = [f"model.layers.{n_layers + k}." for k in range(len(mtp_depths(shapes)))]
    return {prefix + copy: original for prefix in prefixes for copy, original in COPIES.items()}


def empty_tensors(shapes: dict) -> dict[str, tuple[int, ...]]:
    """Returns published name -> shape of empty tensors: shared experts of width 0, in a model without shared experts.

    transformers creates, stores and expects them.
    """
    if any("shared" in path for path in flatten(shapes)):
        return {}
    ends = {"gate_proj": (0, 1), "up_proj": (0, 1), "down_proj": (1, 0)}
    routers = [tensor for tensor in tensors(shapes) if tensor.name.endswith(ROUTER)]
    return {
        f"{router.name.removesuffix(ROUTER)}.shared_experts.{end}.weight": tuple(n * router.shape[1] for n in has)
        for router in routers
        for end, has in ends.items()
    }


def flatten(tree: dict) -> dict[Path, tuple[int, ...]]:
    """Returns {path: shape} of a tree of anything with a shape."""
    return {path: tuple(leaf.shape) for path, leaf in paths(tree).items()}
