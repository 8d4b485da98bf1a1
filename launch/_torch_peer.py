"""The other side of `deepseek-jax bench train`: transformers' DeepseekV3ForCausalLM on torch, in a process of its own.

    python _torch_peer.py '{"sizes": {...}, "optimizer": {...}, "batch": [4, 256], "dtype": "float32", "threads": 2}'

Weights, gradients and both moments of AdamW have the dtype given. It runs on a GPU where torch has one, with torch's
attention (SDPA), grouped matmuls for the experts and the fused AdamW.

Prints one JSON line when ready; then, for each line "N" that it reads, runs N training steps on fresh random tokens and
prints a JSON line with their wall seconds. It needs torch and transformers, and nothing of this package.
"""

import json
import os
import sys
import time
import warnings
from typing import Any


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
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = build(job, device)
    o = job["optimizer"]
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=o["rate"],
        betas=o["betas"],
        eps=o["eps"],
        weight_decay=o["weight_decay"],
        fused=device == "cuda" or None,
    )
    tokens = torch.Generator().manual_seed(1)

    def step() -> torch.Tensor:
        ids = torch.randint(0, job["sizes"]["vocab_size"], job["batch"], generator=tokens).to(device)
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), o["clip_norm"])
        optimizer.step()
        return loss.detach()

    n_params = sum(p.numel() for p in model.parameters())
    experts = getattr(model.config, "_experts_implementation", None)
    name = f"transformers {transformers.__version__}, torch {torch.__version__}, {job['dtype']} weights and moments"
    say({"name": f"{name}, {model.config._attn_implementation} attention, {experts} experts", "n_params": n_params})
    for line in sys.stdin:
        begin = time.perf_counter()
        for _ in range(int(line)):
            loss = step()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - begin
        memory = torch.cuda.max_memory_allocated() if device == "cuda" else None
        say({"seconds": seconds, "loss": float(loss), "peak_memory_bytes": memory})


def build(job: dict, device: str) -> Any:
    """Returns the model with fresh weights on the device; a GPU initialises it much faster than a CPU."""
    import torch
    import transformers

    config = transformers.DeepseekV3Config(**job["sizes"])
    if device == "cuda":
        config._attn_implementation, config._experts_implementation = "sdpa", "grouped_mm"
    with torch.device(device):
        model = transformers.DeepseekV3ForCausalLM(config).to(getattr(torch, job["dtype"])).train()
    if device == "cuda":
        torch.cuda.empty_cache()  # of the first weights, in float32
        torch.cuda.reset_peak_memory_stats()
    return model


def say(answer: dict) -> None:
    """Prints one JSON line at once."""
    print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
