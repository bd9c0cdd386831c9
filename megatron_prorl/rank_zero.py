"""What only rank 0 of a run has: the run directory's lock, problems, verifiers, collector, trackers and display."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from megatron_prorl import ending, heartbeat
from megatron_prorl.checkpoint.folders import latest_sound_checkpoint, prepare_run_dir, step_of
from megatron_prorl.checkpoint.lock import only_writer
from megatron_prorl.config.hf import hf_folder
from megatron_prorl.config.run_dir import check_data, check_run_dir, has_begun, record_config
from megatron_prorl.config.schema import Config
from megatron_prorl.data.chat import load_tokenizer
from megatron_prorl.data.problems import TrainProblems
from megatron_prorl.rollout.client import EngineClient
from megatron_prorl.rollout.collector import Collector
from megatron_prorl.tasks.pool import VerifierPool
from megatron_prorl.tracking.lineage import LineageWriter, describe_event
from megatron_prorl.tracking.metrics import MetricsWriter
from megatron_prorl.tracking.progress import ProgressDisplay
from megatron_prorl.tracking.rollouts import write_rollouts
from megatron_prorl.tracking.status import StatusWriter
from megatron_prorl.types import Collected, Event, Progress
from megatron_prorl.weights.hf import check_tokenizer_fits, keep_model_files
from megatron_prorl.weights.sync import WeightSync

PREDECESSOR_SECONDS = 1800.0  # in which a job's attempt before, on a node that Slurm has lost, notices that it is alone


class RankZero:
    """Made and called by `Run` on rank 0; everything that it opens is closed by the run's stack."""

    def __init__(self, cfg: Config, stack: ExitStack) -> None:
        self._cfg = cfg
        self._stack = stack
        self._run_dir = Path(cfg.run_dir)
        began_again = int(os.environ.get("SLURM_RESTART_COUNT", "0")) > 0
        patience = PREDECESSOR_SECONDS if began_again else 0.0
        stack.enter_context(only_writer(self._run_dir, patience_seconds=patience))
        self._status = stack.enter_context(StatusWriter(self._run_dir, cfg.steps))
        self._changes = check_run_dir(cfg)
        if not self._changes:
            record_config(cfg)
        kept = self._run_dir / "hf"
        if not has_begun(self._run_dir) or not kept.is_dir():
            keep_model_files(hf_folder(cfg.model.path), kept)
        prepare_run_dir(self._run_dir)

    def find_checkpoint(self) -> Path | None:
        """Where the run goes on from. Reads all of it, so it may take long."""
        with_reference = self._cfg.algorithm.kl.coefficient > 0
        self.checkpoint = latest_sound_checkpoint(self._run_dir, with_reference=with_reference)
        self._start_step = step_of(self.checkpoint) if self.checkpoint else 0
        return self.checkpoint

    def note_stall(self, cause: str) -> None:
        self._status.end(cause)

    def begin_stage(self, cfg: Config, progress: Progress) -> None:
        """Open what depends on the stage, whose configuration `cfg` is, besides what needs the engines."""
        plan, self._cfg, stack = self._cfg, cfg, self._stack
        self._status.begin(progress.step, progress.stage, progress.num_resets)
        self.display = ProgressDisplay(cfg.steps, self._start_step, status=self._status)
        stack.callback(self.display.close)
        stack.enter_context(_warnings_to(self.display))
        where = f"going on from step {self._start_step} of" if self.checkpoint else "a new run in"
        stage = f", stage {cfg.stages[progress.stage].name}" if cfg.stages else ""
        self.display.message(f"{where} {self._run_dir}{stage}")
        self._lineage = LineageWriter(self._run_dir, self._start_step)
        stack.callback(self._lineage.close)
        if self._changes:
            self.note({"event": "config", "step": self._start_step, "changed": self._changes})
            record_config(plan)  # only now: a start that does not come this far leaves the change to be noted
        self._metrics = MetricsWriter(self._run_dir, cfg.tracking, self._start_step)
        stack.callback(self._metrics.close)
        self.display.phase("start")

    def open_problems(self, progress: Progress) -> None:
        cfg, stack = self._cfg, self._stack
        self.display.message(f"starting {cfg.rollout.engines.count} vLLM engine(s)")
        self._tokenizer = load_tokenizer(hf_folder(cfg.model.path))
        self._pool = VerifierPool(cfg.verifier, cfg.tasks)
        stack.callback(self._pool.close)
        self._problems = stack.enter_context(
            TrainProblems(cfg.data, cfg.seed, progress.stage_start_draw, progress.source_counts)
        )
        check_data(cfg, self._problems.digests)

    def note(self, event: Event) -> None:
        self._lineage.write(event)
        self.display.message(describe_event(event))

    def check_tokenizer(self, hf: dict[str, Any]) -> None:
        check_tokenizer_fits(hf, len(self._tokenizer))

    def open_collector(self, sync: WeightSync, engines: list[EngineClient]) -> None:
        """To be called once the engines are ready."""
        self._collector = self._stack.enter_context(
            Collector(
                self._cfg,
                self._problems,
                self._tokenizer,
                self._pool,
                engines,
                on_engine_died=sync.refresh,
                on_progress=self._on_progress,
            )
        )
        self._status.watch(self._collector.waits_for)

    def readmit_engines(self) -> None:
        self._collector.readmit_engines()

    def collect(self, progress: Progress) -> Collected:
        self._begin_phase("rollouts", self._cfg.rollout.prompts_per_step)
        return self._collector.collect(progress.next_draw, progress.weight_version, is_told=ending.is_told)

    def validate(self, abandonable: bool) -> dict[str, float]:
        held_out, cfg = self._problems.held_out, self._cfg.validation
        self._begin_phase("validation", len(held_out))
        is_told = ending.is_told if abandonable else lambda: False
        metrics, _ = self._collector.validate(held_out, cfg.samples, cfg.temperature, cfg.top_p, is_told=is_told)
        return metrics

    def log(self, step: int, metrics: dict[str, float], collected: Collected | None) -> None:
        if collected:
            write_rollouts(self._run_dir, step, collected)
        self._metrics.write(step, metrics)
        self.display.step_done(step, metrics)

    def _begin_phase(self, name: str, total: int) -> None:
        self._num_done = 0
        self.display.phase(name, total)

    def _on_progress(self, num_done: int, num_wanted: int) -> None:
        heartbeat.doing(f"group {num_done} of {num_wanted}")
        self.display.advance(num_done - self._num_done)
        self._num_done = num_done


@contextmanager
def _warnings_to(display: ProgressDisplay) -> Iterator[None]:
    """Show the package's warnings as lines that stay above the progress bars."""

    class ToDisplay(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            display.message(f"{record.levelname.lower()}: {record.getMessage()}")

    handler = ToDisplay(logging.WARNING)
    logger = logging.getLogger("megatron_prorl")
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
