"""Model folders in Hugging Face format: config.json and safetensors, one file or shards with an index. No Megatron."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Event
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_prorl.checkpoint.spans import Files, Span, Writeback
from megatron_prorl.checkpoint.threads import Stopped, equal_parts, in_threads
from megatron_prorl.errors import UserError
from megatron_prorl.weights.tables import EMBEDDING, HEAD, hf_shapes

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}  # safetensors' names
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
NUM_WRITERS = 2  # at a time: one thread computes while the other waits for the disk
COMPARED_BYTES = 16 * 2**20  # about, of embedding and head at once
SHARD_BYTES = 5 * 10**9  # of one file, as transformers writes them
_SMALL_SUFFIXES = (".json", ".txt", ".jinja", ".model")  # configs, tokenizer, chat template
_MORE_TEMPLATES = "additional_chat_templates"  # transformers' name
_NAMES_SHOWN = 4


class HfTensors:
    """The tensors of a model folder, read from disk only when a slice is asked for.

    Opening reads the headers of all files. Raises UserError for a folder or file that is missing, truncated or damaged.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._path_of: dict[str, Path] = {}
        self._start_of: dict[str, int] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        files = _files(self.folder)
        self._files = Files(files)
        for path, names in files.items():
            try:
                file = safe_open(path, framework="pt")
                starts = _starts(path)
            except (SafetensorError, OSError) as error:
                raise UserError(f"{path}: not a complete safetensors file ({error}); copy it again") from None
            found = list(file.keys())
            absent = sorted(set(names or ()) - set(found))
            if absent:
                raise UserError(f"{path}: {listing(absent)} missing, though {INDEX} lists it; copy both again")
            if names is not None and (stray := sorted(set(found) - set(names))):
                raise UserError(f"{path}: {listing(stray)} in no line of {INDEX} for this file; copy both again")
            for name in found:
                tensor = file.get_slice(name)
                if tensor.get_dtype() not in DTYPES:
                    raise UserError(
                        f"{path}: {name} is of type {tensor.get_dtype()}; only {', '.join(DTYPES)} are supported"
                    )
                self._path_of[name] = path
                self._start_of[name] = starts[name]
                self.shapes[name] = tuple(tensor.get_shape())
                self.dtypes[name] = DTYPES[tensor.get_dtype()]

    def check(self, expected: Mapping[str, tuple[int, ...]], *, ignored: Iterable[str] = ()) -> None:
        """Raise UserError unless the folder has the `expected` tensors in these shapes and no others but `ignored`."""
        missing = [name for name in expected if name not in self.shapes]
        if missing:
            raise UserError(f"{self.folder}: {listing(missing)} missing; is config.json of this model?")
        left_over = sorted(self.shapes.keys() - expected.keys() - set(ignored))
        if left_over:
            raise UserError(f"{self.folder}: {listing(left_over)} left over; is config.json of this model?")
        for name, shape in expected.items():
            if self.shapes[name] != shape:
                raise UserError(
                    f"{self.folder}: {name} has shape {list(self.shapes[name])}, but config.json means {list(shape)}; "
                    "is config.json of this model?"
                )

    def span(self, name: str, start: int, end: int) -> Span:
        """Where rows `start` to `end` of the tensor lie on disk."""
        row_bytes = math.prod(self.shapes[name][1:]) * self.dtypes[name].itemsize
        return Span(self._path_of[name], self._start_of[name] + start * row_bytes, (end - start) * row_bytes)

    def check_unchanged(self) -> None:
        """Raise UserError if a file is another one by now."""
        self._files.check_unchanged()

    def __contains__(self, name: str) -> bool:
        return name in self.shapes

    def slice(self, name: str) -> _Slice:
        """The tensor as something to take slices of: `tensors.slice(name)[a:b]` reads these rows only."""
        return _Slice(self._path_of[name], name)


@dataclass(frozen=True, slots=True)
class _Slice:
    """Opens the file for every read: its mapping, whose pages count as memory, lives no longer than what was read."""

    path: Path
    name: str

    def __getitem__(self, index: Any) -> Tensor:
        with safe_open(self.path, framework="pt") as file:
            return file.get_slice(self.name)[index]


