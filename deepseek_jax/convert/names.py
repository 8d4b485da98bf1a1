"""Which published tensor becomes which of our weights: one table, read in both directions.

A rule gives the axes of the published tensor; the axes of ours are the letters at the end of its name. So

    "self_attn.q_b_proj.weight", "(H Q) R", "attention.q_up_RHQ"

says that the rows of q_b_proj run over heads, then over a head's width, and that our array has the axes R, H, Q. If
one tensor holds two of our weights side by side, a bar separates the two on the axis along which they are joined:

    "self_attn.kv_b_proj.weight", "(H N|U) C", "attention.k_up_CHN", "attention.v_up_CHU"

An axis that only our weight has numbers published tensors: X counts the experts, which are published one by one. The
layers of a stack are numbered too, on a leading axis that names do not show; where a stack repeats a group of different
blocks, its axis counts the repeats, and each layer is a block of the group. `deepseek_jax.shapes` explains the letters.

No family is named here: a rule applies to every model that has its weights. There are two spellings of names, and a
model of several streams has the second, V4's own; transformers saves that with other beginnings (`saved_by_others`).
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

# Names after `model.layers.N.`
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

# V4's own names. Those of a residual connection over several streams:
MIXING = (("fn", "Y (O D)", "mix_ODY"), ("base", "Y", "bias_Y"), ("scale", "J", "scale"))
STREAMS_HEAD = (
    _rule("hc_head_fn", "J (O D)", "streams_head.mix_ODJ"),
    _rule("hc_head_base", "O", "streams_head.bias_O"),
    _rule("hc_head_scale", "J", "streams_head.scale"),
)
OWN_BEFORE = (_rule("embed.weight", "V D", "embedding.table_VD"),)
OWN_AFTER = (
    *STREAMS_HEAD,
    _rule("norm.weight", "D", "final_norm.gain"),
    _rule("head.weight", "V D", "head.weight_DV"),
)
# Names after `layers.N.`
OWN_BLOCK = (
    _rule("attn_norm.weight", "D", "attention_norm.gain"),
    _rule("attn.wq_a.weight", "R D", "attention.q_down_DR"),
    _rule("attn.q_norm.weight", "R", "attention.q_norm.gain"),
    _rule("attn.wq_b.weight", "(H Q) R", "attention.q_up_RHQ"),
    _rule("attn.wkv.weight", "Q D", "attention.kv_DQ"),
    _rule("attn.kv_norm.weight", "Q", "attention.kv_norm.gain"),
    _rule("attn.attn_sink", "H", "attention.sink_H"),
    _rule("attn.wo_a.weight", "(G R) Y", "attention.out_down_YGR"),
    _rule("attn.wo_b.weight", "D (G R)", "attention.out_up_GRD"),
    *(
        _rule(f"{theirs}.{name}", axes, f"{ours}.{weight}")
        for theirs, ours in (
            ("attn.compressor", "attention.compressor"),
            ("attn.indexer.compressor", "attention.indexer.key"),
        )
        for name, axes, weight in (
            ("wkv.weight", "Q D", "kv_DQ"),
            ("wgate.weight", "Q D", "gate_DQ"),
            ("ape", "J Q", "bias_JQ"),
            ("norm.weight", "Q", "norm.gain"),
        )
    ),
    _rule("attn.indexer.wq_b.weight", "(H Q) R", "attention.indexer.q_up_RHQ"),
    _rule("attn.indexer.weights_proj.weight", "H D", "attention.indexer.weight_DH"),
    *(_rule(f"hc_attn_{name}", axes, f"attention_residual.{weight}") for name, axes, weight in MIXING),
    _rule("ffn_norm.weight", "D", "experts_norm.gain"),
    _rule("ffn.gate.weight", "E D", "experts.router.centroids_DE"),
    _rule("ffn.gate.bias", "E", "experts.router.bias_E"),
    _rule("ffn.gate.tid2eid", "V K", "experts.router.experts_VK"),
    _rule("ffn.shared_experts.w1.weight", "F D", "experts.shared.gate_DF"),
    _rule("ffn.shared_experts.w3.weight", "F D", "experts.shared.up_DF"),
    _rule("ffn.shared_experts.w2.weight", "D F", "experts.shared.down_FD"),
    _rule("ffn.experts.{X}.w1.weight", "F D", "experts.gate_XDF"),
    _rule("ffn.experts.{X}.w3.weight", "F D", "experts.up_XDF"),
    _rule("ffn.experts.{X}.w2.weight", "D F", "experts.down_XFD"),
    *(_rule(f"hc_ffn_{name}", axes, f"experts_residual.{weight}") for name, axes, weight in MIXING),
)
# Names after `mtp.K.`
OWN_MTP = (
    _rule("enorm.weight", "D", "embedding_norm.gain"),
    _rule("hnorm.weight", "D", "hidden_norm.gain"),
    _rule("e_proj.weight", "D Y", "embedding_YD"),
    _rule("h_proj.weight", "D Y", "hidden_YD"),
    *(rule._replace(ours=tuple(f"block.{name}" for name in rule.ours)) for rule in OWN_BLOCK),
    *STREAMS_HEAD,
    _rule("norm.weight", "D", "final_norm.gain"),
)


class Spelling(NamedTuple):
    """The rules of one spelling, and what the names of a layer and of a depth of multi-token prediction begin with."""

    before: tuple[Rule, ...]
    layer: str  # {n}: its number
    block: tuple[Rule, ...]
    depth: str  # {n}: number of layers and depths before it; {k}: of depths
    mtp: tuple[Rule, ...]
    after: tuple[Rule, ...]
    copies: dict[str, str]  # in a depth: name -> name of the original


# Found in old files. These are not weights: they follow from the config.
IGNORED = re.compile(r"\.rotary_emb\.inv_freq$")
# What FP8 releases store in FP8: the matrices of blocks except routers, compressors and the weights of an indexer's
# heads (not embedding, head, norms and eh_proj, but V4's e_proj and h_proj).
QUANTIZED = re.compile(
    r"\.(self_attn|mlp)\.(?!indexer\.)(.*\.)?\w+_proj(_with_mqa)?\.weight$|\.indexer\.(wq_b|wk)\.weight$"
    r"|\.attn\.(wq_a|wq_b|wkv|wo_a|wo_b)\.weight$|\.ffn\.(shared_experts|experts\.\d+)\.w[123]\.weight$"
    r"|^mtp\.\d+\.[eh]_proj\.weight$"
)
IN_FP4 = re.compile(r"\.ffn\.experts\.\d+\.w[123]\.weight$")  # in FP4 in V4, but for its base models
ROUTER = ".gate.weight"  # end of a router's name
# In float32 in every release.
FLOAT32 = re.compile(r"\.(e_score_correction_bias|gate\.bias|attn_sink|ape)$|(^|\.)hc_\w+_(fn|base|scale)$")
INTEGERS = re.compile(r"\.tid2eid$")  # numbers of experts, int64 in the files and int32 here
OWN = re.compile(r"(layers|mtp)\.\d+\.")  # beginning of a block's names in V4's spelling

PUBLISHED = Spelling(BEFORE, "model.layers.{n}.", BLOCK, "model.layers.{n}.", MTP, AFTER, COPIES)
V4 = Spelling(OWN_BEFORE, "layers.{n}.", OWN_BLOCK, "mtp.{k}.", OWN_MTP, OWN_AFTER, {})


def spelling(shapes: dict) -> Spelling:
    """Returns the spelling of a model's names."""
    return V4 if "streams_head" in shapes["params"] else PUBLISHED


