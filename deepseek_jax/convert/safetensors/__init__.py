"""Directories of safetensors files, read without trust and written in one pass. Plain files and numpy, no JAX.

A file is    u64 little-endian n | n bytes of JSON {name: {"dtype", "shape", "data_offsets": [begin, end]}} | data
A directory is model.safetensors alone, or shards and model.safetensors.index.json {"weight_map": {name: shard}}.

Format: https://github.com/huggingface/safetensors; the published libraries read bfloat16 but not float8 into numpy.
"""

from deepseek_jax.convert.safetensors.dequantize import BLOCK, FINITE_CODES, blocks_of
from deepseek_jax.convert.safetensors.format import DTYPE_NAMES, DTYPES, INDEX, SCALE_SUFFIX, SINGLE, Info
from deepseek_jax.convert.safetensors.header import read_json
from deepseek_jax.convert.safetensors.read import Tensors, open_directory
from deepseek_jax.convert.safetensors.write import MAX_SHARD_BYTES, Entry, check_free, write_directory