def _starts(path: Path) -> dict[str, int]:
    """Where in a safetensors file, which `safe_open` has found to be whole, each tensor begins."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    return {name: 8 + length + entry["data_offsets"][0] for name, entry in header.items() if name != "__metadata__"}


def _files(folder: Path) -> dict[Path, list[str] | None]:
    """Every safetensors file of the folder, with the names that the index lists for it; None without an index."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give the folder of a Hugging Face model")
    if (folder / SINGLE).is_file():
        return {folder / SINGLE: None}
    index = folder / INDEX
    if not index.is_file():
        raise UserError(f"{folder}: neither {SINGLE} nor {INDEX}; give a model saved as safetensors")
    try:
        weight_map = json.loads(index.read_bytes())["weight_map"]
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{index}: not a complete safetensors index; copy it again") from None
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise UserError(f"{index}: not a complete safetensors index; copy it again")
    files: dict[Path, list[str] | None] = {}
    for file in sorted(set(weight_map.values())):
        if not (folder / file).is_file():
            raise UserError(f"{folder}: {file} is missing, which {INDEX} lists; copy it again")
        files[folder / file] = [name for name, holder in weight_map.items() if holder == file]
    return files


def listing(names: Sequence[str]) -> str:
    """The first few of some names, as the subject of a sentence with its verb."""
    shown = ", ".join(names[:_NAMES_SHOWN])
    rest = len(names) - _NAMES_SHOWN
    verb = "is" if len(names) == 1 else "are"
    return f"{shown}{f' and {rest} more' if rest > 0 else ''} {verb}"


def check_tokenizer_fits(hf: Mapping[str, Any], tokenizer_len: int) -> None:
    """Raise UserError if `tokenizer_len` tokens, which is `len(tokenizer)`, are more than the model's vocabulary."""
    if hf["vocab_size"] < tokenizer_len:
        raise UserError(
            f"model.path: the tokenizer has {tokenizer_len} tokens, but the model's vocab_size is {hf['vocab_size']}; "
            "use the model's own tokenizer"
        )


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor that is to be written."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def copy_small_files(source: Path, target: Path, dtype: torch.dtype | None) -> None:
    """Config, tokenizer, chat template and the like; config.json then says `dtype`, unless that is None."""
    for path in source.iterdir():
        if path.suffix not in _SMALL_SUFFIXES or path.is_dir() or path.name.endswith(".index.json"):
            continue
        if not path.exists():
            raise UserError(f"{path}: is a link to nothing; put the file there, or remove the link")
        shutil.copyfile(path, target / path.name)
    if (source / _MORE_TEMPLATES).is_dir():
        shutil.copytree(source / _MORE_TEMPLATES, target / _MORE_TEMPLATES)
    if dtype is None:
        return
    config = json.loads((source / "config.json").read_bytes())
    names = {"torch_dtype", "dtype"} & config.keys() or {"dtype"}  # before transformers 5, and since
    config |= dict.fromkeys(names, str(dtype).removeprefix("torch."))
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def keep_model_files(source: Path, target: Path) -> None:
    """Copy config, tokenizer and the like to `target`, which appears by rename, in place of what is there."""
    draft = target.with_name(f".tmp-{target.name}")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    copy_small_files(source, draft, dtype=None)
    shutil.rmtree(target, ignore_errors=True)
    draft.rename(target)


