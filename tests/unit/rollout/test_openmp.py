"""What a killed engine's OpenMP left in /dev/shm goes, and nothing else does."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from megatron_prorl.rollout import openmp


def test_segments_of_dead_processes_of_this_user_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ended = subprocess.Popen(["true"])
    ended.wait()
    user = os.getuid()
    orphan = f"__KMP_REGISTERED_LIB_{ended.pid}_{user}"
    others = [f"__KMP_REGISTERED_LIB_{os.getpid()}_{user}", f"__KMP_REGISTERED_LIB_{ended.pid}_{user + 1}", "sem.mine"]
    for name in (orphan, *others):
        (tmp_path / name).write_bytes(b"")
    monkeypatch.setattr(openmp, "SHARED_MEMORY", tmp_path)
    openmp.remove_orphaned_segments()
    assert sorted(os.listdir(tmp_path)) == sorted(others)
