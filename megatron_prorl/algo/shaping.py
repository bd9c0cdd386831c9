"""Reward shaping by length, on lists of numbers: one entry a rollout."""

from __future__ import annotations

import math
from collections.abc import Sequence

from megatron_prorl.types import FinishReason


def soft_overlong_penalties(
    num_response_tokens: Sequence[int], *, max_response_tokens: int, buffer_tokens: int, penalty: float
) -> list[float]:
    """DAPO's soft overlong punishment (arXiv:2503.14476, equation 13), times `penalty`: numbers to add to rewards.

    0 up to max_response_tokens - buffer_tokens, then linear down to -penalty at max_response_tokens. With
    `buffer_tokens` 0 nothing is punished.
    """
    if buffer_tokens == 0:
        return [0.0] * len(num_response_tokens)
    threshold = max_response_tokens - buffer_tokens
    return [-penalty * min(max(length - threshold, 0) / buffer_tokens, 1.0) for length in num_response_tokens]


def cosine_penalties(num_response_tokens: Sequence[int], *, max_response_tokens: int, penalty: float) -> list[float]:
    """ProRL v2's cosine length penalty: 0 at length 0, -penalty at max_response_tokens, half a cosine in between.

    The write-up gives eta_min + (eta_max - eta_min) (1 + cos(pi t / T)) / 2 and neither eta: eta_max is 0 here, and
    eta_min -penalty. On for 100 steps and off for 500, which a plan's stages say (examples/presets/prorl_v2.yaml).
    """
    shares = (min(length / max_response_tokens, 1.0) for length in num_response_tokens)
    return [-penalty * (1.0 - math.cos(math.pi * share)) / 2.0 for share in shares]


def unterminated_penalties(finish_reasons: Sequence[FinishReason], *, penalty: float) -> list[float]:
    """ProRL's penalty on responses that never end ("stop properly"): -penalty without an end token, else 0.

    ProRL v1 (arXiv:2505.24864, runs 4 and 5) and v2 state the penalty but not its size.
    """
    return [-penalty if reason == "length" else 0.0 for reason in finish_reasons]
