"""From groups with verdicts to samples with advantages."""

from __future__ import annotations

import numpy as np
import torch

from megatron_prorl.algo.advantage import group_advantages, reinforce_pp_baseline
from megatron_prorl.algo.shaping import cosine_penalties, soft_overlong_penalties, unterminated_penalties
from megatron_prorl.config.schema import AlgorithmConfig, ShapingConfig
from megatron_prorl.types import Group, Sample


def label(groups: list[Group], algorithm: AlgorithmConfig, *, max_response_tokens: int) -> list[list[Sample]]:
    """One list of samples a group, in order; the shaped reward becomes one advantage for every response token."""
    if not groups:
        return []
    rewards_PG = torch.tensor(
        [shaped_rewards(group, algorithm.shaping, max_response_tokens=max_response_tokens) for group in groups],
        dtype=torch.float64,
    )
    match algorithm.advantage:
        case "grpo":
            advantages_PG = group_advantages(rewards_PG)
        case "reinforce_pp_baseline":
            advantages_PG = reinforce_pp_baseline(rewards_PG)
    return [_samples(group, advantages_G) for group, advantages_G in zip(groups, advantages_PG.tolist(), strict=True)]


def _samples(group: Group, advantages_G: list[float]) -> list[Sample]:
    prompt_token_ids = np.array(group.prompt_token_ids, dtype=np.int32)
    return [
        Sample(
            prompt_token_ids=prompt_token_ids,
            response_token_ids=rollout.completion.token_ids,
            sampler_logprobs=rollout.completion.sampler_logprobs,
            advantage=advantage,
        )
        for rollout, advantage in zip(group.rollouts, advantages_G, strict=True)
    ]


def shaped_rewards(group: Group, shaping: ShapingConfig, *, max_response_tokens: int) -> list[float]:
    """The verifier's scores of a group, less the penalties for length and for a missing end token."""
    completions = [rollout.completion for rollout in group.rollouts]
    lengths = [len(completion.token_ids) for completion in completions]
    overlong = soft_overlong_penalties(
        lengths,
        max_response_tokens=max_response_tokens,
        buffer_tokens=shaping.overlong_buffer_tokens,
        penalty=shaping.overlong_penalty,
    )
    cosine = cosine_penalties(lengths, max_response_tokens=max_response_tokens, penalty=shaping.cosine_penalty)
    unterminated = unterminated_penalties(
        [completion.finish_reason for completion in completions], penalty=shaping.unterminated_penalty
    )
    return [
        rollout.verdict.score + sum(penalties)
        for rollout, *penalties in zip(group.rollouts, overlong, cosine, unterminated, strict=True)
    ]
