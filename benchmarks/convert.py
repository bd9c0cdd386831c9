"""Converting a random Qwen2.5-shaped model both ways: time against `cp` of the same bytes, and peak memory.

    python benchmarks/convert.py [--size 1.5B | 7B] [--folder DIR]

The model is random bf16 weights in Hugging Face's format, in files of 5 GB as transformers writes them. Each conversion
is the `prorl convert` command in a process of its own; its peak memory is what the kernel counted for it (resident set,
mapped files included). `cp -r` of the same folder and `sync` of the copy, because the converter too returns only once
the bytes are on the disk, runs before and after each and counts with its faster time. Prints cp's time over the
converter's, and the peak memory against 1.5 GiB + the largest tensor. Exits with 1 if the round trip is not
bit-identical.

Needs four times the model's bytes in DIR (default: a temporary folder).
"""

from __future__ import annotations

import argparse
import filecmp
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from megatron_prorl.checkpoint.spans import tensor_chunks
from megatron_prorl.config.hf import read_hf_config
from megatron_prorl.weights.hf import TensorSpec, write_tensors
from megatron_prorl.weights.tables import hf_shapes

SPEED_TARGET = 0.5  # of cp
MEMORY_GIB = 1.5  # beside the largest tensor
COMMON = {
    "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_act": "silu", "rms_norm_eps": 1e-6,
    "rope_theta": 1e6, "max_position_embeddings": 32768, "torch_dtype": "bfloat16", "use_sliding_window": False,
}  # fmt: skip
SHAPES: dict[str, dict[str, Any]] = {  # config.json of Qwen2.5-1.5B and Qwen2.5-7B
    "1.5B": {
        "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12,
        "num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True,
    },
    "7B": {
        "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
        "num_key_value_heads": 4, "vocab_size": 152064, "tie_word_embeddings": False,
    },
}  # fmt: skip


def make_model(folder: Path, size: str) -> list[TensorSpec]:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(COMMON | SHAPES[size]))
    specs = [TensorSpec(name, shape, torch.bfloat16) for name, shape in hf_shapes(read_hf_config(folder)).items()]

    seeds = {spec.name: seed for seed, spec in enumerate(specs)}

    def values(spec: TensorSpec) -> Iterator[memoryview]:
        generator = torch.Generator().manual_seed(seeds[spec.name])
        yield from tensor_chunks(torch.empty(spec.shape, dtype=spec.dtype).normal_(0, 0.02, generator=generator))

    write_tensors(folder, specs, values)
    return specs


def timed(command: list[str]) -> tuple[float, int]:
    """Seconds and peak resident bytes of a command."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"{' '.join(command)} failed")
    return time.perf_counter() - start, usage.ru_maxrss * 1024


def copy_seconds(source: Path, target: Path) -> float:
    seconds, _ = timed(["sh", "-c", 'cp -r "$0" "$1" && find "$1" -type f -exec sync {} +', str(source), str(target)])
    shutil.rmtree(target)
    return seconds


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SHAPES, default="1.5B")
    parser.add_argument("--folder", type=Path, help="where to write")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="convert-", dir=args.folder) as name:
        folder = Path(name)
        hf, megatron, back = folder / "hf", folder / "megatron", folder / "back"
        specs = make_model(hf, args.size)
        num_bytes, largest = sum(spec.num_bytes for spec in specs), max(spec.num_bytes for spec in specs)
        limit = MEMORY_GIB * 2**30 + largest
        print(f"{args.size}: {num_bytes / 1e9:.2f} GB in {len(specs)} tensors, the largest {largest / 2**30:.2f} GiB")
        copy_seconds(hf, folder / "copy")  # brings the model into the page cache, for all that follows
        for direction, source, target in (("hf-to-megatron", hf, megatron), ("megatron-to-hf", megatron, back)):
            before = copy_seconds(source, folder / "copy")
            command = [sys.executable, "-m", "megatron_prorl.cli", "convert", direction, str(source), str(target)]
            seconds, peak = timed(command)
            cp = min(before, copy_seconds(source, folder / "copy"))
            print(
                f"{direction}: {seconds:.1f} s, cp {cp:.1f} s, ratio {cp / seconds:.2f} "
                f"(target {SPEED_TARGET}: {'met' if cp / seconds >= SPEED_TARGET else 'MISSED'}); "
                f"peak memory {peak / 2**30:.2f} GiB of {limit / 2**30:.2f} ({'met' if peak <= limit else 'MISSED'})",
                flush=True,
            )
        files = [path.name for path in hf.iterdir() if path.suffix == ".safetensors"]
        same, different, absent = filecmp.cmpfiles(hf, back, files, shallow=False)
        print(f"round trip: {len(same)} of {len(files)} files bit-identical")
        return 0 if not different and not absent else 1


if __name__ == "__main__":
    sys.exit(main())
