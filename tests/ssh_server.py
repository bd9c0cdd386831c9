"""An SSH server of one's own on this machine, with keys of its own (Debian: openssh-server openssh-client rsync)."""

from __future__ import annotations

import getpass
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

SSHD = "/usr/sbin/sshd"
READY_SECONDS = 60.0

SSHD_CONFIG = """\
ListenAddress 127.0.0.1
Port {port}
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/key.pub
PidFile none
PasswordAuthentication no
StrictModes no
UsePAM no
SetEnv {variables}
"""


def missing() -> str:
    """Why none can be started here; empty if one can."""
    absent = [name for name in (SSHD, "ssh", "ssh-keygen", "rsync") if not shutil.which(name)]
    return f"no {', '.join(absent)} here (Debian: openssh-server openssh-client rsync)" if absent else ""


@contextmanager
def ssh_server(folder: Path, variables: Mapping[str, str]) -> Iterator[dict[str, object]]:
    """Start one, with `variables` in the environment of what it runs; yields host, port, user and identity.

    `folder`/bin has an `ssh` that knows the server's key, to be the first in PATH.
    """
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    for name in ("host_key", "key"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)], check=True)
    (folder / "known_hosts").write_text(f"[127.0.0.1]:{port} {(folder / 'host_key.pub').read_text()}")
    ssh = folder / "bin" / "ssh"
    ssh.parent.mkdir()
    ssh.write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} -o UserKnownHostsFile={folder}/known_hosts "$@"\n')
    ssh.chmod(0o755)
    settings = " ".join(f"{name}={value}" for name, value in variables.items())
    (folder / "sshd_config").write_text(SSHD_CONFIG.format(port=port, folder=folder, variables=settings))
    Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)  # where it drops its privileges
    process = subprocess.Popen([SSHD, "-D", "-e", "-f", str(folder / "sshd_config")], stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + READY_SECONDS
        while process.poll() is None and time.monotonic() < deadline:
            with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=5):
                break
            time.sleep(0.1)
        assert process.poll() is None, "sshd has ended"
        yield {"host": "127.0.0.1", "port": port, "user": getpass.getuser(), "identity": str(folder / "key")}
    finally:
        process.terminate()
        process.wait()
