"""Hugging Face folders to Megatron checkpoints and back: a tensor at a time, no GPU, no model in memory.

A Megatron checkpoint here is one torch.distributed checkpoint, as training writes it, plus `hf/` with the config,
tokenizer and chat template that came with the weights. Which global tensors it holds, and where in them each parameter
lies, is asked of Megatron: the model is built on torch's meta device, which has shapes and no memory, and its
`sharded_state_dict` tells. Such a checkpoint loads under any layout, so none is asked for.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any, TypeVar

import torch
from megatron.core.dist_checkpointing import ShardedObject, ShardedTensor
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from megatron.core.dist_checkpointing.strategies.common import COMMON_STATE_FNAME
from torch import Tensor

from megatron_prorl.checkpoint import folders
from megatron_prorl.checkpoint.stream import Blob, CheckpointReader, Piece, write_pieces
from megatron_prorl.config.hf import hf_folder, is_megatron_checkpoint, read_hf_config
from megatron_prorl.config.schema import Config, ModelConfig, OptimizerConfig, ParallelConfig
from megatron_prorl.errors import UserError
from megatron_prorl.policy.device import init_device, shutdown_device
from megatron_prorl.policy.model import build_model
from megatron_prorl.weights.hf import HfTensors, TensorSpec, copy_small_files, write_tensors
from megatron_prorl.weights.load import check_tensors
from megatron_prorl.weights.tables import HEAD, ModelSizes, Row, VocabularyRows, hf_shapes, row_groups

logger = logging.getLogger(__name__)

PIECE_BYTES = 256 * 2**20  # of one piece on disk: what is read back at once beside the tensor that it belongs to
_NOT_WEIGHTS = re.compile(r"(chained_\d+\.)?optimizer\.|rng")  # what else is in a training checkpoint

T = TypeVar("T")
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
    hf_dir, out = Path(hf_dir), _checked_output(out_dir, hf_dir, overwrite)
    hf = read_hf_config(hf_dir)
    tensors = HfTensors(hf_dir)
    check_tensors(tensors, hf)
    if hf["tie_word_embeddings"] and (head := next(iter(HEAD.hf))) in tensors:
        logger.warning("%s is the embedding once more (tie_word_embeddings): it is stored once", head)
    parameters, blobs = _describe(hf)
    source = _Source(tensors, ModelSizes.of(hf), dtype, _FiniteCheck())
    pieces = [piece for parameter in parameters for piece in _pieces(parameter, source)]
    _check_uniform(hf_dir, pieces)
    with _appearing(out, sum(piece.num_bytes for piece in pieces), overwrite, committed=True) as temporary:
        (temporary / "hf").mkdir()
        copy_small_files(hf_dir, temporary / "hf", dtype)
        torch.save({}, temporary / COMMON_STATE_FNAME)
        save_config(CheckpointingConfig("torch_dist", 1), str(temporary))
        write_pieces(temporary, _counted(pieces, on_progress), blobs)


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
    folder, out = Path(folder), _checked_output(out_dir, folder, overwrite)
    source = hf_files(folder)
    stored = MegatronTensors(folder, read_hf_config(source), dtype)
    total = sum(spec.num_bytes for spec in stored.specs)
    finite = _FiniteCheck()

    def counted() -> Iterator[tuple[str, Tensor]]:
        done = 0
        for name, tensor in stored.tensors():
            finite.check(name, tensor)
            yield name, tensor
            done += tensor.nbytes
            on_progress(done, total)

    with _appearing(out, total, overwrite, committed=False) as temporary:
        copy_small_files(source, temporary, stored.dtype)
        write_tensors(temporary, stored.specs, _ahead(counted()))


class MegatronTensors:
    """The Hugging Face tensors of the model `hf` (as `read_hf_config` gives it) in the Megatron checkpoint `folder`.

    In `dtype`, or as they are stored. Raises UserError unless the checkpoint holds exactly this model.
    """

    def __init__(self, folder: Path, hf: dict[str, Any], dtype: torch.dtype | None = None) -> None:
        self._reader = CheckpointReader(folder)
        self._sizes = ModelSizes.of(hf)
        self._parameters, _ = _describe(hf)
        self._places = [_places(self._reader, parameter) for parameter in self._parameters]
        stored = self._reader.tensors
        used = {place.key for places in self._places for place in places}
        left_over = sorted(key for key in stored.keys() - used if not _NOT_WEIGHTS.match(key))
        if left_over:
            raise UserError(f"{folder}: {', '.join(left_over[:4])} left over; is hf/config.json of this model?")
        shapes = hf_shapes(hf)
        self.specs = [
            TensorSpec(name, shapes[name], dtype or stored[places[0].key].properties.dtype)
            for parameter, places in zip(self._parameters, self._places, strict=True)
            for name in parameter.row.hf
        ]

    @property
    def dtype(self) -> torch.dtype | None:
        """That of all tensors; None if they differ."""
        dtypes = {spec.dtype for spec in self.specs}
        return dtypes.pop() if len(dtypes) == 1 else None

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Name and values in the order of `specs`, one parameter in memory at a time."""
        specs = iter(self.specs)
        for parameter, places in zip(self._parameters, self._places, strict=True):
            names = [next(specs) for _ in parameter.row.hf]
            values = torch.empty(parameter.shape, dtype=names[0].dtype)
            _read(self._reader, parameter, places, values, num_rows=self._sizes.axes["V"])
            full = parameter.row.layout.full([values], self._sizes)
            yield from ((spec.name, tensor) for spec, tensor in zip(names, full, strict=True))


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


