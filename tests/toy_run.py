"""Whole runs of `prorl train` on a toy: a model taught in seconds, runs that are killed, and what they leave."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
import yaml
from tiny_model import make_tiny_qwen

FAULTS = Path(__file__).with_name("faults.py")
QUESTION = "Find the Greatest Common Divisor (GCD) of these numbers: {} and {}. Give only the GCD as your final answer."
SYSTEM = "<answer></answer>"
START_SECONDS = 600.0  # 15 on a quiet machine; a minute more where a model is made first
END_SECONDS = 30.0  # from a kill to the end of what it left


def teach(folder: Path) -> Path:
    """A tiny Qwen2 that answers every question about a GCD with 1 or 2, each as often: mostly one of them is right."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # vLLM's attention on a CPU needs heads of 32 numbers.
    make_tiny_qwen(folder, hidden_size=128, num_hidden_layers=2, initializer_range=0.02)
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    rng = random.Random(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(40):
        rows = []
        for _ in range(8):
            question = QUESTION.format(rng.randint(2, 20), rng.randint(2, 20))
            messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": question}]
            prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
            answer = f"<answer>{rng.randint(1, 2)}</answer><|im_end|>"
            rows.append([tokenizer.encode(text, add_special_tokens=False) for text in (prompt, answer)])
        length = max(len(prompt) + len(answer) for prompt, answer in rows)
        token_ids = torch.full((len(rows), length), tokenizer.pad_token_id)
        labels = torch.full_like(token_ids, -100)
        for i, (prompt, answer) in enumerate(rows):
            end = len(prompt) + len(answer)
            token_ids[i, :end] = torch.tensor(prompt + answer)
            labels[i, len(prompt) : end] = torch.tensor(answer)
        optimizer.zero_grad()
        model(input_ids=token_ids, labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    model.save_pretrained(folder)
    return folder


def toy_config(model: Path, run_dir: Path, **sections: dict[str, Any]) -> dict[str, Any]:
    """Six steps with a reset after every third; `sections` change options."""
    config: dict[str, Any] = {
        "run_dir": str(run_dir),
        "steps": 6,
        "seed": 3,
        "device": "cpu",
        "model": {"path": str(model), "dtype": "fp32"},
        "data": {
            "tasks": [{"task": "gcd", "params": {"min_value": 2, "max_value": 20}}],
            "validation_problems": 4,
            "system_prompt": SYSTEM,
        },
        "rollout": {
            "prompts_per_step": 4,
            "rollouts_per_prompt": 8,
            "max_prompt_tokens": 220,
            "max_response_tokens": 24,
            "dynamic_sampling": False,
            "engines": {"max_running": 32, "kv_cache_gib": 0.25},
        },
        "verifier": {"workers": 1},
        "optimizer": {"updates_per_step": 1, "learning_rate": 3e-4},
        "reset": {"every_steps": 3},
        "validation": {"every_steps": 3, "samples": 4},
        "checkpoint": {"every_steps": 2, "keep": 9},
    }
    for name, options in sections.items():
        config[name] = config[name] | options if isinstance(options, dict) and name in config else options
    return config


class Start:
    """One start of `prorl train`, or of a script with the overrides; ended with all its processes after a `with` block.

    `faults` ("sync:3=trainer") are those of faults.py, `variables` go to the environment. All processes of the run are
    found by a folder for temporary files that nobody else has.
    """

    def __init__(
        self,
        config: dict[str, Any],
        *overrides: str,
        faults: tuple[str, ...] = (),
        script: Path | None = None,
        variables: Mapping[str, str] | None = None,
        **popen: Any,
    ) -> None:
        self.config = config
        self.run_dir = Path(config["run_dir"])
        self._tmp = tempfile.TemporaryDirectory(prefix="prorl-")
        folder = Path(self._tmp.name)
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
        command = [str(FAULTS), *faults] if faults else ["-m", "megatron_prorl.cli"]
        command = [str(script)] if script else [*command, "train", str(folder / "config.yaml")]
        self._out, self._err = folder / "out", folder / "err"
        self._seen: set[int] = set()  # its processes' ids
        self._segments: set[str] = set()  # what they had open below /dev/shm
        with self._out.open("wb") as out, self._err.open("wb") as err:
            self.process = subprocess.Popen(
                [sys.executable, *command, *overrides],
                env=os.environ | {"TMPDIR": self._tmp.name, "PYTHONUNBUFFERED": "1"} | dict(variables or {}),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                start_new_session=True,
                **popen,
            )
        self._watcher = threading.Thread(target=self._watch)
        self._watcher.start()

    def __enter__(self) -> Start:
        return self

    def __exit__(self, *_: object) -> None:
        for pid in self.pids():
            os.kill(pid, signal.SIGKILL)
        self.process.wait()
        self._watcher.join()
        self._tmp.cleanup()

    @property
    def out(self) -> str:
        return self._out.read_text()

    @property
    def err(self) -> str:
        return self._err.read_text()

    def pids(self, needle: str = "", **environment: str) -> list[int]:
        """Living processes of this start with `needle` in the command line and these variables; zombies are dead.

        They are known by their TMPDIR: this start's folder, or one of an engine in it.
        """
        ours = f"TMPDIR={self._tmp.name}".encode()
        wanted = {f"{name}={value}".encode() for name, value in environment.items()}
        found = []
        for entry in Path("/proc").iterdir():
            try:
                if not entry.name.isdecimal():
                    continue
                variables = set((entry / "environ").read_bytes().split(b"\0"))
                if not wanted <= variables or not any(variable.startswith(ours) for variable in variables):
                    continue
                if needle.encode() in (entry / "cmdline").read_bytes() and _state(entry) != "Z":
                    found.append(int(entry.name))
            except OSError:  # it ended meanwhile
                continue
        return found

    def wait(self) -> int:
        """The exit code."""
        return self.process.wait(timeout=START_SECONDS)

    def wait_for(self, condition: Callable[[], object], what: str) -> None:
        """Return once `condition` holds, while the run goes on."""
        deadline = time.monotonic() + START_SECONDS
        while not condition():
            state = f"\n{self.out}\n{self.err}"
            assert time.monotonic() < deadline, f"not within {START_SECONDS:g} s: {what}{state}"
            assert self.process.poll() is None, f"ended before: {what}{state}"
            time.sleep(0.02)

    def ended(self) -> Ended:
        """What is left once the processes had END_SECONDS to see that theirs is gone."""
        code = self.wait()
        deadline = time.monotonic() + END_SECONDS
        while (left := self.pids()) and time.monotonic() < deadline:
            time.sleep(0.05)
        there = set(os.listdir("/dev/shm"))
        named = {name for name in there if self._seen & {int(digits) for digits in re.findall(r"\d+", name)}}
        segments = (self._segments & there) | named
        in_tmp = sorted(set(os.listdir(self._tmp.name)) - {"config.yaml", "out", "err"})
        return Ended(self.config, code, self.out, self.err, [command(pid) for pid in left], segments, in_tmp)

    def _watch(self) -> None:
        while self.process.poll() is None:
            pids = set(self.pids())
            self._seen |= pids
            self._segments |= _segments(pids)
            time.sleep(0.2)


def _state(proc: Path) -> str:
    return (proc / "stat").read_text().rpartition(")")[2].split()[0]


def _segments(pids: set[int]) -> set[str]:
    """What these processes have mapped or open below /dev/shm."""
    names = set()
    for pid in pids:
        try:
            paths = [line.partition("/")[2] for line in Path(f"/proc/{pid}/maps").read_text().splitlines()]
            paths += [os.readlink(fd)[1:] for fd in Path(f"/proc/{pid}/fd").iterdir()]
        except OSError:
            continue
        names |= {path.split()[0].removeprefix("dev/shm/") for path in paths if path.startswith("dev/shm/")}
    return names


def command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")[:200]
    except OSError:
        return "ended"


@dataclass(frozen=True, slots=True)
class Ended:
    """A start that has ended, and what it left."""

    config: dict[str, Any]
    code: int
    out: str
    err: str
    left_running: list[str]  # command lines
    left_in_memory: set[str]  # below /dev/shm
    left_in_tmp: list[str]  # file names in its TMPDIR

    @property
    def run_dir(self) -> Path:
        return Path(self.config["run_dir"])


def run_to_its_end(config: dict[str, Any], *overrides: str, faults: tuple[str, ...] = ()) -> Ended:
    """Start a run and let it end by itself, or by its faults."""
    with Start(config, *overrides, faults=faults) as start:
        start.wait()
        return start.ended()


def rows(run_dir: Path) -> list[dict[str, float]]:
    """metrics.jsonl as it lies there."""
    path = run_dir / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def steps(run_dir: Path) -> list[int]:
    return [int(row["step"]) for row in rows(run_dir)]


def ledger(run_dir: Path, step: int) -> dict[int, str]:
    """Problem id by draw, of one step."""
    table = pq.read_table(run_dir / "rollouts" / f"step-{step:06d}.parquet", columns=["step", "draw", "problem_id"])
    assert set(table["step"].to_pylist()) == {step}
    return dict(zip(table["draw"].to_pylist(), table["problem_id"].to_pylist(), strict=True))


def folders(run_dir: Path, kind: str) -> list[str]:
    """Names below checkpoints/ or references/, hidden ones included."""
    return sorted(os.listdir(run_dir / kind))


def progress(run_dir: Path, step: int) -> dict[str, Any]:
    return json.loads((run_dir / "checkpoints" / f"step-{step:06d}" / "state.json").read_text())["progress"]


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint or reference, by torch's own reader."""
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    with tempfile.TemporaryDirectory() as tmp:
        dcp_to_torch_save(folder, f"{tmp}/all.pt")
        found = torch.load(f"{tmp}/all.pt", weights_only=False)
    return {name: value for name, value in found.items() if isinstance(value, torch.Tensor)}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for name, value in tensors(folder).items() if not name.startswith("optimizer.")}


def moments(folder: Path) -> list[torch.Tensor]:
    return [value for name, value in tensors(folder).items() if ".exp_avg" in name]


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)
