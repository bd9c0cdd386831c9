"""From samples to numbers: each model by task and overall, each model against the first, and a table to read."""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from megatron_prorl.evaluation.cache import Sample
from megatron_prorl.evaluation.estimators import (
    Floats,
    Interval,
    best_of_k,
    bootstrap,
    holm,
    paired_difference,
    pass_at_k,
    powers_of_two,
)

OVERALL = "overall"
LENGTH_QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)

ByTask = Mapping[str, Sequence[Sequence[Sample]]]  # for every problem of a task its n samples


def summarise(models: Mapping[str, ByTask], seed: int) -> dict[str, Any]:
    """Plain JSON: "k", "models" (by name: "overall" and "tasks") and "comparisons" with the first model.

    A task's "correct" are the numbers of samples that pass, problem by problem.

    A sample passes if its score is 1. "overall" is the mean over tasks. Intervals are of 95%, over problems.
    """
    (num_samples,) = {len(samples) for tasks in models.values() for of_task in tasks.values() for samples in of_task}
    ks = powers_of_two(num_samples)
    passes = {name: _values(tasks, ks, passed=True) for name, tasks in models.items()}
    found: dict[str, Any] = {"samples": num_samples, "k": ks, "models": {}}
    for name, tasks in models.items():
        best = _values(tasks, ks, passed=False)
        found["models"][name] = {
            OVERALL: _summary(tasks, list(passes[name].values()), list(best.values()), seed),
            "tasks": {
                task: _summary({task: tasks[task]}, [passes[name][task]], [best[task]], seed)
                | {"correct": [sum(sample.score >= 1.0 for sample in samples) for samples in tasks[task]]}
                for task in tasks
            },
        }
    first, *others = passes
    found["comparisons"] = [
        _comparison(other, first, passes[other], passes[first], column, ks[column], seed)
        for other, column in itertools.product(others, sorted({0, len(ks) - 1}))
    ]
    return found


def lengths_by_domain(models: Mapping[str, ByTask], domains: Mapping[str, str]) -> dict[str, Any]:
    """Of each model's samples by the domain of their task: how many tokens they have, and how many were cut."""
    found: dict[str, Any] = {}
    for name, tasks in models.items():
        samples: defaultdict[str, list[Sample]] = defaultdict(list)
        for task, problems in tasks.items():
            samples[domains[task]] += itertools.chain.from_iterable(problems)
        found[name] = {domain: _lengths(of_domain) for domain, of_domain in sorted(samples.items())}
    return found


def table(results: Mapping[str, Any]) -> str:
    """Markdown: of every model pass@1 with its interval and pass@k, overall and by task, and the comparisons."""
    ks = results["k"]
    header = [
        "task",
        "problems",
        "model",
        "pass@1 (95%)",
        *(f"pass@{k}" for k in ks[1:]),
        "mean score",
        "tokens",
        "cut",
    ]
    rows = []
    for task in [OVERALL, *next(iter(results["models"].values()))["tasks"]]:
        for name, model in results["models"].items():
            row = model[OVERALL] if task == OVERALL else model["tasks"][task]
            passed = row["pass_at_k"]
            rows.append(
                [
                    task,
                    str(row["problems"]),
                    name,
                    _interval(passed[0]),
                    *(f"{100 * interval['mean']:.1f}" for interval in passed[1:]),
                    f"{100 * row['best_of_k'][0]['mean']:.1f}",
                    f"{row['tokens']:.0f}",
                    f"{100 * row['truncated']:.1f}%",
                ]
            )
    parts = [_markdown(header, rows)]
    for comparison in results["comparisons"]:
        rows = [
            [task, _interval(row, sign="+"), f"{row['p']:.4f}", f"{row['p_holm']:.4f}" if "p_holm" in row else ""]
            for task, row in [(OVERALL, comparison[OVERALL]), *comparison["tasks"].items()]
        ]
        title = f"pass@{comparison['k']} of {comparison['model']} minus {comparison['against']}"
        parts.append(_markdown([title, "points (95%)", "p", "p, Holm"], rows))
    return "\n".join(parts)