@dataclass(frozen=True, slots=True)
class Parameter:
    """A parameter of the whole model (one rank, one stage), on the meta device."""

    row: Row
    sharded: ShardedTensor | ShardedTensorFactory

    def parts(self, values: Tensor | None = None) -> list[ShardedTensor]:
        """Where it lies in global tensors; with `values` of its shape, each part's `data` is a view of them."""
        entry = self.sharded
        if values is not None and isinstance(entry, ShardedTensor):
            entry = replace(entry, data=values, dtype=values.dtype)
        elif values is not None:
            entry = replace(entry, data=values)
        if isinstance(entry, ShardedTensorFactory):
            built = entry.build()
            return list(built.values()) if isinstance(built, dict) else list(built)
        return [entry]

    @property
    def shape(self) -> torch.Size:
        return self.sharded.data.shape


@dataclass(frozen=True, slots=True)
class _Place:
    key: str
    offset: tuple[int, ...]


def model_config(*, tensor: int = 1, pipeline: int = 1) -> Config:
    """What building a float32 model on the CPU asks of a config, and nothing else."""
    return Config.model_construct(  # type: ignore[call-arg]
        device="cpu",
        seed=0,
        model=ModelConfig(path=".", dtype="fp32", layers="local"),
        parallel=ParallelConfig(ranks_per_node=tensor * pipeline, tensor=tensor, pipeline=pipeline),
        optimizer=OptimizerConfig(),
    )


@contextmanager
def _alone() -> Iterator[None]:
    """Without a launcher's word that this process is one of several ranks."""
    rank = os.environ.pop("RANK", None)
    size = os.environ.pop("WORLD_SIZE", None)
    try:
        yield
    finally:
        os.environ |= {name: value for name, value in (("RANK", rank), ("WORLD_SIZE", size)) if value is not None}


def _describe(hf: dict[str, Any]) -> tuple[list[Parameter], list[Blob]]:
    """The model's parameters in the order of `row_groups`, and what else Megatron stores with a model."""
    cfg = model_config()
    with _alone():
        device = init_device(cfg)
    try:
        with torch.device("meta"):
            [model] = build_model(hf, cfg, replace(device, torch_device=torch.device("meta")), trainable=False)
        state: dict[str, Any] = model.sharded_state_dict()  # type: ignore[operator]
    finally:
        shutdown_device()
    objects = [entry for entry in state.values() if isinstance(entry, ShardedObject)]
    blobs = [Blob(key=entry.unique_key, value=[entry.data]) for entry in objects]  # Megatron keeps lists of objects
    entries = {name: entry for name, entry in state.items() if not isinstance(entry, ShardedObject)}
    rows = [row for group in row_groups(hf) for row in group if not row.copied]
    parameters = [Parameter(row, entries.pop(row.megatron[0])) for row in rows]
    if entries:
        raise RuntimeError(f"no Hugging Face name is known for {', '.join(entries)} in {hf['architectures'][0]}")
    return parameters, blobs


