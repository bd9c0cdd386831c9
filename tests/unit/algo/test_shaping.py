import pytest

from megatron_prorl.algo.shaping import cosine_penalties, soft_overlong_penalties, unterminated_penalties


def test_soft_overlong_penalty_equals_the_numbers_by_hand():
    # DAPO's own numbers: at most 20,480 tokens of which the last 4,096 are punished.
    penalties = soft_overlong_penalties(
        [100, 16384, 17408, 18432, 20480, 20481], max_response_tokens=20480, buffer_tokens=4096, penalty=1.0
    )
    assert penalties == [0.0, 0.0, -0.25, -0.5, -1.0, -1.0]


def test_soft_overlong_penalty_scales():
    assert soft_overlong_penalties([90], max_response_tokens=100, buffer_tokens=20, penalty=0.5) == [-0.25]


def test_no_buffer_punishes_nothing():
    assert soft_overlong_penalties([1, 100, 101], max_response_tokens=100, buffer_tokens=0, penalty=1.0) == [0.0] * 3


def test_only_responses_without_an_end_token_are_penalised():
    assert unterminated_penalties(["stop", "length", "stop"], penalty=0.3) == [0.0, -0.3, 0.0]


def test_cosine_penalty_equals_the_numbers_by_hand():
    """(1 - cos(pi l / L)) / 2 is 0 at 0, 0.25 at a third, 0.5 at the half, 0.75 at two thirds and 1 from L on."""
    penalties = cosine_penalties([0, 100, 150, 200, 300, 400], max_response_tokens=300, penalty=0.4)
    assert penalties == pytest.approx([0.0, -0.1, -0.2, -0.3, -0.4, -0.4])
