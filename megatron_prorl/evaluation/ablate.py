"""A grid of small runs, arms times seeds, one after the other, and what differs between the arms.

A run is `prorl train` in a process of its own, so a grid that was interrupted goes on where it stopped, and every run
can be looked at, replayed or prolonged by itself. No torch here.
"""

from __future__ import annotations

import csv
import math
import re
import signal
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field, ValidationError

from megatron_prorl.checkpoint.folders import latest_checkpoint, read_state
from megatron_prorl.config.load import ConfigError, describe, load_config, read_yaml, set_option
from megatron_prorl.config.schema import Config, NonEmpty, NonNegative, Section
from megatron_prorl.config.stages import ended_by
from megatron_prorl.errors import RunStopped, ToldToEnd, UserError
from megatron_prorl.evaluation.display import CountDisplay
from megatron_prorl.evaluation.estimators import holm
from megatron_prorl.tracking.metrics import read_metrics

LEVEL = 0.95


class Grid(Section):
    """What GRID.yaml says; its paths are relative to itself, but `out` to where the command is called."""

    base: NonEmpty = Field(description="configuration that every run has below its own options")
    out: NonEmpty = Field(description="folder for the runs and what they show")
    seeds: list[NonNegative] = Field(min_length=1, description="of each arm; runs of one seed get the same problems")
    arms: dict[str, dict[str, Any]] = Field(
        min_length=2, description="name to options, as algorithm.kl.coefficient: 0; `extends` names a preset"
    )
    control: NonEmpty = Field(description="the arm that the others are compared with")
    score: NonEmpty = Field("validation/reward", description="metric of the last validation that is compared")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Run:
    arm: str
    seed: int
    config: Path
    run_dir: Path

    @property
    def name(self) -> str:
        return f"{self.arm}, seed {self.seed}"

    def words(self) -> list[str]:
        return [str(self.config), f"run_dir={self.run_dir}", f"seed={self.seed}"]

    def is_finished(self, cfg: Config) -> bool:
        checkpoint = latest_checkpoint(self.run_dir)
        return bool(checkpoint and ended_by(cfg, read_state(checkpoint)["progress"]))


def ablate(path: str | Path) -> str:
    """Run what is left of the grid and write its table and figure; returns the table.

    Every configuration is checked before the first run starts. Raises UserError for a grid with a mistake, and at the
    end if a run failed, whose log it names; the others are run all the same.
    """
    grid = load_grid(path)
    runs = _plan(Path(path), grid)
    configs = {run: load_config(run.words()[0], run.words()[1:]) for run in runs}
    left = [run for run in runs if not run.is_finished(configs[run])]
    failed = []
    with CountDisplay("runs", len(runs) - len(left)) as display:
        for number, run in enumerate(left, len(runs) - len(left) + 1):
            if problem := _train(run):
                failed.append(f"{run.name}: {problem}")
            display(number, len(runs))
    scores = {run: _score(run, grid.score) for run in runs if run.is_finished(configs[run])}
    out = Path(grid.out)
    table = _write(out, grid, scores)
    if scores:
        _draw(out / "ablation.png", grid, runs)
    if failed:
        raise UserError("\n".join([*failed, f"{len(failed)} of {len(runs)} runs failed; call the same again to go on"]))
    return table


def load_grid(path: str | Path) -> Grid:
    """Raises ConfigError for anything that is not a grid."""
    try:
        grid = Grid.model_validate(read_yaml(path), strict=True)
    except ValidationError as error:
        problems = [problem for detail in error.errors() for problem in describe(detail, Grid)]
        raise ConfigError([f"{path}: {problem}" for problem in problems]) from None
    if grid.control not in grid.arms:
        raise ConfigError([f"{path}: control: {grid.control} is none of the arms: {', '.join(grid.arms)}"])
    if len({_slug(arm) for arm in grid.arms}) < len(grid.arms):
        raise ConfigError([f"{path}: arms: two names differ in nothing that a folder's name may hold"])
    return grid


def _plan(path: Path, grid: Grid) -> list[_Run]:
    """The runs, seed by seed, so that what there is after an interruption compares; writes each arm's configuration."""
    out = Path(grid.out)
    configs = {}
    for arm, options in grid.arms.items():
        document: dict[str, Any] = {"extends": [grid.base]}
        for key, value in options.items():
            if key == "extends":
                document["extends"] += [value] if isinstance(value, str) else value
            else:
                set_option(document, key, value, f"{path}: arms.{arm}.{key}")
        document["extends"] = [str((path.parent / base).resolve()) for base in document["extends"]]
        configs[arm] = out / f"{_slug(arm)}.yaml"
        out.mkdir(parents=True, exist_ok=True)
        configs[arm].write_text(yaml.safe_dump(document, sort_keys=False), encoding="utf-8")
    return [
        _Run(arm=arm, seed=seed, config=config, run_dir=out / _slug(arm) / f"seed-{seed}")
        for seed in grid.seeds
        for arm, config in configs.items()
    ]


def _slug(arm: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", arm.lower()).strip("-") or "arm"


def _train(run: _Run) -> str:
    """Returns what went wrong, in a line; empty if nothing did. Raises ToldToEnd if the run was."""
    run.run_dir.parent.mkdir(parents=True, exist_ok=True)
    log = run.run_dir.with_suffix(".log")
    command = [sys.executable, "-m", "megatron_prorl.cli", "train", *run.words()]
    with log.open("ab") as file, subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT) as process:
        before = signal.signal(signal.SIGTERM, lambda *_: process.terminate())  # it saves its last step first
        try:
            code = process.wait()
        finally:
            signal.signal(signal.SIGTERM, before)
            process.terminate()
    if code == ToldToEnd.exit_code:
        raise ToldToEnd(f"{run.name} was told to end; the same command goes on from there")
    if code == 0:
        return ""
    last = next((line for line in reversed(log.read_text(errors="replace").splitlines()) if line.strip()), "")
    return f"{'stopped by a guard' if code == RunStopped.exit_code else f'exit code {code}'}: {last} (see {log})"


