"""The example of docs/data.md says what the program says."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

DOCS = Path(__file__).parents[3] / "docs" / "data.md"


def test_the_example_of_a_problem_and_its_verdicts_is_what_the_command_prints(tmp_path: Path):
    text = DOCS.read_text()
    [row] = re.findall(r"^```json\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    [session] = re.findall(r"^```\n(\$ .*?)^```", text, re.MULTILINE | re.DOTALL)
    _, answer, *said = re.split(r"^\$ .*\n", session, flags=re.MULTILINE)
    (tmp_path / "problem.json").write_text(row)
    (tmp_path / "answer.txt").write_text(answer)
    prorl = shutil.which("prorl", path=str(Path(sys.executable).parent)) or "prorl"
    commands = [line.removeprefix("$ ") for line in session.splitlines() if line.startswith("$ ")][1:]
    for command, expected in zip(commands, said, strict=True):
        command = re.sub(r"\bprorl\b", prorl, command)
        ran = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True)
        assert (ran.stdout, ran.returncode) == (expected, 0)
