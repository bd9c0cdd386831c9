"""What Intel's OpenMP leaves behind when an engine is killed."""

from __future__ import annotations

import os
import re
from pathlib import Path

SHARED_MEMORY = Path("/dev/shm")


def remove_orphaned_segments() -> None:
    """Remove the segments in /dev/shm with which the library marked this user's processes that have ended.

    It makes one for each process, __KMP_REGISTERED_LIB_<pid>_<uid>, to notice a second copy of itself, and removes it
    at an orderly end only. vLLM ends its engine core by a signal, so every engine would leave one.
    """
    for path in SHARED_MEMORY.glob(f"__KMP_REGISTERED_LIB_*_{os.getuid()}"):
        match = re.fullmatch(r"__KMP_REGISTERED_LIB_(\d+)_\d+", path.name)
        if match and not Path("/proc", match[1]).exists():
            path.unlink(missing_ok=True)
