from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_prorl.config.schema import VerifierConfig
from megatron_prorl.tasks import VerifierError
from megatron_prorl.tasks.pool import VerifierPool
from megatron_prorl.types import Problem, Verdict

# This task's scorer passes a list in the answer to eval: what hangs or fills the memory below is a model's answer in
# production too.
EVALUATING = {"task": "spiral_matrix", "params": {}, "seed": 1, "index": 0}
#     4 6 7 3
#     0 7 6 9
#     7 1 1 1
#     6 0 7 9
RIGHT = "<answer>4 6 7 3 9 1 9 7 0 6 7 0 7 6 1 1</answer>"
HANGS = "<answer>[9**9**9]</answer>"
FILLS_MEMORY = "<answer>[0]*10**12</answer>"
TIMEOUT_SECONDS = 1.0


def problem(**changes: object) -> Problem:
    verification = EVALUATING | changes
    return Problem(id="p", domain="logic", task="spiral_matrix", messages=[], verification=verification, source="test")


def verdict_on(text: str, pool: VerifierPool, **changes: object) -> Verdict:
    [verdict] = asyncio.run(pool.verify_many(problem(**changes), [text]))
    return verdict


def is_running(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def children_of(pid: int) -> list[int]:
    threads = Path(f"/proc/{pid}/task").iterdir()
    return sorted(int(child) for thread in threads for child in (thread / "children").read_text().split())


def wait_until(condition, seconds: float = 30.0) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    return condition()


@pytest.fixture(scope="module")
def pool() -> Iterator[VerifierPool]:
    os.environ["A_SECRET"] = "1"
    try:
        with VerifierPool(VerifierConfig(workers=1, timeout_seconds=TIMEOUT_SECONDS)) as pool:
            yield pool
    finally:
        del os.environ["A_SECRET"]


def test_a_hanging_or_crashing_answer_costs_nobody_else(pool: VerifierPool):
    before = set(children_of(os.getpid()))
    verdicts = asyncio.run(pool.verify_many(problem(), [RIGHT, HANGS, RIGHT, FILLS_MEMORY, RIGHT]))
    assert [(verdict.score, verdict.reason) for verdict in verdicts] == [
        (1.0, "correct"), (0.0, "timed out"), (1.0, "correct"), (0.0, "wrong"), (1.0, "correct"),
    ]  # fmt: skip
    assert not any(is_running(pid) for pid in before - set(children_of(os.getpid()))), "a replaced worker lives on"


def test_an_answer_under_which_its_process_ends_is_a_crash_and_no_other_is(pool: VerifierPool):
    assert verdict_on(RIGHT, pool).reason == "correct"  # the worker is ready
    assert pool._workers[0]._child is not None
    worker = pool._workers[0]._child.pid

    async def judge() -> list[Verdict]:
        verdicts = asyncio.create_task(pool.verify_many(problem(), [RIGHT, HANGS, RIGHT]))
        await asyncio.sleep(0.5 * TIMEOUT_SECONDS)
        os.kill(worker, signal.SIGKILL)
        return await verdicts

    assert [verdict.reason for verdict in asyncio.run(judge())] == ["correct", "crashed", "correct"]


@pytest.mark.parametrize(
    "reach", ["__import__('os').system('touch {}')", "open('{}', 'w')", "__import__('pathlib').Path('{}').touch()"]
)
def test_an_answer_that_is_evaluated_touches_no_file(pool: VerifierPool, tmp_path, reach: str):
    target = tmp_path / "touched"
    verdict = verdict_on(f"<answer>[{reach.format(target)}]</answer>", pool)
    assert verdict.score == 0.0
    assert not target.exists()


def test_a_verifier_sees_none_of_the_trainers_environment(pool: VerifierPool):
    assert verdict_on(RIGHT, pool).reason == "correct"
    assert pool._workers[0]._child is not None
    environment = Path(f"/proc/{pool._workers[0]._child.pid}/environ").read_bytes()
    assert b"PYTHONHASHSEED=0" in environment
    assert b"A_SECRET" not in environment


@pytest.mark.parametrize("broken", [{"task": "no_such_task"}, {"params": {"min_n": -1}}])
def test_a_broken_verifier_is_an_error_that_names_the_problem_never_a_zero(pool: VerifierPool, broken: dict):
    with pytest.raises(VerifierError, match="'p'"):
        verdict_on(RIGHT, pool, **broken)
    assert verdict_on(RIGHT, pool).score == 1.0  # and the pool goes on


def test_no_process_is_left_after_close_even_if_a_verifier_hangs():
    async def hang(pool: VerifierPool) -> None:
        waiting = asyncio.create_task(pool.verify_many(problem(), [HANGS] * 2))
        await asyncio.sleep(0.5)
        await asyncio.to_thread(pool.close)
        with pytest.raises(VerifierError):
            await waiting

    before = set(children_of(os.getpid()))
    pool = VerifierPool(VerifierConfig(workers=2, timeout_seconds=600))
    assert wait_until(lambda: len(set(children_of(os.getpid())) - before) == 2)
    asyncio.run(hang(pool))
    assert set(children_of(os.getpid())) <= before


PARENT = """
import asyncio, json, sys
from megatron_prorl.config.schema import VerifierConfig
from megatron_prorl.tasks.pool import VerifierPool
from megatron_prorl.types import Problem

pool = VerifierPool(VerifierConfig(workers=1, timeout_seconds=600))
problem, right, hangs = json.loads(sys.argv[1])
asyncio.run(pool.verify_many(Problem(**problem), [right]))
print("ready", flush=True)
asyncio.run(pool.verify_many(Problem(**problem), [hangs]))
"""


def test_hanging_verifiers_die_with_a_killed_parent():
    described = {
        "id": "p",
        "domain": "logic",
        "task": "spiral_matrix",
        "messages": [],
        "verification": EVALUATING,
        "source": "test",
    }
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, json.dumps([described, RIGHT, HANGS])], stdout=subprocess.PIPE, text=True
    )
    try:
        assert parent.stdout is not None and parent.stdout.readline() == "ready\n"
        workers = children_of(parent.pid)
        assert len(workers) == 1
        time.sleep(0.3)  # the hang has begun
    finally:
        parent.send_signal(signal.SIGKILL)
        parent.wait()
    assert wait_until(lambda: not any(is_running(pid) for pid in workers))
