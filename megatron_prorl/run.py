"""One run: everything with a lifetime (engines, verifiers, display, run directory) behind the steps of `train.py`.

Rank 0 owns the collector and what is written besides checkpoints; the other ranks take part in the same calls and
receive what rank 0 found. The first rank of every node supervises the engines there, which rank 0 drives.
"""

from __future__ import annotations

import copy
import gc
import socket
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NoReturn, TypeVar

import torch

from megatron_prorl import comm, ending, heartbeat
from megatron_prorl.algo.decide import BY_HAND, Decision, best_step, check_score, left_behind, rollback_steps
from megatron_prorl.checkpoint import folders
from megatron_prorl.checkpoint.folders import (
    STATE,
    committed_checkpoints,
    read_state,
    reference_folder,
    verify_digests,
)
from megatron_prorl.checkpoint.lock import only_writer
from megatron_prorl.checkpoint.store import (
    CheckpointWriter,
    latest_checkpoint,
    load_checkpoint,
    load_reference,
    prepare_run_dir,
    prune,
    save_reference,
)
from megatron_prorl.config.schema import Config, ResetConfig
from megatron_prorl.config.stages import ended_by, stage_config
from megatron_prorl.data.problems import mixture
from megatron_prorl.errors import RunStopped, ToldToEnd, UserError
from megatron_prorl.policy.device import Device, init_device, shutdown_device
from megatron_prorl.policy.policy import Policy
from megatron_prorl.rank_zero import RankZero
from megatron_prorl.rollout.client import EngineClient
from megatron_prorl.rollout.collector import Abandoned
from megatron_prorl.rollout.dispatch import NoEngineLeft
from megatron_prorl.rollout.engine import EngineAddress, EngineSupervisor, check_one_machine, transfer_backend
from megatron_prorl.stalls import Engine, Watch
from megatron_prorl.tracking.metrics import PhaseTimer
from megatron_prorl.tracking.requests import clear_requests, read_requests
from megatron_prorl.types import Collected, Event, Progress
from megatron_prorl.weights.export import hf_metadata, iter_hf_weights
from megatron_prorl.weights.sync import Weights, WeightSync

MAX_REPEATS = 2  # of one collection that lost every engine
ANSWER_SECONDS = 5.0  # of an engine that is asked whether it lives
SEEN_SECONDS = 60.0  # until a network file system shows what another node has made

Result = TypeVar("Result")


@contextmanager
def open_trainer(cfg: Config) -> Iterator[Device]:
    """This rank's device and its part in the process groups, for all stages of the run."""
    ending.listen()
    # About optional packages that are absent and torch calls that Megatron-Core has not renamed: nothing to act on.
    warnings.filterwarnings("ignore", module=r"megatron\.|torch\.distributed\.")
    device = init_device(cfg)
    try:
        comm.init_control_group()
        ending.share()
        try:
            yield device
        except ToldToEnd:
            comm.barrier()  # where one rank's end would end the others, all have ended their engines
            raise
    finally:
        shutdown_device()


def is_finished(cfg: Config, *, at_start: bool = False) -> bool:
    """Whether the run's last checkpoint ends it, the same on every rank; `at_start` a line says so."""

    def found() -> bool:
        checkpoint = latest_checkpoint(cfg.run_dir)
        if checkpoint is None or verify_digests(checkpoint, [STATE]):  # `open_run` sets it aside
            return False
        reason = ended_by(cfg, read_state(checkpoint)["progress"])
        if reason:
            with only_writer(Path(cfg.run_dir)):
                prepare_run_dir(cfg.run_dir)  # nobody else will
        if reason and at_start:
            print(f"{cfg.run_dir}: the run is finished: {reason}", flush=True)
        return bool(reason)

    return comm.broadcast(found() if comm.is_rank_zero() else None)


