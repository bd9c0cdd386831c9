"""Suites: what an evaluation asks, as a YAML file. docs/evaluation.md has the schema.

Problems of Reasoning Gym tasks come from seeds that training and validation never use (`data.problems`). Importing this
takes neither torch nor Reasoning Gym.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError

from megatron_prorl.config.load import ConfigError, describe, read_yaml
from megatron_prorl.config.schema import NonEmpty, NonNegative, Positive, Section, TaskConfig
from megatron_prorl.data.files import ProblemFile
from megatron_prorl.data.order import permuted
from megatron_prorl.errors import UserError
from megatron_prorl.tasks.child import Child, ChildDied, ChildError
from megatron_prorl.types import Problem

FOLDER = Path(__file__).with_name("suites")
PROBLEM_TIMEOUT_SECONDS = 120.0
# Of a space that n different questions fill by no more than 80%, 2n items hold n (coupon collector).
DRAWS, DRAWS_AT_LEAST = 2, 64


Name = Annotated[str, Field(min_length=1, pattern="^[^/]*$")]  # a problem's id is NAME/ID


class TaskEntry(Section):
    task: NonEmpty = Field(description="Reasoning Gym task name")
    name: Name | None = Field(None, description="of the task in the results; by default its own")
    params: dict[str, Any] = Field(default_factory=dict, description="passed to the task's dataset")
    problems: Positive | None = Field(None, description="how many; by default problems_per_task")
    out_of_distribution: bool = Field(False, description="training has nothing like it")
    difficulty: dict[str, float] = Field(default_factory=dict, max_length=1, description="of a sweep: {vertices: 12}")


class FileEntry(Section):
    path: NonEmpty = Field(description="problem file, .jsonl or .parquet, relative to the suite's folder")
    name: Name = Field(description="of the file's problems in the results, as one task")
    problems: Positive | None = Field(None, description="how many, a seeded choice; by default all")
    out_of_distribution: bool = Field(False, description="training has nothing like it")


class SuiteConfig(Section):
    description: NonEmpty
    seed: NonNegative = 0
    problems_per_task: Positive = 50
    system_prompt: str = Field("", description="of the problems of `tasks`; those of `files` bring their own")
    tasks: list[TaskEntry] = Field(default_factory=list)
    files: list[FileEntry] = Field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Suite:
    """A suite whose file is sound. Its problems are not made yet."""

    name: str
    path: Path
    cfg: SuiteConfig

    def names(self) -> list[str]:
        """Of the tasks, in the suite's order."""
        return [entry.name or entry.task for entry in self.cfg.tasks] + [entry.name for entry in self.cfg.files]


def about_tasks(suite: Suite, problems: list[Problem]) -> dict[str, dict[str, Any]]:
    """By the names in the results: "domain", "family" (equal for the entries of one task), "out_of_distribution" and
    "difficulty" ({} or {name: value})."""
    domains = {problem.task: problem.domain for problem in problems}
    tasks = {
        entry.name or entry.task: {"family": entry.task, "difficulty": entry.difficulty} for entry in suite.cfg.tasks
    }
    tasks |= {entry.name: {"family": entry.name, "difficulty": {}} for entry in suite.cfg.files}
    outside = {entry.name or entry.task for entry in suite.cfg.tasks if entry.out_of_distribution}
    outside |= {entry.name for entry in suite.cfg.files if entry.out_of_distribution}
    return {
        name: {"domain": domains[name], "out_of_distribution": name in outside, **about}
        for name, about in tasks.items()
    }


def built_in() -> list[str]:
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def load_suite(suite: str) -> Suite:
    """A suite by its file, or by the name of one that comes with the package. Raises UserError for a bad one."""
    path = Path(suite)
    if path.suffix not in (".yaml", ".yml"):
        path = FOLDER / f"{suite}.yaml"
        if not path.is_file():
            raise UserError(f"suite: {suite}: no such suite; give a .yaml file, or one of {', '.join(built_in())}")
    try:
        cfg = SuiteConfig.model_validate(read_yaml(path), strict=True)
    except ConfigError as error:
        raise UserError(f"suite: {error.problems[0]}") from None
    except ValidationError as error:
        raise UserError(f"suite: {path}: {_first_problem(error)}") from None
    found = Suite(path.stem, path, cfg)
    names = found.names()
    if not names:
        raise UserError(f"suite: {path}: has neither tasks nor files; name something to ask")
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise UserError(f"suite: {path}: two entries are called {twice[0]}; give each a name of its own")
    return found


