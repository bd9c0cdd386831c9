"""Hugging Face folders to Megatron checkpoints and back: bytes from file to file, no GPU, no model in memory.

A Megatron checkpoint here is one torch.distributed checkpoint, as training writes it, plus `hf/` with the config,
tokenizer and chat template that came with the weights. Such a checkpoint loads under any layout, so none is asked for.
Nothing of Megatron is imported: `stored.py` knows where it keeps each parameter, and the layouts of `tables.py` know of
which rows of which Hugging Face tensors it is made.
"""

from __future__ import annotations

import io
import json
import logging
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from megatron_prorl.checkpoint import folders
from megatron_prorl.checkpoint.pieces import Piece, write_pieces
from megatron_prorl.checkpoint.spans import FiniteCheck, Span, copy_spans, tensor_chunks
from megatron_prorl.config.hf import hf_folder, is_megatron_checkpoint, read_hf_config
from megatron_prorl.errors import UserError
from megatron_prorl.weights.hf import (
    DTYPES,
    HfTensors,
    TensorSpec,
    check_tensors,
    copy_small_files,
    listing,
    write_tensors,
)
from megatron_prorl.weights.output import appearing, checked_output
from megatron_prorl.weights.rows import Run, cut, full_runs, shard_runs
from megatron_prorl.weights.stored import Parameter, Part, extra_states, numbered, stored_parameters
from megatron_prorl.weights.tables import HEAD, ModelSizes, Row, hf_shapes

if TYPE_CHECKING:
    from megatron_prorl.checkpoint.stream import CheckpointReader

logger = logging.getLogger(__name__)

PIECE_BYTES = 256 * 2**20  # of one piece on disk: what a reader loads at once beside the tensor that it belongs to
_NOT_WEIGHTS = re.compile(r"(chained_\d+\.)?optimizer\.")  # what else has tensors in a training checkpoint
_FORMAT = {  # what Megatron's loader looks for in metadata.json
    "sharded_backend": "torch_dist", "sharded_backend_version": 1,
    "common_backend": "torch", "common_backend_version": 1,
}  # fmt: skip

OnProgress = Callable[[int, int], None]  # bytes done, bytes in all


def hf_to_megatron(
    hf_dir: str | Path,
    out_dir: str | Path,
    *,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
    on_progress: OnProgress = lambda done, total: None,
) -> None:
    """Write the model of `hf_dir` as the Megatron checkpoint `out_dir`, in `dtype` or in each tensor's own.

    `out_dir` appears complete or not at all. Raises UserError for a folder that is incomplete or of an unknown model,
    for an `out_dir` that holds something (unless `overwrite`), and for a disk that refuses. Weights that are not finite
    are converted too, with a warning that names them.
    """
    hf_dir, out = Path(hf_dir), checked_output(out_dir, hf_dir, overwrite)
    hf = read_hf_config(hf_dir)
    tensors = HfTensors(hf_dir)
    check_tensors(tensors, hf)
    if hf["tie_word_embeddings"] and (head := next(iter(HEAD.hf))) in tensors:
        logger.warning("%s is the embedding once more (tie_word_embeddings): it is stored once", head)
    source = _Source(tensors, ModelSizes.of(hf), dtype, FiniteCheck(logger.warning))
    pieces = [piece for parameter in stored_parameters(hf) for piece in source.pieces(parameter)]
    _check_uniform(hf_dir, pieces)
    total = sum(piece.num_bytes for piece in pieces)
    count = _Count(total, on_progress)
    digests: dict[str, int] = {}
    with appearing(out, total, overwrite, partial(folders.commit, digests=digests)) as temporary:
        (temporary / "hf").mkdir()
        copy_small_files(hf_dir, temporary / "hf", dtype)
        common = io.BytesIO()
        torch.save({}, common)  # to a file it would tell of a full disk in its own words
        (temporary / "common.pt").write_bytes(common.getbuffer())
        (temporary / "metadata.json").write_text(json.dumps(_FORMAT))
        counted = [replace(piece, chunks=partial(count.chunks, piece.chunks)) for piece in pieces]
        digests |= write_pieces(temporary, counted, list(extra_states(hf)))
        tensors.check_unchanged()


