"""A run as NeMo-Run's fiddle configuration, for experiments of one's own."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_prorl.config.load import load_config
from megatron_prorl.errors import UserError

# What torch calls a rank's numbers, and Slurm.
_NUMBERS = {"RANK": "SLURM_PROCID", "LOCAL_RANK": "SLURM_LOCALID", "WORLD_SIZE": "SLURM_NTASKS"}


def nemo_run() -> Any:
    """The module. Raises UserError where it is not installed."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what it imports
            import nemo_run
    except ImportError as error:
        if error.name != "nemo_run":
            raise UserError(f"NeMo-Run cannot be imported here ({error}); pip install -e '.[launch]'") from error
        raise UserError("NeMo-Run is not installed here; pip install -e '.[launch]'") from None
    return nemo_run


def prorl_task(config: str | Path, *overrides: str) -> Any:
    """The run that a configuration describes as a `nemo_run.Partial`: `config` and `overrides` can be changed in it.

    `nemo_run.run` takes it with any executor whose machines see that file and have NeMo-Run; `launch.nemo` makes a
    chain of jobs of it, as `prorl launch` does. Raises ConfigError for a mistake in the configuration.
    """
    load_config(config, overrides)
    return nemo_run().Partial(train, config=str(config), overrides=list(overrides))


def train(config: str, overrides: Sequence[str] = ()) -> None:
    """`prorl train` in a task that Slurm, torchrun or nobody started as one of several ranks; exits with its code."""
    from megatron_prorl import cli

    if "RANK" not in os.environ and int(os.environ.get("SLURM_NTASKS", "1")) > 1 and "SLURM_PROCID" in os.environ:
        os.environ |= {name: os.environ[slurms] for name, slurms in _NUMBERS.items()}
    sys.exit(cli.main(["train", config, *overrides]))
