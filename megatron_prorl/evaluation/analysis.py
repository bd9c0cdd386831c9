"""What can be read from an evaluation's results: one function for each question, each on the numbers of right samples.

K is the k that stands for "with many tries": 128 where so many samples were drawn, else the largest power of 2 drawn.
"Base" is the first model and "final" the last; of three models or more the "intermediate" one is in the middle.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_prorl.errors import UserError
from megatron_prorl.evaluation.estimators import (
    RESAMPLES,
    Difference,
    Floats,
    Interval,
    bootstrap,
    holm,
    paired_difference,
    pass_at_k,
)
from megatron_prorl.evaluation.regimes import Regime, regime
from megatron_prorl.evaluation.results import OVERALL

RESULTS_FILE = "results.json"
MANY_TRIES = 128
BINS = 10  # of pass@1


@dataclass(frozen=True)
class Evaluation:
    """An evaluation's results.json, with what the analyses share."""

    folder: Path
    results: dict[str, Any]

    @property
    def name(self) -> str:
        return str(self.results["suite"]["name"])

    @property
    def models(self) -> list[str]:
        return list(self.results["models"])

    @property
    def num_samples(self) -> int:
        return int(self.results["samples"])

    @property
    def k(self) -> int:
        return min(MANY_TRIES, int(self.results["k"][-1]))

    @property
    def tasks(self) -> dict[str, dict[str, Any]]:
        """By name: domain, family, difficulty, out_of_distribution."""
        tasks: dict[str, dict[str, Any]] = self.results["suite"]["tasks"]
        return tasks

    @cached_property
    def domains(self) -> dict[str, list[str]]:
        """The tasks of each domain."""
        names = sorted({about["domain"] for about in self.tasks.values()})
        return {name: [task for task, about in self.tasks.items() if about["domain"] == name] for name in names}

    def correct(self, model: str, task: str) -> list[int]:
        """How many samples are right, problem by problem."""
        correct: list[int] = self.results["models"][model]["tasks"][task]["correct"]
        return correct

    def passes(self, model: str, task: str, k: int) -> Floats:
        """pass@k of each problem."""
        correct = self.correct(model, task)
        curves = {count: pass_at_k(self.num_samples, count)[k - 1] for count in set(correct)}
        return np.array([curves[count] for count in correct])

    def interval(self, model: str, task: str, k: int) -> Interval:
        """pass@k of a task, or OVERALL, as the results have it; k is one of theirs."""
        found = self.results["models"][model]
        row = found[OVERALL] if task == OVERALL else found["tasks"][task]
        return Interval(**row["pass_at_k"][self.results["k"].index(k)])


def read_evaluation(folder: str | Path) -> Evaluation:
    """Raises UserError for results that are damaged or of an older version."""
    path = Path(folder) / RESULTS_FILE
    try:
        found = Evaluation(Path(folder), json.loads(path.read_bytes()))
        for model in found.models:
            for task in found.tasks:
                if len(found.correct(model, task)) != len(found.correct(found.models[0], task)):
                    raise ValueError("models were asked different problems")
        lengths(found)
    except (ValueError, LookupError, TypeError, AttributeError):
        raise UserError(f"{path}: not the results of prorl eval; run the evaluation again, its samples stay") from None
    return found


def domain_curves(evaluation: Evaluation) -> dict[str, dict[str, list[Interval]]]:
    """pass@k of each domain and model for the k of the results: means over the domain's tasks."""
    ks = evaluation.results["k"]

    def curve(model: str, tasks: Sequence[str]) -> list[Interval]:
        strata = [np.array([evaluation.passes(model, task, k) for k in ks]).T for task in tasks]
        return bootstrap(strata, seed=0)

    return {
        domain: {model: curve(model, tasks) for model in evaluation.models}
        for domain, tasks in evaluation.domains.items()
    }


