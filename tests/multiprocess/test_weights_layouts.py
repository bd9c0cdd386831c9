"""Hugging Face -> Megatron -> Hugging Face on every layout, on gloo ranks; what is expected is transformers' own."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from safetensors.torch import load_file, save_file
from tiny_model import make_tiny_qwen
from torch import Tensor
from transformers import AutoModelForCausalLM

from megatron_prorl.config.hf import padded_vocab_size, read_hf_config
from megatron_prorl.config.schema import Config
from megatron_prorl.errors import UserError
from megatron_prorl.policy.device import init_device
from megatron_prorl.policy.model import build_model
from megatron_prorl.weights.export import hf_metadata, iter_hf_weights
from megatron_prorl.weights.load import copy_weights, load_hf_weights, local_parameters

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class Model:
    family: str
    tied: bool
    dtype: str


MODELS = [
    Model("qwen2", False, "fp32"),
    Model("qwen2", True, "bf16"),
    Model("qwen3", False, "bf16"),
    Model("qwen3", True, "fp32"),
]
LAYOUTS = {  # tensor, pipeline, data
    "1 rank": (1, 1, 1),
    "TP 2": (2, 1, 1),
    "PP 2": (1, 2, 1),
    "TP 2 PP 2": (2, 2, 1),
    "DP 2": (1, 1, 2),
    "TP 2 DP 2": (2, 1, 2),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("models")
    return [
        make_tiny_qwen(root / str(i), model.family, tie_word_embeddings=model.tied, dtype=DTYPES[model.dtype])
        for i, model in enumerate(MODELS)
    ]


def config(folder: Path, dtype: str, layout: tuple[int, int, int]) -> Config:
    tensor, pipeline, data = layout
    return Config.model_validate(
        {
            "run_dir": "unused",
            "steps": 1,
            "device": "cpu",
            "model": {"path": str(folder), "dtype": dtype},
            "parallel": {"ranks_per_node": tensor * pipeline * data, "tensor": tensor, "pipeline": pipeline},
            "data": {"tasks": [{"task": "chain_sum"}]},
            "rollout": {
                "prompts_per_step": 4, "rollouts_per_prompt": 2, "max_prompt_tokens": 8, "max_response_tokens": 8,
            },
        }
    )  # fmt: skip


def expected_tensors(folder: Path, dtype: str) -> dict[str, Tensor]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPES[dtype])
    return {name: p.detach() for name, p in model.named_parameters()}  # a tied head is named once


def same_bits(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return found.keys() == expected.keys() and all(
        found[name].dtype == t.dtype and torch.equal(found[name].view(torch.uint8), t.view(torch.uint8))
        for name, t in expected.items()
    )


def _through_megatron(folders: list[Path], layout: tuple[int, int, int]) -> list[list[tuple[str, Tensor | None]]]:
    """On every rank, for every model: what it exports after loading."""
    exports = []
    for i, (model, folder) in enumerate(zip(MODELS, folders, strict=True)):
        cfg = config(folder, model.dtype, layout)
        if i == 0:
            device = init_device(cfg)
        hf = read_hf_config(folder)
        chunks = build_model(hf, cfg, device, trainable=True)
        load_hf_weights(chunks, folder, hf)
        found = [(name, t if t is None else t.clone()) for name, t in iter_hf_weights(chunks, hf)]
        described = [(name, shape, dtype) for name, shape, dtype in hf_metadata(hf, DTYPES[model.dtype])]
        assert [name for name, _ in found] == [name for name, _, _ in described]
        assert all(
            t is None or (tuple(t.shape), t.dtype) == (s, d) for (_, t), (_, s, d) in zip(found, described, strict=True)
        )
        exports.append(found)
    return exports


@pytest.mark.parametrize("layout", LAYOUTS)
def test_weights_come_back_bit_for_bit(folders: list[Path], layout: str):
    tensor, pipeline, data = LAYOUTS[layout]
    rank_zero, *others = run_ranks(tensor * pipeline * data, _through_megatron, folders, LAYOUTS[layout])
    for model, folder, found in zip(MODELS, folders, rank_zero, strict=True):
        assert same_bits(dict(found), expected_tensors(folder, model.dtype)), model
    for exports in others:
        for found, first in zip(exports, rank_zero, strict=True):
            assert found == [(name, None) for name, _ in first]


def _scale_and_export(folder: Path, layout: tuple[int, int, int]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """After loading, every parameter times -2: the export, and this rank's parameters."""
    cfg = config(folder, "fp32", layout)
    hf = read_hf_config(folder)
    chunks = build_model(hf, cfg, init_device(cfg), trainable=True)
    load_hf_weights(chunks, folder, hf)
    with torch.no_grad():
        for parameter in local_parameters(chunks).values():
            parameter.mul_(-2)
    return dict(iter_hf_weights(chunks, hf)), {name: p.detach() for name, p in local_parameters(chunks).items()}


