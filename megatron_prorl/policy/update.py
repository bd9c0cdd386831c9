"""Scoring and updating through Megatron's forward-backward schedule.

One microbatch is one packed sequence of T tokens, `[1, T]` into the model and `[T, 1, H]` hidden states out of its last
pipeline stage. The head is applied here, to trained positions only, in chunks (see `logprob.py`). Per-token
results are laid out like `PackedBatch.targets_T` and are zero where `mask_T` is False; they exist on the last stage.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import TypeVar

import torch
from megatron.core import parallel_state
from megatron.core.distributed import finalize_model_grads
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.utils import get_attr_wrapped_model, get_model_config
from torch import Tensor

from megatron_prorl import comm, heartbeat
from megatron_prorl.algo.correction import correction_weights, mismatch_metrics
from megatron_prorl.algo.kl import kl_estimate
from megatron_prorl.algo.loss import bounded_log_ratio, entropy_loss, policy_loss, token_mean
from megatron_prorl.config.schema import AlgorithmConfig
from megatron_prorl.policy.logprob import logprobs_and_entropy
from megatron_prorl.types import PackedBatch

Item = TypeVar("Item")


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """How hidden states become log-probs: the sampling temperature and the tokens whose logits exist at once."""

    temperature: float
    chunk_tokens: int
    vocab_size: int  # without the padding that tensor parallelism needs


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """Log-probs and entropy of one microbatch, float32 `[T]`, in nats."""

    logprobs_T: Tensor
    entropy_T: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class LearnBatch:
    """A microbatch with what the loss compares the policy with.

    `trainer_logprobs_T` is None when the policy has not moved since the batch was taken up: then the update's own
    forward pass gives them. `reference_logprobs_T` is None without a KL term.
    """

    batch: PackedBatch
    trainer_logprobs_T: Tensor | None
    reference_logprobs_T: Tensor | None


def _head_scores(hidden_T1H: Tensor, model: torch.nn.Module, batch: PackedBatch, head: Head) -> Scores:
    """Log-probs of the batch's trained targets on the last pipeline stage."""
    tp_group = parallel_state.get_tensor_model_parallel_group()
    if get_model_config(model).sequence_parallel:
        hidden_T1H = gather_from_sequence_parallel_region(hidden_T1H)  # its backward sums over the group and scatters
    else:
        hidden_T1H = copy_to_tensor_model_parallel_region(hidden_T1H)  # its backward sums over the group
    weight_VH = get_attr_wrapped_model(model, "head_weight")()
    mask_T = batch.mask_T
    logprobs_K, entropy_K = logprobs_and_entropy(
        hidden_T1H.squeeze(1)[mask_T],
        weight_VH,
        batch.targets_T[mask_T],
        temperature=head.temperature,
        chunk_tokens=head.chunk_tokens,
        tp_group=tp_group,
        vocab_size=head.vocab_size,
    )
    zeros_T = logprobs_K.new_zeros(mask_T.shape[0])
    return Scores(
        logprobs_T=zeros_T.masked_scatter(mask_T, logprobs_K), entropy_T=zeros_T.masked_scatter(mask_T, entropy_K)
    )


def _forward(model: torch.nn.Module, batch: PackedBatch) -> Tensor:
    packed = PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=batch.cu_seqlens,
        cu_seqlens_kv=batch.cu_seqlens,
        max_seqlen_q=batch.max_seqlen,
        max_seqlen_kv=batch.max_seqlen,
    )
    return model(
        input_ids=batch.token_ids_T.unsqueeze(0),
        position_ids=batch.position_ids_T.unsqueeze(0),
        attention_mask=None,
        packed_seq_params=packed,
    )


def score(chunks: list[torch.nn.Module], batches: list[PackedBatch], head: Head) -> list[Scores]:
    """Log-probs and entropy of this data-parallel rank's microbatches, without gradients; [] off the last stage."""

    def forward_step(data: Iterator[PackedBatch], model: torch.nn.Module) -> tuple[Tensor, Callable]:
        batch = next(data)

        def collect(hidden_T1H: Tensor, non_loss_data: bool) -> Scores:
            assert non_loss_data
            return _head_scores(hidden_T1H, model, batch, head)

        return _forward(model, batch), collect

    for chunk in chunks:
        chunk.eval()
    with torch.no_grad():
        return _run_schedule(forward_step, chunks, batches, forward_only=True, collect_non_loss_data=True)


