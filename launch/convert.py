"""Turn a published model, a Hugging Face directory, into a checkpoint that every other verb reads.

    deepseek-jax convert --from=DeepSeek-V2-Lite --workdir=runs/v2_lite      # a directory, or a hub id
    deepseek-jax generate --workdir=runs/v2_lite --prompt="def main("
    deepseek-jax convert --from=DeepSeek-V3 --workdir=runs/v3          # FP8 weights become bfloat16: 1.3 TB of disk
    deepseek-jax convert --from=gs://bucket/DeepSeek-V3 --workdir=runs/v3          # or s3://: read tensor by tensor

One tensor at a time goes from disk to disk, in the host's memory alone: no accelerator, and for any model no more
than its largest tensor and 1 GiB besides (it is printed). After a stop or a kill, the same command resumes.
The checkpoint counts only when all of it is written; every byte is hashed on its way to the disk, and what an earlier
start has written is compared with its hashes. Weights that are multiplied with scales (FP8) become bfloat16;
--dtype=keep leaves all others as they are. Tokenizer, chat template, settings for generation and licence are copied
to the workdir, and exports contain them.
"""

import os
import sys

from deepseek_jax.bounds import one_of
from deepseek_jax.errors import UserError
from deepseek_jax.launch import _options
from deepseek_jax.storage import place

DTYPES = {"keep": None, "bf16": "bfloat16", "fp32": "float32"}
FLAGS = {
    "from": (place, _options.REQUIRED, "directory of published weights, here or gs://, s3://, or its id on the hub"),
    "dtype": (str, "keep", "of the weights; router biases are kept always", one_of(*DTYPES)),
}


def main(argv: list[str]) -> int:
    """Runs the verb; returns the exit code."""
    options = _options.parse(argv, extra=FLAGS, config=False)
    source, workdir = getattr(options, "from"), options.workdir
    if workdir is None:
        raise UserError("--workdir is missing. Give the directory for the checkpoint, like --workdir=runs/v2_lite.")
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # shapes only; another process may be using the accelerator
    from deepseek_jax.launch import _conversion  # which imports jax

    try:
        _conversion.convert(source, workdir, options.dtype, DTYPES[options.dtype])
    except KeyboardInterrupt:
        print("\nstopped: the same command resumes from here", file=sys.stderr)
        raise
    return 0
