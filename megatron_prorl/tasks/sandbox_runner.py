"""What runs inside the sandbox: runs a solution once per test, in a process of its own that is forked for it.

Started by `tasks.sandbox` as a file of its own, without site-packages: it imports the standard library alone. This
process is trusted and knows neither tests to come nor expected outputs; its forks become untrusted in `_confine`.

Requests (stdin) are JSON lines: first the set-up, then one test each, {"stdin": text} or {"arguments": [...]}.
Replies (stdout) are HEADER (exit status, size) and the output's bytes: stdout, or the returned value in JSON. The first
one says that tests may come, or COMPILE_ERROR: a compiler reads a solution once, Python anew for every test.
"""

from __future__ import annotations

import base64
import contextlib
import ctypes
import gc
import json
import os
import resource
import signal
import struct
import sys
import threading
from typing import Any, BinaryIO

HEADER = struct.Struct("<iI")
COMPILE_ERROR, FAILED = 120, 1  # exit statuses; a solution that forges one loses by it
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP, SECCOMP_MODE_FILTER = 1, 4, 38, 22, 2
RECURSION_LIMIT = 600_000
STACK_BYTES = 64 * 2**20
MAX_FILES = 64
PROGRAM = "/tmp/solution"  # where a compiler leaves it

# Names a solution may use without importing them, as in the graders its data comes from (PRIME's and APPS').
PRELUDE = """
from string import *; from re import *; from datetime import *; from collections import *; from heapq import *
from bisect import *; from copy import *; from math import *; from random import *; from statistics import *
from itertools import *; from functools import *; from operator import *; from io import *; from sys import *
from json import *; from builtins import *; from typing import *
import string, re, datetime, collections, heapq, bisect, copy, math, random, statistics, itertools, functools, operator
import io, sys, json, typing, os, time, builtins, array, queue, decimal, fractions, threading, cmath
"""
# Where files cannot be opened, a module is there before the solution starts or not at all.
MODULES = """
abc asyncio atexit base64 binascii calendar codecs contextlib copyreg dataclasses difflib encodings.ascii
encodings.latin_1 encodings.idna enum glob graphlib hashlib inspect locale numbers pprint secrets select signal socket
struct tempfile textwrap traceback types unicodedata unittest uuid warnings weakref zlib
"""


def main(requests: BinaryIO, replies: int) -> None:
    setup = json.loads(requests.readline())
    libc = ctypes.CDLL(None, use_errno=True)
    _die_with_parent(libc, setup["parent_pid"])
    os.environ.clear()
    os.environb.clear()
    if setup["preload"]:
        for module in MODULES.split():
            __import__(module)
    names: dict[str, Any] = {}
    exec(PRELUDE, names)
    compiled = not setup["compiler"] or _compile(setup)
    gc.collect()
    gc.freeze()  # forks share what is there now
    _send(replies, 0 if compiled else COMPILE_ERROR, b"")
    for line in requests:
        status, output = _run(setup, json.loads(line), names, libc)
        _send(replies, status, output)


def _compile(setup: dict[str, Any]) -> bool:
    """Whether the compiler makes a program of the source in its time."""
    import subprocess

    try:
        compiled = subprocess.run(
            [*setup["compiler"], "-o", PROGRAM, "-"],
            input=setup["source"].encode("utf-8", "replace"),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={"PATH": "/usr/bin", "TMPDIR": "/tmp"},
            timeout=setup["compile_seconds"],
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (setup["memory_bytes"],) * 2),
        )
    except subprocess.TimeoutExpired:  # what the compiler has started ends with the sandbox
        return False
    return compiled.returncode == 0


def _run(setup: dict[str, Any], test: dict[str, Any], names: dict[str, Any], libc: ctypes.CDLL) -> tuple[int, bytes]:
    """Run one test in a fork; the exit status (negative: the signal) and what it produced."""
    stdin, output = os.memfd_create("stdin"), os.memfd_create("output")
    try:
        data = memoryview(test.get("stdin", "").encode("utf-8", "replace"))
        while data:
            data = data[os.write(stdin, data) :]
        os.lseek(stdin, 0, os.SEEK_SET)
        runner_pid = os.getpid()
        pid = os.fork()
        if pid == 0:
            try:
                _die_with_parent(libc, runner_pid)
                _become_solution(setup, test, names, libc, stdin, output)
            except BaseException:  # never back into the runner's loop
                os._exit(FAILED)
        _, status = os.waitpid(pid, 0)
        size = min(os.fstat(output).st_size, setup["output_bytes"])
        return os.waitstatus_to_exitcode(status), os.pread(output, size, 0)
    finally:
        os.close(stdin)
        os.close(output)