def saved_by_others(name: str) -> str:
    """Returns what transformers calls a tensor of V4 in the files that it saves; other names are as published."""
    if name == "embed.weight":
        return "model.embed_tokens.weight"
    if name.startswith("hc_head_"):
        return f"model.hc_head.{name.replace('hc_head_', 'hc_')}"
    if name == "norm.weight" or name.startswith("layers."):
        return f"model.{name.replace('.attn.kv_norm.', '.attn.norm.')}"
    return name


def scale_name(name: str) -> str:
    """Returns the name of the scales of a tensor in FP8 or FP4."""
    return f"{name.removesuffix('weight')}scale" if OWN.match(name) else f"{name}_scale_inv"


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
    found, main = spelling(shapes), list(layers(flat))
    for rule in found.before:
        yield from _apply(rule, flat, "", ())
    for number, (block, index) in enumerate(main):
        for rule in found.block:
            yield from _apply(rule, flat, found.layer.format(n=number), block, index)
    for k, module in enumerate(mtp_depths(shapes)):
        for rule in found.mtp:
            yield from _apply(rule, flat, found.depth.format(n=len(main) + k, k=k), ("mtp", module))
    for rule in found.after:
        yield from _apply(rule, flat, "", ())


def layers(flat: dict[Path, tuple[int, ...]]) -> Iterator[tuple[Path, Index]]:
    """Yields the main model's layers in the order of running: (path of a block below its root, index in its weights).

    The blocks of a group (`layers.block.Group`) run one after the other, once per repeat of their stack.
    """
    for stack in sorted({path[1] for path in flat if re.fullmatch(r"\w*blocks(_\d+)?", path[1])}, key=_place):
        repeats = next(shape[0] for path, shape in flat.items() if path[1] == stack)
        group = {path[1:4] for path in flat if path[1:3] == (stack, "blocks")}
        blocks = sorted(group, key=lambda path: int(path[2])) or [(stack,)]
        yield from ((block, (index,)) for index in range(repeats) for block in blocks)


def _place(stack: str) -> tuple[str, int]:
    """Returns by what the stacks of a model are in order: the name, or the number of the first layer."""
    name, _, number = stack.rpartition("_")
    return (name, int(number)) if number.isdigit() else (stack, 0)


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
    n_layers, found = len(list(layers(flatten(shapes)))), spelling(shapes)
    prefixes = [found.depth.format(n=n_layers + k, k=k) for k in range(len(mtp_depths(shapes)))]
    return {prefix + copy: original for prefix in prefixes for copy, original in found.copies.items()}


def empty_tensors(shapes: dict) -> dict[str, tuple[int, ...]]:
    """Returns published name -> shape of empty tensors: shared experts of width 0, in a model without shared experts.

    transformers creates, stores and expects them.
    """
    if spelling(shapes) is V4 or any("shared" in path for path in flatten(shapes)):
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