@contextmanager
def open_run(cfg: Config, device: Device, kind: type[Run]) -> Iterator[Run]:
    """Start everything that a stage needs, hand over the run, and end it all, whatever happens in between."""
    gc.collect()  # the models of the stage before
    if device.kind == "cuda":
        torch.cuda.empty_cache()
    with ExitStack() as stack:
        yield kind(cfg, device, stack)


class Run:
    """The run as every trainer rank sees it. All methods are collective; what they return is the same on every rank.

    `cfg` is that of the stage.
    """

    def __init__(self, cfg: Config, device: Device, stack: ExitStack) -> None:
        self.timer = PhaseTimer(self._phase)
        self._saved = Progress()  # as the last checkpoint that was begun has it
        self._waits_for_checkpoint = False
        self._run_dir = Path(cfg.run_dir)
        self._rank_zero = RankZero(cfg, stack) if comm.is_rank_zero() else None
        self._watch = stack.enter_context(self._watched(cfg))
        self._writer = stack.enter_context(CheckpointWriter(self._run_dir))
        checkpoint = comm.broadcast(self._rank_zero.find_checkpoint() if self._rank_zero else None)
        _check_seen(self._run_dir, checkpoint)
        self.progress = Progress(**read_state(checkpoint)["progress"]) if checkpoint else Progress()
        self._plan = cfg
        self.cfg = cfg = stage_config(cfg, self.progress.stage)
        if validated := [row for row in self.progress.history if "validation/reward" in row]:
            self._check_scores(validated[-1])
        if self._rank_zero:
            self._rank_zero.begin_stage(cfg, self.progress)
            clear_requests(self._run_dir, _marks(self.progress))
        self._start(stack, device, checkpoint)

    def _watched(self, cfg: Config) -> Watch:
        """The watch over stalls, once the run directory is ours."""
        attempt = comm.broadcast(time.strftime("%Y%m%d-%H%M%S"))
        watch = Watch(
            self._run_dir,
            rank=comm.rank(),
            num_ranks=cfg.parallel.world_size,
            attempt=attempt,
            limit_seconds=cfg.stall_seconds,
        )
        if self._rank_zero:
            watch.at_end(self._rank_zero.note_stall)
        return watch

    def _start(self, stack: ExitStack, device: Device, checkpoint: Path | None) -> None:
        """Make the policy and what gives it rollouts."""
        cfg = self.cfg
        if self._rank_zero:
            self._rank_zero.open_problems(self.progress)
        backend = transfer_backend(cfg, device.kind)
        supervisor, addresses = self._start_engines(stack)
        if backend == "shm":
            check_one_machine(addresses)
        if backend == "ipc":
            # vLLM measures how much of the GPU is free, and takes its share: nobody else may take more meanwhile.
            if supervisor:
                supervisor.wait_ready()
            comm.barrier()
        self.policy = Policy(cfg, device)  # elsewhere the engines start meanwhile
        self._load(checkpoint)
        if self._rank_zero:
            self._rank_zero.check_tokenizer(self.policy.hf)
        if supervisor:
            supervisor.wait_ready()
        comm.barrier()

        dtype = next(self.policy.chunks[0].parameters()).dtype
        engines = [address.client(cfg) for address in addresses] if self._rank_zero else []
        self._sync = WeightSync(
            cfg,
            backend,
            Weights(
                metadata=hf_metadata(self.policy.hf, dtype),
                tensors=lambda: heartbeat.beating(iter_hf_weights(self.policy.chunks, self.policy.hf)),
            ),
            engines,
            probe=self.policy.probe,
            vocab_size=self.policy.hf["vocab_size"],
            restart=supervisor.restart if supervisor else lambda indices: [],
        )
        stack.callback(self._sync.close)
        self._watch.engines = partial(_ask_all, engines)
        if self._rank_zero:
            self._rank_zero.open_collector(self._sync, engines)

    def _start_engines(self, stack: ExitStack) -> tuple[EngineSupervisor | None, list[EngineAddress]]:
        """This node's supervisor, on its first rank, and every node's engines, which are only starting."""
        cfg, supervisor = self.cfg, None
        node, place = divmod(comm.rank(), cfg.parallel.ranks_per_node)
        if place == 0:
            step = self.progress.step
            supervisor = EngineSupervisor(cfg, cfg.model.path, self._run_dir, node=node, start_step=step)
            self._watch.at_end(lambda cause: supervisor.kill())
            stack.enter_context(supervisor)
        shares = comm.gather(supervisor.addresses if supervisor else [])
        return supervisor, [address for share in shares for address in share]

    def _load(self, checkpoint: Path | None) -> None:
        policy = self.policy
        if checkpoint:
            load_checkpoint(checkpoint, policy.chunks, policy.optimizer)
            self._load_reference()
        elif policy.reference:
            save_reference(self._run_dir, self.progress.reference, policy.chunks)

    def _load_reference(self) -> None:
        if self.policy.reference:
            load_reference(self._run_dir, self.progress.reference, self.policy.reference)

    def collect(self) -> Collected:
        """One step's groups; those that were dropped are on rank 0 only. Abandoned when the run is told to end."""
        with self.timer("collect"):
            found, num_repeats = self._with_engines(
                lambda rank_zero: rank_zero.collect(self.progress), abandonable=True
            )
            if found:
                found = replace(found, metrics=found.metrics | {"rollout/repeats": float(num_repeats)})
            everywhere = comm.broadcast(found and replace(found, dropped_groups=[]))
        return found or everywhere

    def sync(self) -> dict[str, float]:
        """Bring every engine to the policy's weights, and prove it."""
        with self.timer("sync"):
            metrics = self._sync.push(self.progress.weight_version)
            if self._rank_zero:
                self._rank_zero.readmit_engines()
            return metrics

    def _with_engines(self, work: Callable[[RankZero], Result], *, abandonable: bool) -> tuple[Result | None, int]:
        """What `work` returns on rank 0, None elsewhere, and how often it was repeated. Collective.

        Where no engine is left and rank 0 cannot restart one alone, all ranks do a sync, which restarts them, and the
        work begins anew. The run ends here if it is told to and the work is `abandonable`: no step is half done.
        """
        for num_repeats in range(MAX_REPEATS + 1):
            found, lost, abandoned = None, False, False
            if self._rank_zero:
                try:
                    found = work(self._rank_zero)
                except Abandoned:
                    abandoned = True
                except NoEngineLeft as error:
                    # A scheduler's SIGTERM goes to all processes of a job, engines too.
                    abandoned = abandonable and ending.wait_told(2 * ending.POLL_SECONDS)
                    if num_repeats == MAX_REPEATS and not abandoned:
                        raise
                    if not abandoned:
                        self._rank_zero.display.message(f"warning: {error}: restarting the engines and beginning anew")
                        lost = True
            lost, abandoned = comm.broadcast((lost, abandoned))
            if abandoned:
                self._leave()
            if not lost:
                break
            self.sync()
        return found, num_repeats

    def validation_due(self) -> bool:
        step, every = self.progress.step, self.cfg.validation.every_steps
        return step == self.cfg.steps or (every > 0 and step % every == 0)

    def validate(self) -> dict[str, float]:
        """Mean reward on the held-out problems."""
        with self.timer("validate"):
            first = self.progress.step == 0  # a later one is part of its step
            found, num_repeats = self._with_engines(lambda rank_zero: rank_zero.validate(first), abandonable=first)
            metrics = comm.broadcast(found and found | {"validation/repeats": float(num_repeats)})
            self._check_scores(metrics)
            return metrics

    def _check_scores(self, validated: dict[str, float]) -> None:
        for stage in range(self.progress.stage, max(1, len(self._plan.stages))):
            check_score(stage_config(self._plan, stage).reset.score, validated)

    def leave_if_told(self) -> None:
        """Between two steps: end the run if any rank has been told to."""
        if comm.broadcast(ending.is_told() if self._rank_zero else None):
            self._leave()

    def _leave(self) -> NoReturn:
        """End the run with a checkpoint of the last step that is complete, in whose state it is."""
        step = self.progress.step
        self._settle(wait=True)
        last = latest_checkpoint(self._run_dir) if self._rank_zero else None
        if step > 0 and comm.broadcast(last and folders.step_of(last)) != step:
            self.checkpoint(wait=True)
        saved = f"step {step} is saved" if step else "no step was done yet"
        how = comm.broadcast(ending.how() if self._rank_zero else None)
        raise ToldToEnd(f"told to end by {how}: {saved}, and the same command goes on from there")

    def requests(self) -> dict[str, str]:
        """What is asked for by hand and not done yet ("reset", "advance"), with its mark."""
        asked = comm.broadcast(read_requests(self._run_dir) if self._rank_zero else None)
        done = _marks(self.progress)
        return {request: mark for request, mark in asked.items() if mark not in done}

    def act(self, decision: Decision, requests: dict[str, str]) -> tuple[Decision, dict[str, float]]:
        """Do what was decided and note it; the next checkpoint makes it last.

        Returns what was done, which is a stop where no checkpoint is left to roll back to, and metrics.
        """
        decision = comm.broadcast(decision)
        for trigger, reason in decision.warnings:
            self._note({"event": "warning", "trigger": trigger, "reason": reason})
        metrics: dict[str, float] = {}
        path, good = None, decision.last_good_step
        if decision.action == "rollback":
            path = self._newest_sound(lambda step: step <= good and not left_behind(self.progress, step))
            if path is None:
                reason = f"{decision.reason}; no sound checkpoint of step {decision.last_good_step} or before is left"
                decision = replace(decision, action="stop", reason=reason)
        if decision.action == "go on":
            return decision, metrics
        with self.timer(decision.action):
            event: Event = {"event": decision.action, "trigger": decision.trigger, "reason": decision.reason}
            if decision.trigger == BY_HAND:
                event["request"] = requests[decision.action]
            if decision.action == "reset":
                metrics = self._reset(event, self.cfg.reset, self.cfg.reset.optimizer)
            elif decision.action == "advance":
                metrics = self._advance(event)
            elif decision.action == "rollback" and path:
                event |= {"last_good_step": good, "ground_step": decision.ground_step}
                metrics = self._roll_back(event, path)
            self._note(event)
        return decision, metrics

    def _reset(self, event: Event, reset: ResetConfig, optimizer: str) -> dict[str, float]:
        """reference := policy (or policy and reference := the best checkpoint's), the optimizer is cleared or kept."""
        progress, policy = self.progress, self.policy
        metrics: dict[str, float] = {}
        weights_of_step = progress.step
        best = self._best() if reset.target == "best" else None
        if best not in (None, progress.step):
            if path := self._newest_sound(lambda step: step == best):
                load_checkpoint(path, policy.chunks, policy.optimizer)
                weights_of_step = best
                progress.weight_version += 1
                metrics = self.sync()
            else:
                reason = f"the best checkpoint, of step {best}, is missing or damaged: the policy stays as it is"
                self._note({"event": "warning", "trigger": "reset.target", "reason": reason})
        policy.reset(clear_optimizer=optimizer == "clear")
        progress.num_resets += 1
        progress.last_reset_step = progress.step
        if reset.warmup_updates is not None or optimizer == "clear":
            progress.optimizer_updates, progress.warmup_updates = 0, reset.warmup_updates
        event |= {"number": progress.num_resets, "optimizer": optimizer, "weights_of_step": weights_of_step}
        if policy.reference:
            event["reference"] = progress.reference = f"reset-{progress.num_resets:03d}"
            save_reference(self._run_dir, progress.reference, policy.reference)
        return metrics

    def _best(self) -> int | None:
        """The step of the best checkpoint there is: that of the step itself, or one on the disk."""
        self._settle(wait=True)
        found = [folders.step_of(path) for path in committed_checkpoints(self._run_dir)] if self._rank_zero else None
        return best_step(self.progress, self.cfg.reset.score, among=[*comm.broadcast(found), self.progress.step])

    def _advance(self, event: Event) -> dict[str, float]:
        """End the stage; its successor begins with this step's checkpoint, and maybe with a reset by its options."""
        progress, cfg = self.progress, self.cfg
        event["stage"] = cfg.stages[progress.stage].name
        metrics: dict[str, float] = {}
        following = progress.stage + 1
        if following < len(cfg.stages):
            event["next"] = cfg.stages[following].name
            if (optimizer := cfg.stages[following].reset) != "none":
                metrics = self._reset(event, stage_config(self._plan, following).reset, optimizer)
        order = mixture(cfg.data, cfg.seed, progress.stage_start_draw, progress.source_counts)
        progress.source_counts = order.counts(progress.next_draw)
        progress.stage, progress.stage_start_step = following, progress.step
        progress.stage_start_draw = progress.next_draw
        return metrics

    def _roll_back(self, event: Event, path: Path) -> dict[str, float]:
        """Policy, optimizer and reference := those of the checkpoint `path`.

        Steps and draws go on counting: no row is written twice, and what was drawn since is not drawn again.
        """
        progress, policy = self.progress, self.policy
        then = load_checkpoint(path, policy.chunks, policy.optimizer)
        progress.reference, progress.optimizer_updates = then.reference, then.optimizer_updates
        progress.warmup_updates = then.warmup_updates
        self._load_reference()
        progress.weight_version += 1
        event |= {"to_step": then.step, "draws_skipped": progress.next_draw - then.next_draw}
        return self.sync()

    def _newest_sound(self, wanted: Callable[[int], bool]) -> Path | None:
        """The newest checkpoint of a wanted step whose bytes, and whose reference's, are as they were written."""
        self._settle(wait=True)

        def is_sound(path: Path) -> bool:
            if verify_digests(path):
                return False
            reference = reference_folder(self._run_dir, read_state(path)["progress"]["reference"])
            return not self.policy.reference or not verify_digests(reference)

        def found() -> Path | None:
            paths = reversed(committed_checkpoints(self._run_dir))
            return next((path for path in paths if wanted(folders.step_of(path)) and is_sound(path)), None)

        return comm.broadcast(found() if self._rank_zero else None)

    def _note(self, event: Event) -> None:
        """Keep the event, with the step's figures, for decisions (but warnings, which none rests on) and people."""
        event |= {"step": self.progress.step, "metrics": dict(self.progress.history[-1])}
        if event["event"] != "warning":
            self.progress.events.append(event)
        if self._rank_zero:
            self._rank_zero.note(event)

    def stop(self) -> NoReturn:
        """End the run as the last decision said."""
        event = self.progress.events[-1]
        raise RunStopped(f"stopped after step {event['step']}: {event['trigger']}: {event['reason']}")

    def checkpoint_due(self) -> bool:
        progress, score = self.progress, self.cfg.reset.score
        if progress.step == 0:
            return rollback_steps(self.cfg) > 0  # or there would be nothing to go back to
        is_best = score in progress.history[-1] and best_step(progress, score) == progress.step
        last = progress.step == self.cfg.steps
        return last or is_best or progress.step % self.cfg.checkpoint.every_steps == 0

    def checkpoint(self, *, wait: bool) -> None:
        """Begin to write a checkpoint, which goes on beside the training; `wait` until it is there for good.

        Its time is logged with the next step. One that cannot be written is a warning, and the next one is tried in its
        time; but where the run waits for it, UserError is raised.
        """
        with self.timer("checkpoint"):
            self._settle(wait=True)  # one at a time
            self._waits_for_checkpoint = wait
            policy = self.policy
            with self._warning_of_a_disk_that_refuses():
                self._writer.save(policy.chunks, policy.optimizer, self.progress, self.cfg.model_dump())
                self._saved = copy.deepcopy(self.progress)
            self._settle(wait=wait)

    def _settle(self, *, wait: bool) -> None:
        """See to a checkpoint that is written by now: remove what it makes needless."""
        committed = None
        with self._warning_of_a_disk_that_refuses():
            if wait:
                self._writer.wait()
            committed = self._writer.poll()
        if committed is not None and self._rank_zero:
            try:
                self._clear_away(committed)
            except OSError as error:
                self._rank_zero.display.message(f"warning: cannot remove what is no longer needed: {error}")

    def _clear_away(self, committed: int) -> None:
        """Remove checkpoints that need not be kept, and requests that the one of step `committed` fulfils."""
        steps = [folders.step_of(path) for path in committed_checkpoints(self._run_dir)]
        lasting = {event["step"] for event in self._saved.events if "number" in event}
        if (best := best_step(self._saved, self.cfg.reset.score, among=steps)) is not None:
            lasting.add(best)
        if horizon := rollback_steps(self.cfg):
            # To go back to, also again and again.
            before = [step for step in steps if step <= committed - horizon and not left_behind(self._saved, step)]
            lasting |= {*before[-self.cfg.guards.max_rollbacks :], *(s for s in steps if s > committed - horizon)}
        keep = self.cfg.checkpoint
        prune(self._run_dir, last=keep.keep, every=keep.keep_every_steps, also=lasting)
        clear_requests(self._run_dir, _marks(self._saved))

    @contextmanager
    def _warning_of_a_disk_that_refuses(self) -> Iterator[None]:
        try:
            yield
        except UserError as error:  # on all ranks
            if self._waits_for_checkpoint:
                raise
            self._note({"event": "warning", "trigger": "checkpoint", "reason": str(error)})

    def log(self, metrics: dict[str, float], collected: Collected | None = None) -> None:
        """Write the step's row, and its rollouts; the time for it is logged with the next step."""
        self._settle(wait=False)
        seconds = self.timer.take()
        if self._rank_zero:
            reset = self.progress.step > 0 and self.progress.last_reset_step == self.progress.step
            counts = {"reset/count": float(self.progress.num_resets), "reset/happened": float(reset)}
            if self.cfg.stages:
                counts["stage"] = float(self.progress.stage)
            with self.timer("log"):
                self._rank_zero.log(self.progress.step, metrics | counts | seconds, collected)

    def _phase(self, name: str) -> None:
        heartbeat.phase(name)
        if self._rank_zero:
            self._rank_zero.display.phase(name)


def _ask_all(engines: list[EngineClient]) -> list[Engine]:
    """Whether each engine works, for the name of a stall."""
    with ThreadPoolExecutor(max(1, len(engines))) as threads:
        answers = threads.map(lambda engine: engine.core_answers(timeout_seconds=ANSWER_SECONDS), engines)
        return [Engine(name=engine.url, answers=answer) for engine, answer in zip(engines, answers, strict=True)]


def _check_seen(run_dir: Path, checkpoint: Path | None) -> None:
    """Raise UserError where this rank's node does not see what rank 0 does."""
    deadline = time.monotonic() + SEEN_SECONDS
    for folder in (run_dir / "checkpoints", checkpoint or run_dir):
        while not folder.is_dir():
            if time.monotonic() < deadline:
                time.sleep(0.5)
                continue
            raise UserError(
                f"run_dir: {folder} is on the first node and not on {socket.gethostname()}; "
                "run_dir has to be in a file system that all nodes share"
            )


def _marks(progress: Progress) -> set[str]:
    """Of the requests that the run has fulfilled."""
    return {event["request"] for event in progress.events if "request" in event}
