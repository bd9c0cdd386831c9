"""The same formulas in TRL, called on the same tensors."""

from types import SimpleNamespace

import pytest
import torch

from megatron_prorl.algo.advantage import group_advantages
from megatron_prorl.algo.kl import kl_estimate
from megatron_prorl.algo.loss import policy_loss, token_mean
from megatron_prorl.algo.shaping import soft_overlong_penalties

pytest.importorskip("trl", reason="compares with TRL, which the development environment leaves out (pip install trl)")


class OneProcess:
    """What `_compute_loss` asks of accelerate, for a single process."""

    num_processes = 1

    def gather(self, tensor):
        return tensor

    def reduce(self, tensor, reduction):
        return tensor


def test_loss_and_gradient_of_a_batch_agree():
    from collections import defaultdict

    from trl.trainer.grpo_trainer import GRPOTrainer

    torch.manual_seed(0)
    rows, length, beta = 3, 5, 0.3
    trainer, reference = torch.randn(2, rows, length) - 2
    policy = (trainer + 0.4 * torch.randn(rows, length)).requires_grad_()
    advantages = torch.tensor([1.2, -0.7, 0.4])
    weights = torch.rand(rows, length) * 2
    mask = torch.arange(length)[None] < torch.tensor([5, 2, 3])[:, None]

    trainer_loop = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *args, **kwargs: (policy, torch.zeros_like(trainer), None),
        model=SimpleNamespace(training=False), accelerator=OneProcess(),
        _metrics=defaultdict(lambda: defaultdict(list)),
        args=SimpleNamespace(delta=None, use_bias_correction_kl=True, steps_per_generation=1),
        loss_type="dapo", importance_sampling_level="token", epsilon_low=0.2, epsilon_high=0.4, beta=beta,
        top_entropy_quantile=1.0, off_policy_mask_threshold=None, aux_loss_enabled=False, _entropy_bonus_enabled=False,
        use_vllm=True, vllm_importance_sampling_correction=True,
    )  # fmt: skip
    inputs = {
        "prompt_ids": torch.zeros(rows, 1, dtype=torch.long), "prompt_mask": torch.ones(rows, 1, dtype=torch.long),
        "completion_ids": torch.zeros(rows, length, dtype=torch.long), "completion_mask": mask.long(),
        "advantages": advantages, "old_per_token_logps": trainer, "ref_per_token_logps": reference,
        "importance_sampling_ratio": weights, "num_items_in_batch": mask.sum(),
    }  # fmt: skip
    theirs = GRPOTrainer._compute_loss(trainer_loop, None, inputs)
    (their_gradient,) = torch.autograd.grad(theirs, policy)

    flat = mask.flatten()
    surrogate = policy_loss(
        policy.flatten(), trainer.flatten(), advantages.repeat_interleave(length), flat,
        clip_low=0.2, clip_high=0.4, weights_T=weights.flatten(), num_tokens=int(flat.sum()),
    )  # fmt: skip
    kl_T = kl_estimate(
        policy.flatten(), reference.flatten(), trainer.flatten(), flat,
        estimator="k3", unbiased=True, log_ratio_clamp=None,
    )  # fmt: skip
    ours = surrogate.loss + beta * token_mean(kl_T, flat, num_tokens=int(flat.sum()))
    (our_gradient,) = torch.autograd.grad(ours, policy)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(our_gradient, their_gradient)
    clipped = trainer_loop._metrics["eval"]
    assert clipped["clip_ratio/low_mean"] == pytest.approx([surrogate.clip_low_fraction.item()])
    assert clipped["clip_ratio/high_mean"] == pytest.approx([surrogate.clip_high_fraction.item()])
    assert surrogate.clip_low_fraction + surrogate.clip_high_fraction > 0


def test_standard_deviation_of_a_group_agrees():
    from trl.trainer.utils import nanstd

    rewards_PG = torch.tensor([[1.0, 0.0, 0.25, 0.5], [0.0, 0.0, 0.0, 1.0]])
    theirs = (rewards_PG - rewards_PG.mean(1, keepdim=True)) / (nanstd(rewards_PG, dim=1, keepdim=True) + 1e-4)
    torch.testing.assert_close(group_advantages(rewards_PG, eps=1e-4), theirs)


def test_soft_overlong_punishment_agrees():
    from trl.rewards import get_soft_overlong_punishment

    lengths = list(range(70, 110))
    theirs = get_soft_overlong_punishment(max_completion_len=100, soft_punish_cache=20)([[0] * n for n in lengths])
    ours = soft_overlong_penalties(lengths, max_response_tokens=100, buffer_tokens=20, penalty=1.0)
    assert ours == pytest.approx(theirs)
