"""Whether a job is to start its ranks, and whether to start them again: what has become of the attempts so far.

`python -m megatron_prorl.launch.attempts begin CONFIG [key=value ...]` before the ranks start, and `... end CODE CONFIG
[key=value ...]` when they have ended. The exit code is AGAIN to start, or to start again; else that of the job. Every
attempt has its line in run_dir/attempts.jsonl, also one of which nobody could say how it ended. No torch here.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_prorl.checkpoint.folders import latest_checkpoint, step_of
from megatron_prorl.config.load import load_config
from megatron_prorl.errors import RunStopped, ToldToEnd, UserError
from megatron_prorl.tracking.status import read_status

ATTEMPTS_FILE = "attempts.jsonl"
BEGUN_FILE = "attempt.json"  # the attempt that has begun and not ended
CHAIN_VARIABLE = "PRORL_CHAIN"  # one name for all jobs of a chain; they end when one of them has the last word
AGAIN = ToldToEnd.exit_code
FINAL = (0, UserError.exit_code, RunStopped.exit_code)  # another attempt would end the same
MAX_IN_VAIN = 3  # attempts in a row that saved nothing new


def main(argv: Sequence[str]) -> int:
    """`begin` or `end`, as the module says."""
    action, *words = argv
    code = int(words.pop(0)) if action == "end" else 0
    config, *overrides = words
    try:
        run_dir = Path(load_config(config, overrides).run_dir)
        verdict, text = judge(run_dir, code) if action == "end" else begin(run_dir)
    except UserError as error:
        print(error, file=sys.stderr)
        return code or UserError.exit_code
    if text:
        print(text, flush=True)
    return verdict


def begin(run_dir: Path) -> tuple[int, str]:
    """Note that this job begins an attempt; returns AGAIN if it shall, else what to exit with, and why in words."""
    here, before, text = _here(), _begun(run_dir), ""
    if before:  # its node was lost, or it was killed at the time limit
        (run_dir / BEGUN_FILE).unlink()
        verdict, text = _note(run_dir, before, None)
        if verdict != AGAIN:
            return verdict, text
    last: dict[str, Any] = next(reversed(_read(run_dir)), {})
    is_next_in_chain = "chain" in last and last["chain"] == os.environ.get(CHAIN_VARIABLE) and here["restart"] == 0
    if is_next_in_chain and last["verdict"] != AGAIN:
        return last["verdict"], f"job {last['job']} has ended this chain with exit code {last['verdict']}"
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / BEGUN_FILE).write_text(json.dumps(here) + "\n", encoding="utf-8")
    return AGAIN, text


def judge(run_dir: Path, code: int) -> tuple[int, str]:
    """Note the attempt that ended with exit code `code`; returns what to exit with, and why in words."""
    (run_dir / BEGUN_FILE).unlink(missing_ok=True)
    return _note(run_dir, _here(), code)


def _note(run_dir: Path, whose: dict[str, Any], code: int | None) -> tuple[int, str]:
    """As `judge`, for the attempt of the job `whose`; without a code nobody knows how it ended."""
    earlier, step = _read(run_dir), _saved_step(run_dir)
    before = earlier[-1] if earlier else {"step": 0, "in_vain": 0}
    in_vain = 0  # so many in a row, with this one
    if code not in FINAL and step == before["step"]:
        in_vain = (before["in_vain"] % MAX_IN_VAIN if before.get("chain") == whose["chain"] else 0) + 1
    verdict = AGAIN
    if code in FINAL:
        verdict = code
    elif in_vain == MAX_IN_VAIN:
        verdict = code if code not in (None, AGAIN) else 1
    attempt = whose | {
        "time": time.time(),
        "code": code,
        "step": step,
        "in_vain": in_vain,
        "verdict": verdict,
        "cause": (read_status(run_dir) or {}).get("end", ""),
    }
    run_dir.mkdir(parents=True, exist_ok=True)
    with (run_dir / ATTEMPTS_FILE).open("a", encoding="utf-8") as file:
        file.write(json.dumps(attempt) + "\n")
    if code in FINAL:
        return verdict, f"{_how(code)}: {'finished' if code == 0 else 'the run cannot go on by itself'}"
    if verdict == AGAIN:
        return verdict, f"{_how(code)} with step {step} saved: to be started again"
    lines = [f"{MAX_IN_VAIN} attempts in a row saved nothing after step {step}, so no other is made:"]
    for found in [*earlier, attempt][-MAX_IN_VAIN:]:
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(found["time"]))
        job = f"job {found['job']}, restart {found['restart']}"
        lines.append(f"  {when}  {job}: {_how(found['code'])}, {found['cause'] or 'no cause was told'}")
    lines.append("look at the logs of ranks and engines; once it is mended the job can be submitted again")
    return verdict, "\n".join(lines)


def _here() -> dict[str, Any]:
    """This job, its restart, and what chain it belongs to: a job that has none is one of its own."""
    job = os.environ.get("SLURM_JOB_ID", "")
    restart = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
    return {"job": job, "restart": restart, "chain": os.environ.get(CHAIN_VARIABLE) or job}


def _how(code: int | None) -> str:
    return "ended by Slurm or with its node" if code is None else f"exit code {code}"


def _saved_step(run_dir: Path) -> int:
    checkpoint = latest_checkpoint(run_dir)
    return step_of(checkpoint) if checkpoint else 0


def _begun(run_dir: Path) -> dict[str, Any] | None:
    try:
        found: dict[str, Any] = json.loads((run_dir / BEGUN_FILE).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):  # none, or cut off as its node was lost
        return None
    return found


def _read(run_dir: Path) -> list[dict[str, Any]]:
    try:
        lines = (run_dir / ATTEMPTS_FILE).read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in lines]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
