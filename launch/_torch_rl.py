"""The other side of `deepseek-jax bench rl`: TRL's GRPOTrainer with transformers' DeepseekV3ForCausalLM, on torch.

    python _torch_rl.py '{"sizes": {...}, "optimizer": {...}, "rl": {...}, "threads": 2}'

Weights, gradients and moments are float32. Answers are drawn by transformers' `generate` with its cache, from random
prompts, up to their full length. Prints one JSON line when ready; then, for each line "N" that it reads, runs N steps,
each a rollout and its updates, and prints a JSON line with their wall and CPU seconds. It runs in a process of its own;
it needs torch, transformers and trl, and nothing of this package.
"""

import json
import os
import sys
import tempfile
import time
import warnings
from typing import Any


def main(job: dict) -> None:
    """Builds the trainer and serves steps until standard input ends."""
    # Threads that spin while they wait would slow down the side that is being measured.
    os.environ |= {"OMP_WAIT_POLICY": "PASSIVE", "KMP_BLOCKTIME": "0", "HF_HUB_OFFLINE": "1"}
    os.environ |= {"CUDA_VISIBLE_DEVICES": "", "TRL_EXPERIMENTAL_SILENCE": "1"}
    warnings.filterwarnings("ignore")
    import torch
    import transformers
    import trl

    transformers.logging.set_verbosity_error()
    torch.set_num_threads(job["threads"])
    torch.manual_seed(0)
    config = transformers.DeepseekV3Config(**job["sizes"])
    config._experts_implementation = job["experts"]
    model = transformers.DeepseekV3ForCausalLM(config)
    name = f"trl {trl.__version__}, transformers {transformers.__version__}, torch {torch.__version__}, float32"
    name += f", {config._attn_implementation} attention, {job['experts']} experts"
    n_params = sum(p.numel() for p in model.parameters())
    with tempfile.TemporaryDirectory() as folder:
        trainer = trl.GRPOTrainer(
            model=model,
            reward_funcs=reward,
            args=settings(job, folder),
            train_dataset=prompts(job),
            processing_class=tokenizer(job["sizes"]["vocab_size"]),
            callbacks=[pacer(job["rl"]["updates"], {"name": name, "n_params": n_params})],
        )
        trainer.train()


def settings(job: dict, folder: str) -> Any:
    """Returns TRL's settings: those of the job, and otherwise what is quickest on a CPU."""
    import trl

    rl, o = job["rl"], job["optimizer"]
    return trl.GRPOConfig(
        output_dir=folder,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        per_device_train_batch_size=rl["rows"] // rl["updates"],
        steps_per_generation=rl["updates"],
        num_generations=rl["answers"],
        max_completion_length=rl["new_tokens"],
        generation_kwargs={"min_new_tokens": rl["new_tokens"]},
        temperature=1.0,
        top_k=0,
        beta=0.0,
        loss_type="dapo",
        scale_rewards="none",
        epsilon=rl["clip_low"],
        epsilon_high=rl["clip_high"],
        optim="adamw_torch_fused",
        learning_rate=o["rate"],
        lr_scheduler_type="constant",
        adam_beta1=o["betas"][0],
        adam_beta2=o["betas"][1],
        adam_epsilon=o["eps"],
        weight_decay=o["weight_decay"],
        max_grad_norm=o["clip_norm"],
        max_steps=10**6,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        seed=0,
    )


def prompts(job: dict) -> Any:
    """Returns random prompts, words that `tokenizer` reads as one id each."""
    import datasets
    import numpy as np

    draw = np.random.default_rng(1).integers(2, job["sizes"]["vocab_size"], (256, job["rl"]["prompt_tokens"]))
    return datasets.Dataset.from_list([{"prompt": " ".join(map(str, row))} for row in draw.tolist()])


def tokenizer(vocab_size: int) -> Any:
    """Returns a tokenizer whose words are the numbers of the ids."""
    import tokenizers
    import transformers

    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({str(n): n for n in range(vocab_size)}, unk_token="0"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="0", eos_token="1", padding_side="left"
    )


def reward(completion_ids: list[list[int]], **_: Any) -> list[float | None]:
    """Returns 1 for answers that begin with an odd id."""
    return [float(ids[0] % 2) for ids in completion_ids]


def pacer(updates: int, ready: dict) -> Any:
    """Returns the callback that lets as many steps run as the lines read ask for."""
    import transformers

    class Pacer(transformers.TrainerCallback):
        left, wall, cpu = 0, 0.0, 0.0

        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            say(ready)
            self.wait(control)

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.left -= 1
            if not self.left:
                say({"seconds": time.perf_counter() - self.wall, "cpu_seconds": time.process_time() - self.cpu})
                self.wait(control)

        def wait(self, control: Any) -> None:
            line = sys.stdin.readline()
            control.should_training_stop = not line
            self.left = int(line or 1) * updates
            self.wall, self.cpu = time.perf_counter(), time.process_time()

    return Pacer()


def say(answer: dict) -> None:
    """Prints one JSON line at once."""
    print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
