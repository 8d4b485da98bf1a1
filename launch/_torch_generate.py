"""The other side of `deepseek-jax bench generate`: transformers' `generate` on torch, in a process of its own.

    python _torch_generate.py '{"sizes": {...}, "dtype": "bfloat16", "prompt": 1024, "threads": 2}'

It runs on a GPU where torch has one, with torch's attention (SDPA) and grouped matmuls for the experts. Prints one JSON
line when ready; then, for each line "B N" that it reads, continues B random prompts by N tokens, greedily and without
an end, and prints a JSON line with the wall seconds. It needs torch and transformers, and nothing of this package.
"""

import json
import os
import sys
import time
import warnings
from typing import Any


def main(job: dict) -> None:
    """Builds the model and serves until standard input ends."""
    # Threads that spin while they wait would slow down the side that is being measured.
    os.environ |= {"OMP_WAIT_POLICY": "PASSIVE", "KMP_BLOCKTIME": "0", "HF_HUB_OFFLINE": "1"}
    warnings.filterwarnings("ignore")
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    torch.set_num_threads(job["threads"])
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = build(job, device)
    vocab_size = job["sizes"]["vocab_size"]
    experts = getattr(model.config, "_experts_implementation", None)
    name = f"transformers {transformers.__version__}, torch {torch.__version__}, {job['dtype']}"
    say({"name": f"{name}, {model.config._attn_implementation} attention, {experts} experts"})
    for line in sys.stdin:
        batch, n_new = map(int, line.split())
        ids = torch.randint(0, vocab_size, (batch, job["prompt"])).to(device)
        begin = time.perf_counter()
        options = {"max_new_tokens": n_new, "min_new_tokens": n_new, "do_sample": False, "pad_token_id": 0}
        with torch.inference_mode():
            new = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
        new[:, -1].tolist()  # waits for the device
        say({"seconds": time.perf_counter() - begin, "n_new": new.shape[1] - ids.shape[1]})


def build(job: dict, device: str) -> Any:
    """Returns the model with fresh weights on the device, made in the dtype in which they stay."""
    import torch
    import transformers

    config = transformers.AutoConfig.for_model(**job["sizes"])
    if device == "cuda":
        config._attn_implementation, config._experts_implementation = "sdpa", "grouped_mm"
    torch.set_default_dtype(getattr(torch, job["dtype"]))
    with torch.device(device):
        return transformers.AutoModelForCausalLM.from_config(config).eval()


def say(answer: dict) -> None:
    """Prints one JSON line at once."""
    print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
