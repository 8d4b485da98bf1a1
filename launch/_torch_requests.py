"""The other side of `deepseek-jax bench requests`: transformers' `generate` on torch, in a process of its own.

    python _torch_requests.py '{"folder": "out", "threads": 2}'

Opens the weights of a folder in float32 on the CPU and prints one JSON line when ready. For each line of JSON that it
reads, {"prompts": [[1, 2], ...], "n_new": [8, ...], "batch": 4}, it continues the prompts greedily, so many of them at
a time with padding before the shorter ones, each batch until the longest of its continuations is done, and prints the
CPU seconds and the new ids. It needs torch and transformers, and nothing of this package.
"""

import json
import os
import sys
import time
import warnings
from typing import Any


def main(job: dict) -> None:
    """Opens the model and serves until standard input ends."""
    # Threads that spin while they wait would count as work.
    os.environ |= {"OMP_WAIT_POLICY": "PASSIVE", "KMP_BLOCKTIME": "0", "HF_HUB_OFFLINE": "1"}
    warnings.filterwarnings("ignore")
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    torch.set_num_threads(job["threads"])
    model = transformers.AutoModelForCausalLM.from_pretrained(job["folder"], dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None
    say({"name": f"transformers {transformers.__version__}, torch {torch.__version__}, float32"})
    for line in sys.stdin:
        work = json.loads(line)
        prompts, n_new, ids = work["prompts"], work["n_new"], []
        begin = time.process_time()
        for start in range(0, len(prompts), work["batch"]):
            part = slice(start, start + work["batch"])
            ids += continued(model, prompts[part], n_new[part])
        say({"cpu_seconds": time.process_time() - begin, "ids": ids})


def continued(model: Any, prompts: list[list[int]], n_new: list[int]) -> list[list[int]]:
    """Returns what each prompt is continued with."""
    import torch

    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    with torch.inference_mode():
        new = model.generate(ids, attention_mask=mask, max_new_tokens=max(n_new), do_sample=False, pad_token_id=0)
    return [row[longest : longest + n].tolist() for row, n in zip(new, n_new, strict=True)]


def say(answer: dict) -> None:
    """Prints one JSON line at once."""
    print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
