"""`prorl preflight` says what is not fit for a run, and which node: with real ranks, one fault at a time."""

from __future__ import annotations

import fcntl
import os
import re
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny_model import make_tiny_qwen

# A rank with a fault, which `{fault}` puts in place before the command.
RANK = """
import sys, time
{fault}
from megatron_prorl.cli import main
sys.exit(main(["preflight", *sys.argv[1:]]))
"""
TWO_NODES = {"nodes": 2, "ranks_per_node": 2}


@dataclass(frozen=True, slots=True)
class Ended:
    codes: list[int]
    out: str  # of rank 0
    err: str  # of all ranks
    seconds: float

    def row(self, name: str) -> str:
        """The check's row and what it goes on with, in one line."""
        lines = self.out.splitlines()
        start = next(i for i, line in enumerate(lines) if re.match(rf"(green|amber|red|skipped) +{name}  ", line))
        end = next((i for i in range(start + 1, len(lines)) if lines[i][:1].strip()), len(lines))
        return " ".join(" ".join(line.split()) for line in lines[start:end])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_qwen(tmp_path_factory.mktemp("model") / "tiny", hidden_size=128, num_hidden_layers=2)


@pytest.fixture
def config(model: Path, tmp_path: Path) -> Path:
    return write_config(tmp_path, model)


def write_config(folder: Path, model: Path, **sections: Any) -> Path:
    path = folder / "config.yaml"
    document = {
        "run_dir": str(folder / "run"),
        "steps": 6,
        "device": "cpu",
        "model": {"path": str(model), "dtype": "fp32"},
        "parallel": TWO_NODES,
        "data": {"tasks": [{"task": "gcd"}]},
        "rollout": {
            "prompts_per_step": 4,
            "rollouts_per_prompt": 8,
            "max_prompt_tokens": 220,
            "max_response_tokens": 24,
            "engines": {"count": 2, "kv_cache_gib": 0.25},
        },
        "optimizer": {"updates_per_step": 1},
    }
    path.write_text(yaml.safe_dump(document | sections))
    return path


def preflight(
    config: Path, *overrides: str, faults: dict[int, str] | None = None, folders: dict[int, Path] | None = None
) -> Ended:
    """Four ranks as srun starts them, of two nodes. `faults` is Python by rank; a rank whose fault is "absent" is."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    began, processes = time.monotonic(), {}
    for rank in range(4):
        if (fault := (faults or {}).get(rank, "")) == "absent":
            continue
        variables = {"RANK": str(rank), "LOCAL_RANK": str(rank % 2), "WORLD_SIZE": "4", "OMP_NUM_THREADS": "1"}
        variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        processes[rank] = subprocess.Popen(
            [sys.executable, "-c", RANK.format(fault=fault), str(config), *overrides],
            env=os.environ | variables,
            cwd=(folders or {}).get(rank),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
    try:
        texts = {rank: process.communicate(timeout=120) for rank, process in processes.items()}
    finally:
        for process in processes.values():
            process.kill()
            process.wait()
    codes = [process.returncode for process in processes.values()]
    return Ended(codes, texts[0][0], "".join(err for _, err in texts.values()), time.monotonic() - began)


def node(number: int) -> str:
    return f"{socket.gethostname()} (node {number})"


def test_machines_that_are_fit_are_green(config: Path) -> None:
    ended = preflight(config)
    assert (ended.codes, ended.err) == ([0, 0, 0, 0], "")
    states = {line.split()[1]: line.split()[0] for line in ended.out.splitlines()[1:-1] if line[:1].strip()}
    assert states.pop("GPUs") == "skipped"
    assert set(states.values()) <= {"green", "amber"}, ended.out  # a busy machine may lack memory
    assert [name for name in states if states[name] != "green" and name != "memory"] == []
    assert "4 on 1 host" in ended.row("ranks")
    speeds = [float(number) for number in re.findall(r"([\d.]+) [GM]B/s", ended.row("collectives"))]
    units = set(re.findall(r"[GM]B/s", ended.row("collectives")))
    assert len(speeds) == 4 and min(speeds) > 0
    if len(units) == 1:  # of four ranks, as nccl-tests count
        assert [speeds[1] / speeds[0], speeds[3] / speeds[2]] == pytest.approx([2 * 3 / 4, 3 / 4], rel=0.1)
    assert os.listdir(config.parent / "run") == [], "it leaves nothing"
    assert ended.seconds < 60


def test_the_ranks_of_one_node_are_started_as_those_of_a_run(config: Path) -> None:
    words = [str(config), "parallel.nodes=1", "parallel.ranks_per_node=2"]
    command = [sys.executable, "-m", "megatron_prorl.cli", "preflight", *words]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert "2 on 1 host" in ended.stdout
    ended = subprocess.run([*command, "device=cuda"], capture_output=True, text=True, timeout=120)
    assert ended.returncode == 2
    assert ended.stderr == f"error: preflight: GPUs: not fit for a run; look at {socket.gethostname()}\n"


def test_a_rank_that_does_not_come_is_named_with_its_node(config: Path) -> None:
    ended = preflight(config, faults={3: "absent"})
    assert set(ended.codes) == {2}
    assert "3 of 4 came; missing: rank 3" in ended.row("ranks")
    ended = preflight(config, faults={2: "absent", 3: "absent"})
    assert "2 of 4 came; missing: ranks 2 to 3" in ended.row("ranks")
    assert ended.err == "error: preflight: ranks: not fit for a run; look at node 1\n"
    assert ended.seconds < 60


def test_a_rank_that_cannot_join_the_group_is_told_with_its_error(config: Path) -> None:
    ended = preflight(config, faults={2: "import os; os.environ['GLOO_SOCKET_IFNAME'] = 'none0'"})
    assert set(ended.codes) == {2}, ended.err
    assert ended.row("ranks").startswith("red ranks rank 2: RuntimeError: ") and "none0" in ended.row("ranks")
    assert f"error: preflight: ranks: not fit for a run; look at {node(1)}\n" in ended.err


def test_a_package_of_another_version_is_named(config: Path) -> None:
    fault = """
