"""The loop: ProRL (arXiv:2505.24864) on one page. Every trainer rank runs it; docs/metrics.md lists what it logs."""

from __future__ import annotations

from megatron_prorl.algo.label import label
from megatron_prorl.algo.reset import reset_due
from megatron_prorl.config.schema import Config
from megatron_prorl.run import open_run


def run(cfg: Config) -> None:
    """Train until `cfg.steps` steps are done, from the last checkpoint of `cfg.run_dir` if it has one."""
    with open_run(cfg) as r:
        policy, progress, timer = r.policy, r.progress, r.timer
        r.sync()
        if progress.step == 0:
            r.log(r.validate())

        while progress.step < cfg.steps:
            with timer("step"):
                collected = r.collect()
                samples = label(collected.kept, cfg.algorithm, max_response_tokens=cfg.rollout.max_response_tokens)
                metrics = collected.metrics | policy.learn(samples, progress, timer)

                progress.step += 1
                progress.next_draw = collected.next_draw
                progress.weight_version += 1
                metrics |= r.sync()

                if r.validation_due():
                    metrics |= r.validate()
                if reset := reset_due(progress, cfg.reset):
                    r.reset()
            r.log(metrics, collected)

            if reset or r.checkpoint_due():
                r.checkpoint()
