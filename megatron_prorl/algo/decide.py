"""What a run does after a step: go on, reset, begin the next stage, roll back or stop.

A pure function of what every checkpoint holds (and of requests by hand), so a run that died and was resumed decides
the same. A window is a stretch of steps since the last event (a reset, a stage's begin, a rollback, a stop): what lies
before one is no ground for the next.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

from megatron_prorl.config.schema import Config, GuardConfig
from megatron_prorl.errors import UserError
from megatron_prorl.types import Event, Progress

Row = Mapping[str, float]
Action = Literal["go on", "reset", "advance", "rollback", "stop"]

GUARDED = {  # the metric that each guard watches
    "entropy": "policy/entropy",
    "kl": "policy/kl_reference",
    "truncation": "rollout/truncated_fraction",
    "mismatch": "mismatch/logprob_diff_mean",
}
_METRIC_GUARDS = {f"guards.{name}" for name in GUARDED}
NON_FINITE = ("policy/loss", "policy/grad_norm")
REWARD = "reward/mean"
_NO_SCORES = {f"validation/{what}" for what in (
    "prompt_too_long", "repeats", "retries", "verifier_crashes", "verifier_timeouts",
)}  # fmt: skip
BY_HAND = "by hand"


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """What to do, by which option (`trigger`) and why.

    `last_good_step`: roll back to a checkpoint no later than it; `ground_step`: the first whose figures are the reason.
    """

    action: Action = "go on"
    trigger: str = ""
    reason: str = ""
    last_good_step: int = 0
    ground_step: int = 0
    warnings: tuple[tuple[str, str], ...] = ()  # (trigger, reason) of guards that only warn


def observe(progress: Progress, metrics: Row) -> None:
    """Keep what decisions are made of, a row a step."""
    kept = {
        key: value
        for key, value in metrics.items()
        if key in (*GUARDED.values(), *NON_FINITE, REWARD)
        or key.startswith("validation/")
        or (key.startswith("domain/") and key.endswith("/reward"))
    }
    progress.history.append({"step": progress.step, **kept})


def check_score(score: str, validated: Row) -> None:
    """Raise UserError if validations do not give the `score` by which they are to compare."""
    if score not in validated or score in _NO_SCORES:
        known = ", ".join(sorted(key for key in validated if key.startswith("validation/") and key not in _NO_SCORES))
        raise UserError(f"reset.score: validations give no {score}; they give {known}")


def best_step(progress: Progress, score: str, among: Collection[int] | None = None) -> int | None:
    """The stage's first step with the highest validation score (of those `among`); None before any.

    The starting model is no step, and steps that a rollback left behind were of weights that are gone.
    """
    left = [range(e["last_good_step"] + 1, e["step"] + 1) for e in progress.events if e["event"] == "rollback"]
    others = [event["step"] for event in progress.events if event["event"] == "branch" and not event["scores_compare"]]
    begin = max([progress.stage_start_step, *others])
    steps = {
        int(row["step"]): row[score]
        for row in progress.history
        if score in row and row["step"] > begin and not any(row["step"] in gone for gone in left)
    }
    found = steps.keys() if among is None else steps.keys() & set(among)
    return max(sorted(found), key=lambda step: steps[step]) if found else None


def rollback_steps(cfg: Config) -> int:
    """How many steps may lie between the last good one and a rollback; 0 if no guard rolls back."""
    guards = [getattr(cfg.guards, name) for name in (*GUARDED, "non_finite", "silent_domain")]
    return max((guard.steps + 1 for guard in guards if guard and guard.action == "rollback"), default=0)


def left_behind(progress: Progress, step: int) -> bool:
    """Whether the checkpoint of this step is of weights that a rollback has gone back from."""
    rollbacks = (event for event in progress.events if event["event"] == "rollback")
    return any(event["last_good_step"] < step < event["step"] for event in rollbacks)


def decide(progress: Progress, cfg: Config, requests: Collection[str] = ()) -> Decision:
    """`cfg` is that of the stage; `requests` holds "reset" or "advance" if a person asks for it.

    The first that applies: a guard that stops, rolls back or resets; a request; the end of the stage; a reset by
    metrics; a reset by the number of steps. But by hand and at a stage's begin, no reset comes within
    `reset.cooldown_steps` of the last.
    """
    found = list(_guards(progress, cfg))
    warnings = tuple((guard.trigger, guard.reason) for guard in found if guard.action == "go on")
    resets = progress.step - progress.last_reset_step >= cfg.reset.cooldown_steps
    candidates = [
        *(guard for action in ("stop", "rollback") for guard in found if guard.action == action),
        *_by_hand(progress, cfg, requests),
        *_stage_end(progress, cfg),
        *((guard for guard in found if guard.action == "reset") if resets else ()),
        *(_metric_resets(progress, cfg) if resets else ()),
        *(_interval(progress, cfg) if resets else ()),
    ]
    chosen = _in_stage(candidates[0], progress, cfg) if candidates else Decision()
    return Decision(
        action=chosen.action,
        trigger=chosen.trigger,
        reason=chosen.reason,
        last_good_step=chosen.last_good_step,
        ground_step=chosen.ground_step,
        warnings=warnings,
    )


def _in_stage(decision: Decision, progress: Progress, cfg: Config) -> Decision:
    """In a stage that ends on a trigger, what would reset ends it."""
    stage = cfg.stages[progress.stage] if cfg.stages else None
    if decision.action == "reset" and decision.trigger != BY_HAND and stage and stage.ends_on_trigger:
        return Decision(action="advance", trigger=decision.trigger, reason=decision.reason)
    return decision


def _by_hand(progress: Progress, cfg: Config, requests: Collection[str]) -> Iterator[Decision]:
    if "advance" in requests and cfg.stages:
        yield Decision(action="advance", trigger=BY_HAND, reason="asked for by hand")
    if "reset" in requests:
        yield Decision(action="reset", trigger=BY_HAND, reason="asked for by hand")


def _stage_end(progress: Progress, cfg: Config) -> Iterator[Decision]:
    if not cfg.stages:
        return
    steps = cfg.stages[progress.stage].steps
    if steps is not None and progress.step - progress.stage_start_step >= steps:
        yield Decision(action="advance", trigger=f"stages.{progress.stage}.steps", reason=f"{steps} steps are done")


def _interval(progress: Progress, cfg: Config) -> Iterator[Decision]:
    every, last = cfg.reset.every_steps, max(progress.last_reset_step, progress.stage_start_step)
    if every and progress.step - last >= every:
        yield Decision(action="reset", trigger="reset.every_steps", reason=f"{every} steps since the last")


def _metric_resets(progress: Progress, cfg: Config) -> Iterator[Decision]:
    reset, scores = cfg.reset, _scores(progress, cfg.reset.score)
    if not scores or reset.score not in progress.history[-1]:
        return  # nothing was validated after this step
    if (plateau := reset.plateau) and len(scores) > plateau.patience:
        before, recent = max(scores[: -plateau.patience]), max(scores[-plateau.patience :])
        if not recent > before + plateau.min_delta:
            yield Decision(
                action="reset",
                trigger="reset.plateau",
                reason=f"{reset.score} at most {recent:.4f} in {plateau.patience} validations, {before:.4f} before",
            )
    if (drop := reset.drop) and len(scores) > drop.patience:
        before, recent = max(scores[: -drop.patience]), max(scores[-drop.patience :])
        if recent <= before - drop.by:
            yield Decision(
                action="reset",
                trigger="reset.drop",
                reason=f"{reset.score} at most {recent:.4f} in {drop.patience} validations, down from {before:.4f}",
            )


def _scores(progress: Progress, score: str) -> list[float]:
    """Validation scores since the last event; that of a reset's own step counts, if it is of the same weights."""
    last: Event = progress.events[-1] if progress.events else {"event": "reset", "step": 0}
    same_weights = last["event"] == "reset" and last.get("weights_of_step", last["step"]) == last["step"]
    since = last["step"] if same_weights else last["step"] + 1
    return [row[score] for row in progress.history if score in row and row["step"] >= since]


