import math

import pytest
import torch

from megatron_prorl.algo.correction import correction_weights, mismatch_metrics

# Two sequences: rho 0.25, 1, 3 (the last position not trained), then 2, 1, and one without trained tokens.
RHO = torch.tensor([0.25, 1.0, 3.0, 9.0, 2.0, 1.0, 7.0])
MASK = torch.tensor([True, True, True, False, True, True, False])
CU_SEQLENS = torch.tensor([0, 4, 6, 7], dtype=torch.int32)
SAMPLER = torch.tensor([-1.0, -2.0, -0.5, -0.1, -3.0, -1.5, 0.0])


def weights(kind, low=0.0, high=math.inf, sampler=SAMPLER, trainer=None):
    trainer = sampler + RHO.log() if trainer is None else trainer
    return correction_weights(trainer, sampler, MASK, CU_SEQLENS, kind=kind, low=low, high=high, num_tokens=5)


def test_none_weighs_every_token_with_one():
    weights_T, metrics = weights("none")
    assert weights_T.tolist() == [1.0] * 7
    assert metrics["correction/weight_mean"].item() == 1.0


def test_tis_clamps_rho():
    weights_T, metrics = weights("tis", 0.5, 2.5)
    torch.testing.assert_close(weights_T, torch.tensor([0.5, 1.0, 2.5, 1.0, 2.0, 1.0, 1.0]))
    assert metrics["correction/outside_window"].item() == pytest.approx(2 / 5)
    assert metrics["correction/weight_mean"].item() == pytest.approx(7 / 5)


def test_icepop_drops_tokens_outside_the_window_and_keeps_rho_inside():
    weights_T, metrics = weights("icepop", 0.5, 2.5)
    torch.testing.assert_close(weights_T, torch.tensor([0.0, 1.0, 0.0, 1.0, 2.0, 1.0, 1.0]))
    assert metrics["correction/outside_window"].item() == pytest.approx(2 / 5)


def test_seq_mask_drops_sequences_by_the_geometric_mean_of_their_trained_tokens():
    # Geometric means: (0.25 * 1 * 3)^(1/3) = 0.9086 and (2 * 1)^(1/2) = 1.4142.
    first, _ = weights("seq_mask", 0.90, 0.92)
    torch.testing.assert_close(first, torch.tensor([0.25, 1.0, 3.0, 1.0, 0.0, 0.0, 1.0]))
    second, metrics = weights("seq_mask", 1.41, 1.42)
    torch.testing.assert_close(second, torch.tensor([0.0, 0.0, 0.0, 1.0, 2.0, 1.0, 1.0]))
    assert metrics["correction/outside_window"].item() == pytest.approx(3 / 5)


@pytest.mark.parametrize("kind", ["none", "tis", "icepop", "seq_mask"])
def test_weights_carry_no_gradient(kind):
    trainer = SAMPLER.clone().requires_grad_()
    weights_T, _ = weights(kind, 0.5, 2.0, trainer=trainer)
    assert not weights_T.requires_grad


@pytest.mark.parametrize("kind", ["none", "tis", "icepop", "seq_mask"])
def test_equal_logprobs_need_no_correction(kind):
    weights_T, metrics = weights(kind, 0.999, 1.002, trainer=SAMPLER)
    assert weights_T.tolist() == [1.0] * 7
    assert metrics["correction/outside_window"].item() == 0


@pytest.mark.parametrize("kind", ["tis", "icepop", "seq_mask"])
def test_a_difference_beyond_float_range_stays_finite(kind):
    trainer = SAMPLER + torch.tensor([1000.0, -1000.0, 0.0, torch.inf, torch.nan, 0.0, torch.nan]).nan_to_num(nan=0.0)
    weights_T, metrics = weights(kind, 0.5, 2.0, trainer=trainer)
    assert weights_T.isfinite().all()
    assert all(value.isfinite() for value in metrics.values())


def test_mismatch_equals_the_numbers_by_hand():
    logs = [math.log(0.25), 0.0, math.log(3.0), math.log(2.0), 0.0]
    metrics = mismatch_metrics(SAMPLER + RHO.log(), SAMPLER, MASK, num_tokens=5)
    assert metrics["mismatch/logprob_diff_mean"].item() == pytest.approx(sum(map(abs, logs)) / 5, rel=1e-5)
    assert metrics["mismatch/logprob_diff_max"].item() == pytest.approx(math.log(4.0), rel=1e-5)
    assert metrics["mismatch/kl"].item() == pytest.approx(sum(math.exp(x) - 1 - x for x in logs) / 5, rel=1e-5)


def test_mean_of_the_mismatch_estimate_is_the_kl_from_sampler_to_trainer():
    torch.manual_seed(0)
    sampler_V, trainer_V = torch.randn(2, 6, dtype=torch.float64).log_softmax(1)
    exact = (sampler_V.exp() * (sampler_V - trainer_V)).sum().item()
    one = torch.ones(1, dtype=torch.bool)
    mean = sum(
        sampler.exp() * mismatch_metrics(trainer[None], sampler[None], one, num_tokens=1)["mismatch/kl"]
        for sampler, trainer in zip(sampler_V, trainer_V, strict=True)
    )
    assert mean.item() == pytest.approx(exact)
