"""What vLLM loads of ours in every process of an engine: the transfer of weights, and the end with its parent.

vLLM finds `register` through the entry point group `vllm.general_plugins`, in the API server, the engine core and the
workers. Nothing happens in a vLLM that EngineSupervisor did not start.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import select
import signal
import threading

PARENT_VARIABLE = "MEGATRON_PRORL_TRAINER_PID"  # set by EngineSupervisor
PR_SET_PDEATHSIG = 1  # linux/prctl.h


def register() -> None:
    """Entry point; vLLM may call it more than once in a process."""
    if PARENT_VARIABLE not in os.environ:
        return
    parent = multiprocessing.parent_process()
    if parent is not None and parent.pid is not None:  # spawned by another process of the engine
        kill_with_creator(parent.pid)

    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

    if "shm" not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(
            "shm", "megatron_prorl.rollout.shm_transfer", "ShmWeightTransferEngine"
        )


def kill_with_creator(creator_pid: int) -> None:
    """The kernel sends SIGKILL to this process when the thread that created it ends.

    For processes created by a main thread, which lives as long as its process.
    """
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != creator_pid:  # it died before the kernel was asked
        os.kill(os.getpid(), signal.SIGKILL)


def kill_with_process(pid: int) -> None:
    """SIGKILL to this process when the parent process `pid` ends, whichever of its threads created this one."""
    try:
        handle = os.pidfd_open(pid)
    except ProcessLookupError:
        os.kill(os.getpid(), signal.SIGKILL)
        return
    if os.getppid() != pid:  # it died, and its number may be another's already
        os.kill(os.getpid(), signal.SIGKILL)

    def wait_and_kill() -> None:
        select.select([handle], [], [])
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=wait_and_kill, name="trainer-watch", daemon=True).start()
