"""Run a function on several ranks, each a process of its own: `run_ranks(2, function, argument)`.

The ranks are forked from a clean server process in which torch and Megatron-Core are imported once: starting them
takes a fraction of a second and inherits nothing from the test process.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import socket
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(
    [
        "pytest",
        "tiny_model",
        "policy_setup",
        "megatron.core.dist_checkpointing.strategies.torch",
        "megatron_prorl.policy.device",
        "megatron_prorl.policy.model",
        "megatron_prorl.policy.optimizer",
        "megatron_prorl.weights.export",
    ]
)


def run_ranks(num_ranks: int, function: Callable[..., Any], *args: Any, timeout_seconds: float = 120.0) -> list[Any]:
    """Call `function(*args)` in `num_ranks` processes with torchrun's environment; returns their answers by rank.

    `function` stands at the top level of a module; it and the arguments are pickled. Raises RuntimeError with the
    traceback of the first rank that fails, and TimeoutError after `timeout_seconds`; no process outlives the call.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    call = pickle.dumps((function, args))
    processes, pipes = [], []
    for rank in range(num_ranks):
        receiver, sender = _context.Pipe(duplex=False)
        environment = {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(num_ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        process = _context.Process(target=_rank_main, args=(environment, call, sender))
        process.start()
        sender.close()
        processes.append(process)
        pipes.append(receiver)
    try:
        return _collect(pipes, time.monotonic() + timeout_seconds)
    finally:
        for process in processes:
            process.join(timeout=0.5)
            process.kill()
            process.join()


def _collect(pipes: list[Connection], deadline: float) -> list[Any]:
    answers: list[Any] = [None] * len(pipes)
    waiting = set(range(len(pipes)))
    while waiting:
        ready = wait([pipes[rank] for rank in waiting], timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            raise TimeoutError(f"ranks {sorted(waiting)} did not answer in time")
        for rank in [rank for rank in waiting if pipes[rank] in ready]:
            waiting.remove(rank)
            try:
                succeeded, payload = pickle.loads(pipes[rank].recv_bytes())
            except EOFError:
                raise RuntimeError(f"rank {rank} died without an answer") from None
            if not succeeded:
                raise RuntimeError(f"rank {rank} failed:\n{payload}")
            answers[rank] = payload
    return answers


def _rank_main(environment: dict[str, str], call: bytes, sender: Connection) -> None:
    os.environ.update(environment)
    try:
        function, args = pickle.loads(call)
        answer = (True, function(*args))
    except BaseException:
        answer = (False, traceback.format_exc())
    sender.send_bytes(pickle.dumps(answer))
    sender.close()