def _become_solution(
    setup: dict[str, Any], test: dict[str, Any], names: dict[str, Any], libc: ctypes.CDLL, stdin: int, output: int
) -> None:
    function = setup["fn_name"]
    null = os.open("/dev/null", os.O_WRONLY)
    os.dup2(stdin, 0)
    os.dup2(null if function else output, 1)
    os.dup2(null, 2)
    if function:
        os.dup2(output, 3)
    os.closerange(4 if function else 3, 4096)
    if setup["compiler"]:
        _confine(setup, libc)
        os.execve(PROGRAM, [PROGRAM], {})
    for number, name in enumerate(("stdin", "stdout", "stderr")):  # what a fork inherits may hold the runner's bytes
        stream = open(number, "w" if number else "r", encoding="utf-8", errors="replace", closefd=False)  # noqa: SIM115
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)
    names = {**names, "__name__": "solution" if function else "__main__"}
    names.pop(function, None)  # one of the prelude's, such as operator's add, is no answer
    sys.argv = ["solution.py"]
    dumps, write = json.dumps, os.write
    source, arguments = setup["source"], test.get("arguments", [])
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.setrecursionlimit(RECURSION_LIMIT)
    _confine(setup, libc)
    del setup, test, libc

    status = 0
    try:
        try:
            code = compile(source, "solution.py", "exec", dont_inherit=True)
        except (SyntaxError, ValueError, MemoryError, RecursionError, OverflowError):
            os._exit(COMPILE_ERROR)
        try:
            exec(code, names)
            if function:
                call = names[function] if function in names else getattr(names["Solution"](), function)
                value = call(*arguments)
                data = memoryview(dumps(value).encode())
                while data:
                    data = data[write(3, data) :]
        except SystemExit as stop:
            status = 0 if not stop.code else FAILED
        threading._shutdown()  # type: ignore[attr-defined]  # as at the interpreter's end: other threads, atexit, flush
        import atexit

        atexit._run_exitfuncs()
    except BaseException:
        status = FAILED
    for written in (sys.stdout, sys.__stdout__):
        with contextlib.suppress(BaseException):  # a solution may have put anything there
            written.flush()  # type: ignore[union-attr]
    os._exit(status)


def _confine(setup: dict[str, Any], libc: ctypes.CDLL) -> None:
    """Limits and the filter; nothing takes them back."""
    limits = {
        resource.RLIMIT_CPU: setup["cpu_seconds"],
        resource.RLIMIT_AS: setup["memory_bytes"],
        resource.RLIMIT_FSIZE: setup["output_bytes"],
        resource.RLIMIT_NOFILE: MAX_FILES,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_MEMLOCK: 0,
    }
    if setup["max_threads"]:
        limits[resource.RLIMIT_NPROC] = setup["max_threads"]
    for limit, value in limits.items():
        resource.setrlimit(limit, (value, value))
    program = base64.b64decode(setup["filter"])

    class Program(ctypes.Structure):  # struct sock_fprog
        _fields_ = [("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p)]

    header = Program(len(program) // 8, program)
    prctl = libc.prctl
    if (
        prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)
        or prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
        or prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.byref(header), 0, 0)
    ):
        raise OSError(ctypes.get_errno(), "no seccomp filter")


def _die_with_parent(libc: ctypes.CDLL, parent_pid: int | None) -> None:
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if parent_pid is not None and os.getppid() != parent_pid:  # it died before prctl
        os._exit(FAILED)


def _send(replies: int, status: int, output: bytes) -> None:
    data = memoryview(HEADER.pack(status, len(output)) + output)
    while data:
        data = data[os.write(replies, data) :]


if __name__ == "__main__":
    _requests = os.fdopen(os.dup(0), "rb")
    _replies = os.dup(1)
    resource.setrlimit(resource.RLIMIT_STACK, (STACK_BYTES, resource.getrlimit(resource.RLIMIT_STACK)[1]))
    main(_requests, _replies)
