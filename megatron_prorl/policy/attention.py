"""Causal self-attention on packed sequences with torch's scaled_dot_product_attention, for Megatron's local layers.

Megatron's own DotProductAttention knows no packed sequences and builds full score matrices. A call for every sequence
is slow on a CPU (hundreds of small parallel regions a layer), so sequences of similar length share one call: each is
padded on the right, where the causal mask alone keeps real tokens from seeing the padding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

# The longest sequence of a call over the shortest: scores grow with the square, so at most 1.44 times the work.
LENGTH_RATIO = 1.2


@dataclass(frozen=True, slots=True)
class _Plan:
    """Where each packed token goes in the padded layout, whose calls of shape (sequences, length) lie end to end."""

    rows_T: Tensor | None  # None: all lengths are equal and the packed layout is already the padded one
    calls: list[tuple[int, int]]

    @property
    def sizes(self) -> list[int]:
        return [sequences * length for sequences, length in self.calls]


@lru_cache(maxsize=8)  # all layers of a microbatch share a plan
def _plan(bounds: tuple[int, ...], device: torch.device) -> _Plan:
    lengths = [end - start for start, end in zip(bounds, bounds[1:], strict=False)]
    calls = group_by_length(lengths)
    if len(calls) == 1 and len(set(lengths)) == 1:
        return _Plan(None, [(len(lengths), lengths[0])])
    rows_T = torch.empty(bounds[-1], dtype=torch.int64)
    shapes = []
    row = 0
    for members in calls:
        longest = lengths[members[0]]
        for i in members:
            rows_T[bounds[i] : bounds[i + 1]] = torch.arange(row, row + lengths[i])
            row += longest
        shapes.append((len(members), longest))
    return _Plan(rows_T.to(device), shapes)


def group_by_length(lengths: Sequence[int]) -> list[list[int]]:
    """Indices of the non-empty sequences in groups, each from its longest to its shortest.

    In a group the longest is at most LENGTH_RATIO times the shortest.
    """
    groups: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if lengths[i] == 0:
            continue
        if groups and lengths[groups[-1][0]] <= LENGTH_RATIO * lengths[i]:
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups


def packed_attention(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, *, scale: float | None = None
) -> Tensor:
    """Causal attention inside each packed sequence.

    `query` is `[T, heads, D]`, `key` and `value` are `[T, groups, D]` with groups dividing heads, `cu_seqlens` is int
    `[sequences + 1]` from 0 to T; returns `[T, heads, D]`. `scale` multiplies the scores, by default 1 / sqrt(D).
    """
    plan = _plan(tuple(cu_seqlens.tolist()), query.device)

    def padded(x: Tensor) -> list[Tensor]:  # per call [sequences, heads, length, D]
        if plan.rows_T is not None:
            x = x.new_zeros(sum(plan.sizes), *x.shape[1:]).index_copy(0, plan.rows_T, x)
        parts = zip(x.split(plan.sizes), plan.calls, strict=True)
        return [part.unflatten(0, shape).transpose(1, 2) for part, shape in parts]

    outputs = [
        scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
        for q, k, v in zip(padded(query), padded(key), padded(value), strict=True)
    ]
    output = torch.cat([part.transpose(1, 2).flatten(0, 1) for part in outputs])
    return output if plan.rows_T is None else output.index_select(0, plan.rows_T)


class PackedAttention(torch.nn.Module):
    """Core attention of Megatron's SelfAttention (see `CoreAttentionBuilder` there) for packed sequences."""

    def __init__(self, *, config: TransformerConfig, softmax_scale: float | None = None, **unused: Any) -> None:
        super().__init__()
        assert config.attention_dropout == 0.0 and config.context_parallel_size == 1
        self.softmax_scale = softmax_scale

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *,
        attn_mask_type: AttnMaskType,
        attention_bias: Tensor | None,
        packed_seq_params: PackedSeqParams,
    ) -> Tensor:
        """`[T, heads, D]` and twice `[T, groups, D]` to `[T, heads * D]`."""
        assert attn_mask_type == AttnMaskType.causal and attention_mask is None and attention_bias is None
        output = packed_attention(query, key, value, packed_seq_params.cu_seqlens_q, scale=self.softmax_scale)
        return output.flatten(1)
