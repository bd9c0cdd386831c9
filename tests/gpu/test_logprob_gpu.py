import pytest
import torch

from megatron_prorl.policy.logprob import logprobs_and_entropy

pytestmark = pytest.mark.needs_gpu

VOCAB = 151_936  # Qwen's


def results(hidden_TH, weight_VH, targets_T, chunk_tokens):
    hidden_TH, weight_VH = hidden_TH.detach().requires_grad_(), weight_VH.detach().requires_grad_()
    found = logprobs_and_entropy(
        hidden_TH, weight_VH, targets_T, temperature=1.2, chunk_tokens=chunk_tokens, vocab_size=VOCAB
    )
    return found + torch.autograd.grad(found[0].sum() + found[1].sum(), (hidden_TH, weight_VH))


def inputs(dtype, tokens=512, hidden=256):
    generator = torch.Generator().manual_seed(0)
    hidden_TH = torch.randn(tokens, hidden, generator=generator).to("cuda", dtype)
    weight_VH = (0.1 * torch.randn(VOCAB, hidden, generator=generator)).to("cuda", dtype)
    return hidden_TH, weight_VH, torch.randint(VOCAB, (tokens,), generator=generator).cuda()


def test_float32_on_the_gpu_equals_float64_on_the_cpu():
    hidden_TH, weight_VH, targets_T = inputs(torch.float32, tokens=64)
    found = results(hidden_TH, weight_VH, targets_T, chunk_tokens=48)
    expected = results(hidden_TH.double().cpu(), weight_VH.double().cpu(), targets_T.cpu(), chunk_tokens=64)
    # Sums over 152k float32 terms; gradients are of order 1.
    for ours, exact in zip(found, expected, strict=True):
        torch.testing.assert_close(ours.double().cpu(), exact, atol=1e-4, rtol=1e-4)


def test_bf16_agrees_with_plain_log_softmax_of_bf16_logits():
    hidden_TH, weight_VH, targets_T = inputs(torch.bfloat16)
    logprobs_T, entropy_T, *_ = results(hidden_TH, weight_VH, targets_T, chunk_tokens=100)
    plain_TV = ((hidden_TH @ weight_VH.T).float() / 1.2).log_softmax(1)
    plain_T = plain_TV.gather(1, targets_T[:, None]).squeeze(1)
    # A matrix product of another shape may round a bf16 logit the other way: one part in 2^8 of logits up to about 8.
    torch.testing.assert_close(logprobs_T, plain_T, atol=0.05, rtol=0)
    torch.testing.assert_close(entropy_T, -(plain_TV.exp() * plain_TV).sum(1), atol=0.01, rtol=0)


def test_forward_and_backward_never_hold_the_logits_of_all_tokens():
    hidden_TH, weight_VH, targets_T = inputs(torch.bfloat16, tokens=8192)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    results(hidden_TH, weight_VH, targets_T, chunk_tokens=256)
    peak_bytes = torch.cuda.max_memory_allocated() - before
    assert peak_bytes < 8192 * VOCAB * 4 / 4
