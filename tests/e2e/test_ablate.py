"""`prorl ablate` on two real runs: one is broken off and gone on with, and a table and a figure come out."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from toy_run import steps, toy_config

pytestmark = pytest.mark.timeout(300)


def test_a_grid_that_was_broken_off_goes_on_and_compares(toy_model: Path, tmp_path: Path) -> None:
    base = toy_config(toy_model, tmp_path / "unused", steps=3, reset={"every_steps": 0}, checkpoint={"every_steps": 1})
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(base))
    arms = {"slow": {}, "fast": {"optimizer.learning_rate": 0.01}}
    grid = {"base": "base.yaml", "out": str(tmp_path / "out"), "seeds": [0], "control": "slow", "arms": arms}
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump(grid))
    command = [sys.executable, "-m", "megatron_prorl.cli", "ablate", str(tmp_path / "grid.yaml")]
    first = tmp_path / "out" / "slow" / "seed-0"
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        while 1 not in steps(first):
            assert process.poll() is None, process.communicate()
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=120)
        assert process.returncode == 75 and "slow, seed 0 was told to end; the same command goes on" in err
    kept = len(steps(first))

    again = subprocess.run(command, capture_output=True, text=True, timeout=250)
    assert again.returncode == 0, again.stderr
    assert steps(first) == steps(tmp_path / "out" / "fast" / "seed-0") == [0, 1, 2, 3] and kept < 4
    table = (tmp_path / "out" / "ablation.md").read_text()
    assert "| fast | 1 |" in table and again.stdout.endswith(table)
    assert len((tmp_path / "out" / "ablation.csv").read_text().splitlines()) == 3
    assert (tmp_path / "out" / "ablation.png").read_bytes().startswith(b"\x89PNG")
