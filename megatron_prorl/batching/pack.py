"""Minibatches of whole groups, and their balanced split into packed microbatches.

Cost is counted in tokens. Attention, whose share grows with the square of a length, is left out: for one sequence of
8k tokens it is about a fifth of a 1.5B-parameter model's work, the mean over a rank's many sequences is less, and what
counts is only how far that mean differs between ranks.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from itertools import chain

import numpy as np
import torch

from megatron_prorl.types import PackedBatch, Sample


def split_minibatches(groups: Sequence[Sequence[Sample]], updates_per_step: int) -> list[list[Sample]]:
    """The samples of each optimizer update: consecutive whole groups, numbers of groups differing by at most one.

    With fewer groups than updates there is one minibatch a group: an update never sees an empty minibatch.
    """
    num_minibatches = min(updates_per_step, len(groups))
    bounds = [len(groups) * i // num_minibatches for i in range(num_minibatches + 1)] if num_minibatches else []
    return [list(chain.from_iterable(groups[a:b])) for a, b in zip(bounds, bounds[1:], strict=False)]


def pack(
    samples: Sequence[Sample], *, tokens_per_microbatch: int, num_data_ranks: int, pad_multiple: int = 1
) -> list[list[PackedBatch]]:
    """Pack `samples` into microbatches, `[data rank][microbatch]`; every sample is in exactly one.

    Deterministic, so ranks that hold the same list compute the same split. No rank has more tokens than the mean of
    the ranks plus the longest sample. All ranks get the same number of microbatches, as Megatron's schedules and
    collectives need; one that runs out of samples gets microbatches of padding with nothing to train. A microbatch
    holds at most `tokens_per_microbatch` tokens, except that a longer sample has one to itself, plus padding to a
    multiple of `pad_multiple` (sequence parallelism needs one of the tensor-parallel size).
    """
    plan = _plan([len(s.token_ids) for s in samples], tokens_per_microbatch, num_data_ranks)
    return [[_packed_batch(samples, indices, pad_multiple) for indices in rank] for rank in plan]


def _plan(lengths: list[int], tokens_per_microbatch: int, num_data_ranks: int) -> list[list[list[int]]]:
    """Sample indices of each microbatch, `[data rank][microbatch][sample]`."""
    ranks = _spread(range(len(lengths)), lengths, num_data_ranks)
    num_microbatches = max(_fewest_microbatches(rank, lengths, tokens_per_microbatch) for rank in ranks)
    while True:  # ends at the latest with one sample a microbatch
        plan = [_spread(rank, lengths, num_microbatches) for rank in ranks]
        if all(
            len(indices) <= 1 or sum(lengths[i] for i in indices) <= tokens_per_microbatch
            for rank in plan
            for indices in rank
        ):
            return plan
        num_microbatches += 1


def _spread(indices: Sequence[int], lengths: list[int], num_bins: int) -> list[list[int]]:
    """Longest first, each into the bin with the fewest tokens so far; within a bin in the order of `indices`.

    A bin takes its last sample when it is the emptiest, so none ends above the mean plus the longest sample.
    """
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    heap = [(0, b) for b in range(num_bins)]
    for i in sorted(indices, key=lambda i: -lengths[i]):
        tokens, b = heap[0]
        bins[b].append(i)
        heapq.heapreplace(heap, (tokens + lengths[i], b))
    return [sorted(indices_of_bin) for indices_of_bin in bins]


def _fewest_microbatches(indices: list[int], lengths: list[int], tokens_per_microbatch: int) -> int:
    """A lower bound, at least 1: one for each sample of the budget or longer, and enough for the others' tokens."""
    alone = sum(lengths[i] >= tokens_per_microbatch for i in indices)
    others = sum(lengths[i] for i in indices if lengths[i] < tokens_per_microbatch)
    return max(1, alone - (-others // tokens_per_microbatch))


def _packed_batch(samples: Sequence[Sample], indices: list[int], pad_multiple: int) -> PackedBatch:
    chosen = [samples[i] for i in indices]
    lengths = np.array([len(s.token_ids) for s in chosen], dtype=np.int64)
    num_tokens = int(lengths.sum())
    padding = -num_tokens % pad_multiple if num_tokens else pad_multiple
    size = num_tokens + padding

    token_ids_T = np.zeros(size, dtype=np.int64)
    trained_T = np.zeros(size, dtype=bool)
    sampler_logprobs_T = np.zeros(size, dtype=np.float32)
    token_ids_T[:num_tokens] = _joined([s.token_ids for s in chosen], np.int64, num_tokens)
    trained_T[:num_tokens] = _joined([s.trained for s in chosen], np.bool_, num_tokens)
    sampler_logprobs_T[:num_tokens] = _joined([s.sampler_logprobs for s in chosen], np.float32, num_tokens)

    all_lengths = np.append(lengths, padding) if padding else lengths
    cu_seqlens = np.concatenate([[0], all_lengths.cumsum()])
    is_last_T = np.zeros(size, dtype=bool)
    is_last_T[cu_seqlens[1:] - 1] = True

    # Position t now holds what belongs to its target, token t + 1 of the same sequence.
    targets_T = np.where(is_last_T, 0, np.roll(token_ids_T, -1))
    mask_T = ~is_last_T & np.roll(trained_T, -1)
    sampler_logprobs_T = np.where(mask_T, np.roll(sampler_logprobs_T, -1), np.float32(0.0))
    advantages_T = np.zeros(size, dtype=np.float32)
    advantages_T[:num_tokens] = np.repeat(np.array([s.advantage for s in chosen], dtype=np.float32), lengths)
    advantages_T[~mask_T] = 0.0

    return PackedBatch(
        token_ids_T=torch.from_numpy(token_ids_T),
        position_ids_T=torch.from_numpy(np.arange(size) - np.repeat(cu_seqlens[:-1], all_lengths)),
        targets_T=torch.from_numpy(targets_T),
        mask_T=torch.from_numpy(mask_T),
        advantages_T=torch.from_numpy(advantages_T),
        sampler_logprobs_T=torch.from_numpy(sampler_logprobs_T),
        cu_seqlens=torch.from_numpy(cu_seqlens.astype(np.int32)),
        max_seqlen=int(all_lengths.max()),
        sample_indices=indices,
    )


def _joined(lists: list[list], dtype: type, count: int) -> np.ndarray:
    return np.fromiter(chain.from_iterable(lists), dtype=dtype, count=count)
