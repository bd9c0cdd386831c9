"""The loop: ProRL (arXiv:2505.24864) on one page. Every trainer rank runs it; docs/metrics.md lists what it logs."""

from __future__ import annotations

from megatron_prorl.algo.decide import decide, observe
from megatron_prorl.algo.label import label
from megatron_prorl.config.schema import Config
from megatron_prorl.run import Run, is_finished, open_run, open_trainer


def run(cfg: Config, kind: type[Run] = Run) -> None:
    """Train until `cfg.steps` steps or all stages are done, from the last checkpoint of `cfg.run_dir` if it has one."""
    with open_trainer(cfg) as device:
        finished = is_finished(cfg, at_start=True)
        while not finished:
            with open_run(cfg, device, kind) as stage:
                train(stage)
            del stage  # its models make room for those of the next
            finished = is_finished(cfg)


def train(r: Run) -> None:
    """One stage; a run without a plan is one."""
    cfg, policy, progress, timer = r.cfg, r.policy, r.progress, r.timer
    r.sync()
    if progress.step == 0:
        progress.history.clear()
        metrics = r.validate()
        observe(progress, metrics)
        r.log(metrics)
        if r.checkpoint_due():
            r.checkpoint(wait=False)

    while progress.step < cfg.steps:
        r.leave_if_told()
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
            observe(progress, metrics)
            requests = r.requests()
            decision, more = r.act(decide(progress, cfg, requests), requests)
            metrics |= more
        r.log(metrics, collected)

        if decision.action != "go on" or r.checkpoint_due():
            r.checkpoint(wait=decision.action != "go on" or progress.step == cfg.steps)
        if decision.action == "stop":
            r.stop()
        if decision.action == "advance":
            return
