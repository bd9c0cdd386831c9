"""Shared by all tests: one thread a process, the helpers beside this file importable, no CUDA test without CUDA."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from hypothesis import settings

# A busy machine is slow, not wrong: what hangs is ended by pytest's timeout.
settings.register_profile("no deadline", deadline=None)
settings.load_profile("no deadline")

# Before torch is imported anywhere: tests run side by side and start processes of their own.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
HERE = Path(__file__).parent
sys.path.append(str(HERE))  # tiny_model, ranks and others beside this file
# The same for processes that tests start.
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(HERE.parent), str(HERE), os.environ.get("PYTHONPATH")]))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    marked = [item for item in items if item.get_closest_marker("needs_gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device, and torch sees none here"))
