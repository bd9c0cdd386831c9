"""A layout or a device that this machine cannot give is refused in one line, before any process group exists."""

from __future__ import annotations

import pytest
import torch
from policy_setup import tiny_config

from megatron_prorl.errors import UserError
from megatron_prorl.policy.device import init_device, shutdown_device

without_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="is about a machine without CUDA; this one has it")


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"num_ranks": 2}, "1\\*2 = 2, but the launcher started 1"),
        pytest.param({"device": "cuda"}, "device: cuda", marks=without_cuda),
        pytest.param({"device": "auto", "model": {"layers": "transformer_engine"}}, "model.layers", marks=without_cuda),
        pytest.param({"device": "auto", "dtype": "bf16", "model": {"fp8": "hybrid"}}, "model.fp8", marks=without_cuda),
    ],
)
def test_what_the_machine_cannot_give_is_refused_in_one_line(sections, words):
    with pytest.raises(UserError, match=words) as error:
        init_device(tiny_config("unused", **sections))
    assert "\n" not in str(error.value)
    assert not torch.distributed.is_initialized()


def test_the_device_can_be_left_and_entered_again():
    for _ in range(2):
        device = init_device(tiny_config("unused"))
        assert (device.kind, device.rank, device.world_size) == ("cpu", 0, 1)
        shutdown_device()
        assert not torch.distributed.is_initialized()
