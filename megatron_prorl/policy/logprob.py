"""Log-probs and entropy from hidden states, without ever holding a full T x V tensor.

The logits of `chunk_tokens` tokens exist at a time, in forward and again in backward, where they are computed anew:
what is kept between the two is three numbers a token. For Qwen's 151,936 entries, 8,192 tokens of float32 logits are
5 GB a copy, and plain log_softmax + entropy holds several.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable


def logprobs_and_entropy(
    hidden_TH: Tensor,
    weight_VH: Tensor,
    targets_T: Tensor,
    *,
    temperature: float,
    chunk_tokens: int,
    tp_group: dist.ProcessGroup | None = None,
    vocab_size: int,
) -> tuple[Tensor, Tensor]:
    """Log-prob of each target and entropy of each softmax(hidden @ weight.T / temperature), both [T], in nats.

    `hidden_TH` is the full hidden states (with sequence parallelism: already gathered), the same on every rank of
    `tp_group`; index it with the trained positions first, to spend nothing on the others. T may be 0. `weight_VH` is
    this rank's shard of the output weight: rank i of n holds rows i*V ... (i+1)*V - 1 of the padded vocabulary, and
    rows from `vocab_size` on get no probability. A target outside the vocabulary has log-prob -inf.

    Logits are computed in the weight's dtype, all that follows in float32 (float64 for float64 weights), which is the
    dtype of both results. Gradients flow to hidden and weight from both results. The gradient of hidden is this rank's
    part, to be summed over `tp_group` by the caller: Megatron's `copy_to_tensor_model_parallel_region` or
    `gather_from_sequence_parallel_region` around hidden do it. The gradient of the weight shard is whole; it is
    accumulated over chunks in float32 and returned in the weight's dtype. One collective on `tp_group`, in forward: a
    gather of three numbers a token.
    """
    return _LogprobsAndEntropy.apply(hidden_TH, weight_VH, targets_T, temperature, chunk_tokens, tp_group, vocab_size)


class _LogprobsAndEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_TH: Tensor,
        weight_VH: Tensor,
        targets_T: Tensor,
        temperature: float,
        chunk_tokens: int,
        tp_group: dist.ProcessGroup | None,
        vocab_size: int,
    ) -> tuple[Tensor, Tensor]:
        tp_rank, tp_size = (0, 1) if tp_group is None else (tp_group.rank(), tp_group.size())
        first_row = tp_rank * weight_VH.shape[0]
        num_rows = min(max(vocab_size - first_row, 0), weight_VH.shape[0])  # the others are padding
        local_targets_T = targets_T - first_row

        # Of this shard's rows alone: log of the sum of exp, entropy, and the target's log-prob.
        math_dtype = torch.promote_types(weight_VH.dtype, torch.float32)
        shard_3T = torch.empty(3, len(targets_T), dtype=math_dtype, device=weight_VH.device)
        for chunk in _chunks(len(targets_T), chunk_tokens):
            _describe_shard(
                _scaled_logits(hidden_TH[chunk], weight_VH[:num_rows], temperature, math_dtype),
                local_targets_T[chunk],
                out_3T=shard_3T[:, chunk],
            )

        if tp_size == 1:
            log_normaliser_T, entropy_T, logprobs_T = (row_T.clone() for row_T in shard_3T)
        else:
            shards_T = shard_3T.new_empty(tp_size * 3, len(targets_T))
            dist.all_gather_into_tensor(shards_T, shard_3T, group=tp_group)
            log_sum_RT, entropy_RT, logprobs_RT = shards_T.unflatten(0, (tp_size, 3)).unbind(1)
            # Shard r is drawn with probability w_r, then a row within it: the entropies of both choices add up.
            log_normaliser_T = log_sum_RT.logsumexp(0)
            log_w_RT = log_sum_RT - log_normaliser_T
            entropy_T = (log_w_RT.exp() * (entropy_RT - log_w_RT)).sum(0)
            logprobs_T = (logprobs_RT + log_w_RT).amax(0)

        ctx.save_for_backward(hidden_TH, weight_VH, local_targets_T, log_normaliser_T, entropy_T)
        ctx.temperature, ctx.chunk_tokens, ctx.num_rows = temperature, chunk_tokens, num_rows
        ctx.set_materialize_grads(False)  # a result that the loss does not use costs nothing
        return logprobs_T, entropy_T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logprobs_T: Tensor | None, grad_entropy_T: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden_TH, weight_VH, local_targets_T, log_normaliser_T, entropy_T = ctx.saved_tensors
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        rows_VH = weight_VH[: ctx.num_rows]
        grad_hidden_TH = torch.empty_like(hidden_TH) if needs_hidden else None
        grad_weight_VH = torch.zeros_like(weight_VH, dtype=entropy_T.dtype) if needs_weight else None
        # By logits before temperature from here on.
        by_logprob_T = torch.zeros_like(entropy_T) if grad_logprobs_T is None else grad_logprobs_T / ctx.temperature
        by_entropy_T = None if grad_entropy_T is None else grad_entropy_T / ctx.temperature

        for chunk in _chunks(len(local_targets_T), ctx.chunk_tokens):
            grad_TV = _logits_gradient(
                _scaled_logits(hidden_TH[chunk], rows_VH, ctx.temperature, entropy_T.dtype),
                local_targets_T[chunk],
                log_normaliser_T[chunk],
                entropy_T[chunk],
                by_logprob_T[chunk],
                None if by_entropy_T is None else by_entropy_T[chunk],
            )
            grad_TV = grad_TV.to(weight_VH.dtype)
            if grad_hidden_TH is not None:
                grad_hidden_TH[chunk] = grad_TV @ rows_VH
            if grad_weight_VH is not None:
                _add_product(grad_weight_VH[: ctx.num_rows], grad_TV.T, hidden_TH[chunk].to(weight_VH.dtype))
            del grad_TV  # before the next chunk's logits exist

        if grad_weight_VH is not None:
            grad_weight_VH = grad_weight_VH.to(weight_VH.dtype)
        return grad_hidden_TH, grad_weight_VH, None, None, None, None, None


def _chunks(num_tokens: int, chunk_tokens: int) -> list[slice]:
    return [slice(start, start + chunk_tokens) for start in range(0, num_tokens, chunk_tokens)]


def _scaled_logits(hidden_TH: Tensor, weight_VH: Tensor, temperature: float, math_dtype: torch.dtype) -> Tensor:
    """Logits after temperature: the product in the weight's dtype, the division in `math_dtype`."""
    return (hidden_TH.to(weight_VH.dtype) @ weight_VH.T).to(math_dtype).div_(temperature)


