"""Folders of a run that appear complete or not at all: written under a temporary name, synced, renamed. No torch here.

run/checkpoints/step-000500/         a checkpoint; run/references/reset-000/ a reference
    COMMITTED                        written last; lists every other file with its size in bytes and its CRC-32
run/checkpoints/.tmp-step-000510/    being written, or left by a process that was killed
    .lock                            locked by the process that writes
run/checkpoints/.corrupt-step-000490/    set aside: a file has changed since the commit (.incomplete-: its size has)
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import json
import os
import re
import shutil
import zlib
from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from megatron_prorl import heartbeat
from megatron_prorl.errors import UserError

COMMITTED = "COMMITTED"
STATE = "state.json"
LOCK = ".lock"
TEMPORARY, REPLACED, INCOMPLETE, CORRUPT = ".tmp-", ".replaced-", ".incomplete-", ".corrupt-"
READ_BYTES = 4 << 20
NUM_READERS = 4  # files at a time

_locks: dict[Path, int] = {}  # descriptors of the locks that this process holds, by temporary folder


def checkpoint_folder(run_dir: str | Path, step: int) -> Path:
    return Path(run_dir) / "checkpoints" / f"step-{step:06d}"


def reference_folder(run_dir: str | Path, name: str) -> Path:
    return Path(run_dir) / "references" / name


def read_state(checkpoint: Path) -> dict[str, Any]:
    """What a checkpoint says besides its tensors: "progress", "layout" and "config"."""
    state: dict[str, Any] = json.loads((checkpoint / STATE).read_text())
    return state


def is_committed(folder: Path) -> bool:
    """Whether the folder was committed and every file still has the size it had then."""
    try:
        sizes, _ = _listed(folder)
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return False


def verify_digests(folder: Path, names: Collection[str] | None = None) -> list[str]:
    """The names of the files of a committed folder that are not, byte for byte, what was committed.

    Reads all of them, or those in `names`, several at a time. Folders committed before digests were kept have none to
    differ from.
    """
    try:
        sizes, digests = _listed(folder)
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return [COMMITTED]

    def differs(name: str) -> bool:
        path = folder / name
        if not path.is_file() or path.stat().st_size != sizes[name]:
            return True
        try:
            return bool(digests) and crc32(path) != digests[name]
        except OSError:  # the disk cannot read it back
            return True

    chosen = sorted(sizes if names is None else names)
    with ThreadPoolExecutor(NUM_READERS) as threads:
        return [name for name, found in zip(chosen, threads.map(differs, chosen), strict=True) if found]


def _listed(folder: Path) -> tuple[dict[str, int], dict[str, int]]:
    """Sizes and digests, by name, that COMMITTED lists. Raises ValueError where it is damaged itself."""
    content = json.loads((folder / COMMITTED).read_text())
    if not isinstance(content, dict) or set(content) not in ({"bytes"}, {"bytes", "crc32"}):
        raise ValueError(COMMITTED)
    sizes, digests = content["bytes"], content.get("crc32", {})
    if digests and digests.keys() != sizes.keys():
        raise ValueError(COMMITTED)
    return sizes, digests


def crc32(path: Path) -> int:
    """CRC-32 of a file: finds every flip of up to 32 neighbouring bits, and others but for one in four billion."""
    digest = 0
    with path.open("rb", buffering=0) as file:
        buffer = bytearray(READ_BYTES)
        while count := file.readinto(buffer):
            digest = zlib.crc32(memoryview(buffer)[:count], digest)
            heartbeat.beat()
    return digest


def committed_checkpoints(run_dir: str | Path) -> list[Path]:
    """Every complete checkpoint of the run, oldest first."""
    found = (Path(run_dir) / "checkpoints").glob("step-*")
    steps = {int(path.name[5:]): path for path in found if re.fullmatch(r"step-\d+", path.name) and is_committed(path)}
    return [steps[step] for step in sorted(steps)]


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


def latest_checkpoint(run_dir: str | Path) -> Path | None:
    """The complete checkpoint with the highest step, or None."""
    return next(reversed(committed_checkpoints(run_dir)), None)


def latest_sound_checkpoint(run_dir: str | Path, *, with_reference: bool) -> Path | None:
    """The newest checkpoint of which no byte has changed, nor of its reference; None in a run that has none yet.

    Those after it are set aside, each with a printed line. On rank 0 only, after `prepare_run_dir`. `with_reference`
    says whether the run uses the reference that a checkpoint names. Raises UserError, and leaves everything where it
    is, if no checkpoint is sound but some were there.
    """
    unsound: dict[Path, str] = {}
    damages: dict[Path, str] = {}  # of references, which checkpoints share
    for checkpoint in reversed(committed_checkpoints(run_dir)):
        damage = _damage(checkpoint)
        if not damage and with_reference:
            reference = reference_folder(run_dir, read_state(checkpoint)["progress"]["reference"])
            if reference not in damages:
                damages[reference] = _damage(reference)
            damage = damages[reference] and f"its reference {reference.name}: {damages[reference]}"
        if not damage:
            for path, reason in unsound.items():
                _set_aside(path, CORRUPT, reason)
            for reference in damages:
                if damages[reference] and reference.exists():
                    _set_aside(reference, CORRUPT, damages[reference])
            return checkpoint
        unsound[checkpoint] = damage
    aside = sorted((Path(run_dir) / "checkpoints").glob(INCOMPLETE + "step-*"))
    found = [*unsound.items(), *((path, "it is not complete") for path in aside)]
    if found:
        path, reason = found[0]
        raise UserError(
            f"{path}: {reason}; no checkpoint of {run_dir} is sound: restore one, or remove them to begin anew"
        )
    return None


def _damage(folder: Path) -> str:
    """What is wrong with a folder that should be as it was committed; empty if nothing."""
    if not is_committed(folder):
        return "missing or not complete"
    names = verify_digests(folder)
    return f"{', '.join(names[:4])} changed since written" if names else ""


def prune(run_dir: str | Path, *, last: int, every: int = 0, also: Collection[int] = ()) -> list[Path]:
    """Remove complete checkpoints; returns those removed. On rank 0 only.

    Kept are the newest `last`, those of steps that `every` divides (0: none), and those of the steps in `also`.
    """
    assert last >= 1, last
    removed = []
    for path in committed_checkpoints(run_dir)[:-last]:
        step = step_of(path)
        if step in also or (every and step % every == 0):
            continue
        doomed = path.with_name(TEMPORARY + path.name)
        path.rename(doomed)  # first, so that a half-removed folder never looks like a checkpoint
        shutil.rmtree(doomed)
        removed.append(path)
    return removed


def prepare_run_dir(run_dir: str | Path) -> None:
    """Make the run's folders and clear away what a killed process left, a printed line each.

    On rank 0 only, before anything is read, with no other writer alive. Unfinished folders are removed; a folder that
    has its final name without being complete (copied in part, say) is set aside.
    """
    for parent in (Path(run_dir) / "checkpoints", Path(run_dir) / "references"):
        parent.mkdir(parents=True, exist_ok=True)
        for path in sorted(parent.glob(REPLACED + "*")):
            _end_replacement(path.with_name(path.name.removeprefix(REPLACED)))
        for path in sorted(parent.glob(TEMPORARY + "*")):
            shutil.rmtree(path)
            print(f"removed {path}: its writing was interrupted", flush=True)
        for path in sorted(parent.glob("[!.]*")):
            if path.is_dir() and not is_committed(path):
                _set_aside(path, INCOMPLETE, "it is not complete")


def _set_aside(path: Path, prefix: str, reason: str) -> None:
    aside = path.with_name(prefix + path.name)
    shutil.rmtree(aside, ignore_errors=True)
    path.rename(aside)
    print(f"set {path} aside as {aside.name}: {reason}", flush=True)


def begin(folder: Path, num_bytes: int) -> Path:
    """A temporary folder in which to write `folder`, empty but for its lock.

    What a process that ended left there is removed. Raises UserError if a living process writes `folder`, on this
    machine or on any that shares the file system's locks, and OSError if the disk cannot take `num_bytes`.
    """
    temporary = folder.with_name(TEMPORARY + folder.name)
    _unlock(temporary)  # this process may begin anew
    temporary.mkdir(parents=True, exist_ok=True)
    if not _lock(temporary):
        raise UserError(f"another process is writing {folder}; wait for it or end it, or give another folder")
    _clear(temporary)
    _end_replacement(folder)
    if free_bytes(folder) < num_bytes:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    return temporary


def commit(folder: Path, digests: Mapping[str, int] | None = None) -> None:
    """`publish` the folder that `begin` made, with a list of its files by which `is_committed` knows it.

    `digests` are CRC-32s already known, by name; the other files are read.
    """
    temporary, known = folder.with_name(TEMPORARY + folder.name), digests or {}
    files = [path for path in sorted(temporary.rglob("*")) if path.is_file() and path != temporary / LOCK]
    names = [str(path.relative_to(temporary)) for path in files]
    sizes = {name: path.stat().st_size for name, path in zip(names, files, strict=True)}
    with ThreadPoolExecutor(NUM_READERS) as threads:
        found = threads.map(lambda name: known[name] if name in known else crc32(temporary / name), names)
        content = {"bytes": sizes, "crc32": dict(zip(names, found, strict=True))}
    (temporary / COMMITTED).write_text(json.dumps(content, indent=1))
    publish(folder)


def publish(folder: Path) -> None:
    """Give the folder that `begin` made its final name, in one step, once all of it is on disk.

    An existing folder of that name is replaced. Its name stands for the old or the new folder at any time, unless the
    file system cannot exchange two names: then a kill between two renames leaves what `begin` puts back.
    """
    temporary, replaced = folder.with_name(TEMPORARY + folder.name), folder.with_name(REPLACED + folder.name)
    for path in (*temporary.rglob("*"), temporary):
        _sync(path)
    if not folder.exists():
        temporary.rename(folder)
    else:
        _remove(replaced)
        if _exchange(temporary, folder):
            temporary.rename(replaced)
        else:
            _rename_over(temporary, folder, replaced)
    _sync(folder.parent)
    (folder / LOCK).unlink(missing_ok=True)  # only now: it also kept others out of the temporary folder
    _unlock(temporary)
    _remove(replaced, ignore_errors=True)


def discard(folder: Path) -> None:
    """Remove what `begin` and its users wrote for `folder`; what another process is writing there is left alone."""
    temporary = folder.with_name(TEMPORARY + folder.name)
    if temporary.is_dir() and _lock(temporary):
        _clear(temporary, ignore_errors=True)
        shutil.rmtree(temporary, ignore_errors=True)
    _unlock(temporary)


def _lock(temporary: Path) -> bool:
    """Hold the lock of the temporary folder until `_unlock`; False if another process has it."""
    if temporary in _locks:
        return True
    try:
        descriptor = os.open(temporary / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    except FileNotFoundError:  # renamed this instant
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        held = os.path.samestat(os.fstat(descriptor), os.stat(temporary / LOCK))  # or it was renamed meanwhile
    except (BlockingIOError, FileNotFoundError):
        held = False
    except OSError:  # a file system without locks: as if no other process were there
        held = True
    if held:
        _locks[temporary] = descriptor
    else:
        os.close(descriptor)
    return held


def _unlock(temporary: Path) -> None:
    descriptor = _locks.pop(temporary, None)
    if descriptor is not None:
        os.close(descriptor)


def _clear(temporary: Path, ignore_errors: bool = False) -> None:
    """Remove all but the lock."""
    for path in temporary.iterdir():
        if path.name != LOCK:
            _remove(path, ignore_errors)


def _remove(path: Path, ignore_errors: bool = False) -> None:
    """Remove a folder with all it holds, a link or a file, if there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=ignore_errors)
    else:
        path.unlink(missing_ok=True)


