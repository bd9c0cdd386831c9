"""A converted checkpoint under every layout, and what layouts and Megatron itself have written, converted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import dist_checkpointing
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from policy_setup import tiny_config
from ranks import run_ranks
from safetensors.torch import load_file
from tiny_model import make_tiny_qwen
from torch import Tensor

from megatron_prorl import comm
from megatron_prorl.checkpoint.sharded import load_model_state, model_state, read_folder
from megatron_prorl.checkpoint.store import save_reference
from megatron_prorl.config.hf import padded_vocab_size, read_hf_config
from megatron_prorl.policy import model as policy_model
from megatron_prorl.policy.device import init_device
from megatron_prorl.policy.model import build_model, transformer_config
from megatron_prorl.weights.convert import hf_to_megatron, megatron_to_hf
from megatron_prorl.weights.export import iter_hf_weights
from megatron_prorl.weights.load import load_hf_weights, local_parameters

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
MODELS = [("qwen2", False, "fp32"), ("qwen2", True, "bf16"), ("qwen3", False, "bf16"), ("qwen3", True, "fp32")]
LAYOUTS = [(1, 1), (2, 1), (4, 1), (1, 2), (2, 2), (4, 2)]  # tensor, pipeline


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("models")
    return [
        make_tiny_qwen(
            root / str(i), family, tie_word_embeddings=tied, dtype=DTYPES[dtype], num_hidden_layers=3,
            num_key_value_heads=4,
        )
        for i, (family, tied, dtype) in enumerate(MODELS)
    ]  # fmt: skip


@pytest.fixture(scope="module")
def converted(folders: list[Path], tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    out = [tmp_path_factory.mktemp("megatron") / folder.name for folder in folders]
    for folder, target in zip(folders, out, strict=True):
        hf_to_megatron(folder, target)
    return out


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def same_bits(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return found.keys() == expected.keys() and all(
        found[name].dtype == t.dtype and torch.equal(found[name].view(torch.uint8), t.view(torch.uint8))
        for name, t in expected.items()
    )


def uneven(first_stage: int) -> None:
    """From now on this process builds models whose first pipeline stage has so many layers."""

    def with_split(*args: Any) -> Any:
        config = transformer_config(*args)
        config.num_layers_in_first_pipeline_stage = first_stage
        return config

    policy_model.transformer_config = with_split


def _load(folders: list[Path], converted: list[Path], tensor: int, pipeline: int) -> list[bool]:
    """Of every model, whether each parameter is what loading the Hugging Face folder gives."""
    answers = []
    for i, (folder, checkpoint) in enumerate(zip(folders, converted, strict=True)):
        parallel = {"tensor": tensor, "pipeline": pipeline}
        cfg = tiny_config(folder, dtype=MODELS[i][2], num_ranks=tensor * pipeline, parallel=parallel)
        if i == 0:
            device = init_device(cfg)
            comm.init_control_group()
            if pipeline == 2:
                uneven(first_stage=2)  # of three layers
        hf = read_hf_config(folder)
        expected = build_model(hf, cfg, device, trainable=False)
        load_hf_weights(expected, folder, hf)
        chunks = build_model(hf, cfg, device, trainable=True)
        load_model_state(chunks, read_folder(checkpoint, model_state(chunks)))
        answers.append(same_bits(local_parameters(chunks), local_parameters(expected)))
        whole = dict(iter_hf_weights(chunks, hf))
        if comm.is_rank_zero():
            answers.append(same_bits({name: t for name, t in whole.items() if t is not None}, tensors_of(folder)))
    return answers


@pytest.mark.parametrize(("tensor", "pipeline"), LAYOUTS)
def test_a_converted_checkpoint_is_the_same_model_under_any_layout(
    folders: list[Path], converted: list[Path], tensor: int, pipeline: int
) -> None:
    answers = run_ranks(tensor * pipeline, _load, folders, converted, tensor, pipeline)
    assert [len(of_rank) for of_rank in answers] == [8] + [4] * (tensor * pipeline - 1)
    assert all(all(of_rank) for of_rank in answers)


def _save(folder: Path, run_dir: Path, tensor: int, pipeline: int) -> None:
    parallel = {"tensor": tensor, "pipeline": pipeline}
    cfg = tiny_config(folder, dtype="bf16", num_ranks=4, parallel=parallel)
    device = init_device(cfg)
    comm.init_control_group()
    if pipeline == 2:
        uneven(first_stage=1)
    hf = read_hf_config(folder)
    chunks = build_model(hf, cfg, device, trainable=True)
    load_hf_weights(chunks, folder, hf)
    save_reference(run_dir, "reset-000", chunks)


@pytest.mark.parametrize(("tensor", "pipeline"), [(4, 1), (2, 2), (1, 2)])
@pytest.mark.parametrize("model", [1, 2])
def test_what_training_saved_under_a_layout_converts(
    folders: list[Path], converted: list[Path], tmp_path: Path, model: int, tensor: int, pipeline: int
) -> None:
    run_ranks(4, _save, folders[model], tmp_path, tensor, pipeline)
    saved = tmp_path / "references" / "reset-000"
    (saved / "hf").symlink_to(converted[model] / "hf")
    megatron_to_hf(saved, tmp_path / "out")
    assert same_bits(tensors_of(tmp_path / "out"), tensors_of(folders[model]))


# What Megatron-Bridge 0.7 asks of `sharded_state_dict` when it saves; Megatron-LM asks nothing.
BRIDGE = {"singleton_local_shards": False, "chained_optim_avoid_prefix": True}


def _save_as_megatron_does(folder: Path, out: Path, metadata: dict[str, Any] | None) -> None:
    """Megatron-Core's own model and its own `save`, with a state dict as Megatron-LM's training loop makes it."""
    cfg = tiny_config(folder, dtype="bf16", num_ranks=2, parallel={"tensor": 2})
    init_device(cfg)
    hf = read_hf_config(folder)
    config = transformer_config(hf, cfg, "cpu")
    model = GPTModel(
        config,
        get_gpt_layer_local_spec(qk_layernorm=config.qk_layernorm, normalization="RMSNorm"),
        vocab_size=padded_vocab_size(hf["vocab_size"], 2),
        max_sequence_length=64,
        share_embeddings_and_output_weights=hf["tie_word_embeddings"],
        position_embedding_type="rope",
    ).bfloat16()  # as Megatron-LM's Float16Module does
    load_hf_weights([model], folder, hf)
    weights = model.sharded_state_dict(metadata=metadata)
    state = {"model": weights, "checkpoint_version": 3.0, "iteration": 7, "args": None}
    if torch.distributed.get_rank() == 0:
        out.mkdir()
    torch.distributed.barrier()
    dist_checkpointing.save(state, str(out))


@pytest.mark.parametrize(("model", "metadata"), [(1, None), (2, BRIDGE)])
def test_what_megatron_itself_saves_converts(
    folders: list[Path], converted: list[Path], tmp_path: Path, model: int, metadata: dict[str, Any] | None
) -> None:
    run_ranks(2, _save_as_megatron_does, folders[model], tmp_path / "iter_0000007", metadata)
    (tmp_path / "iter_0000007" / "hf").symlink_to(converted[model] / "hf")
    megatron_to_hf(tmp_path / "iter_0000007", tmp_path / "out")
    assert same_bits(tensors_of(tmp_path / "out"), tensors_of(folders[model]))
