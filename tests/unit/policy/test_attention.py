"""Packed attention against the textbook formula with a full mask."""

from __future__ import annotations

import pytest
import torch

from megatron_prorl.policy.attention import LENGTH_RATIO, group_by_length, packed_attention

LENGTHS = {
    "different": [5, 1, 40, 7, 6, 40, 17],
    "equal": [9, 9, 9],
    "one": [23],
    "with empty ones": [0, 4, 0, 11],
}


def full_mask_attention(query, key, value, lengths):
    """softmax(q k / sqrt(D)) v over all T tokens, scores outside the own past masked; float64."""
    query, key, value = (x.double() for x in (query, key, value))
    repeats = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(repeats, dim=1) for x in (key, value))
    owner = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    place = torch.arange(len(owner))
    visible = (owner[:, None] == owner[None, :]) & (place[:, None] >= place[None, :])
    scores = torch.einsum("qhd,khd->hqk", query, key) / query.shape[-1] ** 0.5
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(~visible, -torch.inf).softmax(-1), value)


def qkv(num_tokens, num_heads, num_groups, dtype):
    generator = torch.Generator().manual_seed(0)
    shapes = [(num_tokens, count, 16) for count in (num_heads, num_groups, num_groups)]
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]


# The kernels sum in float32: 1e-5 is some ten roundings of numbers near 1; bf16 keeps 8 bits.
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize("num_groups", [4, 2, 1])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())
def test_packed_attention_and_its_gradients_are_those_of_a_full_mask(lengths, num_groups, dtype, tolerance):
    tensors = qkv(sum(lengths), 4, num_groups, dtype)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    weight = torch.randn(sum(lengths), 4, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    actual = packed_attention(*tensors, cu_seqlens)
    expected = full_mask_attention(*tensors, lengths)
    actual_grads = torch.autograd.grad((actual.double() * weight).sum(), tensors)
    expected_grads = torch.autograd.grad((expected * weight).sum(), tensors)

    assert actual.shape == expected.shape and actual.dtype == dtype
    scale = max(1.0, expected.abs().max().item())
    assert (actual.double() - expected).abs().max() <= tolerance * scale
    for mine, theirs in zip(actual_grads, expected_grads, strict=True):
        assert (mine - theirs).abs().max() <= 2 * tolerance * max(1.0, theirs.abs().max().item())


def test_a_sequence_does_not_see_its_neighbours():
    lengths = [6, 5]
    query, key, value = qkv(11, 4, 2, torch.float32)
    cu_seqlens = torch.tensor([0, 6, 11]).int()
    before = packed_attention(query, key, value, cu_seqlens)
    with torch.no_grad():
        key[6:], value[6:] = 100.0, -100.0
    after = packed_attention(query, key, value, cu_seqlens)
    assert torch.equal(before[: lengths[0]], after[: lengths[0]])
    assert not torch.equal(before[lengths[0] :], after[lengths[0] :])


def test_grouping_keeps_every_sequence_once_and_bounds_the_padding():
    lengths = [1, 300, 20, 22, 19, 250, 0, 24, 2, 299]
    groups = group_by_length(lengths)
    assert sorted(i for group in groups for i in group) == [i for i, length in enumerate(lengths) if length > 0]
    for group in groups:
        assert max(lengths[i] for i in group) <= LENGTH_RATIO * min(lengths[i] for i in group)
        assert lengths[group[0]] == max(lengths[i] for i in group)
