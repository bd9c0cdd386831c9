"""A real Slurm of four nodes on this machine, from Debian's packages: munged, slurmctld and four slurmd of its own."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

PROGRAMS = ("munged", "munge", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "sinfo")
ACCOUNTING_PROGRAMS = ("slurmdbd", "sacct", "sacctmgr", "mariadbd", "mariadb-install-db")
NUM_NODES = 4
READY_SECONDS = 120.0  # 2 on a quiet machine

SLURM_CONF = """\
ClusterName=lab
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={controller_port}
FirstJobId={controller_port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
ReturnToService=2
SlurmdTimeout=30
KillWait=5
MinJobAge=300
JobRequeue=1
SchedulerParameters=sched_interval=1,bf_interval=1,sched_min_interval=0,batch_sched_delay=0,requeue_delay=0
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
GresTypes=gpu
NodeName=DEFAULT CPUs=8 RealMemory=16000 Gres=gpu:8 State=UNKNOWN
{nodes}
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=test Nodes=node[1-4] Default=YES MaxTime=INFINITE State=UP OverTimeLimit=0 PriorityTier=1 GraceTime=60
PartitionName=urgent Nodes=node[1-4] MaxTime=INFINITE State=UP PriorityTier=2 PreemptMode=OFF
"""

ACCOUNTING_CONF = """\
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort={port}
AccountingStoragePass={folder}/munge.socket
"""

SLURMDBD_CONF = """\
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CommunicationParameters=NoInAddrAny
DbdHost=localhost
DbdAddr=127.0.0.1
DbdPort={port}
SlurmUser=root
StorageType=accounting_storage/mysql
StorageHost=localhost
StorageUser=root
StorageLoc=slurm_acct
LogFile={folder}/slurmdbd.log
PidFile={folder}/slurmdbd.pid
"""


def missing(*, accounting: bool = False) -> str:
    """Why no cluster can be started here; empty if one can."""
    absent = [name for name in PROGRAMS if not _found(name)]
    if absent:
        return f"Slurm is not installed here: no {', '.join(absent)} (Debian: slurmctld slurmd slurm-client munge)"
    absent = [name for name in ACCOUNTING_PROGRAMS if accounting and not _found(name)]
    if absent:
        packages = "slurmdbd mariadb-server-core mariadb-client-core"
        return f"Slurm has no accounting here: no {', '.join(absent)} (Debian: {packages})"
    return "" if os.getuid() == 0 else "a Slurm of one's own needs root: slurmd starts tasks as other users"


class Cluster:
    """`variables` lead Slurm's commands to this cluster."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.variables = {"SLURM_CONF": str(folder / "slurm.conf")}

    def run(self, *command: str, cwd: Path | None = None, variables: dict[str, str] | None = None) -> str:
        """The standard output of a command of Slurm's."""
        environment = os.environ | self.variables | (variables or {})
        done = subprocess.run(command, env=environment, cwd=cwd, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"
        return done.stdout

    def job(self, number: str) -> dict[str, str]:
        """What `scontrol show job` says: JobState, Restarts, ExitCode and others."""
        shown = self.run("scontrol", "show", "job", "--oneliner", number)
        return dict(word.split("=", 1) for word in shown.split() if "=" in word)

    def preempt(self) -> str:
        """Submit a job that wants all nodes and comes before all others; its id."""
        options = ["--partition=urgent", f"--nodes={NUM_NODES}", "--exclusive", "--output=/dev/null"]
        return self.run("sbatch", "--parsable", *options, "--wrap=sleep 3").strip()


def venv_with(folder: Path, trainer: str) -> str:
    """A virtual environment like this one, but in which the trainer is a shell script."""
    python = folder / "venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/bash\n[ "$2" = megatron_prorl.cli ] || exec {sys.executable} "$@"\n{trainer}\n')
    python.chmod(0o755)
    (python.parent / "python3").symlink_to(python)
    return str(folder / "venv")


def venv_that_leaves(folder: Path) -> str:
    """One whose trainer leaves when it is told to, and the next time finishes; it makes `folder`/started."""
    started = folder / "started"
    trainer = f"[ ! -e {started} ] || exit 0; trap 'exit 75' TERM; touch {started}; while true; do sleep 0.2; done"
    return venv_with(folder, trainer)


@contextmanager
def cluster(folder: Path, *, accounting: bool = False) -> Iterator[Cluster]:
    """Start one with its files in `folder`, whose path has to be short (sockets), and end it with its jobs.

    `accounting` gives it a database, which `sacct` asks.
    """
    found = Cluster(folder)
    with ExitStack() as stack:
        controller_port, database_port, *node_ports = _free_ports(2 + NUM_NODES)
        nodes = "\n".join(
            f"NodeName=node{i} NodeHostname=localhost NodeAddr=127.0.0.1 Port={port}"
            for i, port in enumerate(node_ports, start=1)
        )
        conf = SLURM_CONF.format(folder=folder, controller_port=controller_port, nodes=nodes)
        if accounting:
            conf += ACCOUNTING_CONF.format(folder=folder, port=database_port)
        (folder / "slurm.conf").write_text(conf)
        for i in range(8):  # to ask for, with no device behind it
            (folder / f"gpu{i}").touch()
        (folder / "gres.conf").write_text(f"Name=gpu File={folder}/gpu[0-7]\n")
        (folder / "state").mkdir()
        _start_munge(folder, stack)
        if accounting:
            _start_accounting(found, database_port, stack)
        _start(stack, folder, "slurmctld", "-D", "-f", str(folder / "slurm.conf"))
        _wait(lambda: "UP" in found.run("scontrol", "ping"), "slurmctld")
        stack.callback(_cancel_all, found)
        for i in range(1, NUM_NODES + 1):
            (folder / f"spool-node{i}").mkdir()
            _start(stack, folder, "slurmd", "-D", "-N", f"node{i}", "-f", str(folder / "slurm.conf"))
        _wait(lambda: found.run("sinfo", "-h", "-o", "%D %t").split() == [str(NUM_NODES), "idle"], "four idle nodes")
        yield found


def _start_munge(folder: Path, stack: ExitStack) -> None:
    key = folder / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o600)
    names = {"key-file": "munge.key", "socket": "munge.socket", "pid-file": "munged.pid"}
    names |= {"log-file": "munged.log", "seed-file": "munged.seed"}
    options = [f"--{option}={folder / name}" for option, name in names.items()]
    _start(stack, folder, "munged", "--foreground", "--force", "--num-threads=2", *options)
    _wait((folder / "munge.socket").exists, "munged")


def _start_accounting(found: Cluster, port: int, stack: ExitStack) -> None:
    folder, data, key = found.folder, found.folder / "database", found.folder / "database.socket"
    conf = folder / "slurmdbd.conf"
    conf.write_text(SLURMDBD_CONF.format(folder=folder, port=port))
    conf.chmod(0o600)
    install = ["mariadb-install-db", "--no-defaults", "--user=root", f"--datadir={data}", "--skip-test-db"]
    subprocess.run([*install, "--auth-root-authentication-method=socket"], check=True, capture_output=True, timeout=120)
    options = ["--innodb-buffer-pool-size=64M", "--innodb-lock-wait-timeout=900", "--innodb-flush-log-at-trx-commit=0"]
    options += ["--no-defaults", "--user=root", f"--datadir={data}", f"--socket={key}", "--skip-networking"]
    options.sort(key=lambda option: option != "--no-defaults")  # has to be the first
    _start(stack, folder, "mariadbd", *options)
    _wait(key.exists, "mariadbd")
    _start(stack, folder, "slurmdbd", "-D", MYSQL_UNIX_PORT=str(key))
    _wait(lambda: found.run("sacctmgr", "-n", "show", "cluster") is not None, "slurmdbd")


def _start(stack: ExitStack, folder: Path, program: str, *arguments: str, **variables: str) -> None:
    log = stack.enter_context((folder / f"{program}.out").open("ab"))
    environment = os.environ | {"SLURM_CONF": str(folder / "slurm.conf")} | variables
    process = subprocess.Popen(
        [_found(program), *arguments], env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log
    )
    stack.callback(_end, process)


def _end(process: subprocess.Popen[bytes]) -> None:
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(timeout=20)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _cancel_all(found: Cluster) -> None:
    found.run("scancel", "--user=root")
    _wait(lambda: not found.run("squeue", "-h", "-t", "R,CG").strip(), "no job left")


def _wait(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + READY_SECONDS
    while True:
        try:
            if condition():
                return
        except AssertionError:  # the command finds nobody yet
            pass
        assert time.monotonic() < deadline, f"not within {READY_SECONDS:g} s: {what}"
        time.sleep(0.2)


def _found(program: str) -> str:
    return shutil.which(program, path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin") or ""


def _free_ports(num: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(num)]
        return [found.getsockname()[1] for found in sockets]
