"""On CUDA the Transformer Engine layers compute what transformers computes, in bf16 and, roughly, in FP8.

Each model runs in a process of its own: tests of the CPU layers change what Megatron-Core takes for CUDA in theirs.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from policy_setup import packed_inputs, random_sequences, tiny_config
from ranks import run_ranks
from tiny_model import make_tiny_qwen
from transformers import AutoModelForCausalLM

pytestmark = pytest.mark.needs_gpu

VOCAB_SIZE = 112
SEQUENCES = random_sequences([5, 17, 40, 1, 38, 11])  # 112 tokens: FP8 needs a multiple of 16
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2": ("qwen2", {}),
    "qwen2-tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", {"head_dim": 32}),
}


@pytest.fixture(params=MODELS)
def folder(request, tmp_path):
    family, overrides = MODELS[request.param]
    return str(make_tiny_qwen(tmp_path, family, **overrides))


Outcome = tuple[torch.Tensor, dict[str, torch.Tensor]]


def run_model(folder: str, model: dict[str, Any], batches: list[list[list[int]]]) -> Outcome:
    """In a rank: logits of the batches one after the other; gradients of the summed squares of hidden states."""
    from megatron_prorl.config.hf import read_hf_config
    from megatron_prorl.policy.device import init_device, shutdown_device
    from megatron_prorl.policy.model import build_model
    from megatron_prorl.weights.export import iter_hf_weights
    from megatron_prorl.weights.load import load_hf_weights

    cfg = tiny_config(folder, dtype="bf16", device="cuda", model=model, optimizer={"distributed": False})
    device = init_device(cfg)
    hf = read_hf_config(folder)
    chunks = build_model(hf, cfg, device, trainable=True)
    load_hf_weights(chunks, folder, hf)
    logits = []
    for batch in batches:
        hidden_TH = chunks[0](**packed_inputs(batch, device.torch_device)).squeeze(1)
        hidden_TH.float().square().sum().backward()
        logits.append((hidden_TH @ chunks[0].module.head_weight()[:VOCAB_SIZE].T).detach().float().cpu())
    with torch.no_grad():  # gradients in the place of weights, so that the export names them
        for parameter in chunks[0].parameters():
            parameter.copy_(parameter.main_grad)
    gradients = {name: tensor.float().cpu() for name, tensor in iter_hf_weights(chunks, hf) if tensor is not None}
    shutdown_device()
    return torch.cat(logits), gradients


def policy(folder: str, batches: list[list[list[int]]], **model: Any) -> Outcome:
    return run_ranks(1, run_model, folder, model, batches, timeout_seconds=280)[0]


def transformers_logits_TV(folder: str, dtype: torch.dtype) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).cuda().eval()
    with torch.no_grad():
        return torch.cat([model(torch.tensor([s], device="cuda")).logits[0].float().cpu() for s in SEQUENCES])


def similarity(a: torch.Tensor, b: torch.Tensor) -> float:
    return torch.nn.functional.cosine_similarity(a.flatten(), b.flatten(), dim=0).item()


def test_bf16_logits_are_as_close_to_fp32_as_those_of_transformers(folder):
    exact = transformers_logits_TV(folder, torch.float32)
    theirs = transformers_logits_TV(folder, torch.bfloat16)
    mine, _ = policy(folder, [SEQUENCES], layers="transformer_engine")
    # Other kernels round at other places: the same kind of error, not the same error.
    assert (mine - exact).abs().mean() <= 1.5 * (theirs - exact).abs().mean()


def test_grouped_experts_are_as_close_to_fp32_as_those_of_transformers(tmp_path):
    folder = str(make_tiny_qwen(tmp_path, "qwen3_moe", mlp_only_layers=[1]))
    test_bf16_logits_are_as_close_to_fp32_as_those_of_transformers(folder)


def test_a_sequence_has_the_same_logits_and_gradients_in_any_company(folder):
    packed, packed_gradients = policy(folder, [SEQUENCES])
    alone, alone_gradients = policy(folder, [[sequence] for sequence in SEQUENCES])
    # The same sums in another order: a few roundings of bf16 (2**-8) per layer.
    assert (packed - alone).abs().max() <= 0.05 * alone.abs().max()
    for name, gradient in alone_gradients.items():
        if gradient.norm() > 0:  # not the head, which this loss does not use
            assert similarity(packed_gradients[name], gradient) > 0.999, name


def test_local_and_transformer_engine_layers_agree(folder):
    local, local_gradients = policy(folder, [SEQUENCES], layers="local")
    engine, engine_gradients = policy(folder, [SEQUENCES], layers="transformer_engine")
    assert (local - engine).abs().max() <= 0.05 * local.abs().max()
    for name, gradient in local_gradients.items():
        if gradient.norm() > 0:
            assert similarity(engine_gradients[name], gradient) > 0.999, name


@pytest.mark.parametrize("fp8", ["hybrid", "e4m3"])
def test_fp8_is_used_and_stays_near_bf16(folder, fp8):
    plain, plain_gradients = policy(folder, [SEQUENCES])
    quantized, quantized_gradients = policy(folder, [SEQUENCES], fp8=fp8)
    assert not torch.equal(plain, quantized)
    # E4M3 keeps 4 significant bits: some percent of error after four layers.
    assert similarity(quantized, plain) > 0.95
    for name, gradient in plain_gradients.items():
        if gradient.norm() > 0:
            assert similarity(quantized_gradients[name], gradient) > 0.9, name


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recomputation_changes_no_gradient(folder, recompute):
    _, plain = policy(folder, [SEQUENCES])
    _, recomputed = policy(folder, [SEQUENCES], recompute=recompute)
    for name, gradient in plain.items():
        if gradient.norm() > 0:
            assert similarity(recomputed[name], gradient) > 0.999, name
