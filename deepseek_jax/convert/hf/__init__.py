"""A Hugging Face directory as our weights, piece by piece, and back.

    published = open_published("DeepSeek-V2-Lite")      config.json and headers, checked; no weight is read
    published.family, published.numbers                 values for `config.family` and `config.model`
    source = Source(published, shapes)                  shapes: {"params", "router_bias"} of that model
    source.abstract                                     the resulting tree: shapes, and dtypes as stored
    place.place(source, target)                         that tree on devices; target: `source.abstract` with shardings

Reading. A piece is one published tensor in our axes: a layer of a stack, an expert of a layer, or a whole weight.
Pieces come in a fixed order, and each tensor is read once and dropped before the next, so host memory holds one tensor
at a time whatever the size of the model. FP8 becomes bfloat16; everything else keeps its dtype. A head that is tied to
the embedding, and not stored, is read from the embedding and becomes a weight of its own, which exports then contain.

Writing. `write` asks for pieces, converts them to published tensors and streams those to disk, in bfloat16, in float32,
in FP8 with blocks of 128 x 128, or as they are.
"""

from deepseek_jax.convert.hf.published import (
    CONFIG,
    GENERATION_CONFIG,
    Published,
    Warn,
    announced,
    open_published,
    warn_on_stderr,
)
from deepseek_jax.convert.hf.source import Piece, Source, map_leaves
from deepseek_jax.convert.hf.write import Get, copy_files, from_tree, write