def megatron_to_hf(
    folder: str | Path,
    out_dir: str | Path,
    *,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
    on_progress: OnProgress = lambda done, total: None,
) -> None:
    """Write the model in the Megatron checkpoint `folder` as the Hugging Face folder `out_dir`.

    `folder` is what `hf_to_megatron` wrote, a checkpoint or reference in its run directory (the optimizer's state is
    left out), or one of another Megatron's with the same keys and the model's files in `folder`/hf. Raises
    UserError as `hf_to_megatron` does, and for tensors that are missing or left over.
    """
    folder, out = Path(folder), checked_output(out_dir, folder, overwrite)
    source = hf_files(folder)
    stored = MegatronTensors(folder, read_hf_config(source), dtype)
    total = sum(spec.num_bytes for spec in stored.specs)
    count, finite = _Count(total, on_progress), FiniteCheck(logger.warning)
    with appearing(out, total, overwrite) as temporary:
        copy_small_files(source, temporary, stored.dtype)
        with ThreadPoolExecutor(1) as thread:
            checked = thread.submit(stored.check_committed)
            try:
                write_tensors(
                    temporary, stored.specs, lambda spec: count.chunks(partial(stored.chunks, spec, finite.check))
                )
            except UserError:
                checked.result()  # which says more
                raise
            checked.result()
        stored.check_unchanged()


class MegatronTensors:
    """The Hugging Face tensors of the model `hf` (as `read_hf_config` gives it) in the Megatron checkpoint `folder`.

    In `dtype`, or as they are stored. Raises UserError unless the checkpoint holds exactly this model.
    """

    def __init__(self, folder: Path, hf: dict[str, Any], dtype: torch.dtype | None = None) -> None:
        from megatron_prorl.checkpoint.stream import CheckpointReader  # half a second, which writing one needs not

        self._reader = CheckpointReader(folder)
        self._sizes = ModelSizes.of(hf)
        self._runs = _Runs(self._sizes)
        self._stored = [replace(found, parts=_found(self._reader, found)) for found in stored_parameters(hf)]
        tensors = self._reader.tensors
        used = {part.key for parameter in self._stored for part in parameter.parts}
        left_over = sorted(key for key in tensors.keys() - used if not _NOT_WEIGHTS.match(key))
        if left_over:
            raise UserError(f"{folder}: {listing(left_over)} left over; is hf/config.json of this model?")
        shapes = hf_shapes(hf)
        self._of_name = {name: parameter for parameter in self._stored for name in parameter.row.hf}
        self.specs = [
            TensorSpec(name, shapes[name], dtype or self._dtype_of(parameter))
            for name, parameter in self._of_name.items()
        ]
        if odd := [spec.name for spec in self.specs if spec.dtype not in DTYPES.values()]:
            kinds = {str(self._dtype_of(self._of_name[name])).removeprefix("torch.") for name in odd}
            raise UserError(f"{folder}: {listing(odd)} of type {', '.join(sorted(kinds))}; give --dtype")

    @property
    def dtype(self) -> torch.dtype | None:
        """That of all tensors; None if they differ."""
        dtypes = {spec.dtype for spec in self.specs}
        return dtypes.pop() if len(dtypes) == 1 else None

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Name and values in the order of `specs`, one tensor in memory at a time."""
        for spec in self.specs:
            values = torch.empty(spec.shape, dtype=spec.dtype)
            content, end = values.view(-1).view(torch.uint8).numpy().data, 0
            for chunk in self.chunks(spec):
                content[end : end + len(chunk)] = chunk
                end += len(chunk)
            yield spec.name, values

    def chunks(
        self, spec: TensorSpec, check: Callable[[str, Tensor], None] = lambda name, values: None
    ) -> Iterator[memoryview]:
        """The bytes of the tensor `spec`, copied as they lie on disk where they lie in order; `check` sees them."""
        parameter = self._of_name[spec.name]
        number = list(parameter.row.hf).index(spec.name)
        spans = self._spans(parameter, number)
        if spans is not None:
            yield from copy_spans(spans, self._dtype_of(parameter), spec.dtype, partial(check, spec.name))
            return
        values = self._full(parameter, spec.dtype)[number]
        check(spec.name, values)
        yield from tensor_chunks(values)

    def check_committed(self) -> None:
        """Raise UserError if a file with the model's tensors is not what was committed, where that is known."""
        self._reader.check_committed({part.key for parameter in self._stored for part in parameter.parts})

    def check_unchanged(self) -> None:
        """Raise UserError if a file is another one by now."""
        self._reader.files.check_unchanged()

    def _dtype_of(self, parameter: Parameter) -> torch.dtype:
        return self._reader.tensors[parameter.parts[0].key].properties.dtype

    def _spans(self, parameter: Parameter, number: int) -> list[Span] | None:
        """Where the rows of the row's Hugging Face tensor of this number lie; None if some lie in no such order."""
        found: list[Span] = []
        for run in self._runs.full(parameter)[number]:
            at = 0  # the part's first row in the parameter
            for part in parameter.parts:
                first, end = max(run.first, at), min(run.first + run.count, at + part.rows)
                if first < end:
                    spans = self._reader.spans(part.key, part.lead, part.start + first - at, end - first)
                    if spans is None:
                        return None
                    found += spans
                at += part.rows
        return found

    def _full(self, parameter: Parameter, dtype: torch.dtype) -> list[Tensor]:
        """The row's Hugging Face tensors, through memory. Of a padded vocabulary no more than its rows are read."""
        values = torch.empty(parameter.shape, dtype=dtype)
        at = 0
        for part in parameter.parts:
            rows = min(part.rows, self._sizes.axes["V"]) if parameter.is_padded else part.rows
            offset = (*part.lead, part.start, *(0,) * (values.dim() - 1))
            self._reader.read(part.key, offset, values[at : at + rows])
            at += part.rows
        return parameter.row.layout.full([values], self._sizes)


