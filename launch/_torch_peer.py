"""The other side of `deepseek-jax bench train`: transformers' DeepseekV3ForCausalLM on torch, in a process of its own.

    python _torch_peer.py '{"sizes": {...}, "optimizer": {...}, "batch": [4, 256], "threads": 2}'

Prints one JSON line when ready; then, for each line "N" that it reads, runs N training steps on fresh random tokens and
prints a JSON line with their wall seconds. It needs torch and transformers, and nothing of this package.
"""

import json
import os
import sys
import time
import warnings


def main(job: dict) -> None:
    """Builds the model and serves steps until standard input ends."""
    # Threads that spin while they wait would slow down the side that is being measured.
    os.environ |= {"OMP_WAIT_POLICY": "PASSIVE", "KMP_BLOCKTIME": "0", "HF_HUB_OFFLINE": "1"}
    warnings.filterwarnings("ignore")
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    torch.set_num_threads(job["threads"])
    torch.manual_seed(0)
    model = transformers.DeepseekV3ForCausalLM(transformers.DeepseekV3Config(**job["sizes"])).float().train()
    o = job["optimizer"]
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=o["rate"], betas=o["betas"], eps=o["eps"], weight_decay=o["weight_decay"]
    )
    tokens = torch.Generator().manual_seed(1)

    def step() -> float:
        ids = torch.randint(0, job["sizes"]["vocab_size"], job["batch"], generator=tokens)
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), o["clip_norm"])
        optimizer.step()
        return float(loss.detach())

    n_params = sum(p.numel() for p in model.parameters())
    say({"name": f"transformers {transformers.__version__}, torch {torch.__version__}", "n_params": n_params})
    for line in sys.stdin:
        begin = time.perf_counter()
        for _ in range(int(line)):
            loss = step()
        say({"seconds": time.perf_counter() - begin, "loss": loss})


def say(answer: dict) -> None:
    """Prints one JSON line at once."""
    print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
