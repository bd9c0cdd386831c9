"""Checkpoints written and read a tensor at a time: what stops the writing, and what is refused in reading."""

from __future__ import annotations

import io
import os
import pickle
import signal
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed import checkpoint as torch_checkpoint

from megatron_prorl.checkpoint.folders import crc32
from megatron_prorl.checkpoint.pieces import Blob, Piece, write_pieces
from megatron_prorl.checkpoint.spans import copy_spans, tensor_chunks
from megatron_prorl.checkpoint.stream import CheckpointReader, check_metadata
from megatron_prorl.errors import UserError

NUM_PIECES = 100


def piece(number: int, load: Callable[[], Tensor]) -> Piece:
    def chunks() -> Iterator[memoryview]:
        yield from tensor_chunks(load())

    return Piece(key=f"{number:03}", global_shape=(4,), offset=(0,), shape=(4,), dtype=torch.float32, chunks=chunks)


def stopped_by(fault: Callable[[], Any], folder: Path) -> int:
    """Pieces that were loaded of `NUM_PIECES` when `fault` happens in the first while all others take a while."""
    loaded, done = [], []

    def load() -> Tensor:
        loaded.append(None)
        time.sleep(0.02)
        done.append(None)
        return torch.zeros(4)

    def load_first() -> Tensor:
        fault()
        return load()

    write = [piece(0, load_first), *(piece(number, load) for number in range(1, NUM_PIECES))]
    with pytest.raises((OSError, KeyboardInterrupt), match="injected"):
        write_pieces(folder, write)
    assert len(done) == len(loaded), "a thread still writes"
    return len(loaded)


def test_an_error_in_one_thread_stops_the_others_at_their_next_piece(tmp_path: Path) -> None:
    def fail() -> None:
        time.sleep(0.05)
        raise OSError("injected")

    assert stopped_by(fail, tmp_path) < NUM_PIECES // 5
    assert not (tmp_path / ".metadata").exists()


def test_ctrl_c_stops_all_threads_at_their_next_piece(tmp_path: Path) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt("injected")

    before = signal.signal(signal.SIGINT, interrupt)
    try:
        assert stopped_by(lambda: os.kill(os.getpid(), signal.SIGINT), tmp_path) < NUM_PIECES // 5
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float8_e4m3fn, torch.int64])
def test_what_is_written_is_read(tmp_path: Path, dtype: torch.dtype) -> None:
    values = torch.arange(12).reshape(3, 4).to(dtype)
    rows = [
        Piece(
            key="w",
            global_shape=(3, 4),
            offset=(row, 0),
            shape=(1, 4),
            dtype=dtype,
            chunks=partial(tensor_chunks, values[row : row + 1]),
        )  # fmt: skip
        for row in range(3)
    ]
    write_pieces(tmp_path, rows, [Blob(key="extra", value={"a": 1})])
    check_metadata(tmp_path)
    reader = CheckpointReader(tmp_path)
    out = torch.zeros(2, 3, dtype=dtype)
    reader.read("w", (1, 1), out)
    assert torch.equal(out.float(), values[1:, 1:].float())
    assert list(reader.tensors) == ["w"]


class Evil:
    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize("read", [check_metadata, CheckpointReader])