def three_models(evaluation: Evaluation) -> tuple[str, str, str] | None:
    """Base, intermediate and final; None if there are not three."""
    models = evaluation.models
    return (models[0], models[len(models) // 2], models[-1]) if len(models) > 2 else None


def regimes(evaluation: Evaluation) -> dict[str, Regime]:
    """Of each task; {} without three models."""
    models = three_models(evaluation)
    if models is None:
        return {}
    base, intermediate, final = models
    return {
        task: regime(
            evaluation.correct(base, task),
            evaluation.correct(intermediate, task),
            evaluation.correct(final, task),
            num_samples=evaluation.num_samples,
            k=evaluation.k,
        )
        for task in evaluation.tasks
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class Correlation:
    """Spearman's, with a 95% interval from resampled pairs and the p of a permutation test, two-sided."""

    value: float
    low: float
    high: float
    p: float
    num: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Gains:
    """How much better the final model is by task, against how good the base model was: all at pass@K."""

    base: dict[str, float]
    final: dict[str, float]
    relative: dict[str, float]  # (final - base) / base; tasks that the base model never solves have none
    correlation: Correlation | None  # of base and relative gain; None with fewer than 4 tasks
    # The same with base and gain from samples of their own, at K / 2: free of what the noise that both share makes.
    apart: Correlation | None


def relative_gains(evaluation: Evaluation, *, seed: int = 0) -> Gains:
    """The final model's gain over the base model's pass@K.

    A gain is measured from the same base value that it is compared with, so that noise in it alone makes the two
    correlate negatively (Oldham 1962, J. chron. Dis. 15). `apart` splits each problem's samples in two: base pass@K/2
    is of one half, the gain of the other.
    """
    first, last, k = evaluation.models[0], evaluation.models[-1], evaluation.k
    base = {task: float(evaluation.passes(first, task, k).mean()) for task in evaluation.tasks}
    final = {task: float(evaluation.passes(last, task, k).mean()) for task in evaluation.tasks}
    relative = {task: (final[task] - base[task]) / base[task] for task in base if base[task] > 0.0}
    pairs = [(base[task], gain) for task, gain in relative.items()]
    halves = []
    rng = np.random.default_rng(seed)
    n = evaluation.num_samples
    if k >= 2:
        for task in relative:
            there = _split(evaluation.correct(first, task), n, rng)
            here = _split(evaluation.correct(last, task), n, rng)
            left, right, gained = (float(_pass(counts, n // 2, k // 2)) for counts in (*there, here[1]))
            if right > 0.0:
                halves.append((left, (gained - right) / right))
    return Gains(
        base=base,
        final=final,
        relative=relative,
        correlation=spearman(pairs, seed=seed),
        apart=spearman(halves, seed=seed),
    )


def spearman(pairs: Sequence[tuple[float, float]], *, seed: int, resamples: int = RESAMPLES) -> Correlation | None:
    """Of at least four pairs that differ in both values; None otherwise."""
    if len(pairs) < 4:
        return None
    x, y = (np.array(values, dtype=np.float64) for values in zip(*pairs, strict=True))
    if len(set(x)) == 1 or len(set(y)) == 1:
        return None
    rng = np.random.default_rng(seed)
    value = _pearson(_ranks(x), _ranks(y))
    drawn = rng.integers(len(x), size=(resamples // 5, len(x)))
    values = [_pearson(_ranks(x[row]), _ranks(y[row])) for row in drawn]
    low, high = np.nanquantile(values, [0.025, 0.975])
    ranks = _ranks(x), _ranks(y)
    permuted = [_pearson(ranks[0], rng.permutation(ranks[1])) for _ in range(resamples)]
    as_far = int((np.abs(permuted) >= abs(value) - 1e-12).sum())
    return Correlation(value=value, low=float(low), high=float(high), p=(as_far + 1) / (resamples + 1), num=len(x))


@dataclass(frozen=True, slots=True, kw_only=True)
class Shift:
    """How a model's pass@1 is distributed over a domain's problems, and how far that is from the base model's."""

    histogram: list[float]  # shares of the problems, in BINS equal parts of [0, 1]
    mean: Interval  # over the domain's tasks
    never: float  # shares of problems that no sample solves, and that all do
    always: float
    newly: float  # shares solved here and never by the base model, and the other way round
    lost: float
    distance: float  # Wasserstein's from the base model's distribution: what a problem's pass@1 changes by at least
    change: Difference  # of the mean, against the base model


def distribution_shift(evaluation: Evaluation) -> dict[str, dict[str, Shift]]:
    """By domain and model."""
    base, n = evaluation.models[0], evaluation.num_samples
    found: dict[str, dict[str, Shift]] = {}
    for domain, tasks in evaluation.domains.items():
        before = np.array([count for task in tasks for count in evaluation.correct(base, task)])
        reference = [evaluation.passes(base, task, 1) for task in tasks]
        found[domain] = {}
        for model in evaluation.models:
            counts = np.array([count for task in tasks for count in evaluation.correct(model, task)])
            values = [evaluation.passes(model, task, 1) for task in tasks]
            bins = np.minimum(counts * BINS // n, BINS - 1)
            found[domain][model] = Shift(
                histogram=(np.bincount(bins, minlength=BINS) / len(counts)).tolist(),
                mean=bootstrap(values, seed=0)[0],
                never=float((counts == 0).mean()),
                always=float((counts == n).mean()),
                newly=float(((before == 0) & (counts > 0)).mean()),
                lost=float(((before > 0) & (counts == 0)).mean()),
                distance=float(np.abs(np.sort(counts) - np.sort(before)).mean() / n),
                change=paired_difference(values, reference, seed=0),
            )
    return found


def sweeps(evaluation: Evaluation) -> dict[tuple[str, str], list[tuple[float, str]]]:
    """Tasks of one family by difficulty: {(family, what is varied): [(value, task), ...]}, where there are several."""
    found: dict[tuple[str, str], list[tuple[float, str]]] = {}
    for task, about in evaluation.tasks.items():
        for what, value in about["difficulty"].items():
            found.setdefault((about["family"], what), []).append((value, task))
    return {key: sorted(points) for key, points in found.items() if len(points) > 1}


@dataclass(frozen=True, slots=True, kw_only=True)
class Outside:
    """A task out of the training distribution, or the mean of several."""

    pass_at_1: dict[str, Interval]  # by model
    change: dict[str, Difference]  # of pass@1 against the base model, by every other model
    p: dict[str, float]  # of the change, after Holm's correction for the number of these tasks


def out_of_distribution(evaluation: Evaluation) -> dict[str, Outside]:
    """The tasks that training has nothing like, but for those of a sweep; last the mean of them, and of the others.

    {} if there are none.
    """
    base, *others = evaluation.models
    alone = {task: not about["difficulty"] for task, about in evaluation.tasks.items()}
    outside = [task for task, about in evaluation.tasks.items() if about["out_of_distribution"] and alone[task]]
    inside = [task for task, about in evaluation.tasks.items() if not about["out_of_distribution"]]
    if not outside:
        return {}
    groups = {task: [task] for task in outside}
    if len(outside) > 1:
        groups["mean of these"] = outside
    if inside:
        groups["mean in distribution"] = inside
    values = {
        model: {task: evaluation.passes(model, task, 1) for task in evaluation.tasks} for model in evaluation.models
    }

    def changes(model: str) -> dict[str, Difference]:
        return {
            name: paired_difference([values[model][t] for t in tasks], [values[base][t] for t in tasks], seed=0)
            for name, tasks in groups.items()
        }

    change = {model: changes(model) for model in others}
    corrected = {
        model: dict(zip(outside, holm([change[model][task].p for task in outside]), strict=True)) for model in others
    }
    return {
        name: Outside(
            pass_at_1={
                model: bootstrap([values[model][task] for task in tasks], seed=0)[0] for model in evaluation.models
            },
            change={model: change[model][name] for model in others},
            p={model: corrected[model].get(name, change[model][name].p) for model in others},
        )
        for name, tasks in groups.items()
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class Length:
    """How many tokens a model's samples have."""

    samples: int
    tokens: float  # mean
    tokens_right: float | None  # means of the samples that pass and of the others; None where there are none
    tokens_wrong: float | None
    quantiles: list[float]  # at results.LENGTH_QUANTILES
    truncated: float  # share that was cut at the maximum


def lengths(evaluation: Evaluation) -> dict[str, dict[str, Length]]:
    """By domain and model."""
    found = evaluation.results["lengths"]
    return {
        domain: {model: Length(**found[model][domain]) for model in evaluation.models} for domain in evaluation.domains
    }


def _split(correct: Sequence[int], num_samples: int, rng: np.random.Generator) -> tuple[NDArray[np.int64], ...]:
    """Right samples in each half of every problem's samples, drawn at random; of an odd number one is left out."""
    counts = np.array(correct)
    half = num_samples // 2
    first = rng.hypergeometric(counts, num_samples - counts, half)
    rest = counts - first
    second = rng.hypergeometric(rest, num_samples - half - rest, half)
    return first, second


def _pass(counts: NDArray[np.int64], num_samples: int, k: int) -> float:
    curves: Mapping[int, float] = {count: pass_at_k(num_samples, count)[k - 1] for count in set(counts.tolist())}
    return float(np.mean([curves[count] for count in counts.tolist()]))


def _ranks(values: Floats) -> Floats:
    """1 for the lowest; equal values share the mean of their ranks."""
    _, place, count = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(count)
    return (ends - (count - 1) / 2)[place]


def _pearson(x: Floats, y: Floats) -> float:
    """NaN where all of one are equal."""
    a, b = x - x.mean(), y - y.mean()
    scale = float(np.sqrt((a @ a) * (b @ b)))
    return float(a @ b) / scale if scale else float("nan")
