"""Ranks of one machine are this launcher's, and nothing else that it starts is."""

from __future__ import annotations

import logging
import os

import pytest

from megatron_prorl.launch.local import launch_ranks


@pytest.mark.parametrize("threads", [None, "1"])
def test_what_the_ranks_inherit_is_gone_when_they_have_ended(
    monkeypatch: pytest.MonkeyPatch, threads: str | None
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if threads:
        monkeypatch.setenv("OMP_NUM_THREADS", threads)
    script = "import os, sys; sys.exit(os.environ['PRORL_LAUNCHER_PID'] != str(os.getppid()))"
    assert launch_ranks(["-c", script], num_ranks=1) == 0
    assert "PRORL_LAUNCHER_PID" not in os.environ and os.environ.get("OMP_NUM_THREADS") == threads
    assert logging.root.manager.disable == 0