def accumulate_gradients(
    chunks: list[torch.nn.Module],
    batches: list[LearnBatch],
    head: Head,
    algorithm: AlgorithmConfig,
    *,
    num_tokens: int,
) -> dict[str, float]:
    """Forward and backward over one minibatch; gradients end in the main-grad buffers, reduced over all ranks.

    `num_tokens` is the minibatch's trained-token count over all data-parallel ranks: every token weighs 1 / num_tokens
    (DAPO, arXiv:2503.14476, eq. 12). Returns the minibatch's metrics, the same on all ranks.
    """

    def forward_step(data: Iterator[LearnBatch], model: torch.nn.Module) -> tuple[Tensor, Callable]:
        item = next(data)
        return _forward(model, item.batch), partial(_loss, model=model, item=item)

    def _loss(
        hidden_T1H: Tensor, *, model: torch.nn.Module, item: LearnBatch
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        scores = _head_scores(hidden_T1H, model, item.batch, head)
        loss, metrics = microbatch_loss(scores, item, algorithm, num_tokens=num_tokens)
        return loss, item.batch.mask_T.sum(), metrics

    for chunk in chunks:
        chunk.train()
        chunk.zero_grad_buffer()  # type: ignore[operator]  # of Megatron's DistributedDataParallel
    rows = _run_schedule(forward_step, chunks, batches, forward_only=False, collect_non_loss_data=False)
    return _combine(rows)


def microbatch_loss(
    scores: Scores, item: LearnBatch, algorithm: AlgorithmConfig, *, num_tokens: int
) -> tuple[Tensor, dict[str, Tensor]]:
    """This microbatch's share of the minibatch loss, and its shares of the metrics (see `algo`).

    loss = (-sum(weight * clipped surrogate) + beta * sum(KL) - c * sum(entropy)) / num_tokens, over trained tokens.
    """
    batch, mask_T = item.batch, item.batch.mask_T
    policy_logprobs_T = scores.logprobs_T
    trainer_logprobs_T = policy_logprobs_T.detach() if item.trainer_logprobs_T is None else item.trainer_logprobs_T
    low, high = algorithm.correction.window
    weights_T, metrics = correction_weights(
        trainer_logprobs_T,
        batch.sampler_logprobs_T,
        mask_T,
        batch.cu_seqlens,
        kind=algorithm.correction.kind,
        low=low,
        high=high,
        num_tokens=num_tokens,
    )
    surrogate = policy_loss(
        policy_logprobs_T,
        trainer_logprobs_T,
        batch.advantages_T,
        mask_T,
        clip_low=algorithm.clip_low,
        clip_high=algorithm.clip_high,
        weights_T=weights_T,
        num_tokens=num_tokens,
    )
    loss = surrogate.loss
    metrics |= mismatch_metrics(trainer_logprobs_T, batch.sampler_logprobs_T, mask_T, num_tokens=num_tokens)
    metrics |= {
        "policy/loss": surrogate.loss.detach(),
        "policy/clip_low_fraction": surrogate.clip_low_fraction,
        "policy/clip_high_fraction": surrogate.clip_high_fraction,
        "policy/ratio_mean": surrogate.ratio_mean,
        "policy/entropy": token_mean(scores.entropy_T.detach(), mask_T, num_tokens=num_tokens),
    }
    if algorithm.entropy_coefficient > 0:
        loss = loss + entropy_loss(
            scores.entropy_T, mask_T, coefficient=algorithm.entropy_coefficient, num_tokens=num_tokens
        )
    if item.reference_logprobs_T is not None:
        kl = algorithm.kl
        kl_T = kl_estimate(
            policy_logprobs_T,
            item.reference_logprobs_T,
            trainer_logprobs_T,
            mask_T,
            estimator=kl.estimator,
            unbiased=kl.unbiased,
            log_ratio_clamp=kl.log_ratio_clamp,
        )
        loss = loss + kl.coefficient * token_mean(kl_T, mask_T, num_tokens=num_tokens)
        # Whatever the loss uses, what is logged is k3: never negative, and the divergence in the mean.
        log_ratio_T = bounded_log_ratio(policy_logprobs_T.detach(), item.reference_logprobs_T, mask_T)
        k3_T = torch.expm1(-log_ratio_T) + log_ratio_T
        metrics["policy/kl_reference"] = token_mean(k3_T, mask_T, num_tokens=num_tokens)
    return loss, metrics


def _run_schedule(
    forward_step: Callable,
    chunks: list[torch.nn.Module],
    batches: list,
    *,
    forward_only: bool,
    collect_non_loss_data: bool,
) -> list:
    config = get_model_config(chunks[0])
    # The loss is divided by the minibatch's token count in `microbatch_loss`, so Megatron sums and does not scale.
    config.finalize_model_grads_func = _finalize_without_scaling
    return get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=_counted(batches),
        model=chunks,
        num_microbatches=len(batches),
        seq_length=1,  # microbatches differ in length (variable_seq_lengths): shapes travel with the tensors
        micro_batch_size=1,
        forward_only=forward_only,
        collect_non_loss_data=collect_non_loss_data,
    )


def _counted(batches: list[Item]) -> Iterator[Item]:
    """The same, telling how far it is."""
    for number, batch in enumerate(batches, start=1):
        heartbeat.doing(f"microbatch {number} of {len(batches)}")
        yield batch


def _finalize_without_scaling(
    chunks: list[torch.nn.Module], num_tokens: Tensor | None = None, **kwargs: object
) -> None:
    finalize_model_grads(chunks, None, **kwargs)


def _combine(rows: list[dict[str, Tensor]]) -> dict[str, float]:
    """Shares of microbatches and data-parallel ranks to whole metrics, the same on every rank.

    Of a replica, the first tensor rank of the last pipeline stage speaks for all.
    """
    speaks = parallel_state.is_pipeline_last_stage() and parallel_state.get_tensor_model_parallel_rank() == 0
    mine = [{key: float(value) for key, value in row.items()} for row in rows] if speaks else []
    whole: dict[str, float] = {}
    for row in chain.from_iterable(comm.gather(mine)):
        for key, value in row.items():
            whole[key] = max(whole.get(key, 0.0), value) if key.endswith("_max") else whole.get(key, 0.0) + value
    return whole
