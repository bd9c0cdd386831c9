"""Runs as a report: how far each is, what it learned, and what that took, from their run directories alone.

Runs side by side share every pair of axes and have a colour each. No torch here.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_prorl.config.run_dir import differences, run_config
from megatron_prorl.errors import UserError
from megatron_prorl.report.content import Figure, Mark, Section, Series, Table
from megatron_prorl.tracking.lineage import describe_event, read_lineage
from megatron_prorl.tracking.metrics import read_metrics
from megatron_prorl.tracking.overview import overview
from megatron_prorl.tracking.plots import COLOURS, GREY, points, stages
from megatron_prorl.tracking.status import duration
from megatron_prorl.types import Event

MOST_RUNS = len(COLOURS)
MOST_KEYS = len(COLOURS)  # of tasks or domains in one figure
PHASES = ("collect", "score", "update", "sync", "validate", "checkpoint", "log")
PHASE_COLOURS = ("#56B4E9", "#E69F00", "#0072B2", "#009E73", "#CC79A7", "#F0E442", "#D55E00", "#8C8C8C")
NOT_OPTIONS = ("run_dir",)  # in which runs that are compared always differ


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What a run directory tells."""

    path: Path
    name: str
    colour: str
    rows: list[dict[str, float]]
    events: list[Event]
    found: dict[str, Any]  # `overview`

    def series(self, key: str, label: str = "", **look: Any) -> Series | None:
        """A metric over the steps; None if the run has not logged it."""
        steps, values = points(self.rows, key)
        return self.curve(steps, values, label, **look) if values else None

    def curve(self, steps: Sequence[float], values: Sequence[float], label: str, **look: Any) -> Series:
        return Series(**{"label": label, "x": steps, "y": values, "colour": self.colour, "kind": "noisy", **look})


def read_runs(folders: Sequence[str | Path]) -> list[Run]:
    """Raises UserError for a folder without metrics, and for more runs than there are colours."""
    if len(folders) > MOST_RUNS:
        raise UserError(f"{len(folders)} runs are too many to tell apart by colour; give at most {MOST_RUNS}")
    runs = []
    for folder, name, colour in zip(folders, _names(folders), COLOURS, strict=False):
        rows = read_metrics(folder)
        if not rows:
            raise UserError(f"{folder}: no metrics there yet; a report needs a first step")
        found, events = overview(folder), read_lineage(folder)
        runs.append(Run(path=Path(folder), name=name, colour=colour, rows=rows, events=events, found=found))
    return runs


def sections(runs: Sequence[Run]) -> list[Section]:
    """The report on these runs, its most important part first."""
    found = [
        Section(title="Runs" if len(runs) > 1 else "Run", tables=[_run_table(runs)]),
        _learning(runs),
        _policy(runs),
        _rollouts(runs),
        _mismatch(runs),
        _time(runs),
    ]
    if len(runs) > 1:
        found.insert(1, Section(title="Options that differ", tables=[_options_table(runs)]))
    return [*(section for section in found if section.figures or section.tables), _events(runs)]


def _names(folders: Sequence[str | Path]) -> list[str]:
    """The last parts of the paths, as many as tell them apart."""
    paths = [Path(folder).resolve() for folder in folders]
    for length in range(1, max(len(path.parts) for path in paths) + 1):
        names = ["/".join(path.parts[-length:]) for path in paths]
        if len(set(names)) == len(names):
            return names
    raise UserError("a run is given twice")


