"""What a check measures on one machine, and how it is told."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from megatron_prorl.launch.machines import numbered
from megatron_prorl.launch.preflight import summary
from megatron_prorl.launch.readiness import Row, _gpu_errors, disk_speed


def test_ecc_errors_are_those_that_nvidia_smi_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert _gpu_errors() == [], "without nvidia-smi"
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho '0, 0'; echo '1, 2'; echo '2, [N/A]'\n")
    program.chmod(0o755)
    assert _gpu_errors() == ["GPU 1: 2 ECC errors"]
    program.write_text("#!/bin/sh\nexit 9\n")
    assert _gpu_errors() == []


def test_measuring_a_disk_leaves_nothing_and_needs_no_folder_yet(tmp_path: Path) -> None:
    assert min(disk_speed(tmp_path / "run" / "not" / "there")) > 0
    assert os.listdir(tmp_path) == []


def test_the_summary_names_what_is_red_and_each_node_once() -> None:
    rows = [
        Row("versions", "red", "", nodes=("gpu-3",)),
        Row("disk speed", "amber", "", nodes=("gpu-1",)),
        Row("clocks", "red", "", nodes=("gpu-3", "gpu-4")),
    ]
    assert summary(rows) == "preflight: versions, clocks: not fit for a run; look at gpu-3, gpu-4"


@pytest.mark.parametrize(
    ("numbers", "text"),
    [([4], "rank 4"), ([8, 3, 9, 10], "ranks 3, 8 to 10"), ([], "ranks none"), ([0, 1], "ranks 0 to 1")],
)
def test_numbers_in_a_row_are_told_as_a_span(numbers: list[int], text: str) -> None:
    assert numbered("rank", numbers) == text
