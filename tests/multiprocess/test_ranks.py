"""The helper that starts ranks reports what happens to them and leaves no process behind."""

from __future__ import annotations

import os
import time

import pytest
from ranks import run_ranks


def who(extra: str) -> tuple[str, str, str, int]:
    return os.environ["RANK"], os.environ["WORLD_SIZE"], extra, os.getpid()


def fail_on_rank_1() -> None:
    if os.environ["RANK"] == "1":
        raise LookupError("the reason")
    time.sleep(60)


def die_on_rank_0() -> None:
    if os.environ["RANK"] == "0":
        os._exit(3)
    time.sleep(60)


def sleep_forever() -> None:
    time.sleep(60)


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_answers_come_back_by_rank():
    answers = run_ranks(2, who, "x")
    assert [answer[:3] for answer in answers] == [("0", "2", "x"), ("1", "2", "x")]
    assert not any(is_running(answer[3]) for answer in answers)


def test_the_traceback_of_a_failing_rank_is_raised_while_others_still_wait():
    start = time.monotonic()
    with pytest.raises(RuntimeError, match="(?s)rank 1 failed.*fail_on_rank_1.*LookupError: the reason"):
        run_ranks(2, fail_on_rank_1)
    assert time.monotonic() - start < 30


def test_a_rank_that_dies_is_reported():
    with pytest.raises(RuntimeError, match="rank 0 died"):
        run_ranks(2, die_on_rank_0)


def test_a_hang_ends_with_the_timeout():
    with pytest.raises(TimeoutError, match=r"ranks \[0, 1\]"):
        run_ranks(2, sleep_forever, timeout_seconds=3)