def _run_table(runs: Sequence[Run]) -> Table:
    """How far the runs are, and what they are compared by."""
    window = 10

    def last(key: str, form: str) -> Callable[[Run], str]:
        def of(run: Run) -> str:
            _, values = points(run.rows, key)
            return _number(math.fsum(values[-window:]) / len(values[-window:]) if values else None, form)

        return of

    def course(key: str, which: str) -> Callable[[Run], str]:
        def of(run: Run) -> str:
            steps, values = points(run.rows, key)
            if not values:
                return "–"
            best = max(range(len(values)), key=values.__getitem__)
            texts = {
                "first": f"{values[0]:.3f}",
                "last": f"{values[-1]:.3f}",
                "best": f"{values[best]:.3f} (step {steps[best]:g})",
            }
            return texts[which]

        return of

    lines: list[tuple[str, Callable[[Run], str]]] = [
        ("state", lambda run: run.found["state"] + (f": {run.found['detail']}" if run.found["detail"] else "")),
        ("step", lambda run: f"{run.found['step']} of {run.found['steps']}"),
        ("stage", _stage),
        ("resets", lambda run: str(run.found["resets"])),
        ("held-out reward, first", course("validation/reward", "first")),
        ("held-out reward, last", course("validation/reward", "last")),
        ("held-out reward, best", course("validation/reward", "best")),
        ("training reward", last("reward/mean", "{:.3f}")),
        ("entropy, nats a token", last("policy/entropy", "{:.3f}")),
        ("KL to the reference, nats a token", last("policy/kl_reference", "{:.4f}")),
        ("response length, tokens", last("rollout/response_tokens_mean", "{:,.1f}")),
        ("truncated", last("rollout/truncated_fraction", "{:.1%}")),
        ("clipped, low", last("policy/clip_low_fraction", "{:.2%}")),
        ("clipped, high", last("policy/clip_high_fraction", "{:.2%}")),
        ("|trainer − sampler|, nats", last("mismatch/logprob_diff_mean", "{:.2e}")),
        ("seconds a step", last("time/step", "{:.1f}")),
        ("tokens generated a second", lambda run: _number(run.found["tokens_a_second"], "{:,.0f}")),
        ("time in all steps", lambda run: duration(math.fsum(points(run.rows, "time/step")[1]))),
    ]
    rows = [[name, *(text(run) for run in runs)] for name, text in lines]
    note = f"Means of the last {window} steps where nothing else is said"
    return Table(name="runs", header=["", *(run.name for run in runs)], rows=rows, note=note)


def _stage(run: Run) -> str:
    names = run.found["stages"]
    if not names:
        return "–"
    place = min(run.found["stage"], len(names) - 1)
    return f"{place + 1} of {len(names)}: {names[place]}"


def _options_table(runs: Sequence[Run]) -> Table:
    first, *others = [run_config(run.path).model_dump() for run in runs]
    keys = sorted({key for other in others for key in differences(first, other)})
    keys = [key for key in keys if key not in NOT_OPTIONS]
    rows = []
    for key in keys:
        values = [differences(first, other).get(key) for other in others]
        mine = next(value[0] for value in values if value is not None)
        rows.append([key, str(mine), *(str(mine if value is None else value[1]) for value in values)])
    return Table(
        name="options", header=["option", *(run.name for run in runs)], rows=rows or [["none"] + ["–"] * len(runs)]
    )


def _events(runs: Sequence[Run]) -> Section:
    rows = []
    for run in runs:
        for event in run.events:
            at = time.strftime("%Y-%m-%d %H:%M", time.localtime(event["time"])) if "time" in event else "–"
            rows.append([*([run.name] if len(runs) > 1 else []), str(event["step"]), at, describe_event(event)])
    header = [*(["run"] if len(runs) > 1 else []), "step", "time", "what and why"]
    rows = rows or [["–"] * (len(header) - 1) + ["no lineage"]]
    return Section(title="What happened", tables=[Table(name="events", header=header, rows=rows)])


def _figure(runs: Sequence[Run], name: str, title: str, key: str, **look: Any) -> Figure | None:
    """One metric, a curve a run."""
    kind = look.pop("kind", "noisy")
    curves = [run.series(key, run.name if len(runs) > 1 else "", kind=kind) for run in runs]
    found = [curve for curve in curves if curve]
    return Figure(name=name, title=title, series=found, marks=_marks(runs), **look) if found else None


def _figures(runs: Sequence[Run], name: str, title: str, keys: Mapping[str, str], **look: Any) -> list[Figure]:
    """Several metrics, {label: key}: of one run in one figure, of several runs in a figure each."""
    keys = {label: key for label, key in keys.items() if any(points(run.rows, key)[1] for run in runs)}
    if len(runs) > 1 or len(keys) == 1:
        all_of_them = [
            _figure(runs, f"{name}_{_file_name(label)}", f"{title}: {label}", key, **look)
            for label, key in keys.items()
        ]
        return [figure for figure in all_of_them if figure]
    kind = look.pop("kind", "noisy")
    curves = []
    for (label, key), colour in zip(keys.items(), COLOURS, strict=False):
        curves.append(runs[0].series(key, label, colour=colour, kind=kind))
    found = [curve for curve in curves if curve]
    return [Figure(name=name, title=title, series=found, marks=_marks(runs), **look)] if found else []


