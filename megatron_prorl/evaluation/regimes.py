"""Which of ProRL's three regimes a task is in, by tests over its problems.

The regimes are those of ProRL (arXiv:2505.24864), which tells them apart by eye. Here each is a claim about
the expected pass@1 and pass@k of three models, from the problems that all three were asked:

    diminished   final above base at pass@1, and below it at pass@k
    plateau      intermediate above base at both; final within `margin` of intermediate at both
    sustained    intermediate above base, and final above intermediate, at both

A claim has several parts and is made if each part is tested at level / 3: the test of the whole then has that level
whatever its parts have to do with each other (intersection-union test, Berger 1982, Technometrics 24), and one of three
claims is wrong with a probability of at most `level`. Where none can be made the task is "undecided", which says that
there are too few problems, that the gains are too small, or that the course was another one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_prorl.evaluation.estimators import Floats, holm, pass_at_k

UNDECIDED = "undecided"
REGIMES = ("diminished", "plateau", "sustained")
LEVEL = 0.05
MARGIN = 0.05  # a change of pass@k below 5 points counts as none


@dataclass(frozen=True, slots=True, kw_only=True)
class Regime:
    """What can be said of a task. `p` are those of the three claims, each three times its weakest part's."""

    name: str
    p: dict[str, float]
    early: tuple[float, float]  # intermediate minus base: pass@1, pass@k
    late: tuple[float, float]  # final minus intermediate


def regime(
    base_P: Sequence[int],
    intermediate_P: Sequence[int],
    final_P: Sequence[int],
    *,
    num_samples: int,
    k: int,
    level: float = LEVEL,
    margin: float = MARGIN,
) -> Regime:
    """From how many of `num_samples` samples were right, problem by problem, in the same order for all three models."""
    base, intermediate, final = (_at_1_and_k(correct, num_samples, k) for correct in (base_P, intermediate_P, final_P))
    early, late, total = intermediate - base, final - intermediate, final - base
    parts = {
        "diminished": [p_above(total[0]), p_below(total[1])],
        "plateau": [
            *(p_above(change) for change in early),
            *(p_below(change, margin) for change in late),
            *(p_above(change, -margin) for change in late),
        ],
        "sustained": [p_above(change) for change in (*early, *late)],
    }
    p = {name: min(1.0, len(REGIMES) * max(of_claim)) for name, of_claim in parts.items()}
    claimed = [name for name in REGIMES if p[name] <= level]
    return Regime(
        name=claimed[0] if claimed else UNDECIDED,
        p=p,
        early=(float(early[0].mean()), float(early[1].mean())),
        late=(float(late[0].mean()), float(late[1].mean())),
    )


def corrected(regimes: Sequence[Regime]) -> list[float]:
    """p of each task's likeliest claim after Holm's correction for the number of tasks."""
    return holm([min(found.p.values()) for found in regimes])


def p_above(change_P: Floats, bound: float = 0.0) -> float:
    """One-sided p of a mean change of at most `bound`, for problems' changes within [-1, 1].

    Student's t, with one more problem that speaks against the claim as far as any could, a change of -1: where most
    changes are 0 the few others would make the spread look far smaller than it may be.
    """
    values = np.append(change_P, -1.0) - bound
    error = float(values.std(ddof=1)) / math.sqrt(len(values))
    return student_t_tail(float(values.mean()) / error, len(values) - 1) if error else 1.0


def p_below(change_P: Floats, bound: float = 0.0) -> float:
    """The same of a mean change of at least `bound`."""
    return p_above(-np.asarray(change_P), -bound)


def student_t_tail(t: float, dof: int) -> float:
    """Probability above `t` of Student's distribution with a whole number of degrees of freedom.

    Abramowitz and Stegun, Handbook of Mathematical Functions, 26.7.3 and 26.7.4.
    """
    angle = math.atan(t / math.sqrt(dof))
    square = math.cos(angle) ** 2
    odd = dof % 2
    term = math.cos(angle) if odd else 1.0
    series = 0.0 if dof == 1 else term
    for i in range(3 if odd else 2, dof - 1, 2):
        term *= square * (i - 1) / i
        series += term
    inside = math.sin(angle) * series
    if odd:
        inside = (angle + inside) * 2 / math.pi
    return (1.0 - inside) / 2


def _at_1_and_k(correct_P: Sequence[int], num_samples: int, k: int) -> Floats:
    """[2, P]: pass@1 and pass@k of each problem."""
    curves = {correct: pass_at_k(num_samples, correct) for correct in set(correct_P)}
    return np.array([[curves[correct][place] for correct in correct_P] for place in (0, k - 1)])
