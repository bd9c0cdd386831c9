"""Runs untrusted programs, one process a test, in a sandbox that the kernel enforces.

What a program gets: processor time until the deadline, `memory_mib` of address space, its standard input, the
standard library, 64 open files, 8 MiB of output, no environment. What it never gets, in either mode: new processes
(threads are allowed), signals to others, sockets, other processes' memory, shared memory, system calls outside the list
in `tasks.seccomp`. Tests wait outside and come one at a time, expected outputs never come: all that leaves the sandbox
is what the program wrote or returned, so forging that takes the right answer.

Modes:

- namespaces: bubblewrap (`bwrap` 0.7 or newer; Debian package bubblewrap) starts a tree of its own: no network, no
  other process, no /proc, a read-only root with the dynamic libraries and the standard library, and an empty /tmp of
  32 MiB, shared by the tests of one solution, that goes with the sandbox. Needs unprivileged user namespaces:
  kernel.unprivileged_userns_clone=1 (Debian), kernel.apparmor_restrict_unprivileged_userns=0 (Ubuntu 24.04); in a
  container seccomp=unconfined or CAP_SYS_ADMIN.
- seccomp: the fallback. The same limits and filter, which here refuses to open any file at all: a solution has only the
  modules that were imported for it, and no scratch. Its processes share the pid namespace and the user of the verifier.

A solution in a compiled language gets the same in mode namespaces, where it can do what its compiler could not be kept
from in the other: read any file. The compiler runs inside the namespaces, before the filter; the filter of its program
allows execve too, by which that starts, and which keeps filter and limits.

No cgroups (docs/decisions/0007): as a program cannot start processes, its limits are those of the whole sandbox. Its
threads are limited in mode namespaces by a kernel of 5.14 or newer, unless the verifier runs as root, whom the kernel
exempts from RLIMIT_NPROC; else by what their stacks take of `memory_mib`.

A sandbox dies with the thread that made it (PR_SET_PDEATHSIG), a killed verifier included.
"""

from __future__ import annotations

import base64
import contextlib
import functools
import json
import logging
import math
import os
import re
import select
import shutil
import subprocess
import sys
import sysconfig
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megatron_prorl.errors import UserError
from megatron_prorl.tasks import sandbox_runner, seccomp
from megatron_prorl.tasks.guard import lifted

logger = logging.getLogger(__name__)

Mode = Literal["namespaces", "seccomp"]

OUTPUT_BYTES = 8 * 2**20  # also the size of a file in the scratch
SCRATCH_BYTES = 32 * 2**20
START_TIMEOUT_SECONDS = 60.0
MAX_THREADS = 256
COMPILERS = {"cpp": ("g++", "-x", "c++", "-std=c++17", "-O2", "-w")}
TOOLCHAIN = ("g++", "as", "ld")  # what is in /usr/bin; a compiler keeps the rest of it in /usr/lib
RUNNER = Path(sandbox_runner.__file__).resolve()


class SandboxError(RuntimeError):
    """The sandbox itself does not work; no program can cause it."""


class SandboxDied(RuntimeError):
    """The sandbox ended under a program."""


@dataclass(frozen=True, slots=True)
class Ran:
    """What one test's process did: its exit status, negative if a signal ended it, and its output."""

    status: int
    output: bytes

    @property
    def compile_error(self) -> bool:
        return self.status == sandbox_runner.COMPILE_ERROR


