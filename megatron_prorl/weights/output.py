"""The folder that a conversion writes: it appears complete or not at all, and replaces nothing that it should not."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_prorl.checkpoint import folders
from megatron_prorl.errors import UserError

_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def checked_output(out_dir: str | Path, source_dir: str | Path, overwrite: bool) -> Path:
    """The folder to write, absolute. Raises UserError for one that holds something that is not to be replaced."""
    out = Path(os.path.abspath(out_dir))
    source = Path(source_dir).resolve()
    if out.resolve() in (source, *source.parents):
        raise UserError(f"{out_dir}: holds what is to be converted; give another folder")
    for prefix in (folders.TEMPORARY, folders.REPLACED):
        if out.resolve().with_name(prefix + out.name) in (source, *source.parents):
            raise UserError(
                f"{out_dir}: {prefix}{out.name} beside it would be removed, which is to be converted; rename it"
            )
    _check_replaceable(out, overwrite)
    return out


def _check_replaceable(out: Path, overwrite: bool) -> None:
    if not out.exists() and not out.is_symlink():
        return
    if out.is_symlink() or not out.is_dir() or out.is_mount():
        raise UserError(f"{out}: is no folder of its own, but a file, a link or a mount; give another")
    if not any(out.iterdir()):
        return
    if not overwrite:
        raise UserError(f"{out}: is not empty; give another folder, or --overwrite")
    if not any((out / name).is_file() for name in ("config.json", ".metadata")):
        raise UserError(f"{out}: holds neither a model nor a checkpoint, so it is not overwritten; give another folder")


@contextmanager
def appearing(
    out: Path, num_bytes: int, overwrite: bool, end: Callable[[Path], None] = folders.publish
) -> Iterator[Path]:
    """A temporary folder that becomes `out` when the block ends well, by `end`, and is removed when it does not."""
    temporary = out
    try:
        temporary = folders.begin(out, num_bytes)
        try:
            yield temporary
            _check_replaceable(out, overwrite)  # once more, after what may have been hours
            end(out)
        finally:
            folders.discard(out)
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        file = Path(error.filename) if isinstance(error.filename, str | os.PathLike) else temporary
        if not {temporary, out} & {file, *file.parents} and file not in out.parents:
            raise UserError(f"cannot read {file}: {reason}") from None
        room = f"; {folders.free_bytes(out):,} bytes are free there, {num_bytes:,} are needed"
        raise UserError(f"cannot write {out}: {reason}{room if error.errno in _DISK_FULL else ''}") from None
