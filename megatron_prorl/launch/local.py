"""Start the ranks of one node through torch's elastic agent, end them together, and tell a failure once.

A rank started here dies with its launcher, and leaves a `UserError` in the agent's error file for the launcher to
print, so that four ranks with the same complaint make one line. torch is imported only by `launch_ranks`.
"""

from __future__ import annotations

import ctypes
import json
import logging
import os
import re
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_prorl import ending
from megatron_prorl.config.load import ConfigError
from megatron_prorl.config.schema import Config
from megatron_prorl.errors import ToldToEnd, UserError

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

_LAUNCHER_PID = "PRORL_LAUNCHER_PID"
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_CAUSE_SECONDS = 5
_SHUTDOWN_SECONDS = 20  # what a rank has to end its engines after SIGTERM


def launch_ranks(command: Sequence[str], *, num_ranks: int) -> int:
    """Run `python COMMAND` as `num_ranks` ranks on this node and return the exit code.

    SIGTERM and SIGUSR1 are forwarded to the ranks, which end when they can (`ending`); another SIGTERM, SIGINT, SIGHUP
    or SIGQUIT ends them at once, and the first rank to fail ends the others.
    """
    from torch.distributed.elastic.multiprocessing.api import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    with _as_launcher(num_ranks), tempfile.TemporaryDirectory(prefix="prorl-ranks-") as folder:
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=num_ranks,
            run_id=f"prorl-{os.getpid()}",
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            local_addr="localhost",
            max_restarts=0,
            shutdown_timeout=_SHUTDOWN_SECONDS,
            signals_to_handle="SIGINT,SIGHUP,SIGQUIT",  # besides those of `_forwarding`
            logs_specs=DefaultLogsSpecs(log_dir=folder),
        )
        try:
            with _forwarding() as forwarded:
                elastic_launch(config, sys.executable)(*command)
        except ChildFailedError as error:
            return _tell(error, forwarded)
        except SignalException as error:
            return 128 + error.sigval
    return 0


@contextmanager
def _as_launcher(num_ranks: int) -> Iterator[None]:
    """What the ranks are to inherit, and nobody else that this process starts: a rank of another launcher would end."""
    before = {name: os.environ.get(name) for name in (_LAUNCHER_PID, "OMP_NUM_THREADS")}
    os.environ[_LAUNCHER_PID] = str(os.getpid())
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // num_ranks)))
    disabled = logging.root.manager.disable
    logging.disable()  # of this process alone: what failed is told below, once
    try:
        yield
    finally:
        logging.disable(disabled)
        for name, value in before.items():
            os.environ.pop(name, None)
            os.environ |= {} if value is None else {name: value}


@contextmanager
def _forwarding() -> Iterator[list[int]]:
    """Forward what `ending` listens to; yields a list of what was forwarded, which grows."""
    from torch.distributed.elastic.multiprocessing.api import SignalException

    forwarded: list[int] = []
    first_seconds = 0.0

    def forward(signum: int, frame: Any) -> None:
        nonlocal first_seconds
        now = time.monotonic()
        ranks = _children()
        again = forwarded and signum == signal.SIGTERM and now - first_seconds >= ending.REPEAT_SECONDS
        if again or not ranks:
            raise SignalException("told to end", signal.Signals(signum))
        first_seconds = first_seconds or now
        forwarded.append(signum)
        for pid in ranks:
            with suppress(ProcessLookupError):
                os.kill(pid, signum)

    before = {signum: signal.signal(signum, forward) for signum in ending.SIGNALS}
    try:
        yield forwarded
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def _children() -> list[int]:
    """Process ids of this process's children; some kernels have no /proc/PID/task/TID/children."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it ended meanwhile
            if int(stat.read_text().rpartition(")")[2].split()[1]) == os.getpid():
                found.append(int(stat.parent.name))
    return found


def _tell(error: ChildFailedError, forwarded: Sequence[int]) -> int:
    """Print the root cause in one line, unless it is a signal that was `forwarded`, and return its exit code."""

    def order(item: tuple[int, ProcessFailure]) -> tuple[bool, bool, int, int]:
        # The agent stops the other ranks with SIGTERM, which they may answer with exit code 143, and lists them as
        # failures too, maybe of the same second.
        rank, failure = item
        was_stopped = failure.exitcode in (-signal.SIGTERM, 128 + signal.SIGTERM)
        return not os.path.isfile(failure.error_file), was_stopped, failure.timestamp, rank

    rank, failure = min(error.failures.items(), key=order)
    if os.path.isfile(failure.error_file):
        print(failure.message, file=sys.stderr)
    elif -failure.exitcode in forwarded:
        pass
    elif failure.exitcode < 0:
        print(f"error: rank {rank} was ended by {failure.signal_name()}; all ranks were stopped", file=sys.stderr)
    else:
        print(f"error: rank {rank} failed (its traceback is above); all ranks were stopped", file=sys.stderr)
    return failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode


def report_user_error(error: UserError) -> None:
    """One line on stderr, or a note to the launcher, which prints the first of all ranks' notes."""
    text = str(error) if isinstance(error, ConfigError | ToldToEnd) else f"error: {error}"
    rank = os.environ.get("RANK")
    if _LAUNCHER_PID in os.environ and "TORCHELASTIC_ERROR_FILE" in os.environ:
        with open(os.environ["TORCHELASTIC_ERROR_FILE"], "w", encoding="utf-8") as file:
            json.dump({"message": text, "timestamp": int(time.time())}, file)
    elif rank in (None, "0"):
        print(text, file=sys.stderr)
    elif error.is_of_all_ranks:
        pass
    elif not isinstance(error, ConfigError) or os.environ.get("LOCAL_RANK") == "0":  # one node may lack a file
        print(f"rank {rank}: {text}", file=sys.stderr)


def let_the_cause_speak(error: Exception) -> None:
    """Hold an error that another rank's end has caused until the launcher stops this rank, so that it hides nothing."""
    if _LAUNCHER_PID in os.environ and re.search("Connection (closed|reset) by peer", str(error)):
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if ending.is_told():  # to stop, while this rank gave up what it had
            sys.exit(128 + signal.SIGTERM)
        time.sleep(_CAUSE_SECONDS)


def check_world_size(cfg: Config) -> None:
    """Raise ConfigError when torchrun or srun started another number of ranks than the configuration names, or none."""
    started = os.environ.get("WORLD_SIZE", "1")
    if started != str(cfg.parallel.world_size):
        raise ConfigError(
            [
                f"parallel: nodes*ranks_per_node = {cfg.parallel.nodes}*{cfg.parallel.ranks_per_node} = "
                f"{cfg.parallel.world_size} ranks, but {started} started; more than one node needs srun or torchrun"
            ]
        )


def end_with_launcher() -> None:
    """Ask the kernel to kill this process when the launcher that started it dies; no effect outside a launcher."""
    launcher = os.environ.get(_LAUNCHER_PID)
    if launcher is None or "RANK" not in os.environ:
        return
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != int(launcher):  # it died before the line above
        os.kill(os.getpid(), signal.SIGKILL)