@pytest.fixture(scope="module")
def scaled(folders: list[Path]) -> list[tuple[dict[str, Any], dict[str, Tensor]]]:
    assert MODELS[3].tied
    return run_ranks(4, _scale_and_export, folders[3], LAYOUTS["TP 2 PP 2"])


def test_an_export_is_of_the_weights_as_they_are_now(folders: list[Path], scaled: list[Any]):
    assert same_bits(scaled[0][0], {name: -2 * t for name, t in expected_tensors(folders[3], "fp32").items()})


def test_every_rank_holds_its_vocabulary_rows_and_the_last_stage_its_copy(folders: list[Path], scaled: list[Any]):
    rows = padded_vocab_size(112, 2) // 2
    embedding = expected_tensors(folders[3], "fp32")["model.embed_tokens.weight"]
    padded = torch.cat([embedding, torch.zeros(2 * rows - 112, 64)]).mul(-2)
    for rank, name in enumerate(["embedding.word_embeddings.weight"] * 2 + ["output_layer.weight"] * 2):
        _, parameters = scaled[rank]
        part = rank % 2
        assert torch.equal(parameters[name], padded[part * rows : (part + 1) * rows])


def _load_with_other_dtype_and_copy(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    cfg = config(folder, "bf16", (1, 1, 1))
    device, hf = init_device(cfg), read_hf_config(folder)
    policy = build_model(hf, cfg, device, trainable=True)
    reference = build_model(hf, cfg, device, trainable=False)
    load_hf_weights(policy, folder, hf)
    copy_weights(policy, reference)
    return dict(iter_hf_weights(policy, hf)), dict(iter_hf_weights(reference, hf))


def test_a_float32_folder_is_rounded_as_transformers_does_and_copied_to_the_reference(folders: list[Path]):
    assert MODELS[0].dtype == "fp32"
    ((policy, reference),) = run_ranks(1, _load_with_other_dtype_and_copy, folders[0])
    expected = expected_tensors(folders[0], "bf16")
    assert same_bits(policy, expected)
    assert same_bits(reference, expected)


def _load_both(folders: list[Path]) -> list[str]:
    """What loading each folder says."""
    cfg = config(folders[0], "fp32", (2, 1, 1))
    hf = read_hf_config(folders[0])
    chunks = build_model(hf, cfg, init_device(cfg), trainable=False)
    answers = []
    for folder in folders:
        try:
            load_hf_weights(chunks, folder, hf)
            answers.append("loaded")
        except UserError as error:
            answers.append(str(error))
    return answers


def test_a_tied_folder_may_hold_its_head_too_if_it_is_the_embedding(tmp_path: Path):
    folders = []
    for difference in (0, 1):
        folder = make_tiny_qwen(tmp_path / str(difference), tie_word_embeddings=True, num_hidden_layers=1)
        tensors = load_file(folder / "model.safetensors")
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + difference
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        folders.append(folder)
    for same, other in run_ranks(2, _load_both, folders):
        assert same == "loaded"
        assert "lm_head.weight differs from the embedding" in other


def _source(folder: Path) -> tuple[list[Any], list[list[str]], dict[str, Tensor]]:
    cfg = config(folder, "fp32", (1, 1, 1))
    hf = read_hf_config(folder)
    chunks = build_model(hf, cfg, init_device(cfg), trainable=True)
    load_hf_weights(chunks, folder, hf)
    from megatron_prorl.weights.source import MegatronWeightSource
    from megatron_prorl.weights.sync import Weights

    weights = Weights(metadata=hf_metadata(hf, torch.float32), tensors=lambda: iter_hf_weights(chunks, hf))
    source = MegatronWeightSource(weights, everywhere=False)
    described = [(meta.name, meta.shape, meta.dtype) for meta in source.metadata()]
    tensors: dict[str, Tensor] = {}
    for names, batch in source.iter_groups():  # vLLM's own check that iteration follows metadata
        tensors |= dict(zip(names, batch, strict=True))
    assert [(name, tuple(t.shape), t.dtype) for name, t in source] == described  # a second, fresh pass
    return described, source.groups(), tensors


def test_vllms_view_of_the_weights_is_the_whole_model_in_layer_groups(folders: list[Path]):
    ((described, groups, tensors),) = run_ranks(1, _source, folders[0])
    assert [name for group in groups for name in group] == [name for name, _, _ in described]
    assert len(groups) == 1 + 4 + 1
    assert same_bits(tensors, expected_tensors(folders[0], "fp32"))
