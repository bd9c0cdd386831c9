"""The head sharded over tensor-parallel ranks computes what one rank with the whole vocabulary does."""

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks

from megatron_prorl.policy.logprob import logprobs_and_entropy

T, H = 17, 6


def inputs(num_rows: int, vocab_size: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    hidden_TH, weight_VH = (torch.randn(n, H, generator=generator, dtype=torch.float64) for n in (T, num_rows))
    upstream_2T = torch.randn(2, T, generator=generator, dtype=torch.float64)
    return hidden_TH, 3 * weight_VH, torch.randint(vocab_size, (T,), generator=generator), upstream_2T


def results(hidden_TH, weight_VH, targets_T, upstream_2T, vocab_size, tp_group):
    hidden_TH, weight_VH = hidden_TH.clone().requires_grad_(), weight_VH.clone().requires_grad_()
    found = logprobs_and_entropy(
        hidden_TH, weight_VH, targets_T, temperature=1.2, chunk_tokens=5, tp_group=tp_group, vocab_size=vocab_size
    )
    return found + torch.autograd.grad(found, (hidden_TH, weight_VH), tuple(upstream_2T))


def on_each_rank(num_rows: int, vocab_size: int, num_tokens: int) -> list[list]:
    dist.init_process_group("gloo")
    hidden_TH, weight_VH, targets_T, upstream_2T = inputs(num_rows, vocab_size)
    shard_VH = weight_VH.chunk(dist.get_world_size())[dist.get_rank()]
    hidden_TH, targets_T, upstream_2T = hidden_TH[:num_tokens], targets_T[:num_tokens], upstream_2T[:, :num_tokens]
    logprobs_T, entropy_T, grad_hidden_TH, grad_shard_VH = results(
        hidden_TH, shard_VH, targets_T, upstream_2T, vocab_size, dist.group.WORLD
    )
    dist.all_reduce(grad_hidden_TH)  # what Megatron's mappings around hidden do
    answer = [x.tolist() for x in (logprobs_T, entropy_T, grad_hidden_TH, grad_shard_VH)]
    dist.destroy_process_group()
    return answer


# In the last layout rank 2 has two real rows of three, and rank 3 none.
@pytest.mark.parametrize("num_ranks, num_rows, vocab_size", [(2, 10, 10), (2, 12, 9), (4, 12, 8)])
def test_sharded_values_and_gradients_equal_those_of_one_rank(num_ranks, num_rows, vocab_size):
    expected = results(*inputs(num_rows, vocab_size), vocab_size, None)
    answers = run_ranks(num_ranks, on_each_rank, num_rows, vocab_size, T)
    for logprobs, entropy, grad_hidden, _ in answers:
        found = [torch.tensor(x, dtype=torch.float64) for x in (logprobs, entropy, grad_hidden)]
        torch.testing.assert_close(found, list(expected[:3]), atol=1e-12, rtol=1e-12)
    grad_weight = torch.tensor([row for answer in answers for row in answer[3]], dtype=torch.float64)
    torch.testing.assert_close(grad_weight, expected[3], atol=1e-12, rtol=1e-12)
    assert all(answer[:2] == answers[0][:2] for answer in answers)  # to the last bit: ranks must not drift apart


def test_ranks_without_trained_tokens_pass():
    assert [answer[:3] for answer in run_ranks(2, on_each_rank, 10, 10, 0)] == [[[], [], []]] * 2
