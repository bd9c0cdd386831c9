"""Qwen3-MoE is transformers' model on every layout, expert parallelism included, and survives every conversion."""

from __future__ import annotations

import shutil
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from cross_entropy import Outcome, accumulate, forward_backward, relative_difference, transformers_forward_backward
from policy_setup import tiny_config
from ranks import run_ranks
from safetensors.torch import load_file, save_file
from tiny_model import make_tiny_qwen
from torch import Tensor

from megatron_prorl import comm
from megatron_prorl.checkpoint.sharded import load_model_state, model_state, read_folder, write_folder
from megatron_prorl.checkpoint.store import latest_checkpoint, load_checkpoint, prepare_run_dir, save_checkpoint
from megatron_prorl.checkpoint.stream import CheckpointReader
from megatron_prorl.config.hf import read_hf_config
from megatron_prorl.policy.device import init_device, shutdown_device
from megatron_prorl.policy.model import build_model
from megatron_prorl.policy.optimizer import build_optimizer
from megatron_prorl.types import Progress
from megatron_prorl.weights.convert import hf_to_megatron, megatron_to_hf
from megatron_prorl.weights.export import hf_metadata, iter_hf_weights
from megatron_prorl.weights.load import load_hf_weights, local_parameters
from megatron_prorl.weights.verify import verify

MODELS: dict[str, dict[str, Any]] = {
    "all layers": {"head_dim": 24},
    "a dense layer, softmax over all experts": {"mlp_only_layers": [1], "norm_topk_prob": False},
}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one process": (1, {}),
    "tensor 2": (2, {"tensor": 2, "sequence": True}),
    "pipeline 2": (2, {"pipeline": 2}),
    "expert 2": (2, {"expert": 2}),
    "tensor 2, expert 2": (4, {"tensor": 2, "sequence": True, "expert": 2}),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@cache
def folder(model: str, base: Path) -> str:
    return str(make_tiny_qwen(base / model, "qwen3_moe", **MODELS[model]))