import importlib.metadata
right = importlib.metadata.version
importlib.metadata.version = lambda name: "9.9" if name == "transformers" else right(name)
"""
    ended = preflight(config, faults={2: fault})
    assert set(ended.codes) == {2}
    assert f"transformers 9.9 on {node(1)}, " in ended.row("versions")
    assert ended.err == f"error: preflight: versions: not fit for a run; look at {node(1)}\n"


def test_a_run_directory_that_a_node_does_not_share_is_named(config: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    folders = {rank: tmp_path / ("a" if rank < 2 else "b") for rank in range(4)}
    ended = preflight(config, "run_dir=relative", folders=folders)
    assert "ranks 2 to 3: does not see relative/.preflight-" in ended.row("run directory")
    assert ended.err == f"error: preflight: run directory: not fit for a run; look at {node(1)}\n"


def test_a_run_directory_in_which_a_run_trains_or_that_cannot_be_written_is_red(config: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    with (run_dir / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        row = preflight(config).row("run directory")
    assert "another process trains in" in row and str(run_dir) in row  # a long path has a line of its own
    (tmp_path / "file").touch()
    ended = preflight(config, f"run_dir={tmp_path}/file/run")
    assert "cannot write" in ended.row("run directory") and "not a directory" in ended.row("run directory")
    assert set(ended.codes) == {2}


def test_a_clock_that_is_wrong_is_named_with_how_much(config: Path) -> None:
    ended = preflight(config, faults={2: "right = time.time; time.time = lambda: right() + 90"})
    assert re.search(r"\(node 1\) \+(89999|90000)\.\d ms", ended.row("clocks"))
    assert ended.err == f"error: preflight: clocks: not fit for a run; look at {node(1)}\n"


def test_a_node_that_has_lost_its_gpus_is_named(config: Path) -> None:
    has = "import torch; torch.cuda.is_available = lambda: True"
    ended = preflight(config, "device=cuda", faults=dict.fromkeys((0, 1, 3), has))
    assert "rank 2: torch sees none, the others do" in ended.row("GPUs")
    assert ended.err == f"error: preflight: GPUs: not fit for a run; look at {node(1)}\n"


def test_a_wrong_sum_is_found_and_the_rank_named(config: Path) -> None:
    fault = """
import torch.distributed as dist
right = dist.all_reduce
def wrong(tensor, *args, **kwargs):
    right(tensor, *args, **kwargs)
    if tensor.numel() > 12345:
        tensor[12345] += 1
dist.all_reduce = wrong
"""
    ended = preflight(config, faults={3: fault})
    assert ended.row("collectives").startswith("red collectives wrong sums on rank 3")
    assert ended.err == f"error: preflight: collectives: not fit for a run; look at {node(1)}\n"


def test_a_check_that_hangs_on_a_rank_is_named_with_it_in_less_than_a_minute(config: Path) -> None:
    fault = """
from megatron_prorl.launch import readiness
readiness.disk_speed = lambda folder: __import__("time").sleep(1000)
"""
    ended = preflight(config, faults={2: fault})
    assert set(ended.codes) == {2}, ended.err
    assert "does not end; still in it: rank 2" in ended.row("disk speed")
    assert f"look at {node(1)}\n" in ended.err
    assert ended.seconds < 70


def test_a_rank_that_fails_between_others_that_wait_for_it_is_told_with_its_error(config: Path) -> None:
    fault = """
import torch.distributed as dist
def broken(*args, **kwargs): raise RuntimeError("CUDA error: uncorrectable ECC error")
dist.all_reduce = broken
"""
    ended = preflight(config, faults={3: fault})
    assert "rank 3: RuntimeError: CUDA error: uncorrectable ECC error" in ended.row("collectives")
    assert set(ended.codes) == {2}, ended.err
    assert ended.seconds < 60


def test_a_taken_port_is_red(config: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        ended = preflight(config, f"rollout.engines.port={port}")
    assert f"port {port} is taken" in ended.row("engines")
    assert f"look at {node(0)}\n" in ended.err


def test_a_rank_that_fails_in_a_check_is_told_with_its_error(config: Path) -> None:
    fault = """
from megatron_prorl.launch import readiness
def broken(folder): raise OSError(5, "Input/output error", "/shared/x")
readiness.disk_speed = broken
"""
    ended = preflight(config, faults={2: fault})
    assert "rank 2: OSError: [Errno 5] Input/output error: '/shared/x'" in ended.row("disk speed")
    assert "green engines" in ended.row("engines"), "the others are still made"


def test_a_disk_without_room_for_the_run_is_red_or_amber_by_how_much(config: Path) -> None:
    free = "import shutil; right = shutil.disk_usage; "
    free += "shutil.disk_usage = lambda path: right(path)._replace(free={free})"
    red = preflight(config, "reset.every_steps=1", faults={0: free.format(free=2**20)})
    assert red.row("disk space").startswith("red disk space 1.0 MiB free")
    amber = preflight(config, "reset.every_steps=1", faults={0: free.format(free=15 * 2**20)})
    assert amber.row("disk space").startswith("amber disk space 15.0 MiB free")
    assert "10 checkpoints of 3.5 MiB, 7 references" in amber.row("disk space")
