"""Rewards of groups to one advantage a rollout."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_prorl.errors import UserError


def group_advantages(rewards_PG: Tensor, *, eps: float = 1e-6) -> Tensor:
    """GRPO (arXiv:2402.03300, section 4.1.2): (r - mean) / (std + eps) over each group, shape [P, G].

    An all-equal group gives exact zeros. The paper does not say which std; this is the unbiased one (G - 1), as in TRL
    (eps 1e-4) and in verl, which DAPO's own code is (eps 1e-6, ours). A group of one raises UserError.
    """
    return _zero_where_all_equal(rewards_PG, _centred(rewards_PG) / (rewards_PG.std(dim=1, keepdim=True) + eps))


def reinforce_pp_baseline(rewards_PG: Tensor, *, eps: float = 1e-6) -> Tensor:
    """REINFORCE++ with baseline (arXiv:2501.03262; ProRL v2): subtract the group mean, divide by the batch's std.

    The mean of the whole batch is 0 once the group means are gone, so only the division is left of the batch
    normalisation. The std is the unbiased one over the P*G rollouts of the step, each counted once; OpenRLHF and verl
    whiten over *tokens* instead, where a long response weighs more. A group of one raises UserError; an all-equal group
    gives exact zeros.
    """
    centred_PG = _centred(rewards_PG)
    return _zero_where_all_equal(rewards_PG, centred_PG / (centred_PG.std() + eps))


def _centred(rewards_PG: Tensor) -> Tensor:
    num_rollouts = rewards_PG.shape[1]
    if num_rollouts < 2:
        raise UserError(f"rollout.rollouts_per_prompt: a group of {num_rollouts} has no baseline; use 2 or more")
    return rewards_PG - rewards_PG.mean(dim=1, keepdim=True)


def _zero_where_all_equal(rewards_PG: Tensor, advantages_PG: Tensor) -> Tensor:
    # The mean of equal floats may be off by a rounding error, which the division by std + eps would blow up.
    all_equal_P1 = rewards_PG.amax(dim=1, keepdim=True) == rewards_PG.amin(dim=1, keepdim=True)
    return torch.where(all_equal_P1, 0.0, advantages_PG)
