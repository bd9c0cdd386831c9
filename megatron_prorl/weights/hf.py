"""Model folders in Hugging Face format: config.json and safetensors, one file or shards with an index. No Megatron."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from megatron_prorl.errors import UserError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD_BYTES = 5 * 10**9  # of one file, as transformers writes them
_SMALL_SUFFIXES = (".json", ".txt", ".jinja", ".model")  # configs, tokenizer, chat template
_NAMES_SHOWN = 4


class HfTensors:
    """The tensors of a model folder, read from disk only when a slice is asked for.

    Opening reads the headers of all files. Raises UserError for a folder or file that is missing, truncated or damaged.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._file_of: dict[str, Any] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        for path, names in _files(self.folder).items():
            try:
                file = safe_open(path, framework="pt")
            except (SafetensorError, OSError) as error:
                raise UserError(f"{path}: not a complete safetensors file ({error}); copy it again") from None
            found = list(file.keys())
            absent = sorted(set(names or ()) - set(found))
            if absent:
                raise UserError(f"{path}: {_listing(absent)} missing, though {INDEX} lists it; copy both again")
            for name in found:
                self._file_of[name] = file
                self.shapes[name] = tuple(file.get_slice(name).get_shape())

    def check(self, expected: Mapping[str, tuple[int, ...]], *, ignored: Iterable[str] = ()) -> None:
        """Raise UserError unless the folder has the `expected` tensors in these shapes and no others but `ignored`."""
        missing = [name for name in expected if name not in self.shapes]
        if missing:
            raise UserError(f"{self.folder}: {_listing(missing)} missing; is config.json of this model?")
        left_over = sorted(self.shapes.keys() - expected.keys() - set(ignored))
        if left_over:
            raise UserError(f"{self.folder}: {_listing(left_over)} left over; is config.json of this model?")
        for name, shape in expected.items():
            if self.shapes[name] != shape:
                raise UserError(
                    f"{self.folder}: {name} has shape {list(self.shapes[name])}, but config.json means {list(shape)}; "
                    "is config.json of this model?"
                )

    def __contains__(self, name: str) -> bool:
        return name in self.shapes

    def slice(self, name: str) -> Any:
        """The tensor as something to take slices of: `tensors.slice(name)[a:b]` reads these rows only."""
        return self._file_of[name].get_slice(name)


def _files(folder: Path) -> dict[Path, list[str] | None]:
    """Every safetensors file of the folder, with the names that the index lists for it; None without an index."""
    if not folder.is_dir():
        raise UserError(f"model.path: {folder}: no such folder; give the folder of a Hugging Face model")
    if (folder / SINGLE).is_file():
        return {folder / SINGLE: None}
    index = folder / INDEX
    if not index.is_file():
        raise UserError(f"{folder}: neither {SINGLE} nor {INDEX}; give a model saved as safetensors")
    try:
        weight_map = json.loads(index.read_bytes())["weight_map"]
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{index}: not a complete safetensors index; copy it again") from None
    files: dict[Path, list[str] | None] = {}
    for file in sorted(set(weight_map.values())):
        if not (folder / file).is_file():
            raise UserError(f"{folder}: {file} is missing, which {INDEX} lists; copy it again")
        files[folder / file] = [name for name, holder in weight_map.items() if holder == file]
    return files


def _listing(names: list[str]) -> str:
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


def write_folder(
    source_dir: str | Path,
    out_dir: str | Path,
    tensors: Iterator[tuple[str, Tensor]],
    sizes_bytes: Mapping[str, int],
    dtype: torch.dtype,
    *,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write a complete model folder: the tensors as they come, config and tokenizer files from `source_dir`.

    `sizes_bytes` names every tensor in the order in which it comes. At most one file's tensors (`shard_bytes`) are held
    in memory. Everything is written beside `out_dir`, which appears by a rename; an error leaves nothing behind. Raises
    UserError if `out_dir` exists.
    """
    out = Path(out_dir)
    if out.exists():
        raise UserError(f"{out}: exists already; remove it or give another folder")
    temporary = out.with_name(f".tmp-{out.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        _copy_small_files(Path(source_dir), temporary, dtype)
        _write_tensors(temporary, tensors, sizes_bytes, shard_bytes)
        temporary.rename(out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _copy_small_files(source: Path, target: Path, dtype: torch.dtype) -> None:
    for path in source.iterdir():
        if path.suffix in _SMALL_SUFFIXES and path.is_file() and not path.name.endswith(".index.json"):
            shutil.copyfile(path, target / path.name)
    config = json.loads((source / "config.json").read_bytes())
    key = "torch_dtype" if "torch_dtype" in config else "dtype"  # its name before transformers 5, and since
    config[key] = str(dtype).removeprefix("torch.")
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def _write_tensors(
    folder: Path, tensors: Iterator[tuple[str, Tensor]], sizes_bytes: Mapping[str, int], shard_bytes: int
) -> None:
    plan: list[list[str]] = [[]]
    room = shard_bytes
    for name, size in sizes_bytes.items():
        if size > room and plan[-1]:
            plan.append([])
            room = shard_bytes
        plan[-1].append(name)
        room -= size
    weight_map: dict[str, str] = {}
    for number, names in enumerate(plan, start=1):
        file = SINGLE if len(plan) == 1 else f"model-{number:05d}-of-{len(plan):05d}.safetensors"
        held = {}
        for expected in names:
            name, tensor = next(tensors)
            assert name == expected, f"{name} came instead of {expected}"
            held[name] = tensor.to("cpu", copy=True)  # safetensors refuses views of one buffer
        save_file(held, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    leftover = next(tensors, None)
    assert leftover is None, f"{leftover} came after all names"
    if len(plan) > 1:
        index = {"metadata": {"total_size": sum(sizes_bytes.values())}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
