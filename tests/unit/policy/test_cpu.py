"""Megatron-Core sees a CPU where it says CUDA; everybody else sees the true torch."""

from __future__ import annotations

import torch
from megatron.core.optimizer import clip_grads
from megatron.core.tensor_parallel import random

from megatron_prorl.policy.cpu import enable_cpu_megatron


def test_only_megatron_sees_the_cpu_as_cuda():
    current_device, zeros = torch.cuda.current_device, torch.zeros
    enable_cpu_megatron()
    enable_cpu_megatron()  # a second time changes nothing
    assert clip_grads.torch.zeros(1, device="cuda").device == torch.device("cpu")
    assert clip_grads.torch.cuda.current_device() == torch.device("cpu")
    assert clip_grads.torch.Tensor is torch.Tensor
    assert torch.cuda.current_device is current_device and torch.zeros is zeros


def test_parameters_have_the_type_names_that_the_optimizers_know():
    enable_cpu_megatron()
    assert torch.zeros(1).type() == "torch.cuda.FloatTensor"
    assert torch.zeros(1, dtype=torch.bfloat16).type() == "torch.cuda.BFloat16Tensor"
    assert torch.zeros(1).type(torch.float64).dtype == torch.float64  # conversions stay conversions
    assert torch.zeros(1).cuda().device == torch.device("cpu")


def test_the_rng_tracker_gives_every_stream_its_own_numbers_and_keeps_them_apart():
    enable_cpu_megatron()
    tracker = random.CudaRNGStatesTracker()
    tracker.add("a", 1)
    tracker.add("b", 2)
    torch.manual_seed(3)
    outside = torch.get_rng_state()
    drawn = []
    for name in ("a", "b", "a"):
        with tracker.fork(name):
            drawn.append(torch.rand(4))
    expected = torch.rand(8, generator=torch.Generator().manual_seed(1)).split(4)
    assert torch.equal(drawn[0], expected[0]) and torch.equal(drawn[2], expected[1])
    assert torch.equal(drawn[1], torch.rand(4, generator=torch.Generator().manual_seed(2)))
    assert torch.equal(torch.get_rng_state(), outside)