class Sandbox:
    """One solution's sandbox, to be used as a context manager; empty-handed afterwards, whatever the solution did.

    `fn_name`: the function to call, None for a program that reads stdin. `language`: "python", or one of COMPILERS, in
    mode "namespaces" and without `fn_name`; `compile_error` then says whether there is no program to run. Raises
    SandboxError if it does not start.
    """

    def __init__(
        self,
        source: str,
        fn_name: str | None,
        *,
        mode: Mode,
        memory_mib: int,
        timeout_seconds: float,
        language: str = "python",
        compile_seconds: float = 10.0,
    ) -> None:
        files = mode == "namespaces"
        compiler = COMPILERS.get(language, ())
        assert not compiler or (files and fn_name is None)
        setup = {
            "source": source,
            "fn_name": fn_name,
            "compiler": compiler,
            "compile_seconds": compile_seconds,
            "filter": base64.b64encode(seccomp.build(files=files, execute=bool(compiler))).decode(),
            "preload": not files,
            "parent_pid": None if files else os.getpid(),
            "memory_bytes": memory_mib * 2**20,
            "output_bytes": OUTPUT_BYTES,
            "cpu_seconds": math.ceil(timeout_seconds) + 1,
            "max_threads": MAX_THREADS if files and _counts_by_namespace() else None,
        }
        with lifted():
            self._process = subprocess.Popen(
                [*(_bubblewrap(language) if files else []), *_interpreter("/runner.py" if files else str(RUNNER))],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env={"PYTHONHASHSEED": "0"},
                cwd="/",
                start_new_session=True,
            )
        assert self._process.stdin and self._process.stdout and self._process.stderr
        self._stdin, self._stdout = self._process.stdin, self._process.stdout
        self._poll = select.poll()
        self._poll.register(self._stdout, select.POLLIN)
        try:
            self._send(setup)
            deadline = time.monotonic() + START_TIMEOUT_SECONDS + (compile_seconds if compiler else 0.0)
            self.compile_error = self._receive(deadline).compile_error
        except (SandboxDied, TimeoutError) as error:
            self.close()
            complaint = self._process.stderr.read().decode(errors="replace").strip()
            self._process.stderr.close()
            raise SandboxError(complaint.rpartition("\n")[2] or f"the sandbox does not start: {error}") from None

    def run(self, test: dict[str, Any], deadline: float) -> Ran:
        """One test, {"stdin": str} or {"arguments": list}. Raises TimeoutError at `deadline` (time.monotonic()),
        SandboxDied if the solution took the sandbox with it; no other test can follow then.
        """
        self._send(test)
        return self._receive(deadline)

    def close(self) -> None:
        """Kill whatever is left; return when the sandbox's own process has ended. Safe to call twice."""
        with lifted():
            if self._process.poll() is None:
                self._process.kill()
            self._process.wait()
        with contextlib.suppress(OSError):
            self._stdin.close()
        if not self._stdout.closed:
            while self._stdout.read(1 << 16):  # its end comes when the runner inside the namespaces has ended too
                pass
            self._stdout.close()

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
        assert self._process.stderr
        self._process.stderr.close()

    def _send(self, message: dict[str, Any]) -> None:
        try:
            self._stdin.write(json.dumps(message).encode() + b"\n")
            self._stdin.flush()
        except BrokenPipeError:
            raise SandboxDied(self._how_it_ended()) from None

    def _receive(self, deadline: float) -> Ran:
        status, size = sandbox_runner.HEADER.unpack(self._read(sandbox_runner.HEADER.size, deadline))
        return Ran(status, self._read(size, deadline))

    def _read(self, size: int, deadline: float) -> bytes:
        data = bytearray()
        while len(data) < size:
            remaining = deadline - time.monotonic()
            if remaining <= 0 or not self._poll.poll(remaining * 1000):
                raise TimeoutError("out of time")
            chunk = os.read(self._stdout.fileno(), size - len(data))
            if not chunk:
                raise SandboxDied(self._how_it_ended())
            data += chunk
        return bytes(data)

    def _how_it_ended(self) -> str:
        return f"ended with status {self._process.wait()}"


@functools.cache
def choose_mode(isolation: Literal["auto", "required"], *, quiet: bool = False) -> Mode:
    """The strongest mode that works here, tried once; without namespaces a warning says so, once a process.

    Raises UserError if `isolation` is "required" and there are no namespaces, or if not even seccomp works.
    """
    trouble = what_fails("namespaces")
    if trouble is None:
        return "namespaces"
    if isolation == "required":
        raise UserError(
            f"tasks.code.isolation: required, but this machine gives no namespaces ({trouble}); install bubblewrap and "
            "allow unprivileged user namespaces, or set it to auto"
        )
    if seccomp_trouble := what_fails("seccomp"):
        raise UserError(f"code cannot be verified here: neither namespaces ({trouble}) nor seccomp ({seccomp_trouble})")
    if not quiet:
        logger.warning(
            "code runs without namespaces (%s), confined by seccomp and resource limits alone: solutions cannot open "
            "files; tasks.code.isolation: required refuses to run like this",
            trouble,
        )
    return "seccomp"


