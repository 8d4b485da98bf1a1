"""What the figures of a run are called when they are shown, how they are written, and what they mean."""

from collections.abc import Mapping
from typing import Any

# Figure -> (label, format), in the order in which they are shown. The loss that is shown is that of the next token,
# which bits/byte is made of as well; the one that is minimised holds other losses too, with weights that change.
FIGURES = {
    "main": ("loss", ".4f"),
    "mtp": ("mtp", ".4f"),
    "bits_per_byte": ("bits/byte", ".4f"),
    "learning_rate": ("lr", ".2e"),
    "gradient_norm": ("grad_norm", ".3f"),
    "max_violation": ("maxvio", ".3f"),
    "skipped": ("skipped", "d"),
    "imbalance_redundant": ("imbalance", ".3f"),
    # of reinforcement learning
    "reward": ("reward", ".3f"),
    "accuracy": ("accuracy", ".3f"),
    "accuracy_error": ("+-", ".3f"),
    "greedy_accuracy": ("greedy", ".3f"),
    "answer_length": ("length", ".1f"),
    "thought": ("thought", ".3f"),
    "cut_off": ("cut_off", ".3f"),
    "tied": ("tied", ".2f"),
    "entropy": ("entropy", ".3f"),
    "kl": ("kl", ".4f"),
    "teacher_kl": ("teacher_kl", ".4f"),
    "clipped_high": ("clipped", ".3f"),
    "gap": ("gap", ".1e"),
}
LEGEND = {
    "main": "how badly the next token is predicted, in nats per token",
    "mtp": "the same for the token after that, guessed by multi-token prediction with the next one given",
    "bits_per_byte": "the loss per byte of text, comparable between tokenizers; held-out: on text not trained on",
    "max_violation": "load of the busiest expert above an even share: 0 is even, 1 is twice its share",
    "skipped": "steps left out since their loss or gradient was not finite: 0 is right",
    "reward": "mean of what the answers are worth",
    "accuracy": "share of right answers, drawn as in training; held-out: to problems not trained on",
    "accuracy_error": "half of its 95 % interval",
    "greedy_accuracy": "the same with the likeliest token taken each time",
    "answer_length": "tokens of an answer, end mark included",
    "thought": "share of answers with a thought",
    "cut_off": "share of answers without an end within the tokens allowed",
    "tied": "share of problems whose answers have equal rewards: nothing is learnt from them",
    "entropy": "of the distributions that tokens are drawn from, nats per token",
    "kl": "divergence from the reference, nats per token",
    "teacher_kl": "divergence from the teacher (config.rl.teacher) on the answers drawn, nats per token",
    "clipped_high": "share of tokens whose ratio is above the clip",
    "gap": "largest difference between log-probabilities of the draw and of the trainer: rounding only",
    "imbalance": "load of the experts of the busiest device above an even share",
    "imbalance_redundant": "the same with redundant experts, as held-out text is judged (loop.eval_redundant)",
    "sent_gib": "what a device sends to the experts of others in the forward pass of a step, empty rows included",
    "crossing_gib": "the part of it that leaves the group of the device",
    "repeated": "attempts at a step given up so far, since the buffers of an exchange with experts were too small",
}
LOG_ONLY = ("checksum", "skipped_in_row", "loss")  # written, never shown
SPEED = {
    "tokens_per_second": ("tokens/s", ".0f"),
    "mfu": ("mfu", ".1%"),
    "memory_gib": ("memory_gib", ".2f"),
    # of the exchange of tokens, which like the others depend on the mesh and change no result
    "imbalance": ("imbalance", ".3f"),
    "sent_gib": ("sent_gib", ".3g"),
    "crossing_gib": ("crossing_gib", ".3g"),
    "repeated": ("repeated", "d"),
}


def columns(figures: Mapping[str, Any], table: Mapping[str, tuple[str, str]]) -> list[str]:
    """Returns label=value of those figures that the table names, in its order."""
    return [f"{label}={_show(figures[name], form)}" for name, (label, form) in table.items() if name in figures]


def _show(value: int | float, form: str) -> str:
    return format(value, form if form != "d" or isinstance(value, int) else ".0f")
