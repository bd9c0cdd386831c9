"""The paper's recipe on four nodes, for as long as it takes, from Python: what `prorl launch` does, to build upon.

python examples/launch_slurm.py --site my_site.yaml            # 20 jobs of 4 hours, one after the other
python examples/launch_slurm.py --site my_site.yaml --dry-run  # the exact script for sbatch
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from megatron_prorl.errors import UserError
from megatron_prorl.launch import nemo, prorl_task
from megatron_prorl.launch.site import load_site

HERE = Path(__file__).parent


def main() -> None:
    parser = argparse.ArgumentParser(description="ProRL on a Slurm cluster by NeMo-Run.")
    parser.add_argument("--site", default=HERE / "site.yaml", help="what the cluster wants; copy examples/site.yaml")
    parser.add_argument("--dry-run", action="store_true", help="print the script that would be submitted")
    args = parser.parse_args()

    # A nemo_run.Partial: a script of one's own can change it, or give it to any other experiment of NeMo-Run.
    task = prorl_task(HERE / "prorl_1p5b.yaml")
    task.overrides.append("parallel.nodes=4")

    plan = nemo.Plan(task=task, executor="slurm", site=load_site(args.site), jobs=20, time_limit="04:00:00")
    print(nemo.dry_run(plan) if args.dry_run else nemo.submit(plan))


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(str(error))