def test_metadata_runs_no_code(tmp_path: Path, read: Callable[[Path], Any]) -> None:
    write_pieces(tmp_path, [piece(0, lambda: torch.zeros(4))])
    metadata = torch_checkpoint.FileSystemReader(tmp_path).read_metadata()
    metadata.planner_data = Evil(os.mkdir, str(tmp_path / "made"))
    (tmp_path / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(UserError) as error:
        read(tmp_path)
    assert str(error.value) == (
        f"{tmp_path}: its .metadata refers to 'posix.mkdir', which no checkpoint needs and which may run code; "
        "use one that you trust"
    )
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("module", ["torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem"])
def test_metadata_reaches_nothing_through_the_modules_of_its_classes(tmp_path: Path, module: str) -> None:
    made = str(tmp_path / "made").encode()
    names = module.encode(), b"os.mkdir"  # protocol 4 follows the dots
    texts = b"".join(b"\x8c" + bytes([len(name)]) + name for name in names)
    (tmp_path / ".metadata").write_bytes(
        b"\x80\x04" + texts + b"\x93X" + len(made).to_bytes(4, "little") + made + b"\x85R."
    )
    with pytest.raises(UserError, match=f"'{module}.os.mkdir'"):
        check_metadata(tmp_path)
    assert not (tmp_path / "made").exists()


def test_a_missing_or_damaged_metadata_is_one_line(tmp_path: Path) -> None:
    for content in (None, b"nonsense", pickle.dumps({})):
        if content is not None:
            (tmp_path / ".metadata").write_bytes(content)
        with pytest.raises(UserError, match=r"no torch.distributed checkpoint \(.metadata: .*Error\); give the folder"):
            check_metadata(tmp_path)


def test_a_file_that_was_cut_off_is_named(tmp_path: Path) -> None:
    write_pieces(tmp_path, [piece(number, lambda: torch.zeros(4)) for number in range(4)])
    for file in sorted(tmp_path.glob("*.distcp")):
        whole = file.read_bytes()
        file.write_bytes(whole[:-1])
        with pytest.raises(UserError, match=f"{file}: cut off"):
            CheckpointReader(tmp_path)
        file.write_bytes(whole)
    CheckpointReader(tmp_path)


def box(values: Tensor, rows: slice, columns: slice) -> Piece:
    part = values[rows, columns]
    return Piece(
        key="w", global_shape=tuple(values.shape), offset=(rows.start, columns.start), shape=tuple(part.shape),
        dtype=values.dtype, chunks=partial(tensor_chunks, part),
    )  # fmt: skip


def test_rows_lie_where_their_spans_say_whatever_pieces_they_are_in(tmp_path: Path) -> None:
    values = torch.arange(40).reshape(10, 4).to(torch.bfloat16)
    write_pieces(tmp_path, [box(values, slice(start, start + 5), slice(0, 4)) for start in (0, 5)])
    spans = CheckpointReader(tmp_path).spans("w", (), 3, 4)
    assert spans is not None and [span.num_bytes for span in spans] == [16, 16]
    copied = b"".join(bytes(chunk) for chunk in copy_spans(spans, values.dtype, values.dtype, lambda _: None))
    assert copied == bytes(values[3:7].contiguous().view(torch.uint8).numpy().data)
    widened = b"".join(bytes(chunk) for chunk in copy_spans(spans, values.dtype, torch.float32, lambda _: None))
    assert widened == bytes(values[3:7].float().view(torch.uint8).numpy().data)


def test_rows_in_pieces_of_columns_or_in_none_have_no_spans(tmp_path: Path) -> None:
    values = torch.zeros(10, 4)
    (tmp_path / "columns").mkdir()
    (tmp_path / "gap").mkdir()
    write_pieces(tmp_path / "columns", [box(values, slice(0, 10), slice(start, start + 2)) for start in (0, 2)])
    write_pieces(tmp_path / "gap", [box(values, slice(0, 4), slice(0, 4)), box(values, slice(6, 10), slice(0, 4))])
    for folder in ("columns", "gap"):
        assert CheckpointReader(tmp_path / folder).spans("w", (), 2, 6) is None


def test_the_digests_are_those_of_the_files(tmp_path: Path) -> None:
    digests = write_pieces(tmp_path, [piece(number, lambda: torch.randn(4)) for number in range(4)])
    assert len(digests) == 2
    assert digests == {path.name: crc32(path) for path in tmp_path.glob("*.distcp")}


def test_rows_of_another_layer_are_never_taken(tmp_path: Path) -> None:
    """Chunks that cover one layer or two, in any order."""
    values = torch.arange(3 * 4 * 2).reshape(3, 4, 2).float()
    for number, cuts in enumerate([((0, 1), (1, 3)), ((2, 3), (0, 2)), ((0, 2), (2, 3)), ((1, 3), (0, 1))]):
        folder = tmp_path / str(number)
        folder.mkdir()
        pieces = [
            Piece(
                key="w", global_shape=(3, 4, 2), offset=(first, 0, 0), shape=(last - first, 4, 2), dtype=torch.float32,
                chunks=partial(tensor_chunks, values[first:last]),
            )
            for first, last in cuts
        ]  # fmt: skip
        write_pieces(folder, pieces)
        reader = CheckpointReader(folder)
        for layer in range(3):
            spans = reader.spans("w", (layer,), 1, 3)
            if spans is not None:
                copied = b"".join(
                    bytes(chunk) for chunk in copy_spans(spans, values.dtype, values.dtype, lambda _: None)
                )
                assert copied == bytes(values[layer, 1:].contiguous().view(torch.uint8).numpy().data)
            out = torch.empty(3, 2)
            reader.read("w", (layer, 1, 0), out)
            assert torch.equal(out, values[layer, 1:])


@pytest.mark.parametrize("stored", [torch.float32, torch.float16])
def test_values_in_another_dtype_than_the_metadata_say_are_converted(tmp_path: Path, stored: torch.dtype) -> None:
    """As torch's own planner leaves it where chunks differ: the first one's dtype is that of all."""
    values = torch.arange(8).reshape(4, 2).to(torch.bfloat16)
    write_pieces(tmp_path, [box(values, slice(0, 2), slice(0, 2)), box(values.to(stored), slice(2, 4), slice(0, 2))])
    reader = CheckpointReader(tmp_path)
    assert reader.spans("w", (), 0, 2) is not None and reader.spans("w", (), 2, 2) is None
    out = torch.empty(4, 2, dtype=torch.bfloat16)
    reader.read("w", (0, 0), out)
    assert torch.equal(out, values)


def test_parts_that_are_stored_twice_are_refused(tmp_path: Path) -> None:
    """Also where a gap of the same size would make up for it."""
    values = torch.arange(20).reshape(10, 2).float()
    for number, rows in enumerate([((0, 6), (2, 10)), ((0, 4), (2, 6), (8, 10))]):
        folder = tmp_path / str(number)
        folder.mkdir()
        write_pieces(folder, [box(values, slice(first, last), slice(0, 2)) for first, last in rows])
        reader = CheckpointReader(folder)
        assert reader.spans("w", (), 0, 8) is None
        with pytest.raises(UserError, match="parts of w are stored twice"):
            reader.read("w", (0, 0), torch.empty(8, 2))


def test_damaged_metadata_is_one_line_or_harmless(tmp_path: Path) -> None:
    """Every byte of it changed, in turn."""
    values = torch.arange(8).reshape(4, 2).float()
    write_pieces(tmp_path, [box(values, slice(0, 4), slice(0, 2))], [Blob(key="extra", value=[None])])
    whole = (tmp_path / ".metadata").read_bytes()
    refused = 0
    for place in range(len(whole)):
        changed = bytearray(whole)
        changed[place] ^= 0x15
        (tmp_path / ".metadata").write_bytes(changed)
        try:
            reader = CheckpointReader(tmp_path)
            if "w" in reader.tensors and tuple(reader.tensors["w"].size) == (4, 2):
                reader.spans("w", (), 0, 4)
                reader.read("w", (0, 0), torch.empty(4, 2))
        except UserError as error:
            assert len(str(error).splitlines()) == 1
            refused += 1
    assert refused > len(whole) // 2


def test_a_record_that_is_no_tensor_is_one_line(tmp_path: Path) -> None:
    write_pieces(tmp_path, [piece(0, lambda: torch.zeros(4))])
    [file] = [path for path in tmp_path.glob("*.distcp") if path.stat().st_size]
    content = io.BytesIO()
    torch.save({"no": "tensor"}, content)
    file.write_bytes(content.getvalue().ljust(file.stat().st_size, b"\0"))
    with pytest.raises(UserError, match=r"000 cannot be read"):
        CheckpointReader(tmp_path).read("000", (0,), torch.empty(4))
