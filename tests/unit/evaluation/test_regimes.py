"""The regime rule on tasks whose regime is known, and the tests that it is made of against values of their own."""

from __future__ import annotations

import math
import random

import pytest
from regime_tasks import NONE, TASKS, rates

from megatron_prorl.evaluation.regimes import LEVEL, UNDECIDED, corrected, p_above, p_below, regime, student_t_tail


@pytest.mark.parametrize("dof", [1, 2, 3, 4, 9, 30])
def test_the_tail_of_students_distribution_is_the_integral_of_its_density(dof: int) -> None:
    scale = math.exp(math.lgamma((dof + 1) / 2) - math.lgamma(dof / 2)) / math.sqrt(dof * math.pi)
    for t in (-1.5, 0.0, 0.7, 2.5):
        # Of u = 1 / (1 + x - t), so that the tail is an interval; by midpoints.
        points = [(i + 0.5) / 20_000 for i in range(20_000)]
        density = [scale * (1 + (t + 1 / u - 1) ** 2 / dof) ** (-(dof + 1) / 2) / u**2 for u in points]
        assert student_t_tail(t, dof) == pytest.approx(math.fsum(density) / 20_000, abs=1e-6)


def test_a_change_of_few_problems_is_no_proof() -> None:
    assert p_above([0.0] * 50) > 0.5
    assert p_above([0.0] * 49 + [1.0]) > 0.3
    assert p_above([0.2] * 50) < 0.01
    # Without a change in 20 problems, one in 20 of all may still be solved anew: 0.95**20 = 0.36.
    assert p_below([0.0] * 20, 0.05) > 0.36
    assert p_below([-0.3] * 50) == pytest.approx(p_above([0.3] * 50))


@pytest.mark.parametrize("name", TASKS)
def test_wrong_regimes_are_rarer_than_the_level(name: str) -> None:
    """400 tasks: above 36 a rate of 5% is refuted (binomial, one in 500)."""
    truth, _ = TASKS[name]
    found = rates(name, P=100, tasks=400, num_samples=64, k=32)
    wrong = sum(count for key, count in found.items() if key not in (truth, UNDECIDED))
    assert wrong <= 20, found  # half of what the level allows: the claims have several parts each


@pytest.mark.parametrize("name", [name for name, (truth, _) in TASKS.items() if truth != NONE and name != "slow"])
def test_regimes_are_named_from_200_problems(name: str) -> None:
    found = rates(name, P=200, tasks=100, num_samples=64, k=32)
    assert found[TASKS[name][0]] >= 90, found


def test_what_is_reported_beside_the_name() -> None:
    """64 problems and 4 samples: base solves none, the intermediate half of all, the final model every one, always."""
    found = regime([0] * 64, [4, 0] * 32, [4] * 64, num_samples=4, k=2)
    assert (found.name, found.early, found.late) == ("sustained", (0.5, 0.5), (0.5, 0.5))
    assert found.p["sustained"] <= LEVEL / 10 and found.p["diminished"] == found.p["plateau"] == 1.0
    assert regime([1] * 64, [1] * 64, [1] * 64, num_samples=4, k=2).name == UNDECIDED


def test_the_order_of_problems_does_not_matter_but_their_pairing_is_used() -> None:
    rng = random.Random(0)
    base = [rng.randint(0, 8) for _ in range(300)]
    rows = [(b, min(8, b + 1), min(8, b + 2)) for b in base]
    first = regime(*zip(*rows, strict=True), num_samples=8, k=2)  # type: ignore[misc]
    rng.shuffle(rows)
    again = regime(*zip(*rows, strict=True), num_samples=8, k=2)  # type: ignore[misc]
    assert first.p == pytest.approx(again.p)
    shuffled = [row[2] for row in rows]
    rng.shuffle(shuffled)
    apart = regime([row[0] for row in rows], [row[1] for row in rows], shuffled, num_samples=8, k=2)
    assert apart.p["sustained"] > first.p["sustained"]


def test_p_of_many_tasks_is_corrected_for_their_number() -> None:
    found = regime([0] * 64, [4, 0] * 32, [4] * 64, num_samples=4, k=2)
    assert corrected([found] * 3) == pytest.approx([3 * found.p["sustained"]] * 3)
