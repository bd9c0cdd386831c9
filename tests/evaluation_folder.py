"""What `prorl eval` leaves, from numbers of right samples."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_prorl.evaluation.cache import Sample
from megatron_prorl.evaluation.results import lengths_by_domain, summarise

Counts = Mapping[str, Mapping[str, Sequence[int]]]  # model, task: right samples of each problem


def make_evaluation(folder: Path, counts: Counts, num_samples: int, name: str = "toys", **about: Any) -> Path:
    """An evaluation's folder; `about` has for a task what its entry in the suite says. A right answer has 10 tokens, a
    wrong one 20, and is cut in task "cut"."""
    tasks = list(next(iter(counts.values())))
    entries = {
        task: {"domain": "logic", "family": task, "difficulty": {}, "out_of_distribution": False} | about.get(task, {})
        for task in tasks
    }

    def samples(task: str, right: int) -> list[Sample]:
        wrong = Sample(0.0, "wrong", 20, task == "cut")
        return [Sample(1.0, "correct", 10, False)] * right + [wrong] * (num_samples - right)

    found = {
        model: {task: [samples(task, right) for right in of_task] for task, of_task in by_task.items()}
        for model, by_task in counts.items()
    }
    spec = {"suite": "5e17", "temperature": 0.6, "top_p": 0.95, "max_tokens": 64}
    results = {
        "suite": {"name": name, "digest": "5e17", "description": "Toys", "tasks": entries},
        "specs": {model: spec | {"model": model} for model in counts},
        "differences": [],
        "paths": {model: f"models/{model}" for model in counts},
        **summarise(found, seed=0),
        "lengths": lengths_by_domain(found, {task: entries[task]["domain"] for task in tasks}),
    }
    (folder / "samples").mkdir(parents=True)
    (folder / "results.json").write_text(json.dumps(results))
    for model, by_task in counts.items():
        rows = [
            {"problem": f"{task}/{i}", "sample": number, "score": 0.0, "text": f"the answer of {task} is {i} " * 2}
            for task, of_task in by_task.items()
            for i in range(len(of_task))
            for number in range(2)
        ]
        lines = [json.dumps(row) + "\n" for row in [spec, *rows]]
        (folder / "samples" / f"{model}.jsonl").write_text("".join(lines))
    return folder