def _guards(progress: Progress, cfg: Config) -> Iterator[Decision]:
    since = _since(progress)
    rows = [row for row in progress.history if row["step"] > since]
    guards = cfg.guards
    for name, key in GUARDED.items():
        guard: GuardConfig | None = getattr(guards, name)
        if guard:
            streak = _streak(rows, key, partial(_outside, guard))
            yield from _fired(progress, cfg, f"guards.{name}", guard, streak, key)
    if guards.non_finite:
        rows_over_resets = [row for row in progress.history if row["step"] > _since(progress, but="reset")]
        streaks = {key: _streak(rows_over_resets, key, lambda value: not math.isfinite(value)) for key in NON_FINITE}
        key = max(streaks, key=lambda key: len(streaks[key]))
        yield from _fired(progress, cfg, "guards.non_finite", guards.non_finite, streaks[key], key)
    if guards.silent_domain and rows:
        for key in sorted(key for key in rows[-1] if key == REWARD or key.startswith("domain/")):
            streak = _streak([row for row in rows if key in row], key, lambda value: value == 0)
            yield from _fired(progress, cfg, "guards.silent_domain", guards.silent_domain, streak, key)


def _fired(
    progress: Progress, cfg: Config, trigger: str, guard: GuardConfig, streak: Sequence[Row], key: str
) -> Iterator[Decision]:
    length = len(streak)
    if length < guard.steps:
        return
    reason = (
        f"{key} {streak[-1][key]:.4g} after {length} {'step' if length == 1 else 'steps'} {_bounds(trigger, guard)}"
    )
    # A policy whose figures are no numbers is none to make the reference of.
    is_no_ground = guard.action == "reset" and trigger in _METRIC_GUARDS and not math.isfinite(streak[-1][key])
    if guard.action == "warn" or is_no_ground:
        if length % guard.steps == 0:
            yield Decision(trigger=trigger, reason=reason)
    elif guard.action == "rollback":
        # A step's figures are of the weights before it; but an update that is not finite was skipped, and left them.
        before = 1 if trigger == "guards.non_finite" else 2
        first = int(streak[0]["step"])
        if trigger == "guards.silent_domain":  # its streak has gaps, and checkpoints are kept for one without
            first = max(first, progress.step - guard.steps + 1)
        last_good_step = _last_good_step(progress, first - before)
        done = _rollbacks_in_a_row(progress, cfg, first)
        if done >= cfg.guards.max_rollbacks:
            yield Decision(action="stop", trigger=trigger, reason=f"{reason}; {done} rollbacks in a row did not help")
        else:
            yield Decision(
                action="rollback", trigger=trigger, reason=reason, last_good_step=last_good_step, ground_step=first
            )
    else:
        yield Decision(action=guard.action, trigger=trigger, reason=reason)