@functools.cache
def what_fails(mode: Mode) -> str | None:
    """Why `mode` does not work on this machine, None if it does."""
    if mode == "namespaces" and not shutil.which("bwrap"):
        return "bwrap is not installed"
    try:
        with Sandbox("print(input())", None, mode=mode, memory_mib=1024, timeout_seconds=10.0) as sandbox:
            ran = sandbox.run({"stdin": "works"}, time.monotonic() + START_TIMEOUT_SECONDS)
    except (SandboxError, SandboxDied, TimeoutError, NotImplementedError, OSError) as error:
        return str(error)
    return None if ran == Ran(0, b"works\n") else f"a trial program ended with {ran.status}"


@functools.cache
def why_not(language: str) -> str | None:
    """Why solutions in a compiled `language` cannot be judged on this machine, None if they can."""
    if trouble := what_fails("namespaces"):
        return f"this machine gives no namespaces ({trouble})"
    if missing := [tool for tool in TOOLCHAIN if not shutil.which(tool)]:
        return f"not installed: {', '.join(missing)}"
    source = "#include <iostream>\nint main() { std::cout << std::cin.rdbuf(); }"
    try:
        with Sandbox(
            source,
            None,
            mode="namespaces",
            memory_mib=1024,
            timeout_seconds=10.0,
            language=language,
            compile_seconds=START_TIMEOUT_SECONDS,
        ) as sandbox:
            ran = sandbox.run({"stdin": "works"}, time.monotonic() + START_TIMEOUT_SECONDS)
    except (SandboxError, SandboxDied, TimeoutError, OSError) as error:
        return str(error)
    return None if ran == Ran(0, b"works") else "a trial program does not compile or run"


def _interpreter(runner: str) -> list[str]:
    return [_executable(), "-P", "-s", "-S", "-B", "-X", "utf8", runner]


@functools.cache
def _counts_by_namespace() -> bool:
    """Whether RLIMIT_NPROC counts in a user namespace what runs in it, and not all that the user runs (Linux 5.14)."""
    numbers = re.findall(r"\d+", os.uname().release)[:2]
    return tuple(map(int, numbers)) >= (5, 14)


def _executable() -> str:
    return os.path.realpath(getattr(sys, "_base_executable", sys.executable))


@functools.cache
def _bubblewrap(language: str) -> list[str]:
    bwrap = shutil.which("bwrap")
    if not bwrap:
        raise SandboxError("bwrap is not installed")
    command = [
        *(bwrap, "--unshare-all", "--unshare-user", "--die-with-parent", "--new-session", "--cap-drop", "ALL"),
        *("--uid", "65534", "--gid", "65534", "--hostname", "sandbox"),
    ]
    library_folders = ["/usr/lib", "/usr/lib32", "/usr/lib64"]
    for folder in library_folders:
        command += ["--ro-bind-try", folder, folder]
    for link in ("/lib", "/lib32", "/lib64"):
        if os.path.islink(link):
            command += ["--symlink", os.readlink(link), link]
        else:
            command += ["--ro-bind-try", link, link]
    standard_library = sysconfig.get_path("stdlib", vars={"installed_base": sys.base_prefix, "base": sys.base_prefix})
    needed = [_executable(), standard_library, *_python_libraries()]
    for path in dict.fromkeys(needed):
        if not path.startswith(tuple(f"{folder}/" for folder in library_folders)):
            command += ["--ro-bind", path, path]
    for packages in ("site-packages", "dist-packages"):
        if os.path.isdir(os.path.join(standard_library, packages)):
            command += ["--tmpfs", os.path.join(standard_library, packages)]
    if language in COMPILERS:
        command += ["--ro-bind", "/usr/include", "/usr/include"]
        for tool in TOOLCHAIN:
            command += ["--ro-bind", os.path.realpath(shutil.which(tool) or tool), f"/usr/bin/{tool}"]
    for device in ("null", "zero", "random", "urandom"):
        command += ["--dev-bind", f"/dev/{device}", f"/dev/{device}"]
    command += ["--ro-bind", str(RUNNER), "/runner.py", "--size", str(SCRATCH_BYTES), "--tmpfs", "/tmp"]
    return [*command, "--remount-ro", "/", "--chdir", "/tmp", "--"]


def _python_libraries() -> list[str]:
    """The folder of an interpreter's own shared libraries; of a shared one (/usr, /usr/local), libpython alone."""
    folder = str(sysconfig.get_config_var("LIBDIR"))
    if sys.base_prefix.startswith("/usr"):
        shared = os.path.join(folder, str(sysconfig.get_config_var("INSTSONAME")))
        return [shared] if os.path.isfile(shared) else []
    return [folder] if os.path.isdir(folder) else []
