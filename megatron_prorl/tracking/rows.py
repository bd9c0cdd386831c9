"""JSONL files of a run that are appended to, and cut back to the checkpoint that the run goes on from."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from megatron_prorl.errors import UserError
from megatron_prorl.files import replace_file


def read_rows(path: Path) -> Iterator[tuple[dict[str, Any], str]]:
    """Each complete row with its line. Raises UserError for a line that is not JSON."""
    if not path.exists():
        return
    with path.open(encoding="utf-8", newline="\n") as lines:
        for number, line in enumerate(lines, 1):
            if not line.endswith("\n"):
                return  # only the last line can lack its end: a kill came while it was written
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                raise UserError(
                    f"{path} line {number}: not JSON; delete the line, or move the file away to begin a new one"
                ) from None
            yield row, line


def cut_off(path: Path, keep: Callable[[dict[str, Any]], bool]) -> None:
    """Leave the complete rows that are to be kept."""
    replace_file(path, "".join(line for row, line in read_rows(path) if keep(row)))