def _score(run: _Run, score: str) -> float:
    found = [row[score] for row in read_metrics(run.run_dir) if score in row]
    if not found:
        raise UserError(f"score: {score} is in no row of {run.run_dir}/metrics.jsonl; give one that validation logs")
    return found[-1]


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """An arm's scores, and how far above the control's they are, seed by seed; of one seed there is no interval."""

    arm: str
    scores: list[float]
    mean: float
    difference: float | None = None
    low: float | None = None
    high: float | None = None
    p: float | None = None  # corrected for the number of arms (Holm)


def compare(scores: Mapping[str, Mapping[int, float]], control: str) -> list[Comparison]:
    """Of arms' scores by seed: means, and paired differences from `control` over the seeds that both have.

    Intervals and p are Student's for the mean of the differences (Student 1908), which supposes that they are normal:
    of three seeds the interval is 4.3 standard errors to either side.
    """
    rows, p_values = [], []
    for arm, by_seed in scores.items():
        row: dict[str, Any] = {"arm": arm, "scores": list(by_seed.values()), "mean": statistics.fmean(by_seed.values())}
        common = sorted(by_seed.keys() & scores.get(control, {}).keys())
        if arm != control and common:
            differences = [by_seed[seed] - scores[control][seed] for seed in common]
            row["difference"] = statistics.fmean(differences)
            if len(differences) > 1:
                error = statistics.stdev(differences) / math.sqrt(len(differences))
                reach = student_quantile(0.5 + LEVEL / 2, len(differences) - 1) * error
                row |= {"low": row["difference"] - reach, "high": row["difference"] + reach}
                p_values.append(_p(row["difference"], error, len(differences) - 1))
                row["p"] = len(p_values) - 1
        rows.append(row)
    corrected = holm(p_values)
    return [Comparison(**(row | ({"p": corrected[row["p"]]} if "p" in row else {}))) for row in rows]


def student_quantile(probability: float, degrees: int) -> float:
    """Student's t below which a share `probability` > 0.5 of the distribution lies, to 1e-9."""
    low, high = 0.0, 1.0
    while _student(high, degrees) < probability:
        high *= 2
    while high - low > 1e-9 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if _student(middle, degrees) < probability else (low, middle)
    return (low + high) / 2


def _student(t: float, degrees: int) -> float:
    """Share of Student's distribution below t >= 0 (Abramowitz and Stegun, 26.7.1)."""
    from mpmath import betainc

    return 1.0 - 0.5 * float(betainc(degrees / 2, 0.5, 0, degrees / (degrees + t * t), regularized=True))


def _p(difference: float, error: float, degrees: int) -> float:
    if error == 0.0:
        return 1.0 if difference == 0.0 else 0.0
    return 2.0 * (1.0 - _student(abs(difference) / error, degrees))


def _write(out: Path, grid: Grid, scores: Mapping[_Run, float]) -> str:
    """`ablation.csv` with every run, and `ablation.md` with every arm; returns the latter."""
    by_arm: dict[str, dict[int, float]] = {}
    with (out / "ablation.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["arm", "seed", grid.score, "run_dir"])
        for run, score in scores.items():
            by_arm.setdefault(run.arm, {})[run.seed] = score
            writer.writerow([run.arm, run.seed, score, run.run_dir])
    lines = [
        f"| arm | seeds | {grid.score} | above *{grid.control}*, seed by seed | 95% | p (Holm) |",
        "|---|---|---|---|---|---|",
    ]
    for row in compare({arm: by_arm[arm] for arm in grid.arms if arm in by_arm}, grid.control):
        spread = f"{row.mean:.3f} ({', '.join(f'{score:.3f}' for score in row.scores)})"
        difference = "" if row.difference is None else f"{row.difference:+.3f}"
        interval = "" if row.low is None or row.high is None else f"{row.low:+.3f} to {row.high:+.3f}"
        p = "" if row.p is None else f"{row.p:.3f}"
        lines.append(f"| {row.arm} | {len(row.scores)} | {spread} | {difference} | {interval} | {p} |")
    table = "\n".join(lines) + "\n"
    (out / "ablation.md").write_text(table, encoding="utf-8")
    return table


def _draw(path: Path, grid: Grid, runs: Sequence[_Run]) -> None:
    """The score of every arm over the steps: mean of its seeds, and a band from the lowest to the highest."""
    from megatron_prorl.tracking.plots import COLOURS, dress, new_figure

    figure = new_figure(7.2, 4.4)
    axes = figure.subplots()
    for arm, colour in zip(grid.arms, cycle(COLOURS), strict=False):
        by_step: dict[float, list[float]] = {}
        for row in (row for run in runs if run.arm == arm for row in read_metrics(run.run_dir)):
            if grid.score in row:
                by_step.setdefault(row["step"], []).append(row[grid.score])
        steps = sorted(by_step)
        axes.fill_between(
            steps, [min(by_step[step]) for step in steps], [max(by_step[step]) for step in steps],
            color=colour, alpha=0.15, linewidth=0,
        )  # fmt: skip
        axes.plot(steps, [statistics.fmean(by_step[step]) for step in steps], color=colour, marker="o", label=arm)
    axes.set_xlabel("step")
    axes.set_ylabel(grid.score)
    dress(axes, f"{len(grid.seeds)} seeds: mean, lowest and highest")
    axes.legend(fontsize=8.5, framealpha=0.9, edgecolor="none")
    figure.savefig(path)