def _describe_shard(logits_TV: Tensor, local_targets_T: Tensor, *, out_3T: Tensor) -> None:
    """Write log-sum-exp, entropy and the target's log-prob (-inf where another shard has it) of each row."""
    if logits_TV.shape[1] == 0:  # padding only: a share of e^-1e30 = 0, finite so that nothing becomes inf - inf
        out_3T[0], out_3T[1], out_3T[2] = -1e30, 0.0, -torch.inf
        return
    log_probs_TV = logits_TV.log_softmax(1)
    torch.sub(logits_TV[:, 0], log_probs_TV[:, 0], out=out_3T[0])
    column_T, owned_T = _owned(local_targets_T, logits_TV.shape[1])
    out_3T[2] = torch.where(owned_T, log_probs_TV.gather(1, column_T[:, None]).squeeze(1), -torch.inf)
    torch.exp(log_probs_TV, out=logits_TV)
    torch.sum(logits_TV.mul_(log_probs_TV), 1, out=out_3T[1]).neg_()


def _logits_gradient(
    logits_TV: Tensor,
    local_targets_T: Tensor,
    log_normaliser_T: Tensor,
    entropy_T: Tensor,
    by_logprob_T: Tensor,
    by_entropy_T: Tensor | None,
) -> Tensor:
    """Gradient by the logits, given those by log-prob and entropy, with p = softmax; uses up the logits.

    d logprob / d logit_v = [v is the target] - p_v        d entropy / d logit_v = -p_v (log p_v + entropy)
    """
    grad_TV = logits_TV.sub_(log_normaliser_T[:, None])  # log p, turned into the gradient in place
    if by_entropy_T is None:
        grad_TV.exp_().mul_(-by_logprob_T[:, None])
    else:
        probs_TV = grad_TV.exp()
        grad_TV *= -by_entropy_T[:, None]
        grad_TV -= (by_logprob_T + by_entropy_T * entropy_T)[:, None]
        grad_TV *= probs_TV
    if grad_TV.shape[1] > 0:
        column_T, owned_T = _owned(local_targets_T, grad_TV.shape[1])
        grad_TV.scatter_add_(1, column_T[:, None], torch.where(owned_T, by_logprob_T, 0.0)[:, None])
    return grad_TV


def _owned(local_targets_T: Tensor, num_rows: int) -> tuple[Tensor, Tensor]:
    """Column of each target in this shard (0 where another shard has it) and whether this shard has it."""
    owned_T = (local_targets_T >= 0) & (local_targets_T < num_rows)
    return torch.where(owned_T, local_targets_T, 0), owned_T


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right, in place without a temporary where the dtypes allow."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        total += left @ right
