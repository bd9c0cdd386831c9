"""Logits and gradients of the summed cross-entropy, by Megatron on some ranks and by transformers."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from policy_setup import packed_inputs, random_sequences, tiny_config
from torch.nn.functional import cross_entropy

from megatron_prorl.config.schema import ParallelConfig

VOCAB_SIZE = 112
# Two microbatches of different lengths for each of two data-parallel ranks; even totals, as sequence parallelism needs.
LENGTHS = [[5, 9, 2], [30], [7, 7], [1, 12, 21]]
MICROBATCHES = [random_sequences(lengths, seed=seed) for seed, lengths in enumerate(LENGTHS)]
Outcome = tuple[dict[int, torch.Tensor], dict[str, torch.Tensor]]


def accumulate(chunks: list[torch.nn.Module], parallel: ParallelConfig) -> dict[int, torch.Tensor]:
    """The gradient of the summed cross-entropy into the chunks' buffers; microbatch -> logits, on last stages."""
    from megatron.core import parallel_state
    from megatron.core.distributed import finalize_model_grads
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.tensor_parallel import (
        copy_to_tensor_model_parallel_region,
        gather_from_sequence_parallel_region,
        gather_from_tensor_model_parallel_region,
    )
    from megatron.core.utils import get_model_config

    logits: dict[int, torch.Tensor] = {}

    def loss(hidden_T1H, index):
        gather = gather_from_sequence_parallel_region if parallel.sequence else copy_to_tensor_model_parallel_region
        mine_TV = gather(hidden_T1H).squeeze(1) @ chunks[0].module.head_weight().T
        logits_TV = gather_from_tensor_model_parallel_region(mine_TV)[:, :VOCAB_SIZE].float()
        logits[index] = logits_TV.detach()
        return summed_cross_entropy(logits_TV, MICROBATCHES[index]), torch.tensor(1), {}

    def forward_step(indices, model):
        index = next(indices)
        return model(**packed_inputs(MICROBATCHES[index])), partial(loss, index=index)

    config = get_model_config(chunks[0])
    config.finalize_model_grads_func = lambda model, num_tokens, **kwargs: finalize_model_grads(model, None, **kwargs)
    mine = range(parallel_state.get_data_parallel_rank(), len(MICROBATCHES), parallel.data)
    chunks[0].zero_grad_buffer()
    get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iter(mine),
        model=chunks,
        num_microbatches=len(mine),
        seq_length=1,
        micro_batch_size=1,
        forward_only=False,
    )
    return logits


def forward_backward(folder: str, num_ranks: int, layout: dict[str, Any], dtype: str = "fp32") -> Outcome:
    """Microbatch -> logits (on last stages); HF name -> gradient of the summed cross-entropy (on rank 0)."""
    from megatron_prorl.config.hf import read_hf_config
    from megatron_prorl.policy.device import init_device, shutdown_device
    from megatron_prorl.policy.model import build_model
    from megatron_prorl.weights.export import iter_hf_weights
    from megatron_prorl.weights.load import load_hf_weights

    cfg = tiny_config(folder, dtype=dtype, num_ranks=num_ranks, parallel=layout, optimizer={"distributed": False})
    device = init_device(cfg)
    hf = read_hf_config(folder)
    chunks = build_model(hf, cfg, device, trainable=True)
    load_hf_weights(chunks, folder, hf)
    logits = accumulate(chunks, cfg.parallel)
    with torch.no_grad():  # gradients in the place of weights, so that the export puts them together
        for parameter in chunks[0].parameters():
            parameter.copy_(parameter.main_grad)
    gradients = {name: tensor.float().clone() for name, tensor in iter_hf_weights(chunks, hf) if tensor is not None}
    shutdown_device()
    return logits, gradients


def gradient_norm(folder: str, num_ranks: int, layout: dict[str, Any]) -> float:
    """What the optimizer says of the gradient of the summed cross-entropy."""
    from megatron_prorl.config.hf import read_hf_config
    from megatron_prorl.policy.device import init_device, shutdown_device
    from megatron_prorl.policy.model import build_model
    from megatron_prorl.policy.optimizer import build_optimizer
    from megatron_prorl.weights.load import load_hf_weights

    cfg = tiny_config(folder, num_ranks=num_ranks, parallel=layout)
    device = init_device(cfg)
    hf = read_hf_config(folder)
    chunks = build_model(hf, cfg, device, trainable=True)
    load_hf_weights(chunks, folder, hf)
    optimizer = build_optimizer(chunks, cfg, device)
    accumulate(chunks, cfg.parallel)
    _, norm = optimizer.step()
    shutdown_device()
    return norm


def summed_cross_entropy(logits_TV: torch.Tensor, sequences: list[list[int]]) -> torch.Tensor:
    """The sum over all tokens but the last of each sequence of -log p(next token)."""
    losses = [
        cross_entropy(part[:-1], torch.tensor(sequence[1:]), reduction="sum")
        for part, sequence in zip(logits_TV.split([len(s) for s in sequences]), sequences, strict=True)
        if len(sequence) > 1
    ]
    return torch.stack(losses).sum()


def transformers_forward_backward(folder: str) -> Outcome:
    """Microbatch -> logits; transformers' name -> gradient of the summed cross-entropy."""
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    logits = {
        index: torch.cat([theirs(torch.tensor([sequence])).logits[0] for sequence in sequences])
        for index, sequences in enumerate(MICROBATCHES)
    }
    torch.stack([summed_cross_entropy(logits[i], MICROBATCHES[i]) for i in logits]).sum().backward()
    return {i: part.detach() for i, part in logits.items()}, {n: p.grad for n, p in theirs.named_parameters()}


def relative_difference(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual - expected).abs().max() / expected.abs().max()).item()