def _marks(runs: Sequence[Run]) -> list[Mark]:
    marks = []
    for run in runs:
        colour = run.colour if len(runs) > 1 else GREY
        resets = [row["step"] for row in run.rows if row.get("reset/happened") == 1.0]
        marks += [Mark(x=step, kind="reset", colour=colour) for step in resets]
        rollbacks = [event["step"] for event in run.events if event["event"] == "rollback"]
        text = "rollback" if len(runs) == 1 else ""
        marks += [Mark(x=step, kind="note", colour=colour, text=text) for step in rollbacks]
        for step, stage in stages(run.rows):
            marks.append(Mark(x=step, kind="stage", colour=colour, text=str(stage) if len(runs) == 1 else ""))
    return marks


def _present(*figures: Figure | None) -> list[Figure]:
    return [figure for figure in figures if figure]


def _keys(runs: Sequence[Run], prefix: str, suffix: str = "") -> dict[str, str]:
    """{name: key} for the metrics prefix + name + suffix, as many as have a colour."""
    found = {
        key[len(prefix) : len(key) - len(suffix)]: key
        for run in runs
        for row in run.rows
        for key in row
        if key.startswith(prefix) and key.endswith(suffix)
    }
    return dict(sorted((name, key) for name, key in found.items() if name and "/" not in name)[:MOST_KEYS])


def _learning(runs: Sequence[Run]) -> Section:
    domains = _keys(runs, "domain/", "/reward")
    tasks = {name: key for name, key in _keys(runs, "reward/").items() if name != "mean"}
    held_out_domains = _keys(runs, "validation/domain/")
    figures = _present(
        _figure(runs, "reward", "Reward in training", "reward/mean"),
        _figure(runs, "held_out", "Reward on held-out problems", "validation/reward", kind="marked"),
    )
    if domains:
        figures += _figures(runs, "reward_domains", "Reward by domain", domains)
    elif 1 < len(tasks) <= MOST_KEYS:
        figures += _figures(runs, "reward_tasks", "Reward by task", tasks)
    figures += _figures(runs, "held_out_domains", "Held-out reward by domain", held_out_domains, kind="marked")
    return Section(title="Learning", figures=figures)


def _policy(runs: Sequence[Run]) -> Section:
    clipped = {"low": "policy/clip_low_fraction", "high": "policy/clip_high_fraction"}
    return Section(
        title="Policy",
        figures=[
            *_present(
                _figure(runs, "entropy", "Entropy (nats a token)", "policy/entropy"),
                # As it is: a running mean would blur its fall at a reset.
                _figure(runs, "kl", "KL to the reference (nats a token)", "policy/kl_reference", kind="line"),
            ),
            *_figures(runs, "clipped", "Share of tokens clipped", clipped),
            *_present(_figure(runs, "grad_norm", "Gradient norm before clipping", "policy/grad_norm")),
            *_present(_figure(runs, "learning_rate", "Learning rate", "policy/learning_rate", kind="line")),
        ],
    )


def _rollouts(runs: Sequence[Run]) -> Section:
    lengths = _keys(runs, "domain/", "/response_tokens_mean")
    return Section(
        title="Rollouts",
        figures=[
            *_present(
                _figure(runs, "length", "Response length (tokens)", "rollout/response_tokens_mean"),
                _figure(runs, "truncated", "Share of responses truncated", "rollout/truncated_fraction", top=0.02),
                _figure(runs, "no_answer", "Share of responses without an answer", "rollout/no_answer_fraction"),
            ),
            *_figures(runs, "length_domains", "Response length by domain (tokens)", lengths),
            *_pass_rates(runs),
            *_figures(
                runs, "kept_domains", "Dynamic sampling passes, by domain", _keys(runs, "domain/", "/kept_fraction")
            ),
        ],
    )


