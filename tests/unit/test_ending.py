"""Signals that tell a process to end are noted wherever it is, and end it only when they come again later."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

PROCESS = """
import sys, threading, time
from pathlib import Path
from megatron_prorl import ending

ending.REPEAT_SECONDS = 2.0
ending.listen()
ending.listen()

def watch():
    ending.wait_told(60)
    Path(sys.argv[2]).write_text(ending.how())

def until(release):
    sys.stdin.read()
    release()

threading.Thread(target=watch, daemon=True).start()
print("listening", flush=True)
if sys.argv[1] == "in C":  # which no signal interrupts, as in a collective
    import ctypes
    libc, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(64)
    libc.pthread_mutex_lock(mutex)
    threading.Thread(target=until, args=(lambda: libc.pthread_mutex_unlock(mutex),), daemon=True).start()
    libc.pthread_mutex_lock(mutex)
else:
    over = threading.Event()
    threading.Thread(target=until, args=(over.set,), daemon=True).start()
    while not over.is_set():
        time.sleep(0.05)
print("at its end", flush=True)
"""


class Listener:
    """A process that listens, and lasts until `end`; `told` is what it took note of."""

    def __init__(self, folder: Path, where: str) -> None:
        self._file = folder / "told"
        self.process = subprocess.Popen(
            [sys.executable, "-c", PROCESS, where, str(self._file)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout and self.process.stdout.readline() == "listening\n"

    def told(self) -> str:
        deadline = time.monotonic() + 30
        while not self._file.exists() or not self._file.read_text():
            assert time.monotonic() < deadline, "not noted"
            time.sleep(0.02)
        return self._file.read_text()

    def end(self) -> tuple[int, str]:
        out, _ = self.process.communicate(timeout=30)
        return self.process.returncode, out


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_is_noted_and_ends_nothing(tmp_path: Path, signum: signal.Signals) -> None:
    listener = Listener(tmp_path, "in Python")
    listener.process.send_signal(signum)
    assert listener.told() == signum.name
    assert listener.end() == (0, "at its end\n")


def test_the_same_signal_forwarded_by_several_is_one(tmp_path: Path) -> None:
    listener = Listener(tmp_path, "in Python")
    for _ in range(3):
        listener.process.send_signal(signal.SIGTERM)
        time.sleep(0.1)
    assert listener.end() == (0, "at its end\n")


def test_another_sigterm_later_ends_the_process_at_once(tmp_path: Path) -> None:
    listener = Listener(tmp_path, "in Python")
    listener.process.send_signal(signal.SIGUSR1)
    listener.told()
    time.sleep(2.1)
    listener.process.send_signal(signal.SIGTERM)
    assert listener.process.wait(timeout=30) == 128 + signal.SIGTERM
    assert listener.end() == (128 + signal.SIGTERM, "")


def test_a_signal_is_noted_while_the_main_thread_is_inside_a_call_that_python_cannot_interrupt(tmp_path: Path) -> None:
    listener = Listener(tmp_path, "in C")
    listener.process.send_signal(signal.SIGTERM)
    assert listener.told() == "SIGTERM"
    assert listener.end() == (0, "at its end\n")