def hf_files(folder: Path) -> Path:
    """Where a Megatron checkpoint's config.json and tokenizer lie. Raises UserError where that is nowhere."""
    if not is_megatron_checkpoint(folder):
        below = sorted(path.parent.name for path in folder.glob("*/.metadata"))
        hint = f"it has {', '.join(below[:3])}" if below else "give the folder that holds .metadata and *.distcp"
        raise UserError(f"{folder}: no torch.distributed checkpoint; {hint}")
    source = hf_folder(folder)
    if not (source / "config.json").is_file():
        raise UserError(
            f"{folder}: no hf/config.json, which says what model this is; put the model's config.json and tokenizer "
            "there"
        )
    return source


def _found(reader: CheckpointReader, parameter: Parameter) -> tuple[Part, ...]:
    """Where the checkpoint has the parameter's parts: in tensors stacked over layers, or in one for each layer."""
    found: list[Part] = []
    for part in parameter.parts:
        place = numbered(part) if part.key not in reader.tensors and "decoder.layers." in part.key else part
        if place.key not in reader.tensors:
            raise UserError(f"{reader.folder}: {part.key} is missing; is hf/config.json of this model?")
        saved, shape = tuple(reader.tensors[place.key].size), place.global_shape
        padded = parameter.is_padded  # as the writer's layout wanted it
        if len(saved) != len(shape) or saved[padded:] != shape[padded:]:
            raise UserError(
                f"{reader.folder}: {place.key} has shape {list(saved)}, but hf/config.json means {list(shape)}; "
                "is it of this model?"
            )
        found.append(place)
    return tuple(found)