def _pass_rates(runs: Sequence[Run]) -> list[Figure]:
    """The share of the groups drawn that dynamic sampling let pass, and of those that it dropped."""
    dropped = {"all wrong": "all_0", "all right": "all_1", "all alike": "all_equal"}
    several = len(runs) > 1
    passed = []
    for run in runs:
        drawn = [row for row in run.rows if row.get("rollout/groups_drawn")]
        steps = [row["step"] for row in drawn]

        def share(row: Mapping[str, float], *names: str) -> float:
            lost = math.fsum(row.get(f"rollout/groups_dropped_{name}", 0.0) for name in names)
            return lost / row["rollout/groups_drawn"]

        if drawn:
            values = [1.0 - share(row, *dropped.values()) for row in drawn]
            passed.append(run.curve(steps, values, run.name if several else "pass"))
        if drawn and not several:
            for (label, name), colour in zip(dropped.items(), (COLOURS[1], COLOURS[2], COLOURS[3]), strict=True):
                lost = [share(row, name) for row in drawn]
                if any(lost):
                    passed.append(run.curve(steps, lost, label, colour=colour))
    title = "Dynamic sampling: share of groups" + (" that pass" if several else "")
    note = "" if several else "Dropped: every reward 0 (all wrong), 1 (all right), or the same in between (all alike)."
    return [Figure(name="pass_rate", title=title, series=passed, marks=_marks(runs), note=note)] if passed else []


def _mismatch(runs: Sequence[Run]) -> Section:
    weight = _figure(runs, "correction_weight", "Mean correction weight", "correction/weight_mean", zero=False)
    return Section(
        title="Sampler against trainer",
        figures=_present(
            _figure(runs, "mismatch", "Mean |log-prob difference| (nats)", "mismatch/logprob_diff_mean"),
            _figure(runs, "mismatch_max", "Largest |log-prob difference| (nats)", "mismatch/logprob_diff_max"),
            _figure(
                runs, "outside_window", "Share of tokens outside the window", "correction/outside_window", top=0.001
            ),
            weight,
        ),
    )


def _time(runs: Sequence[Run]) -> Section:
    figures = _present(_figure(runs, "step_time", "Seconds a step", "time/step"))
    for number, run in enumerate(runs, 1):
        timed = [row for row in run.rows if math.isfinite(row.get("time/step", math.nan))]
        if not timed:
            continue
        phases = [*PHASES, *sorted({key[5:] for row in timed for key in row if _is_other_phase(key)})]
        areas, steps = [], [row["step"] for row in timed]
        for phase, colour in zip(phases, PHASE_COLOURS + (GREY,) * len(phases), strict=False):
            seconds = [row.get(f"time/{phase}", 0.0) for row in timed]
            seconds = [value if math.isfinite(value) else 0.0 for value in seconds]
            if math.fsum(seconds) > 0.002 * math.fsum(row["time/step"] for row in timed):
                x, y = _binned(steps, seconds)
                areas.append(Series(label=phase, x=x, y=y, colour=colour, kind="area"))
        name = f"phases_{number}" if len(runs) > 1 else "phases"
        title = "Seconds a step, by phase" + (f": {run.name}" if len(runs) > 1 else "")
        figures.append(Figure(name=name, title=title, series=areas))
    return Section(title="Time", figures=figures, tables=[_time_table(runs)])


def _time_table(runs: Sequence[Run]) -> Table:
    """Where the seconds went, in all steps together."""
    found = {key[5:] for run in runs for row in run.rows for key in row if _is_other_phase(key)}
    wholes = [math.fsum(points(run.rows, "time/step")[1]) for run in runs]

    def cells(phase: str) -> list[str]:
        seconds = [math.fsum(points(run.rows, f"time/{phase}")[1]) for run in runs]
        return [
            f"{spent:,.1f} ({spent / whole:.1%})" if whole else "–"
            for spent, whole in zip(seconds, wholes, strict=True)
        ]

    rows = [[phase, *cells(phase)] for phase in (*PHASES, *sorted(found))]
    rows.insert(1, ["of that, an engine generating", *cells("generating")])
    rows.append(["all steps", *(duration(whole) for whole in wholes)])
    title = "Seconds by phase, and their share of the steps; checkpoint and log are beside these"
    return Table(name="time", title=title, header=["phase", *(run.name for run in runs)], rows=rows)


def _is_other_phase(key: str) -> bool:
    return key.startswith("time/") and key[5:] not in (*PHASES, "step", "generating")


def _binned(x: Sequence[float], y: Sequence[float], most: int = 200) -> tuple[list[float], list[float]]:
    """Means of neighbours, so that at most `most` are left: areas are of what a step takes on average."""
    size = -(-len(x) // most)
    starts = range(0, len(x), size)
    return [x[start] for start in starts], [math.fsum(y[s : s + size]) / len(y[s : s + size]) for s in starts]


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else form.format(value)


def _file_name(text: str) -> str:
    return "".join(character if character.isalnum() else "_" for character in text)