def _end_replacement(folder: Path) -> None:
    """Undo a replacement of `folder` that was interrupted before the new one was there, or finish one after that."""
    replaced = folder.with_name(REPLACED + folder.name)
    if folder.exists():
        _remove(replaced)
    elif replaced.exists():
        replaced.rename(folder)
        print(f"put {folder} back: replacing it was interrupted", flush=True)


def _exchange(one: Path, other: Path) -> bool:
    """Exchange the names of two folders in one step (renameat2(2)); False where the system or file system cannot."""
    libc = ctypes.CDLL(None, use_errno=True)
    at_fdcwd, rename_exchange = -100, 2
    try:
        renameat2 = libc.renameat2
    except AttributeError:  # glibc before 2.28
        return False
    if renameat2(at_fdcwd, os.fsencode(one), at_fdcwd, os.fsencode(other), ctypes.c_uint(rename_exchange)) == 0:
        return True
    error = ctypes.get_errno()
    if error in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
        return False
    raise OSError(error, os.strerror(error), str(other))


def _rename_over(temporary: Path, folder: Path, replaced: Path) -> None:
    folder.rename(replaced)
    try:
        temporary.rename(folder)
    except BaseException:
        if not folder.exists():
            replaced.rename(folder)
        raise


def free_bytes(folder: Path) -> int:
    """Bytes free on the disk that `folder` lies on, or would lie on."""
    return shutil.disk_usage(next(path for path in folder.absolute().parents if path.exists())).free


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
