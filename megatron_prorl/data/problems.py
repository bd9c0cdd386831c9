"""The run's problems, each a pure function of the run's seed and its place in the order ("draw"): Reasoning Gym items
and rows of problem files, mixed by weight (`data.order`).

The seeds of Reasoning Gym's items lie in [0, 2**32) (numpy's range). Their lower half is for training, a quarter each
for validation and evaluation:

    training    item `draw` of a task: base + draw            base < 2**30 hashed from (seed, task, params)
                its k-th substitute:   base + draw + k * 2**24
    validation  item i of a task:      2**31 + base + i
    evaluation  item i of a task:      3 * 2**30 + base + i, of suites (`evaluation.suite`)

Small tasks make the same question from different seeds, so a training item that asks a held-out question gives way to
its first substitute that does not.

A problem file's held-out problems are the first of its own validation file, or of itself, in an order of the seed's.
Its training problems are the rows that ask no held-out question, whoever holds that out: each once an epoch.
"""

from __future__ import annotations

import difflib
import json
import logging
import threading
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import asdict, fields
from typing import Any

from megatron_prorl.config.schema import DataConfig, SourceConfig, TaskConfig
from megatron_prorl.data.files import ProblemFile, question_hash
from megatron_prorl.data.order import Mixture, hash64, permuted
from megatron_prorl.errors import UserError
from megatron_prorl.tasks import logic
from megatron_prorl.tasks.child import Child, ChildDied, ChildError
from megatron_prorl.tasks.guard import forbid_side_effects
from megatron_prorl.types import Problem

logger = logging.getLogger(__name__)

MAX_DRAWS = 2**24  # ProRL's 3,000 steps of 256 prompts with every second group dropped make 1.5 million
SUBSTITUTES = 63
FIRST_SEEDS = {"validation": 2**31, "evaluation": 3 * 2**30}  # of splits other than training
PROBLEM_TIMEOUT_SECONDS = 120.0
HOLD_OUT_TIMEOUT_SECONDS = 1800.0
TOO_FEW = "too few different problems to hold any out; choose larger params or fewer data.validation_problems"


class TrainProblems:
    """The training problems of a run, made in a child process, which keeps their cost and side effects to itself.

    `start_draw` and `given` say where this mix took over from another, and how many problems each task and source had
    given before. Raises UserError at once if a task, a parameter or a file does not exist, if a row of a file is bad,
    or if a task or a file is too small to hold problems out.
    """

    def __init__(self, cfg: DataConfig, seed: int, start_draw: int = 0, given: Sequence[int] = ()) -> None:
        if cfg.tasks and "<answer>" not in cfg.system_prompt:
            logger.warning("data.system_prompt does not ask for <answer></answer>, without which no reward is earned")
        self._argument = {"cfg": cfg.model_dump(), "seed": seed, "start_draw": start_draw, "given": list(given)}
        self._lock = threading.Lock()
        self._child = self._start()
        try:
            self._child.wait_ready(HOLD_OUT_TIMEOUT_SECONDS)
            self._held_out = [Problem(**problem) for problem in self._request("held out")]
            self._digests: dict[str, str] = self._request("digests")
            self._domains: list[str] = self._request("domains")
        except BaseException as error:
            self.close()
            if isinstance(error, ChildDied | ChildError | TimeoutError):
                raise RuntimeError(f"the process that makes problems does not start: {error}") from error
            raise

    def problem(self, draw: int) -> Problem:
        """The problem at place `draw` >= 0 of the seeded order, the same in every process. Thread-safe."""
        return Problem(**self._request(draw))

    @property
    def held_out(self) -> list[Problem]:
        """The validation problems, shared out evenly over tasks and sources; training asks none of their questions."""
        return self._held_out

    @property
    def digests(self) -> dict[str, str]:
        """`ProblemFile.digest` of every file that problems come from, by path."""
        return self._digests

    @property
    def domains(self) -> list[str]:
        """The domains of the sources' problems, in the order of their names."""
        return self._domains

    def close(self) -> None:
        self._child.close()

    def __enter__(self) -> TrainProblems:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start(self) -> Child:
        return Child(f"{__name__}:serve", self._argument)

    def _request(self, request: int | str) -> Any:
        """What `Generator` answers, which depends on nothing but the request: a child that was killed gives way to
        another, once.
        """
        with self._lock:
            try:
                try:
                    return self._ask(request)
                except ChildDied as error:
                    logger.warning("%s while making problem %r: starting another", error, request)
                    self._child.close()
                    self._child = self._start()
                    self._child.wait_ready(HOLD_OUT_TIMEOUT_SECONDS)
                    return self._ask(request)
            except (ChildDied, ChildError, TimeoutError) as error:
                raise RuntimeError(f"making problem {request!r} failed: {error}") from error

    def _ask(self, request: int | str) -> Any:
        self._child.send(request)
        return self._child.receive(PROBLEM_TIMEOUT_SECONDS)


