"""When the reference policy is reset."""

from __future__ import annotations

from megatron_prorl.config.schema import ResetConfig
from megatron_prorl.types import Progress


def reset_due(progress: Progress, reset: ResetConfig) -> bool:
    """True when `reset.every_steps` steps have been completed since the last reset (ProRL v2: every 200-500 steps).

    A pure function of what every checkpoint holds, so a run that died and was resumed decides the same.
    """
    return reset.every_steps > 0 and progress.step - progress.last_reset_step >= reset.every_steps