def write_tensors(
    folder: Path,
    specs: Sequence[TensorSpec],
    chunks: Callable[[TensorSpec], Iterable[memoryview]],
    *,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write safetensors files into `folder`, several tensors at a time; `chunks` gives the bytes of each.

    One file, or several of at most `shard_bytes` (or one tensor) with an index. Raises OSError if the disk refuses, and
    what `chunks` raises; the other threads then end with the chunk they have in hand, as they do on Ctrl-C.
    """
    plan: list[list[TensorSpec]] = [[]]
    room = shard_bytes
    for spec in specs:
        if spec.num_bytes > room and plan[-1]:
            plan.append([])
            room = shard_bytes
        plan[-1].append(spec)
        room -= spec.num_bytes
    weight_map: dict[str, str] = {}
    places: list[tuple[Path, int, TensorSpec]] = []
    for number, of_file in enumerate(plan, start=1):
        file = SINGLE if len(plan) == 1 else f"model-{number:05d}-of-{len(plan):05d}.safetensors"
        starts = _write_header(folder / file, of_file)
        places += [(folder / file, start, spec) for start, spec in zip(starts, of_file, strict=True)]
        weight_map |= dict.fromkeys((spec.name for spec in of_file), file)
    stop = Event()
    parts = equal_parts(places, NUM_WRITERS, lambda place: place[2].num_bytes)
    in_threads([partial(_write_places, part, chunks, stop) for part in parts], stop)
    if len(plan) > 1:
        index = {"metadata": {"total_size": sum(spec.num_bytes for spec in specs)}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _write_header(path: Path, specs: Sequence[TensorSpec]) -> list[int]:
    """Begin a safetensors file: the header's length in eight bytes, the header. Returns where each tensor is to lie."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    ends = [0]
    for spec in specs:
        ends.append(ends[-1] + spec.num_bytes)
        header[spec.name] = {"dtype": _NAMES[spec.dtype], "shape": list(spec.shape), "data_offsets": ends[-2:]}
    content = json.dumps(header, separators=(",", ":")).encode()
    content += b" " * (-len(content) % 8)  # the tensors begin at a multiple of 8
    path.write_bytes(len(content).to_bytes(8, "little") + content)
    return [8 + len(content) + start for start in ends[:-1]]


def _write_places(
    places: Sequence[tuple[Path, int, TensorSpec]], chunks: Callable[[TensorSpec], Iterable[memoryview]], stop: Event
) -> None:
    for path, start, spec in places:
        descriptor = os.open(path, os.O_WRONLY)
        try:
            end, writeback = start, Writeback(descriptor, start)
            for chunk in chunks(spec):
                if stop.is_set():
                    raise Stopped
                while chunk:  # one call may write less, as on a disk that gets full
                    count = os.pwrite(descriptor, chunk, end)
                    chunk, end = chunk[count:], end + count
                writeback.written(end)
            assert end == start + spec.num_bytes, (spec, end - start)
        finally:
            os.close(descriptor)


def same_bits(one: Tensor, other: Tensor) -> bool:
    """NaN equals NaN of the same bits, and 0 is not -0."""
    return torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))


def check_tensors(tensors: HfTensors, hf: dict[str, Any], *, rank: int = 0, num_ranks: int = 1) -> None:
    """Raise UserError unless the folder holds exactly the tensors of the model that `hf` describes.

    A folder with tied embeddings may hold the head too, if it is the embedding; rank's rows are compared.
    """
    is_tied = hf["tie_word_embeddings"]
    tensors.check(hf_shapes(hf), ignored=HEAD.hf if is_tied else ())
    if not is_tied or next(iter(HEAD.hf)) not in tensors:
        return
    embedding, head = (next(iter(row.hf)) for row in (EMBEDDING, HEAD))
    num_rows, width = tensors.shapes[embedding]
    of_rank = range(rank * num_rows // num_ranks, (rank + 1) * num_rows // num_ranks)
    step = max(1, COMPARED_BYTES // width)
    same = tensors.shapes[head] == tensors.shapes[embedding] and tensors.dtypes[head] == tensors.dtypes[embedding]
    for start in of_rank[::step] if same else ():
        rows = slice(start, min(start + step, of_rank.stop))
        same = same and same_bits(tensors.slice(embedding)[rows], tensors.slice(head)[rows])
    if not same:
        raise UserError(
            f"{tensors.folder}: lm_head.weight differs from the embedding in values, shape or dtype, but config.json "
            "says tie_word_embeddings; set it to false"
        )