def mixture(cfg: DataConfig, seed: int, start_draw: int, given: Sequence[int]) -> Mixture:
    """The shares of tasks and sources, in this order, from draw `start_draw` on."""
    return Mixture(cfg.weights, seed, start_draw, given)


def serve(argument: dict[str, Any]) -> Generator:
    """What the child process runs. An item that could write files, as some of codeio's do, would not be the one that a
    verifier makes again."""
    if argument["cfg"]["tasks"]:
        import reasoning_gym  # noqa: F401  (numpy's import changes the environment)

        forbid_side_effects()
    return Generator(argument)


class Generator:
    """Makes problems; runs in the child process and answers a draw, "held out", "digests", "domains", in plain JSON."""

    def __init__(self, argument: dict[str, Any]) -> None:
        cfg = DataConfig(**argument["cfg"])
        self.cfg = cfg.model_copy(update={"tasks": check_tasks(cfg.tasks)}) if cfg.tasks else cfg
        self.seed: int = argument["seed"]
        self.mixture = mixture(self.cfg, self.seed, argument.get("start_draw", 0), argument.get("given", ()))
        files = _open_files(self.cfg.sources)
        self.digests = {str(file.path): file.digest for pair in files for file in pair}
        self.domains = sorted({domain for file, _ in files for domain in file.domains})
        self.validation = self._hold_out(files)
        self.held_out = {question_hash(problem) for problem in self.validation}
        self.sources = [_Source(file, self.held_out, self.seed) for file, _ in files]

    def __call__(self, request: int | str) -> Iterator[Any]:
        if request == "digests":
            yield self.digests
        elif request == "domains":
            yield self.domains
        elif request == "held out":
            yield [asdict(problem) for problem in self.validation]
        else:
            yield asdict(self.problem(int(request)))

    def problem(self, draw: int) -> Problem:
        if not 0 <= draw < MAX_DRAWS:
            raise UserError(f"problem {draw}: a run has {MAX_DRAWS} draws; start another with a seed of its own")
        part = self.mixture.source(draw)
        if part >= len(self.cfg.tasks):
            return self.sources[part - len(self.cfg.tasks)].problem(self.mixture.count(part, draw))
        task = self.cfg.tasks[part]
        for substitute in range(SUBSTITUTES + 1):
            problem = self._item(task, "train", draw + substitute * MAX_DRAWS)
            if problem and question_hash(problem) not in self.held_out:
                return problem
        raise UserError(f"data.tasks: {task.task}: {TOO_FEW}")

    def _hold_out(self, files: list[tuple[ProblemFile, ProblemFile]]) -> list[Problem]:
        """`validation_problems` different questions, as many of each task or source as of any other, or one more."""
        chosen: dict[int, Problem] = {}
        num_tasks = len(self.cfg.tasks)
        num_each, num_more = divmod(self.cfg.validation_problems, num_tasks + len(files))

        def choose(candidates: Iterator[Problem | None], number: int, complaint: str) -> None:
            wanted = len(chosen) + number
            while len(chosen) < wanted:
                try:
                    problem = next(candidates)
                except StopIteration:
                    raise UserError(complaint) from None
                if problem:
                    chosen.setdefault(question_hash(problem), problem)

        for i, task in enumerate(self.cfg.tasks):
            number = num_each + (i < num_more)
            # Of a space that n different questions fill by no more than 80%, 2n items hold n (coupon collector).
            items = (self._item(task, "validation", index) for index in range(2 * number + 8))
            choose(items, number, f"data.tasks.{i}: {task.task}: {TOO_FEW}")
        for i, (_, validation) in enumerate(files):
            number = num_each + (num_tasks + i < num_more)
            key = ("validation", self.seed, validation.digest)
            rows = (validation[permuted(place, len(validation), *key)] for place in range(len(validation)))
            complaint = f"{validation.path}: fewer than {number} different questions to hold out"
            choose(rows, number, f"data.sources.{i}: {complaint}; choose fewer data.validation_problems")
        return list(chosen.values())

    def _item(self, task: TaskConfig, split: str, index: int) -> Problem | None:
        return make_item(task, split, self.seed, index, self.cfg.system_prompt)


