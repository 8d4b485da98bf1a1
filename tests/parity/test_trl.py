"""GRPO's objective against TRL's, on the same tensors: values and gradients; both are given log-probabilities."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.rl.grpo import GRPO, Drawn, advantages, objective, token_weights

B, T, LONGEST = 6, 9, 12
COMMON = dict(
    advantage="std", ratio="token", clip_low=0.2, clip_high=0.28, log_ratio_bound=20.0, beta=0.0, unbiased_kl=False,
    off_policy_bound=0.0, importance_cap=0.0,
)  # fmt: skip
# Ours, and what TRL calls the same.
CASES = {
    "token": (dict(aggregation="token"), dict(loss_type="dapo")),
    "sequence": (dict(aggregation="sequence"), dict(loss_type="grpo")),
    "constant": (dict(aggregation="constant"), dict(loss_type="dr_grpo")),
    "kl": (dict(aggregation="sequence", beta=0.04), dict(loss_type="grpo", beta=0.04)),
    "unbiased kl": (
        dict(aggregation="token", beta=0.3, unbiased_kl=True),
        dict(loss_type="dapo", beta=0.3, unbiased=True),
    ),
    "off policy": (dict(aggregation="token", off_policy_bound=0.05), dict(loss_type="dapo", off_policy=0.05)),
    "gspo": (
        dict(aggregation="sequence", ratio="sequence", clip_low=3e-4, clip_high=4e-4),
        dict(loss_type="grpo", level="sequence", clip=(3e-4, 4e-4)),
    ),
    "importance": (dict(aggregation="token", importance_cap=1.1), dict(loss_type="dapo", cap=1.1)),
    "R1": (
        dict(aggregation="sequence", clip_low=10.0, clip_high=10.0, beta=0.001),
        dict(loss_type="grpo", clip=(10.0, 10.0), beta=0.001),
    ),
    "V3.2": (
        dict(advantage="mean", aggregation="sequence", importance_cap=1.1, off_policy_bound=0.05)
        | dict(beta=0.3, unbiased_kl=True),
        dict(loss_type="grpo", beta=0.3, unbiased=True, off_policy=0.05, cap=1.1),
    ),
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def theirs():
    """Imports them, which takes seconds, when the first test begins and not wherever tests are collected."""
    global torch
    torch = pytest.importorskip("torch")
    pytest.importorskip("trl")


def tensors():
    rng = np.random.default_rng(0)
    logp, sampled, old, reference = (-1.5 + 0.3 * rng.normal(size=(4, B, T))).astype(np.float32)
    mask = (np.arange(T) < np.array([1, 9, 4, 6, 2, 5])[:, None]).astype(np.float32)
    return logp, sampled, old, reference, mask


def of_trl(
    given, A, *, loss_type, beta=0.0, unbiased=False, off_policy=None, level="token", clip=(0.2, 0.28), cap=None
):
    """(loss, its gradient) of TRL's trainer, whose model and accelerator are left out."""
    from trl import GRPOTrainer

    logp, sampled, old, reference, mask = map(torch.tensor, given)
    logp.requires_grad_()
    gather = SimpleNamespace(
        gather=lambda x: x, reduce=lambda x, reduction: x, num_processes=1, gather_for_metrics=lambda x: x
    )
    trainer = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *args, **kwargs: (logp, torch.zeros_like(logp), None),
        get_off_policy_mask=GRPOTrainer.get_off_policy_mask,
        model=SimpleNamespace(training=True),
        accelerator=gather,
        args=SimpleNamespace(delta=None, use_bias_correction_kl=unbiased, steps_per_generation=1),
        aux_loss_enabled=False,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=off_policy,
        importance_sampling_level=level,
        beta=beta,
        loss_type=loss_type,
        epsilon_low=clip[0],
        epsilon_high=clip[1],
        use_vllm=cap is not None,
        vllm_importance_sampling_correction=cap is not None,
        max_completion_length=LONGEST,
        current_gradient_accumulation_steps=1,
        _entropy_bonus_enabled=False,
        _metrics={"train": __import__("collections").defaultdict(list)},
    )
    ids = torch.zeros(B, T, dtype=torch.long)
    inputs = dict(prompt_ids=ids[:, :1], prompt_mask=ids[:, :1] + 1, completion_ids=ids, completion_mask=mask)
    inputs |= dict(advantages=torch.tensor(A, dtype=torch.float32), old_per_token_logps=old)
    inputs |= dict(ref_per_token_logps=reference, sampling_per_token_logps=sampled, num_items_in_batch=mask.sum())
    if cap is not None:
        inputs["importance_sampling_ratio"] = torch.clamp(torch.exp(old - sampled), max=cap)
    loss = GRPOTrainer._compute_loss(trainer, None, inputs)
    loss.backward()
    return loss.item(), logp.grad.numpy()


@pytest.mark.parametrize("name", CASES)
@pytest.mark.filterwarnings("ignore")
def test_objective_and_gradient_are_those_of_trl(name):
    ours, theirs = CASES[name]
    c = GRPO(**COMMON | ours)
    given = logp, sampled, old, reference, mask = tensors()
    rewards, groups = [1.0, 0.0, 0.5, 0.0, 1.0, 1.0], [0, 0, 0, 1, 1, 1]
    A = advantages(rewards, groups, c.advantage)
    grouped = torch.tensor(rewards).view(2, 3)
    over = grouped.std(1, keepdim=True) + 1e-4 if c.advantage == "std" else 1.0
    expected = (grouped - grouped.mean(1, keepdim=True)) / over
    np.testing.assert_allclose(A, expected.flatten().numpy(), atol=1e-6)
    drawn = Drawn(
        mask, sampled, old, reference, A[:, None] * np.ones((1, T)), token_weights(mask, c.aggregation, LONGEST)
    )
    loss = lambda x: -objective(c, x, drawn, mask / mask.sum())[0]  # noqa: E731
    value, slope = jax.value_and_grad(loss)(jnp.asarray(logp))
    expected_value, expected_slope = of_trl(given, A, **theirs)
    assert float(value) == pytest.approx(expected_value, abs=1e-5)
    np.testing.assert_allclose(slope, expected_slope, atol=1e-5)
