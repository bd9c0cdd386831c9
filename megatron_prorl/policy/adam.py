"""AdamW with the state layout of FusedAdam, for where Transformer Engine and apex are not: on the CPU above all."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import optimizer as megatron_optimizer
from megatron.core.optimizer import distrib_optimizer


class AdamW(torch.optim.Optimizer):
    """AdamW (arXiv:1711.05101, algorithm 2) through torch's fused kernel.

    Differs from `torch.optim.AdamW` in its state only: `step` is an int in the parameter group instead of a tensor per
    parameter, and `exp_avg`, `exp_avg_sq` may be created before the first step (a checkpoint is loaded into them).
    Parameters and gradients share one floating dtype; a parameter without a gradient is left alone.
    """

    def __init__(
        self,
        params: Any,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        adam_w_mode: bool = True,
    ) -> None:
        assert adam_w_mode, "the coupled weight decay of plain Adam is not implemented"
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, step=0))

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # gradients are made by Megatron's schedule
        """One update of every parameter that has a gradient, in place."""
        for group in self.param_groups:
            group["step"] += 1  # also in a group that is empty on this rank: every rank stores the same step
            params = [param for param in group["params"] if param.grad is not None and param.numel() > 0]
            if not params:
                continue
            for param in params:
                if not self.state[param]:
                    self.state[param] = {"exp_avg": torch.zeros_like(param), "exp_avg_sq": torch.zeros_like(param)}
            step = torch.tensor(float(group["step"]), device=params[0].device)
            beta1, beta2 = group["betas"]
            torch._fused_adamw_(
                params,
                [param.grad for param in params],
                [self.state[param]["exp_avg"] for param in params],
                [self.state[param]["exp_avg_sq"] for param in params],
                [],
                [step] * len(params),
                lr=group["lr"],
                beta1=beta1,
                beta2=beta2,
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                amsgrad=False,
                maximize=False,
            )


def use_in_megatron() -> None:
    """Make Megatron-Core build and checkpoint this AdamW where it would take FusedAdam.

    Without Transformer Engine and apex, Megatron-Core 0.16.1 falls back to `torch.optim.AdamW`, whose per-parameter
    `step` its distributed optimizer cannot load. The flags below are what its two modules set when they find apex.
    """
    megatron_optimizer.Adam = AdamW
    megatron_optimizer.USING_PYTORCH_OPTIMIZER = False
    distrib_optimizer.Adam = AdamW
    distrib_optimizer.HAVE_APEX_OR_TE = True
    distrib_optimizer.USING_APEX_OPTIMIZER = True