def as_on_disk(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """transformers stacks experts in memory; in the folder each has tensors of its own."""
    found = {}
    for name, tensor in tensors.items():
        prefix, _, stacked = name.partition(".experts.")
        if not stacked:
            found[name] = tensor
            continue
        for number, expert in enumerate(tensor):
            parts = expert.chunk(2) if stacked == "gate_up_proj" else [expert]
            names = ("gate_proj", "up_proj") if stacked == "gate_up_proj" else (stacked,)
            found |= {f"{prefix}.experts.{number}.{n}.weight": part for n, part in zip(names, parts, strict=True)}
    return found


@cache
def transformers_run(model: str, base: Path) -> Outcome:
    logits, gradients = transformers_forward_backward(folder(model, base))
    return logits, as_on_disk(gradients)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_has_the_logits_and_gradients_of_transformers(model: str, layout: str, base: Path) -> None:
    num_ranks, parallel = LAYOUTS[layout]
    answers = run_ranks(num_ranks, forward_backward, folder(model, base), num_ranks, parallel)
    logits = {index: part for answer in answers for index, part in answer[0].items()}
    expected_logits, expected_gradients = transformers_run(model, base)
    assert logits.keys() == expected_logits.keys()
    for index, expected in expected_logits.items():
        assert expected.abs().max() > 1
        assert (logits[index] - expected).abs().max() <= 1e-4
    gradients = answers[0][1]
    assert gradients.keys() == expected_gradients.keys()
    for name, expected in expected_gradients.items():
        assert relative_difference(gradients[name], expected) <= 1e-4, name


DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """For each model in bf16 and in fp32: model, its Megatron checkpoint, and the model made of that."""
    work = tmp_path_factory.mktemp("converted")
    found = []
    for number, (overrides, dtype) in enumerate((m, d) for m in MODELS.values() for d in DTYPES.values()):
        top = work / str(number)
        make_tiny_qwen(top / "hf", "qwen3_moe", dtype=dtype, **overrides)
        hf_to_megatron(top / "hf", top / "megatron")
        megatron_to_hf(top / "megatron", top / "back")
        found.append(top)
    return found


def same_bits(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(
        tensor.dtype == second[name].dtype and torch.equal(tensor.view(torch.uint8), second[name].view(torch.uint8))
        for name, tensor in first.items()
    )


def test_there_and_back_is_bit_identical(folders: list[Path]) -> None:
    for top in folders:
        assert same_bits(load_file(top / "back/model.safetensors"), load_file(top / "hf/model.safetensors"))


def load_both_ways(folders: list[Path], num_ranks: int, layout: dict[str, Any]) -> list[dict[str, Tensor | None]]:
    """Load each model from its folder and from its checkpoint; what this rank exports, and `written` by all of them."""
    exports = []
    for number, top in enumerate(folders):
        hf = read_hf_config(top / "hf")
        dtype = "bf16" if number % 2 == 0 else "fp32"
        cfg = tiny_config(top / "hf", dtype=dtype, num_ranks=num_ranks, parallel=layout)
        if number == 0:
            device = init_device(cfg)
            comm.init_control_group()
        chunks = build_model(hf, cfg, device, trainable=False)
        load_hf_weights(chunks, top / "hf", hf)
        expected = {name: p.clone() for name, p in local_parameters(chunks).items()}
        for parameter in local_parameters(chunks).values():
            parameter.zero_()
        load_model_state(chunks, read_folder(top / "megatron", model_state(chunks)))
        assert same_bits(local_parameters(chunks), expected)
        exports.append({name: t if t is None else t.clone() for name, t in iter_hf_weights(chunks, hf)})
        assert list(exports[-1]) == [name for name, _, _ in hf_metadata(hf, DTYPES[dtype])]
        write_folder(top / "written", model_state(chunks), {})
    shutdown_device()
    return exports


@pytest.mark.parametrize("layout", LAYOUTS)
def test_checkpoints_and_folders_are_the_same_weights_on_every_layout(
    layout: str, folders: list[Path], tmp_path: Path
) -> None:
    num_ranks, parallel = LAYOUTS[layout]
    rank_zero, *others = run_ranks(num_ranks, load_both_ways, folders, num_ranks, parallel)
    for top, export in zip(folders, rank_zero, strict=True):
        expected = load_file(top / "hf/model.safetensors")
        assert same_bits(export, expected)
        shutil.copytree(top / "hf", top / "written/hf")
        megatron_to_hf(top / "written", tmp_path / top.name)
        assert same_bits(load_file(tmp_path / top.name / "model.safetensors"), expected)
        shutil.rmtree(top / "written")
    for exports in others:
        assert all(tensor is None for export in exports for tensor in export.values())


def write_layers_one_by_one(top: Path, out: Path) -> None:
    """The model in `top`/hf as Megatron writes it when told that layers differ: no tensor has parts of two layers."""
    hf = read_hf_config(top / "hf")
    cfg = tiny_config(top / "hf")
    device = init_device(cfg)
    comm.init_control_group()
    (model,) = build_model(hf, cfg, device, trainable=False)
    load_hf_weights([model], top / "hf", hf)
    write_folder(out, {"model": model.sharded_state_dict(metadata={"non_homogeneous_layers": True})}, {})
    shutdown_device()


def test_layers_stored_one_by_one_are_read(folders: list[Path], tmp_path: Path) -> None:
    top = folders[1]  # all layers alike, which we stack; fp32
    run_ranks(1, write_layers_one_by_one, top, tmp_path / "megatron")
    keys = CheckpointReader(tmp_path / "megatron").tensors
    assert "decoder.layers.3.mlp.experts.experts.linear_fc1.weight" in keys
    assert "decoder.layers.3.mlp.experts.experts.linear_fc1.weight" not in CheckpointReader(top / "megatron").tensors
    shutil.copytree(top / "hf", tmp_path / "megatron/hf")
    megatron_to_hf(tmp_path / "megatron", tmp_path / "back")
    assert same_bits(load_file(tmp_path / "back/model.safetensors"), load_file(top / "hf/model.safetensors"))


def test_verify_finds_a_changed_expert(folders: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    top, name = folders[1], "model.layers.2.mlp.experts.3.down_proj.weight"
    assert verify(top / "hf", top / "megatron", tensor=2)
    assert "100.0%" in capsys.readouterr().out
    shutil.copytree(top / "hf", tmp_path / "changed")
    tensors = load_file(tmp_path / "changed/model.safetensors")
    save_file(tensors | {name: tensors[name] + 0.1}, tmp_path / "changed/model.safetensors", metadata={"format": "pt"})
    assert not verify(tmp_path / "changed", top / "megatron", tensor=2)
    assert f"different: {name}\n" in capsys.readouterr().out


def train(folder: str, run_dir: Path, num_ranks: int, layout: dict[str, Any], first: int, last: int) -> dict[str, Any]:
    """Updates `first` to `last`, from the newest checkpoint unless `first` is 0, and one at the end; the weights."""
    optimizer = {"learning_rate": 1e-2, "eps": 1.0}  # moves by the gradient, not its sign: rounding stays small
    cfg = tiny_config(folder, num_ranks=num_ranks, parallel=layout, optimizer=optimizer)
    device = init_device(cfg)
    comm.init_control_group()
    if comm.is_rank_zero():
        prepare_run_dir(run_dir)
    hf = read_hf_config(folder)
    chunks = build_model(hf, cfg, device, trainable=True)
    load_hf_weights(chunks, folder, hf)
    optimizer = build_optimizer(chunks, cfg, device)
    comm.barrier()
    if first:
        load_checkpoint(latest_checkpoint(run_dir), chunks, optimizer)
    for _ in range(first, last):
        optimizer.zero_grad()
        accumulate(chunks, cfg.parallel)
        assert optimizer.step()[0]
    save_checkpoint(run_dir, chunks, optimizer, Progress(step=last), {})
    weights = {name: tensor.clone() for name, tensor in iter_hf_weights(chunks, hf) if tensor is not None}
    shutdown_device()
    return weights


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("expert 2", "expert 2"),
        ("expert 2", "one process"),
        ("tensor 2", "expert 2"),
        ("one process", "tensor 2, expert 2"),
    ],
)
def test_updates_and_resumes_are_those_of_one_process(before: str, after: str, base: Path, tmp_path: Path) -> None:
    model = folder("a dense layer, softmax over all experts", base)
    (expected,) = run_ranks(1, train, model, tmp_path / "whole", 1, {}, 0, 4)
    for layout, first, last in ((LAYOUTS[before], 0, 2), (LAYOUTS[after], 2, 4)):
        found, *_ = run_ranks(layout[0], train, model, tmp_path / "broken", *layout, first, last)
    start = load_file(Path(model) / "model.safetensors")
    assert found.keys() == expected.keys() == start.keys()
    for name, values in expected.items():
        # of the largest step, and the rounding of a weight below 1 in each of four
        assert (found[name] - values).abs().max() <= 1e-4 * (values - start[name]).abs().max() + 4 * 6e-8, name
