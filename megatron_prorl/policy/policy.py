"""The policy being trained and its frozen reference, on this rank's share of the model."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from megatron.core import parallel_state

from megatron_prorl import comm
from megatron_prorl.batching.pack import pack, split_minibatches
from megatron_prorl.config.hf import hf_folder, read_hf_config
from megatron_prorl.config.schema import Config
from megatron_prorl.policy.device import Device
from megatron_prorl.policy.model import build_model, token_multiple
from megatron_prorl.policy.optimizer import build_optimizer, clear_optimizer_state, learning_rate, set_learning_rate
from megatron_prorl.policy.update import Head, LearnBatch, Scores, accumulate_gradients, score
from megatron_prorl.tracking.metrics import PhaseTimer
from megatron_prorl.types import PackedBatch, Progress, Sample
from megatron_prorl.weights.load import copy_weights, load_weights


class Policy:
    """Policy, reference and optimizer. Every method is collective: all trainer ranks call it with equal arguments."""

    def __init__(self, cfg: Config, device: Device) -> None:
        self.cfg = cfg
        self.device = device
        self.hf = read_hf_config(hf_folder(cfg.model.path))
        self.chunks = build_model(self.hf, cfg, device, trainable=True)
        load_weights(self.chunks, cfg.model.path, self.hf)
        self.optimizer = build_optimizer(self.chunks, cfg, device)
        self.reference: list[torch.nn.Module] = []
        if cfg.algorithm.kl.coefficient > 0:
            self.reference = build_model(self.hf, cfg, device, trainable=False)
            copy_weights(self.chunks, self.reference)
        self._head = Head(
            temperature=cfg.rollout.temperature,
            chunk_tokens=cfg.batching.logprob_chunk_tokens,
            vocab_size=self.hf["vocab_size"],
        )

    def learn(self, groups: list[list[Sample]], progress: Progress, timer: PhaseTimer) -> dict[str, float]:
        """The optimizer updates of one step: minibatches of whole groups, scored once, before any update.

        Counts the updates in `progress`. Returns the step's metrics, token-weighted means over its minibatches.
        """
        if not groups:
            return {}
        cfg = self.cfg
        minibatches = [self._pack(m) for m in split_minibatches(groups, cfg.optimizer.updates_per_step)]
        batches = [batch for local, _ in minibatches for batch in local]
        with timer("score"):
            references = self._score_all(self.reference, batches) if self.reference else [None] * len(batches)
            # A single update sees the policy as it was when the batch was taken up: its own forward pass scores it.
            olds = self._score_all(self.chunks, batches) if len(minibatches) > 1 else [None] * len(batches)
        items = iter(
            [
                LearnBatch(
                    batch=batch,
                    trainer_logprobs_T=old.logprobs_T if old else None,
                    reference_logprobs_T=reference.logprobs_T if reference else None,
                )
                for batch, old, reference in zip(batches, olds, references, strict=True)
            ]
        )
        rows = []
        with timer("update"):
            for local, num_tokens in minibatches:
                rows.append((self._update([next(items) for _ in local], num_tokens, progress), num_tokens))
        return _mean_over_minibatches(rows)

    def _pack(self, samples: list[Sample]) -> tuple[list[PackedBatch], int]:
        """This data-parallel rank's microbatches, on the device, and the trained tokens of all ranks together."""
        mine = pack(
            samples,
            tokens_per_microbatch=self.cfg.batching.tokens_per_microbatch,
            num_data_ranks=self.cfg.parallel.data,
            data_rank=parallel_state.get_data_parallel_rank(),
            pad_multiple=token_multiple(self.cfg),
        )
        return [_to_device(batch, self.device.torch_device) for batch in mine], sum(s.num_trained for s in samples)

    def _score_all(self, chunks: list[torch.nn.Module], batches: list[PackedBatch]) -> list[Scores | None]:
        scores = score(chunks, batches, self._head)
        return list(scores) if scores else [None] * len(batches)

    def _update(self, items: list[LearnBatch], num_tokens: int, progress: Progress) -> dict[str, float]:
        rate = learning_rate(self.cfg.optimizer, progress.optimizer_updates, progress.warmup_updates)
        set_learning_rate(self.optimizer, rate)
        self.optimizer.zero_grad()
        metrics = accumulate_gradients(self.chunks, items, self._head, self.cfg.algorithm, num_tokens=num_tokens)
        updated, grad_norm = self.optimizer.step()
        progress.optimizer_updates += updated
        return metrics | {
            "policy/grad_norm": grad_norm,
            "policy/learning_rate": rate,
            "policy/skipped_updates": 0.0 if updated else 1.0,
        }

    def probe(self, token_ids: list[int]) -> list[float]:
        """Log-probs at temperature 1 of every token after the first, the same list on every rank."""
        sample = Sample(
            prompt_token_ids=np.array(token_ids[:1], dtype=np.int32),
            response_token_ids=np.array(token_ids[1:], dtype=np.int32),
            sampler_logprobs=np.zeros(len(token_ids) - 1, dtype=np.float32),
            advantage=0.0,
        )
        batches, _ = self._pack([sample])
        scores = score(self.chunks, batches, replace(self._head, temperature=1.0))
        mine = [
            logprob
            for batch, found in zip(batches, scores, strict=False)
            if batch.mask_T.any()
            for logprob in found.logprobs_T[batch.mask_T].tolist()
        ]
        return max(comm.gather(mine), key=len)

    def reset(self, *, clear_optimizer: bool) -> None:
        """reference := policy; the optimizer's moments are cleared or kept."""
        if self.reference:
            copy_weights(self.chunks, self.reference)
        if clear_optimizer:
            clear_optimizer_state(self.optimizer)


def _to_device(batch: PackedBatch, device: torch.device) -> PackedBatch:
    if device.type == "cpu":
        return batch
    moved = {
        name: getattr(batch, name).to(device, non_blocking=True)
        for name in (
            "token_ids_T", "position_ids_T", "targets_T", "mask_T", "advantages_T", "sampler_logprobs_T", "cu_seqlens",
        )
    }  # fmt: skip
    return replace(batch, **moved)


def _mean_over_minibatches(rows: list[tuple[dict[str, float], int]]) -> dict[str, float]:
    """Token-weighted means; the maximum where a key ends in `_max`."""
    total = sum(num_tokens for _, num_tokens in rows)
    return {
        key: max(row[key] for row, _ in rows)
        if key.endswith("_max")
        else sum(row[key] * num_tokens for row, num_tokens in rows) / total
        for key in rows[0][0]
    }