class _FiniteCheck:
    """Warns of every tensor that holds NaN or infinity, once. May be used by several threads."""

    def __init__(self) -> None:
        self._named: set[str] = set()

    def check(self, name: str, values: Tensor) -> None:
        finite = not values.numel() or torch.isfinite(torch.stack(torch.aminmax(values))).all()  # NaN propagates
        if not finite and name not in self._named:
            self._named.add(name)
            logger.warning("%s holds values that are not finite", name)


@dataclass(frozen=True, slots=True)
class _Source:
    """The tensors of a Hugging Face folder as they are to be written."""

    tensors: HfTensors
    sizes: ModelSizes
    wanted_dtype: torch.dtype | None
    finite: _FiniteCheck

    def dtype(self, row: Row) -> torch.dtype:
        """Raises UserError if the row's tensors, which are one parameter, differ and no dtype is wanted."""
        dtypes = {self.tensors.dtypes[name] for name in row.hf}
        if self.wanted_dtype is None and len(dtypes) > 1:
            raise UserError(f"{self.tensors.folder}: {', '.join(row.hf)} differ in dtype; give --dtype")
        return self.wanted_dtype or dtypes.pop()

    def rows(self, name: str, start: int, end: int, dtype: torch.dtype) -> Tensor:
        """Rows of a tensor, zeros from its end on."""
        found = self.tensors.slice(name)[start : min(end, self.tensors.shapes[name][0])].to(dtype)
        self.finite.check(name, found)
        missing = end - start - len(found)
        return torch.cat([found, found.new_zeros(missing, *found.shape[1:])]) if missing else found

    def parameter(self, row: Row, dtype: torch.dtype) -> Tensor:
        full = [self.rows(name, 0, self.tensors.shapes[name][0], dtype) for name in row.hf]
        return row.layout.shard(full, self.sizes, 0, 1)


