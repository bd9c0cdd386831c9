"""Verifiers in processes that may hang, crash and be killed, behind an asyncio interface."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import queue
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any

from megatron_prorl import heartbeat
from megatron_prorl.config.schema import TasksConfig, VerifierConfig
from megatron_prorl.tasks import VerifierError, code, prepare, verify
from megatron_prorl.tasks.child import Child, ChildDied, ChildError
from megatron_prorl.tasks.guard import forbid_side_effects
from megatron_prorl.tasks.sandbox import choose_mode
from megatron_prorl.types import Problem, Verdict

PREPARE_TIMEOUT_SECONDS = 120.0  # to make a problem's entry again: our work, not the answer's, so no answer pays for it


@dataclasses.dataclass(frozen=True, slots=True)
class _Job:
    problem: Problem
    texts: list[str]
    verdicts: Future[list[Verdict]]


class VerifierPool:
    """`cfg.workers` verifier processes, each driven by a thread of this one; they start in the background.

    An answer that takes longer than `cfg.timeout_seconds` costs its worker: killed, replaced, score 0 ("timed out"), as
    does an answer that ends the worker ("crashed"). The other answers of the batch go on in the new worker. Usable from
    any event loop.
    """

    def __init__(self, cfg: VerifierConfig, tasks: TasksConfig = TasksConfig()) -> None:  # noqa: B008  (frozen)
        self._tasks = tasks
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._workers = [_Worker(self._jobs, cfg.timeout_seconds, tasks) for _ in range(cfg.workers)]
        self._closed = False

    async def verify_many(self, problem: Problem, texts: list[str]) -> list[Verdict]:
        """The verdicts on several responses to one problem, in their order; they are shared out over the workers.

        Raises VerifierError if the verifier, not an answer, is broken, UserError if this machine cannot isolate code as
        configured.
        """
        if self._closed:
            raise VerifierError("the verifier pool is closed")
        if problem.domain == "code":  # here, so that one process warns of a weaker sandbox
            await asyncio.to_thread(choose_mode, self._tasks.code.isolation)
        stride = max(1, -(-len(texts) // len(self._workers)))
        jobs = [_Job(problem, texts[i : i + stride], Future()) for i in range(0, len(texts), stride)]
        for job in jobs:
            self._jobs.put(job)
        with heartbeat.waiting("verifier", problem.domain, f"{len(texts)} responses to {problem.id}"):
            parts = await asyncio.gather(*(asyncio.wrap_future(job.verdicts) for job in jobs))
        return [verdict for part in parts for verdict in part]

    def close(self) -> None:
        """Kill the workers, fail what waits, and return when no process is left."""
        self._closed = True
        for worker in self._workers:
            worker.stop()
            self._jobs.put(None)
        for worker in self._workers:
            worker.join()
        while not self._jobs.empty():
            if job := self._jobs.get():
                job.verdicts.cancel()

    def __enter__(self) -> VerifierPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Worker(threading.Thread):
    """Takes jobs from the queue and has them done by a child process of its own, replaced when it hangs or dies."""

    def __init__(self, jobs: queue.SimpleQueue[_Job | None], timeout_seconds: float, tasks: TasksConfig) -> None:
        super().__init__(daemon=True, name="verifier")
        self._jobs = jobs
        self._tasks = tasks
        self._timeout_seconds = timeout_seconds
        self._child: Child | None = None
        self._ready = False
        self._lock = threading.Lock()  # around starting a child and stopping for good
        self._stopped = False
        self.start()

    def run(self) -> None:
        try:
            with contextlib.suppress(OSError, VerifierError):  # the first job tries again and reports it
                self._start_child()
            while (job := self._jobs.get()) is not None and not self._stopped:
                if job.verdicts.set_running_or_notify_cancel():
                    try:
                        job.verdicts.set_result(self._verify(job))
                    except Exception as error:
                        job.verdicts.set_exception(error)
        finally:
            self._end_child()

    def stop(self) -> None:
        """Make the thread end soon, whatever its child is doing; called by another thread."""
        with self._lock:
            self._stopped = True
            if self._child:
                self._child.kill()

    def _verify(self, job: _Job) -> list[Verdict]:
        verdicts: list[Verdict] = []
        while len(verdicts) < len(job.texts):
            child = self._prepared_child(job, job.texts[len(verdicts) :])
            try:
                while len(verdicts) < len(job.texts):
                    verdicts.append(Verdict(**child.receive(self._timeout_seconds)))
                    heartbeat.beat()
            except TimeoutError:
                verdicts.append(Verdict(score=0.0, reason="timed out"))
                self._replace_child()
            except ChildDied:
                verdicts.append(Verdict(score=0.0, reason="crashed"))
                self._replace_child()
            except ChildError as error:
                raise VerifierError(str(error)) from None
        return verdicts

    def _prepared_child(self, job: _Job, texts: list[str]) -> Child:
        """A child that has been given `texts` and starts on the first of them now."""
        request = {"problem": dataclasses.asdict(job.problem), "texts": texts}
        for last in (False, True):  # the child may have died since its last job, through no fault of this one
            try:
                child = self._child or self._start_child()
                if not self._ready:
                    child.wait_ready()
                    self._ready = True
                child.send(request)
                child.receive(PREPARE_TIMEOUT_SECONDS)
                return child
            except ChildError as error:
                raise VerifierError(str(error)) from None
            except (ChildDied, TimeoutError) as error:
                self._replace_child()
                if last:
                    raise VerifierError(
                        f"problem {job.problem.id!r}: no verifier process gets ready: {error}"
                    ) from None
        raise AssertionError

    def _start_child(self) -> Child:
        with self._lock:
            if self._stopped:
                raise VerifierError("the verifier pool was closed")
            self._child = Child(f"{__name__}:serve", self._tasks.model_dump())
            self._ready = False
            return self._child

    def _end_child(self) -> None:
        if self._child:
            self._child.close()
            self._child = None

    def _replace_child(self) -> None:
        self._end_child()
        self._start_child()


def serve(tasks: dict[str, Any]) -> Callable[[Any], Iterator[Any]]:
    """What a verifier process runs (see `tasks.child`); `tasks` is a dumped TasksConfig."""
    import reasoning_gym  # noqa: F401  (now, not in the first answer's time)

    code.configure(TasksConfig(**tasks).code, quiet=True)
    forbid_side_effects()

    def handle(request: dict[str, Any]) -> Iterator[Any]:
        problem = Problem(**request["problem"])
        prepare(problem)
        yield "prepared"
        for text in request["texts"]:
            yield dataclasses.asdict(verify(problem, text))

    return handle
