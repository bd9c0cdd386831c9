import pytest
import torch

from megatron_prorl.policy.logprob import logprobs_and_entropy

T, H, V = 13, 6, 11


def inputs(dtype, num_rows=V, tokens=T):
    torch.manual_seed(0)
    hidden_TH = torch.randn(tokens, H, dtype=dtype, requires_grad=True)
    weight_VH = torch.randn(num_rows, H, dtype=dtype, requires_grad=True)
    return hidden_TH, weight_VH, torch.randint(V, (tokens,))


def plain(hidden_TH, weight_VH, targets_T, temperature):
    """The definition, with every logit at once."""
    logprobs_TV = (hidden_TH @ weight_VH[:V].T).div(temperature).log_softmax(1)
    entropy_T = -(logprobs_TV.exp() * logprobs_TV).sum(1)
    return logprobs_TV.gather(1, targets_T[:, None]).squeeze(1), entropy_T


@pytest.mark.parametrize("temperature", [1.0, 1.2, 0.6])
@pytest.mark.parametrize("chunk_tokens", [1, 5, 13, 1000])
@pytest.mark.parametrize("num_rows", [V, V + 5])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_values_and_gradients_equal_log_softmax(dtype, tolerance, num_rows, chunk_tokens, temperature):
    hidden_TH, weight_VH, targets_T = inputs(dtype, num_rows)
    expected = plain(hidden_TH, weight_VH, targets_T, temperature)
    found = logprobs_and_entropy(
        hidden_TH, weight_VH, targets_T, temperature=temperature, chunk_tokens=chunk_tokens, vocab_size=V
    )
    upstream = torch.randn(2, T, dtype=dtype)
    expected_gradients = torch.autograd.grad(expected, (hidden_TH, weight_VH), tuple(upstream))
    found_gradients = torch.autograd.grad(found, (hidden_TH, weight_VH), tuple(upstream))
    torch.testing.assert_close(found + found_gradients, expected + expected_gradients, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("used", [(0,), (1,), (0, 1)])
def test_gradients_agree_with_finite_differences_for_each_result_used(used):
    hidden_TH, weight_VH, targets_T = inputs(torch.float64, V + 2, tokens=5)

    def results(hidden, weight):
        both = logprobs_and_entropy(hidden, weight, targets_T, temperature=1.3, chunk_tokens=2, vocab_size=V)
        return tuple(both[i] for i in used)

    assert torch.autograd.gradcheck(results, (hidden_TH, weight_VH))


def test_results_are_float32_and_gradients_have_the_dtype_of_their_tensor_for_bf16_weights():
    hidden_TH, weight_VH, targets_T = inputs(torch.bfloat16)
    logprobs_T, entropy_T = logprobs_and_entropy(
        hidden_TH, weight_VH, targets_T, temperature=1.2, chunk_tokens=4, vocab_size=V
    )
    assert logprobs_T.dtype == entropy_T.dtype == torch.float32
    # Logits in bf16, as the engine computes them; everything after that in float32.
    logits_TV = (hidden_TH @ weight_VH.T).float().detach() / 1.2
    torch.testing.assert_close(logprobs_T, logits_TV.log_softmax(1).gather(1, targets_T[:, None]).squeeze(1))
    (logprobs_T.sum() + entropy_T.sum()).backward()
    assert hidden_TH.grad.dtype == weight_VH.grad.dtype == torch.bfloat16


def test_weight_gradient_over_many_chunks_loses_nothing_to_bf16():
    # 4,096 equal contributions: summed in bf16 they stop growing at 256 times the size of one.
    tokens = 4096
    hidden_TH = torch.ones(tokens, 1, dtype=torch.bfloat16)
    weight_VH = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    logprobs_T, _ = logprobs_and_entropy(
        hidden_TH, weight_VH, torch.zeros(tokens, dtype=torch.long), temperature=1.0, chunk_tokens=1, vocab_size=2
    )
    logprobs_T.sum().backward()
    assert weight_VH.grad.tolist() == [[tokens / 2], [-tokens / 2]]


def test_padded_rows_get_neither_probability_nor_gradient():
    hidden_TH, weight_VH, targets_T = inputs(torch.float64, V + 3)
    with torch.no_grad():
        weight_VH[V:] = 1e6
    logprobs_T, entropy_T = logprobs_and_entropy(
        hidden_TH, weight_VH, targets_T, temperature=1.0, chunk_tokens=4, vocab_size=V
    )
    torch.testing.assert_close((logprobs_T, entropy_T), plain(hidden_TH, weight_VH, targets_T, 1.0))
    (logprobs_T.sum() + entropy_T.sum()).backward()
    assert weight_VH.grad[V:].abs().max() == 0.0


def test_a_target_beyond_the_vocabulary_is_impossible():
    hidden_TH, weight_VH, _ = inputs(torch.float32, V + 3)
    targets_T = torch.full((T,), V + 1)
    logprobs_T, _ = logprobs_and_entropy(hidden_TH, weight_VH, targets_T, temperature=1.0, chunk_tokens=4, vocab_size=V)
    assert logprobs_T.tolist() == [-torch.inf] * T


def test_large_logits_stay_finite():
    hidden_TH, weight_VH, targets_T = inputs(torch.float32)
    hidden_TH = (hidden_TH * 1e4).detach().requires_grad_()
    logprobs_T, entropy_T = logprobs_and_entropy(
        hidden_TH, weight_VH, targets_T, temperature=0.1, chunk_tokens=4, vocab_size=V
    )
    (logprobs_T.sum() + entropy_T.sum()).backward()
    assert all(x.isfinite().all() for x in (logprobs_T, entropy_T, hidden_TH.grad, weight_VH.grad))


def test_no_tokens_give_empty_results_and_zero_gradients():
    hidden_TH, weight_VH, targets_T = inputs(torch.float32, tokens=0)
    logprobs_T, entropy_T = logprobs_and_entropy(
        hidden_TH, weight_VH, targets_T, temperature=1.0, chunk_tokens=4, vocab_size=V
    )
    assert logprobs_T.shape == entropy_T.shape == (0,)
    logprobs_T.sum().backward()
    assert hidden_TH.grad.shape == (0, H)
    assert weight_VH.grad.abs().max() == 0.0


def test_a_frozen_weight_gets_no_gradient_and_scoring_builds_no_graph():
    hidden_TH, weight_VH, targets_T = inputs(torch.float32)
    frozen = weight_VH.detach()
    logprobs_T, _ = logprobs_and_entropy(hidden_TH, frozen, targets_T, temperature=1.0, chunk_tokens=4, vocab_size=V)
    logprobs_T.sum().backward()
    assert frozen.grad is None and hidden_TH.grad is not None
    with torch.no_grad():
        scored_T, _ = logprobs_and_entropy(
            hidden_TH, weight_VH, targets_T, temperature=1.0, chunk_tokens=4, vocab_size=V
        )
    assert not scored_T.requires_grad
    torch.testing.assert_close(scored_T, logprobs_T.detach())