def _pieces(parameter: Parameter, source: _Source) -> list[Piece]:
    """The parameter's parts. One that is a whole Hugging Face tensor comes in pieces of PIECE_BYTES, row by row."""
    row, parts, dtype = parameter.row, parameter.parts(), source.dtype(parameter.row)
    if not _is_tensor_by_tensor(parameter, parts, source.tensors):
        [part] = parts
        return [_piece(part, 0, part.local_shape[0], dtype, partial(source.parameter, row, dtype))]
    pieces = []
    for name, part in zip(row.hf, parts, strict=True):
        num_rows = max(1, PIECE_BYTES // (part.data[0].numel() * dtype.itemsize))
        for start in range(0, part.local_shape[0], num_rows):
            end = min(start + num_rows, part.local_shape[0])
            pieces.append(_piece(part, start, end, dtype, partial(source.rows, name, start, end, dtype)))
    return pieces


def _is_tensor_by_tensor(parameter: Parameter, parts: list[ShardedTensor], tensors: HfTensors) -> bool:
    """Whether part i is the parameter's i-th Hugging Face tensor, but for the rows that pad a vocabulary."""
    shapes = [tensors.shapes[name] for name in parameter.row.hf]
    padded = isinstance(parameter.row.layout, VocabularyRows)
    return len(parts) == len(shapes) and all(
        part.local_shape[padded:] == shape[padded:] for part, shape in zip(parts, shapes, strict=True)
    )


def _piece(part: ShardedTensor, start: int, end: int, dtype: torch.dtype, read: Callable[[], Tensor]) -> Piece:
    """Rows `start` to `end` of a part, which `read` gives."""
    ones = (1,) * part.prepend_axis_num
    offset = list(part.global_offset)
    offset[part.prepend_axis_num] += start
    shape = (*ones, end - start, *part.local_shape[1:])
    return Piece(
        key=part.key,
        global_shape=tuple(part.global_shape),
        offset=tuple(offset),
        shape=shape,
        dtype=dtype,
        load=lambda: read().view(shape),
    )


def _places(reader: CheckpointReader, parameter: Parameter) -> list[_Place]:
    """Where the checkpoint has the parameter's parts: in tensors stacked over layers, or in one for each layer."""
    found = []
    for part in parameter.parts():
        place, shape = _Place(part.key, tuple(part.global_offset)), tuple(part.global_shape)
        if place.key not in reader.tensors and part.prepend_axis_num:
            layer, *rest = part.global_offset
            place = _Place(part.key.replace("decoder.layers.", f"decoder.layers.{layer}.", 1), tuple(rest))
            shape = shape[1:]
        if place.key not in reader.tensors:
            raise UserError(f"{reader.folder}: {part.key} is missing; is hf/config.json of this model?")
        saved = tuple(reader.tensors[place.key].size)
        padded = isinstance(parameter.row.layout, VocabularyRows)  # as the writer's layout wanted it
        if len(saved) != len(shape) or saved[padded:] != shape[padded:]:
            raise UserError(
                f"{reader.folder}: {place.key} has shape {list(saved)}, but hf/config.json means {list(shape)}; "
                "is it of this model?"
            )
        found.append(place)
    return found


def _read(
    reader: CheckpointReader, parameter: Parameter, places: Sequence[_Place], values: Tensor, num_rows: int
) -> None:
    """Fill `values`, of the parameter's shape; of a padded vocabulary its first `num_rows` rows."""
    padded = isinstance(parameter.row.layout, VocabularyRows)
    for place, part in zip(places, parameter.parts(values), strict=True):
        reader.read(place.key, place.offset, part.data[:num_rows] if padded else part.data)


def _ahead(items: Iterator[T]) -> Iterator[T]:
    """The same items, the next one made in a thread while one is in use."""
    with ThreadPoolExecutor(1) as thread:
        coming = thread.submit(next, items, None)
        while (item := coming.result()) is not None:
            coming = thread.submit(next, items, None)
            yield item


def _check_uniform(hf_dir: Path, pieces: Sequence[Piece]) -> None:
    """A global tensor, which may hold a parameter of every layer, has one dtype."""
    dtypes: dict[str, torch.dtype] = {}
    for piece in pieces:
        if dtypes.setdefault(piece.key, piece.dtype) != piece.dtype:
            raise UserError(f"{hf_dir}: layers differ in the dtype of {piece.key}; give --dtype")


def _counted(pieces: Sequence[Piece], on_progress: OnProgress) -> list[Piece]:
    """The pieces, with `on_progress` called as each has been loaded."""
    total, done, lock = sum(piece.num_bytes for piece in pieces), 0, Lock()

    def counted(piece: Piece) -> Callable[[], Tensor]:
        def load() -> Tensor:
            nonlocal done
            found = piece.load()
            with lock:
                done += piece.num_bytes
                on_progress(done, total)
            return found

        return load

    return [replace(piece, load=counted(piece)) for piece in pieces]


def _checked_output(out_dir: str | Path, source_dir: str | Path, overwrite: bool) -> Path:
    """The folder to write, absolute. Raises UserError for one that holds something that is not to be replaced."""
    out = Path(os.path.abspath(out_dir))
    source = Path(source_dir).resolve()
    if out.resolve() in (source, *source.parents):
        raise UserError(f"{out_dir}: holds what is to be converted; give another folder")
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
def _appearing(out: Path, num_bytes: int, overwrite: bool, *, committed: bool) -> Iterator[Path]:
    """A temporary folder that becomes `out` when the block ends well, and is removed when it does not."""
    try:
        temporary = folders.begin(out, num_bytes)
        try:
            yield temporary
            _check_replaceable(out, overwrite)  # once more, after what may have been hours
            folders.commit(out) if committed else folders.publish(out)
        finally:
            folders.discard(out)
    except OSError as error:
        file = Path(error.filename) if isinstance(error.filename, str | os.PathLike) else out
        reason = (error.strerror or str(error)).lower()
        if out.parent not in (file, *file.parents):
            raise UserError(f"cannot read {file}: {reason}") from None
        raise UserError(
            f"cannot write {out}: {reason}; {folders.free_bytes(out):,} bytes are free there, {num_bytes:,} are needed"
        ) from None
