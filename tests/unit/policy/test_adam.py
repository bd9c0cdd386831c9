"""The CPU's AdamW against torch's."""

from __future__ import annotations

import pytest
import torch

from megatron_prorl.policy.adam import AdamW

SHAPES = [(37, 5), (11,), (300, 40)]


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_two_hundred_updates_equal_torchs_adamw(weight_decay):
    torch.manual_seed(0)
    start = [torch.randn(shape) for shape in SHAPES]
    ours, theirs = ([p.clone().requires_grad_() for p in start] for _ in range(2))
    options = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": weight_decay}
    optimizer, reference = AdamW(ours, **options), torch.optim.AdamW(theirs, foreach=False, fused=False, **options)
    for update in range(200):
        for mine, other in zip(ours, theirs, strict=True):
            gradient = torch.randn_like(mine) * 10.0 ** ((update * 7) % 6 - 4)  # over six orders of magnitude
            mine.grad, other.grad = gradient, gradient.clone()
        optimizer.step()
        reference.step()
    for mine, other in zip(ours, theirs, strict=True):
        # The fused kernel orders its float32 operations differently: a few units in the last place over 200 updates.
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)


def test_the_step_is_an_int_of_the_group_and_the_moments_are_the_only_state_of_a_parameter():
    param = torch.nn.Parameter(torch.ones(3))
    param.grad = torch.ones(3)
    optimizer = AdamW([param], lr=0.1)
    optimizer.step()
    assert optimizer.param_groups[0]["step"] == 1
    assert set(optimizer.state[param]) == {"exp_avg", "exp_avg_sq"}


def test_moments_made_before_the_first_step_are_used():
    param = torch.nn.Parameter(torch.zeros(1))
    optimizer = AdamW([param], lr=1.0, betas=(0.5, 0.5), eps=0.0)
    optimizer.state[param] = {"exp_avg": torch.tensor([2.0]), "exp_avg_sq": torch.tensor([4.0])}
    optimizer.param_groups[0]["step"] = 1
    param.grad = torch.tensor([1.0])
    optimizer.step()
    # exp_avg = (2 + 1) / 2, exp_avg_sq = (4 + 1) / 2, both corrected by 1 - 0.5**2 at step 2
    torch.testing.assert_close(param.data, -torch.tensor([(1.5 / 0.75) / (2.5 / 0.75) ** 0.5]))


def test_a_parameter_without_gradient_stays_and_gets_no_state():
    param = torch.nn.Parameter(torch.ones(3))
    optimizer = AdamW([param], lr=0.1, weight_decay=0.5)
    optimizer.step()
    assert param.tolist() == [1.0, 1.0, 1.0]
    assert not optimizer.state
