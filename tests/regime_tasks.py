"""Tasks whose regime is known, and how often the rule of `evaluation.regimes` names it: python tests/regime_tasks.py

A task is a population of problems, each with three models' chances of a right answer; problems and samples are drawn
from it. "nothing", "pass@1 alone", "sharpened late" and "lost again" are none of the three: every claim about them is
wrong.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from megatron_prorl.evaluation.regimes import MARGIN, UNDECIDED, Regime, regime

Chances = NDArray[np.float64]  # [3, P], base, intermediate, final
UNSOLVED = 0.4  # of the base model's problems
NONE = "none"


def sigmoid(x: Chances) -> Chances:
    return 1.0 / (1.0 + np.exp(-x))


def draw(rng: np.random.Generator, P: int, gains: tuple[float, float], solved: tuple[float, float]) -> Chances:
    """Problems that the base model solves now and then gain `gains` in log-odds by the later models; of those that it
    cannot solve the shares `solved` become solvable."""
    ability, place, unsolved = rng.normal(0.0, 1.5, P), rng.random(P), rng.random(P) < UNSOLVED
    rows = [np.where(unsolved, 0.0, sigmoid(ability))]
    for gain, share in zip(gains, solved, strict=True):
        rows.append(np.where(unsolved, np.where(place < share, sigmoid(ability), 0.0), sigmoid(ability + gain)))
    return np.array(rows)


def forget(chances: Chances, rng: np.random.Generator, shares: tuple[float, float]) -> Chances:
    """The later models have lost these shares of the problems altogether."""
    place = rng.random(chances.shape[1])
    for model, share in zip((1, 2), shares, strict=True):
        chances[model, place < share] = 0.0
    return chances


TASKS: dict[str, tuple[str, Callable[[np.random.Generator, int], Chances]]] = {
    "diminished": ("diminished", lambda rng, P: forget(draw(rng, P, (1.5, 3.0), (0.0, 0.0)), rng, (0.08, 0.16))),
    "plateau": ("plateau", lambda rng, P: draw(rng, P, (1.0, 1.0), (0.5, 0.5))),
    "sustained": ("sustained", lambda rng, P: draw(rng, P, (1.0, 2.0), (0.4, 0.8))),
    "nothing": (NONE, lambda rng, P: draw(rng, P, (0.0, 0.0), (0.0, 0.0))),
    "pass@1 alone": (NONE, lambda rng, P: draw(rng, P, (1.0, 2.0), (0.0, 0.0))),
    # On the edge of a claim, where the chance that it is made wrongly is highest: late, pass@k gains nothing though
    # pass@1 does (sustained); it loses the margin, or gains it (plateau). The last is sustained, if slowly.
    "sharpened late": (NONE, lambda rng, P: draw(rng, P, (1.0, 2.0), (0.5, 0.5))),
    "lost again": (NONE, lambda rng, P: forget(draw(rng, P, (1.0, 1.0), (0.5, 0.5)), rng, (0.0, MARGIN / 0.8))),
    "slow": ("sustained", lambda rng, P: draw(rng, P, (1.0, 1.0), (0.5, 0.5 + MARGIN / UNSOLVED))),
}


def decide(name: str, rng: np.random.Generator, *, P: int, num_samples: int, k: int) -> Regime:
    """The rule on one drawn task of this name."""
    base, intermediate, final = rng.binomial(num_samples, TASKS[name][1](rng, P))
    return regime(base.tolist(), intermediate.tolist(), final.tolist(), num_samples=num_samples, k=k)


def rates(name: str, *, P: int, tasks: int, num_samples: int = 256, k: int = 128, seed: int = 0) -> Counter[str]:
    """Of so many drawn tasks, what the rule says."""
    rng = np.random.default_rng([seed, P])
    return Counter(decide(name, rng, P=P, num_samples=num_samples, k=k).name for _ in range(tasks))


def main(tasks: int = 1000) -> None:
    print("| truth | problems | named | undecided | wrong | as |\n|---|--:|--:|--:|--:|---|")
    for name, (truth, _) in TASKS.items():
        for P in (50, 100, 200, 400):
            found = rates(name, P=P, tasks=tasks)
            wrong = {key: count / tasks for key, count in found.items() if key not in (truth, UNDECIDED)}
            named = "" if truth == NONE else f"{found[truth] / tasks:.1%}"
            said = ", ".join(f"{key} {share:.1%}" for key, share in wrong.items())
            print(f"| {name} | {P} | {named} | {found[UNDECIDED] / tasks:.1%} | {sum(wrong.values()):.1%} | {said} |")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
