"""Bytes copied from file to file: every value seen that is not finite, every source that ends too soon."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_prorl.checkpoint.spans import Span, copy_spans, is_finite
from megatron_prorl.errors import UserError

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@given(st.sampled_from(DTYPES), st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=4))
def test_finite_is_what_torch_calls_finite_whatever_the_bits(dtype: torch.dtype, bits: list[int]) -> None:
    raw = torch.tensor(bits, dtype=torch.int64).view(torch.uint8).view(-1, 8)[:, : dtype.itemsize].contiguous()
    values = raw.view(-1).view(dtype)
    assert is_finite(values) == bool(torch.isfinite(values).all())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", ["inf", "-inf", "nan", "-nan"])
def test_the_borders_of_what_is_finite(dtype: torch.dtype, value: str) -> None:
    info = torch.finfo(dtype)
    extremes = torch.tensor([info.max, info.min, info.tiny, -0.0, 0.0], dtype=dtype)
    assert is_finite(extremes)
    assert not is_finite(torch.cat([extremes, torch.tensor([float(value)], dtype=dtype)]))


def test_a_file_that_ends_before_its_span_is_named(tmp_path: Path) -> None:
    path = tmp_path / "values"
    path.write_bytes(bytes(10))
    with pytest.raises(UserError, match=f"{path}: cut off"):
        list(copy_spans([Span(path, 4, 8)], torch.float32, torch.float32, lambda _: None))


def test_zeros_come_from_no_file() -> None:
    chunks = list(copy_spans([Span(None, 0, 3 * 2**20 + 4)], torch.float32, torch.bfloat16, lambda _: None))
    content = b"".join(bytes(chunk) for chunk in chunks)
    assert content == bytes((3 * 2**20 + 4) // 2)