def make_item(task: TaskConfig, split: str, seed: int, index: int, system_prompt: str) -> Problem | None:
    """Item `index` of the task in the split's seeds (FIRST_SEEDS; all others are training's); None where it makes none,
    as word_ladder may. For child processes alone (`tasks.logic`)."""
    base = FIRST_SEEDS.get(split, 0) + hash64(split, seed, task.task, task.params) % 2**30
    chunk, place = divmod(index, logic.DATASET_SIZE)
    origin = {"task": task.task, "params": task.params, "seed": base + chunk * logic.DATASET_SIZE, "index": place}
    try:
        _, entry = logic.load(origin)
    except Exception as error:
        logger.warning("%s makes no item from %s (%r): the next takes its place", task.task, origin, error)
        return None
    system = [{"role": "system", "content": system_prompt}] if system_prompt else []
    return Problem(
        id=f"{task.task}/{base + index}",
        domain="logic",
        task=task.task,
        messages=[*system, {"role": "user", "content": entry["question"]}],
        verification={**origin, "answer": entry["answer"]},
        source="reasoning_gym",
    )


class _Source:
    """A problem file in training: its problems in an order of its own every epoch."""

    def __init__(self, file: ProblemFile, held_out: set[int], seed: int) -> None:
        self._file = file
        self._seed = seed
        hashes = file.question_hashes
        self._rows = array("I", (row for row in range(len(file)) if hashes[row] not in held_out))
        if not self._rows:
            raise UserError(f"{file.path}: every question is held out; choose fewer data.validation_problems")

    def problem(self, count: int) -> Problem:
        """The problem that the source gives after `count` others."""
        epoch, place = divmod(count, len(self._rows))
        return self._file[self._rows[permuted(place, len(self._rows), "train", self._seed, self._file.digest, epoch)]]


def _open_files(sources: list[SourceConfig]) -> list[tuple[ProblemFile, ProblemFile]]:
    """Each source's file to train on and file to hold problems out of, which may be the same."""
    files: list[tuple[ProblemFile, ProblemFile]] = []
    for i, source in enumerate(sources):
        file = ProblemFile(source.path)
        for other, (earlier, _) in enumerate(files):
            if file.digest == earlier.digest:
                raise UserError(
                    f"data.sources.{i}: {source.path} holds the problems of data.sources.{other}; "
                    "give them one entry and a larger weight"
                )
        files.append((file, ProblemFile(source.validation_path) if source.validation_path else file))
    return files


def check_tasks(tasks: list[TaskConfig]) -> list[TaskConfig]:
    """The tasks with the parameters of their levels. Raises UserError, with the nearest name, for a task or parameter
    that Reasoning Gym lacks or refuses.
    """
    import reasoning_gym
    from reasoning_gym.factory import DATASETS

    found: list[TaskConfig] = []
    for i, task in enumerate(tasks):
        where = f"data.tasks.{i}"
        if task.task not in DATASETS:
            raise UserError(f"{where}.task: no such Reasoning Gym task: {task.task!r}{_nearest(task.task, DATASETS)}")
        known = {field.name for field in fields(DATASETS[task.task][1])} - {"seed", "size"}
        for name in task.params:
            if name not in known:
                raise UserError(f"{where}.params.{name}: {task.task} has no such parameter{_nearest(name, known)}")
        if task.level is not None:
            params = _level_params(task.task, task.level, where) | task.params
            task = task.model_copy(update={"level": None, "params": params})
        if any(task.task == other.task and task.params == other.params for other in found):
            raise UserError(
                f"{where}: {task.task} with these params is there twice; give it one entry and a larger weight"
            )
        try:
            reasoning_gym.create_dataset(task.task, **task.params, seed=0, size=1)[0]
        except Exception as error:
            reason = str(error).partition("\n")[0] or type(error).__name__
            raise UserError(f"{where}.params: {task.task} refuses {json.dumps(task.params)}: {reason}") from error
        found.append(task)
    return found


def _level_params(task: str, level: int, where: str) -> dict[str, Any]:
    """What a task's curriculum sets at a level from 0. An attribute with fewer levels stays at its highest; one with a
    lower and an upper bound has the lower of level 0.
    """
    from reasoning_gym.coaching import RangeAttributeDefinition
    from reasoning_gym.factory import create_curriculum, has_curriculum

    if not has_curriculum(task):
        raise UserError(f"{where}.level: {task} has no curriculum in Reasoning Gym; set its params instead")
    curriculum = create_curriculum(task)
    attributes = curriculum.attributes.values()
    highest = max(len(attribute.levels) for attribute in attributes) - 1
    if level > highest:
        raise UserError(f"{where}.level: {task} has the levels 0 to {highest}, not {level}")
    curriculum.set_global_level(level)
    config = curriculum.generate_configuration()
    names: list[str] = []
    for attribute in attributes:
        is_range = isinstance(attribute, RangeAttributeDefinition)
        names += [attribute.lower_field_name, attribute.upper_field_name] if is_range else [attribute.field_name]
    return {name: getattr(config, name) for name in names}


def _nearest(name: str, known: Any) -> str:
    nearest = difflib.get_close_matches(name, sorted(known), n=1)
    return (
        f"; did you mean {nearest[0]!r}?"
        if nearest
        else f"; there are {', '.join(sorted(known))}"
        if len(known) < 20
        else ""
    )