def make_problems(suite: Suite, on_progress: Callable[[int, int], None] = lambda done, total: None) -> list[Problem]:
    """The suite's problems, in its order; every question of a task is another. `task` of each is its entry's name.

    Raises UserError for a task, parameter or file that does not exist, for a bad row of a file, and where a task or
    file has too few different problems.
    """
    files = [_from_file(suite, entry) for entry in suite.cfg.files]
    num_items = sum(entry.problems or suite.cfg.problems_per_task for entry in suite.cfg.tasks)
    problems = _items(suite, lambda done: on_progress(done, num_items)) if suite.cfg.tasks else []
    return problems + [problem for of_file in files for problem in of_file]


def digest(problems: list[Problem]) -> str:
    """The suite's version: of every problem with what it is verified by, in order."""
    content = hashlib.blake2b(digest_size=8)
    for problem in problems:
        content.update(json.dumps(asdict(problem), sort_keys=True, default=str).encode() + b"\n")
    return content.hexdigest()


def _first_problem(error: ValidationError) -> str:
    """Of a suite's mistakes the first; `describe` knows what options a run's configuration has, not a suite's."""
    detail = error.errors()[0]
    if detail["type"] != "extra_forbidden":
        return describe(detail)[0]
    sections: dict[str, type[Section]] = {"tasks": TaskEntry, "files": FileEntry}
    section = sections.get(str(detail["loc"][0]), SuiteConfig) if len(detail["loc"]) > 1 else SuiteConfig
    where = ".".join(str(part) for part in detail["loc"])
    return f"{where}: no such option; there are {', '.join(section.model_fields)}"


def _from_file(suite: Suite, entry: FileEntry) -> list[Problem]:
    where = f"suite: {suite.path}: {entry.name}"
    try:
        file = ProblemFile(suite.path.parent / entry.path)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    number = entry.problems or len(file)
    if number > len(file):
        raise UserError(f"{where}: {file.path} has {len(file)} problems, not {number}")
    key = ("evaluation", suite.cfg.seed, file.digest)
    rows = sorted(permuted(place, len(file), *key) for place in range(number))
    return [
        replace(problem, task=entry.name, id=f"{entry.name}/{problem.id}") for problem in map(file.__getitem__, rows)
    ]


def _items(suite: Suite, on_progress: Callable[[int], None]) -> list[Problem]:
    """Reasoning Gym's, made in a child process."""
    problems: list[Problem] = []
    with closing(Child(f"{__name__}:serve", suite.cfg.model_dump())) as child:
        try:
            child.wait_ready()
            for place, entry in enumerate(suite.cfg.tasks):
                number = entry.problems or suite.cfg.problems_per_task
                child.send(place)
                for found in range(number):
                    problem = child.receive(PROBLEM_TIMEOUT_SECONDS)
                    if problem is None:
                        raise UserError(
                            f"tasks.{place}: {entry.task} gave {found} different questions and not "
                            f"{number}; ask fewer problems, or give it larger params"
                        )
                    name, number_of_item = entry.name or entry.task, problem["id"].rpartition("/")[2]
                    problems.append(Problem(**problem | {"task": name, "id": f"{name}/{number_of_item}"}))
                    on_progress(len(problems))
                child.receive(PROBLEM_TIMEOUT_SECONDS)  # the None at the end
        except UserError as error:
            raise UserError(f"suite: {suite.path}: {str(error).removeprefix('data.')}") from None
        except (ChildDied, ChildError, TimeoutError) as error:
            raise RuntimeError(f"making the problems of {suite.path} failed after {len(problems)}: {error}") from error
    return problems


def serve(argument: dict[str, Any]) -> Callable[[Any], Iterator[Any]]:
    """What the child process runs: for an entry's place its problems, all different, and None at the end."""
    import reasoning_gym  # noqa: F401  (numpy's import changes the environment)

    from megatron_prorl.data.problems import check_tasks, make_item
    from megatron_prorl.tasks.guard import forbid_side_effects

    forbid_side_effects()
    cfg = SuiteConfig(**argument)
    tasks = [TaskConfig(task=entry.task, params=entry.params) for entry in cfg.tasks]
    check_tasks(tasks)

    def handle(place: Any) -> Iterator[Any]:
        number = cfg.tasks[place].problems or cfg.problems_per_task
        asked: set[str] = set()
        for index in range(max(DRAWS * number, DRAWS_AT_LEAST)):
            if len(asked) == number:
                break
            problem = make_item(tasks[place], "evaluation", cfg.seed, index, cfg.system_prompt)
            if problem and problem.messages[-1]["content"] not in asked:
                asked.add(problem.messages[-1]["content"])
                yield asdict(problem)
        yield None

    return handle
