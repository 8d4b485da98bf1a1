"""A published config.json as a family and its numbers, and back.

Two spellings are read (`rope`); the hub's is written. Keys that change what a model_type computes, in the released code
or in transformers, are rejected if their value is not known here; keys that neither reads are ignored.
"""

from deepseek_jax.convert.hf_config.kinds import KINDS
from deepseek_jax.convert.hf_config.read import ConfigFacts, eos_ids, facts, from_hf, one_or_list
from deepseek_jax.convert.hf_config.rope import remarks
from deepseek_jax.convert.hf_config.write import code, model_type, to_hf
