import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_prorl.algo.advantage import group_advantages, reinforce_pp_baseline
from megatron_prorl.errors import UserError


def test_group_advantages_equal_the_numbers_by_hand():
    # Rewards 1, 0, 0, 1: mean 0.5, squared deviations 4 * 0.25 over G - 1 = 3, std sqrt(1/3).
    expected = 0.5 / (math.sqrt(1 / 3) + 1e-6)
    torch.testing.assert_close(
        group_advantages(torch.tensor([[1.0, 0.0, 0.0, 1.0]])),
        torch.tensor([[expected, -expected, -expected, expected]]),
    )


def test_each_group_is_judged_by_itself():
    rewards_PG = torch.tensor([[1.0, 0.0, 0.0, 1.0], [0.0, 0.25, 0.5, 0.0]])
    alone = torch.cat([group_advantages(rewards_PG[:1]), group_advantages(rewards_PG[1:])])
    assert torch.equal(group_advantages(rewards_PG), alone)


@pytest.mark.parametrize("advantages", [group_advantages, reinforce_pp_baseline])
@pytest.mark.parametrize("reward", [0.1, 1 / 3, 1.0, -0.7])
def test_all_equal_group_teaches_nothing(advantages, reward):
    rewards_PG = torch.tensor([[0.2, 0.9, 0.4], [reward] * 3])
    result_PG = advantages(rewards_PG)
    assert result_PG[1].tolist() == [0.0, 0.0, 0.0]
    assert result_PG[0].abs().min() > 0.1


@pytest.mark.parametrize("advantages", [group_advantages, reinforce_pp_baseline])
def test_a_group_of_one_is_refused(advantages):
    with pytest.raises(UserError, match="a group of 1 has no baseline"):
        advantages(torch.ones(3, 1))


@pytest.mark.parametrize("advantages", [group_advantages, reinforce_pp_baseline])
@given(rewards=st.lists(st.lists(st.floats(-1, 1), min_size=4, max_size=4), min_size=2, max_size=5))
def test_advantages_of_a_group_sum_to_zero(advantages, rewards):
    result_PG = advantages(torch.tensor(rewards, dtype=torch.float64))
    torch.testing.assert_close(result_PG.sum(1), torch.zeros(len(rewards), dtype=torch.float64), atol=1e-6, rtol=0)


def test_reinforce_pp_baseline_equals_the_numbers_by_hand():
    # Centred: +-0.5 and +-0.1; sum of squares 2 * 0.25 + 2 * 0.01 = 0.52 over N - 1 = 3.
    std = math.sqrt(0.52 / 3) + 1e-6
    torch.testing.assert_close(
        reinforce_pp_baseline(torch.tensor([[1.0, 0.0], [0.4, 0.6]])),
        torch.tensor([[0.5 / std, -0.5 / std], [-0.1 / std, 0.1 / std]]),
    )


def test_reinforce_pp_baseline_keeps_the_size_of_a_groups_spread():
    grpo = group_advantages(torch.tensor([[1.0, 0.0], [0.4, 0.6]]))
    baseline = reinforce_pp_baseline(torch.tensor([[1.0, 0.0], [0.4, 0.6]]))
    torch.testing.assert_close(grpo[0, 0] / grpo[1, 1], torch.tensor(1.0), atol=1e-4, rtol=0)
    torch.testing.assert_close(baseline[0, 0] / baseline[1, 1], torch.tensor(5.0))