def _values(tasks: ByTask, ks: Sequence[int], *, passed: bool) -> dict[str, Floats]:
    """[P, K] of every task: pass@k, or the best score of k, of each problem."""
    places = np.array(ks) - 1
    found = {}
    for task, problems in tasks.items():
        rows = []
        for samples in problems:
            scores = [sample.score for sample in samples]
            curve = pass_at_k(len(scores), sum(score >= 1.0 for score in scores)) if passed else best_of_k(scores)
            rows.append(curve[places])
        found[task] = np.array(rows)
    return found


def _summary(tasks: ByTask, passes: list[Floats], best: list[Floats], seed: int) -> dict[str, Any]:
    samples = [sample for problems in tasks.values() for of_problem in problems for sample in of_problem]
    return {
        "problems": sum(len(problems) for problems in tasks.values()),
        "pass_at_k": [asdict(interval) for interval in bootstrap(passes, seed=seed)],
        "best_of_k": [asdict(interval) for interval in bootstrap(best, seed=seed)],
        "tokens": sum(sample.num_tokens for sample in samples) / len(samples),
        "truncated": sum(sample.truncated for sample in samples) / len(samples),
        "reasons": dict(sorted(Counter(sample.reason for sample in samples).items())),
    }


def _lengths(samples: Sequence[Sample]) -> dict[str, Any]:
    """Mean, the mean of those that pass and of the others (null where there are none), and LENGTH_QUANTILES."""
    lengths = np.array([sample.num_tokens for sample in samples])
    passed = np.array([sample.score >= 1.0 for sample in samples])

    def mean(chosen: Any) -> float | None:
        return float(lengths[chosen].mean()) if chosen.any() else None

    return {
        "samples": len(samples),
        "tokens": float(lengths.mean()),
        "tokens_right": mean(passed),
        "tokens_wrong": mean(~passed),
        "quantiles": np.quantile(lengths, LENGTH_QUANTILES).tolist(),
        "truncated": sum(sample.truncated for sample in samples) / len(samples),
    }


def _comparison(
    model: str,
    against: str,
    ours: Mapping[str, Floats],
    theirs: Mapping[str, Floats],
    column: int,
    k: int,
    seed: int,
) -> dict[str, Any]:
    """p by task is corrected for the number of tasks (`p_holm`)."""
    left = {task: values[:, column] for task, values in ours.items()}
    right = {task: values[:, column] for task, values in theirs.items()}
    tasks = {task: asdict(paired_difference([left[task]], [right[task]], seed=seed)) for task in left}
    for row, p in zip(tasks.values(), holm([row["p"] for row in tasks.values()]), strict=True):
        row["p_holm"] = p
    overall = paired_difference(list(left.values()), list(right.values()), seed=seed)
    return {"model": model, "against": against, "k": k, OVERALL: asdict(overall), "tasks": tasks}


def by_task(samples: Sequence[tuple[str, Sequence[Sample]]]) -> dict[str, list[Sequence[Sample]]]:
    """(task, samples of a problem) by task, in the order of their first problems."""
    found: defaultdict[str, list[Sequence[Sample]]] = defaultdict(list)
    for task, of_problem in samples:
        found[task].append(of_problem)
    return dict(found)


def _interval(row: Mapping[str, float] | Interval, sign: str = "") -> str:
    values = row if isinstance(row, Mapping) else asdict(row)
    mean, low, high = (f"{100 * values[key]:{sign}.1f}" for key in ("mean", "low", "high"))
    return f"{mean} ({low} to {high})"


def _markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    numbers = [False, *(all(row[i][:1].isdigit() or row[i][:1] in "+-" for row in rows) for i in range(1, len(header)))]

    def line(cells: Sequence[str]) -> str:
        padded = [
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(cells, widths, numbers, strict=True)
        ]
        return f"| {' | '.join(padded)} |"

    rule = [f"{'-' * (width - 1)}{':' if right else '-'}" for width, right in zip(widths, numbers, strict=True)]
    return "\n".join([line(header), f"| {' | '.join(rule)} |", *map(line, rows), ""])