class _Runs:
    """Which rows go where, found once for all parameters of a layout and a number of rows."""

    def __init__(self, sizes: ModelSizes) -> None:
        self._sizes = sizes
        self._sharded: dict[Any, list[Run]] = {}
        self._full: dict[Any, list[list[Run]]] = {}

    def sharded(self, row: Row) -> list[Run]:
        """Of which rows of the row's Hugging Face tensors the parameter is made."""
        num_rows = tuple(shape[0] for shape in row.shapes(self._sizes).values())
        key = (row.layout, num_rows)
        if key not in self._sharded:
            self._sharded[key] = shard_runs(lambda full: row.layout.shard(full, self._sizes, 0, 1), num_rows)
        return self._sharded[key]

    def full(self, parameter: Parameter) -> list[list[Run]]:
        """Of which rows of the parameter each of its row's Hugging Face tensors is made."""
        key = (parameter.row.layout, parameter.shape[0])
        if key not in self._full:
            self._full[key] = full_runs(lambda rows: parameter.row.layout.full([rows], self._sizes), parameter.shape[0])
        return self._full[key]


class _Source:
    """The tensors of a Hugging Face folder as they are to be written, in `dtype` or in their own."""

    def __init__(self, tensors: HfTensors, sizes: ModelSizes, dtype: torch.dtype | None, finite: FiniteCheck) -> None:
        self._tensors, self._dtype, self._finite = tensors, dtype, finite
        self._runs = _Runs(sizes)

    def pieces(self, parameter: Parameter) -> Iterator[Piece]:
        """The parameter's parts, in pieces of PIECE_BYTES, row by row.

        Raises UserError if the row's tensors, which are one parameter, differ in dtype and none is wanted.
        """
        row, at = parameter.row, 0
        dtypes = {self._tensors.dtypes[name] for name in row.hf}
        if self._dtype is None and len(dtypes) > 1:
            raise UserError(f"{self._tensors.folder}: {', '.join(row.hf)} differ in dtype; give --dtype")
        dtype = self._dtype or dtypes.pop()
        width = parameter.shape[1:]
        step = max(1, PIECE_BYTES // (math.prod(width) * dtype.itemsize))
        for part in parameter.parts:
            for start in range(0, part.rows, step):
                rows = min(step, part.rows - start)
                yield Piece(
                    key=part.key,
                    global_shape=part.global_shape,
                    offset=(*part.lead, part.start + start, *(0,) * len(width)),
                    shape=(*(1,) * len(part.lead), rows, *width),
                    dtype=dtype,
                    chunks=partial(self._chunks, row, at + start, at + start + rows, dtype),
                )
            at += part.rows

    def _chunks(self, row: Row, start: int, end: int, dtype: torch.dtype) -> Iterator[memoryview]:
        """The bytes of rows `start` to `end` of the parameter."""
        names = list(row.hf)
        row_values = math.prod(self._tensors.shapes[names[0]][1:])
        for run in cut(self._runs.sharded(row), start, end):
            name = names[run.source or 0]
            stored = self._tensors.dtypes[name]
            if run.source is None:
                span = Span(None, 0, run.count * row_values * stored.itemsize)
            else:
                span = self._tensors.span(name, run.first, run.first + run.count)
            yield from copy_spans([span], stored, dtype, partial(self._finite.check, name))


class _Count:
    """Tells of progress. May be used by several threads."""

    def __init__(self, total: int, on_progress: OnProgress) -> None:
        self._total, self._on_progress = total, on_progress
        self._done = 0
        self._lock = Lock()

    def chunks(self, make: Callable[[], Iterable[memoryview]]) -> Iterator[memoryview]:
        for chunk in make():
            yield chunk
            with self._lock:
                self._done += len(chunk)
                self._on_progress(self._done, self._total)


def _check_uniform(hf_dir: Path, pieces: Sequence[Piece]) -> None:
    """A global tensor, which may hold a parameter of every layer, has one dtype."""
    dtypes: dict[str, torch.dtype] = {}
    for piece in pieces:
        if dtypes.setdefault(piece.key, piece.dtype) != piece.dtype:
            raise UserError(f"{hf_dir}: layers differ in the dtype of {piece.key}; give --dtype")