def _bounds(trigger: str, guard: GuardConfig) -> str:
    if trigger == "guards.non_finite":
        return "that are not finite"
    if trigger == "guards.silent_domain":
        return "without any reward"
    low = [] if guard.low is None else [f"below {guard.low:g}"]
    high = [] if guard.high is None else [f"above {guard.high:g}"]
    return " or ".join(low + high)


def _outside(guard: GuardConfig, value: float) -> bool:
    inside = (guard.low is None or value >= guard.low) and (guard.high is None or value <= guard.high)
    return not inside  # as is a value that is no number


def _streak(rows: Sequence[Row], key: str, holds: Callable[[float], bool]) -> list[Row]:
    """The last rows, without a gap, in which the metric is there and `holds`."""
    found = itertools.takewhile(lambda row: key in row and holds(row[key]), reversed(rows))
    return list(found)[::-1]


def _last_good_step(progress: Progress, step: int) -> int:
    """The latest step to go back to if the weights after `step` are good and those after the next step are not.

    Where those that are good lie before an earlier rollback, the checkpoint that it went to was bad, too. No further
    back than to where a branch began.
    """
    begin = max((event["step"] for event in progress.events if event["event"] == "branch"), default=0)
    for event in reversed([event for event in progress.events if event["event"] == "rollback"]):
        if step >= event["step"]:
            break
        step = min(step, event["to_step"] - 1)
    return max(step, begin)


def _since(progress: Progress, but: str = "") -> int:
    """The last event's step, of events other than `but`."""
    return max((event["step"] for event in progress.events if event["event"] != but), default=0)


def _rollbacks_in_a_row(progress: Progress, cfg: Config, ground_step: int) -> int:
    """How many came just before, with too few good steps in between for another checkpoint."""
    count = 0
    for event in reversed(progress.events):
        if event["event"] == "reset":
            continue
        if event["event"] != "rollback" or ground_step - 1 - event["step"] >= cfg.checkpoint.every_steps:
            break
        count += 1
        ground_step = event["ground_step"]
    return count
