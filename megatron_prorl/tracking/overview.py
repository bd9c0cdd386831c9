"""`prorl status`: how a run stands, from its directory alone. No torch here, so it takes a fraction of a second."""

from __future__ import annotations

import http.client
import json
import math
import time
import urllib.error
import urllib.request
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from megatron_prorl.checkpoint.folders import committed_checkpoints, read_state
from megatron_prorl.config.run_dir import run_config
from megatron_prorl.config.schema import Config
from megatron_prorl.config.stages import ended_by
from megatron_prorl.stalls import name_stall, read_ranks
from megatron_prorl.tracking.lineage import describe_changes, describe_event, read_branches, read_lineage
from megatron_prorl.tracking.metrics import read_metrics
from megatron_prorl.tracking.requests import read_requests
from megatron_prorl.tracking.status import duration, life, read_status
from megatron_prorl.types import Event

STEPS_AVERAGED = 10
EVENTS_SHOWN = 5
ANSWER_SECONDS = 1.0

Rows = Sequence[Mapping[str, float]]


def overview(run_dir: str | Path) -> dict[str, Any]:
    """Everything that `prorl status` tells, as JSON. Raises UserError for a folder that is no run's.

    "state" is running, STALLED, finished, stopped (by a guard), ended (and goes on where `prorl train` is called) or
    not started; "detail" says more.
    """
    run_dir, now = Path(run_dir), time.time()
    cfg = run_config(run_dir)
    status, rows, events = read_status(run_dir), read_metrics(run_dir), read_lineage(run_dir)
    checkpoints = committed_checkpoints(run_dir)
    progress: dict[str, Any] = read_state(checkpoints[-1])["progress"] if checkpoints else {"step": 0}
    alive = life(run_dir, status, now)
    state: str = alive.name
    detail = alive.detail
    if alive.name == "STALLED" and (ranks := read_ranks(run_dir)):
        detail += f"; {name_stall(ranks)}"
    if status is None or alive.name == "ended":
        state, detail = _rest(cfg, progress, events, alive.detail)
    live = state in ("running", "STALLED")
    step = status["step"] if live and status else max(progress["step"], int(rows[-1]["step"]) if rows else 0)
    # What lies after the step died with its process, as the run will find when it goes on.
    done = [event for event in events if event["step"] <= step]
    resets = [(event["number"], event["step"]) for event in done if "number" in event]
    num_resets, last_reset_step = max([(progress.get("num_resets", 0), progress.get("last_reset_step", 0)), *resets])
    left = _left_behind([*progress.get("events", []), *done])
    stage = status["stage"] if live and status else progress.get("stage", 0)
    last_rows = [row for row in rows if row.get("step", 0) > 0][-STEPS_AVERAGED:]
    seconds = status["seconds_a_step"] if live and status else None
    seconds = seconds or _mean([row["time/step"] for row in last_rows if "time/step" in row])
    return {
        "run": str(run_dir),
        "state": state,
        "detail": detail,
        "branch": events[0] if events and events[0]["event"] == "branch" else None,
        "step": step,
        "steps": cfg.steps,
        "stage": stage,
        "stages": [planned.name for planned in cfg.stages],
        "resets": status["resets"] if live and status else num_resets,
        "last_reset_step": last_reset_step,
        "reward": _course(rows, "reward/mean", left),
        "held_out": _course(rows, "validation/reward", left),
        "kl": _last(rows, "policy/kl_reference"),
        "entropy": _last(rows, "policy/entropy"),
        "response_tokens": _last(rows, "rollout/response_tokens_mean"),
        "truncated_fraction": _last(rows, "rollout/truncated_fraction"),
        "seconds_a_step": seconds,
        "tokens_a_second": _rate(last_rows),
        "seconds_left": seconds * (cfg.steps - step) if seconds and live else None,
        "started": status["started"] if live and status else None,
        "checkpoint": _newest(checkpoints, progress, now),
        "engines": _engines(run_dir) if live else None,
        "requests": read_requests(run_dir),
        "branches": [{"run": event["run"], "from": event["from"]} for event in read_branches(run_dir)],
        "events": sorted([*events, *read_branches(run_dir)], key=lambda event: event["time"])[-EVENTS_SHOWN:],
    }


def _left_behind(events: Sequence[Event]) -> set[int]:
    """The steps whose weights a rollback has given up."""
    rollbacks = [event for event in events if event["event"] == "rollback"]
    return {step for event in rollbacks for step in range(event["last_good_step"] + 1, event["step"] + 1)}


def _rest(cfg: Config, progress: Mapping[str, Any], events: Sequence[Event], detail: str) -> tuple[str, str]:
    """The state of a run in which no process trains."""
    last = next((event for event in reversed(events) if event["event"] != "warning"), None)
    if last and last["event"] == "stop":
        return "stopped", f"by {last['trigger']} after step {last['step']}: {last['reason']}"
    if reason := ended_by(cfg, progress):
        return "finished", reason
    if last is None or last["event"] == "branch":
        return "not started", f"begins with step {progress['step'] + 1}"
    goes_on = f"goes on from step {progress['step']}" if progress["step"] else "begins anew"
    return "ended", f"{detail}; prorl train {goes_on}" if detail else f"prorl train {goes_on}"


