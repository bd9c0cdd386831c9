"""What tests of the policy share: a config for a tiny model and packed inputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams

from megatron_prorl.config.schema import Config


def tiny_config(model_path: str | Path, *, dtype: str = "fp32", num_ranks: int = 1, **sections: Any) -> Config:
    """A valid config for `num_ranks` trainer processes; `sections` are merged over it, e.g. parallel={"tensor": 2}."""
    document: dict[str, Any] = {
        "run_dir": "unused",
        "steps": 1,
        "device": "cpu",
        "model": {"path": str(model_path), "dtype": dtype},
        "parallel": {"ranks_per_node": num_ranks},
        "data": {"tasks": [{"task": "chain_sum"}]},
        "rollout": {
            "prompts_per_step": 4, "rollouts_per_prompt": 2, "max_prompt_tokens": 64, "max_response_tokens": 64,
        },
        "batching": {"tokens_per_microbatch": 256},
    }  # fmt: skip
    for name, value in sections.items():
        document[name] = {**document.get(name, {}), **value} if isinstance(value, dict) else value
    return Config.model_validate(document)


def packed_inputs(sequences: list[list[int]], device: str | torch.device = "cpu") -> dict[str, Any]:
    """Keyword arguments of `PolicyModel.forward` for these sequences, packed in order."""
    lengths = [len(sequence) for sequence in sequences]
    cu_seqlens = torch.tensor([0, *lengths], device=device).cumsum(0).to(torch.int32)
    return {
        "input_ids": torch.tensor([[token for sequence in sequences for token in sequence]], device=device),
        "position_ids": torch.cat([torch.arange(length, device=device) for length in lengths])[None],
        "attention_mask": None,
        "packed_seq_params": PackedSeqParams(
            qkv_format="thd",
            cu_seqlens_q=cu_seqlens,
            cu_seqlens_kv=cu_seqlens,
            max_seqlen_q=max(lengths),
            max_seqlen_kv=max(lengths),
        ),
    }


def random_sequences(lengths: list[int], vocab_size: int = 112, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, vocab_size, (length,), generator=generator).tolist() for length in lengths]
