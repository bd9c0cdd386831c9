"""A whole ProRL run on a laptop's CPU: make a tiny model, train it, and show what it has learned.

python examples/quickstart.py                        # again to go on where it was stopped
python examples/quickstart.py --seed 1 steps=40      # any key=value of the configuration
"""

from __future__ import annotations

import argparse
import math
import subprocess
import sys
from pathlib import Path

from megatron_prorl.config.load import load_config
from megatron_prorl.errors import UserError
from megatron_prorl.tracking.metrics import read_metrics
from megatron_prorl.tracking.plots import curves
from megatron_prorl.warm_start import warm_start

CONFIG = Path(__file__).with_name("quickstart.yaml")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, help="another seed has a model and a run directory of its own")
    parser.add_argument("--run-dir", type=Path, help="default: the configuration's")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_args()

    cfg = load_config(CONFIG, args.overrides)
    suffix = "" if args.seed is None or args.seed == cfg.seed else f"-seed-{args.seed}"
    seed = cfg.seed if args.seed is None else args.seed
    model = Path(cfg.model.path + suffix)
    run_dir = args.run_dir or Path(cfg.run_dir + suffix)

    if warm_start(cfg.data, model, seed=seed):
        print(f"made the model {model}", flush=True)
    settings = [f"run_dir={run_dir}", f"seed={seed}", f"model.path={model}"]
    exit_code = train([str(CONFIG), *args.overrides, *settings])
    if exit_code == 0:
        summarize(run_dir)
    return exit_code


def train(arguments: list[str]) -> int:
    """`prorl train` on this process's own terminal; its exit code."""
    with subprocess.Popen([sys.executable, "-m", "megatron_prorl.cli", "train", *arguments]) as process:
        while True:
            try:
                return process.wait()
            except KeyboardInterrupt:
                pass  # Ctrl-C has reached the training as well: wait until it has ended in order


def summarize(run_dir: Path) -> None:
    rows = read_metrics(run_dir)
    held_out = [row["validation/reward"] for row in rows if math.isfinite(row.get("validation/reward", math.nan))]
    num_resets = sum(row.get("reset/happened") == 1.0 for row in rows)
    print(
        f"\nheld-out reward  {held_out[0]:.3f} before, {held_out[-1]:.3f} after {rows[-1]['step']} steps"
        if held_out
        else ""
    )
    print(f"resets           {num_resets}")
    print(f"run directory    {run_dir}")
    print(f"curves           {curves(run_dir, run_dir / 'curves.png')}")


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