def render(found: Mapping[str, Any], now: float | None = None) -> str:
    """`overview` as a table of two columns."""
    now = time.time() if now is None else now
    lines = {"state": found["state"] + (f": {found['detail']}" if found["detail"] else "")}
    if branch := found["branch"]:
        changes = describe_changes(branch)
        lines["branch"] = f"of {branch['parent']} at {branch['from']}, step {branch['step']}: {changes}"
    lines["step"] = f"{found['step']} of {found['steps']}"
    if found["stages"]:
        place = min(found["stage"], len(found["stages"]) - 1)
        lines["step"] += f", stage {place + 1} of {len(found['stages'])}: {found['stages'][place]}"
    since = found["step"] - found["last_reset_step"]
    lines["resets"] = f"{found['resets']}, the last {since} steps ago" if found["resets"] else "none"
    for key, name in (("reward", "reward"), ("held_out", "held-out")):
        if course := found[key]:
            lines[name] = "{first:.3f} first, {last:.3f} last, {best:.3f} best at step {best_step}".format(**course)
    figures = [
        ("kl", "KL {:.4f}"),
        ("entropy", "entropy {:.3f}"),
        ("response_tokens", "{:,.0f} tokens a response"),
        ("truncated_fraction", "{:.1%} truncated"),
    ]
    shown = [text.format(found[key]) for key, text in figures if found[key] is not None]
    if shown:
        lines["policy"] = ", ".join(shown)
    rates = [("seconds_a_step", "{:.1f} s a step"), ("tokens_a_second", "{:,.0f} tokens a second")]
    shown = [text.format(found[key]) for key, text in rates if found[key] is not None]
    if shown:
        lines["rate"] = ", ".join(shown)
    if found["started"] is not None:
        lines["up"] = duration(now - found["started"])
    if found["seconds_left"] is not None:
        lines["time left"] = duration(found["seconds_left"])
    if checkpoint := found["checkpoint"]:
        lines["checkpoint"] = (
            f"step {checkpoint['step']}, {duration(checkpoint['age_seconds'])} ago; {checkpoint['count']} kept"
        )
    if engines := found["engines"]:
        lines["engines"] = f"{engines['answering']} of {engines['announced']} answer"
    if found["requests"]:
        lines["requests"] = ", ".join(found["requests"])
    width = max(len(name) for name in lines) + 2
    text = [found["run"], *(f"  {name:<{width}}{value}" for name, value in lines.items())]
    if found["events"]:
        text.append("  events")
    for event in found["events"]:
        at = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(event["time"]))
        text.append(f"    {at}  step {event['step']}  {describe_event(event)}")
    return "\n".join(text)


def _course(rows: Rows, key: str, left: Collection[int]) -> dict[str, Any] | None:
    """First, last and best value of a metric; the best of the steps that are not in `left`."""
    found = [(int(row["step"]), row[key]) for row in rows if math.isfinite(row.get(key, math.nan))]
    if not found:
        return None
    best_step, best = max([at for at in found if at[0] not in left] or found, key=lambda point: point[1])
    last_step, last = found[-1]
    return {"first": found[0][1], "last": last, "last_step": last_step, "best": best, "best_step": best_step}


def _last(rows: Rows, key: str) -> float | None:
    return next((row[key] for row in reversed(rows) if math.isfinite(row.get(key, math.nan))), None)


def _mean(values: Sequence[float]) -> float | None:
    return math.fsum(values) / len(values) if values else None


def _rate(rows: Rows) -> float | None:
    """Response tokens generated a second."""
    timed = [row for row in rows if "rollout/tokens_generated" in row and row.get("time/step")]
    seconds = math.fsum(row["time/step"] for row in timed)
    return math.fsum(row["rollout/tokens_generated"] for row in timed) / seconds if seconds else None


def _newest(checkpoints: Sequence[Path], progress: Mapping[str, Any], now: float) -> dict[str, Any] | None:
    if not checkpoints:
        return None
    age = max(0.0, now - checkpoints[-1].stat().st_mtime)
    return {"step": progress["step"], "age_seconds": round(age, 1), "count": len(checkpoints)}


def _engines(run_dir: Path) -> dict[str, int]:
    """How many engines have announced themselves, and how many of them answer."""
    announced = list((run_dir / "engines").glob("engine-*.json"))

    def answers(path: Path) -> bool:
        try:
            url = json.loads(path.read_text())["url"]
            urllib.request.urlopen(f"{url}/health", timeout=ANSWER_SECONDS).close()
        except urllib.error.HTTPError as error:
            return error.code < 500  # it asks for the token that only the trainer has
        except (OSError, ValueError, http.client.HTTPException):
            return False
        return True

    with ThreadPoolExecutor(max(1, len(announced))) as threads:
        return {"announced": len(announced), "answering": sum(threads.map(answers, announced))}
