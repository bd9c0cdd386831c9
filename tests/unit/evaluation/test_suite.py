"""Suites: the same problems everywhere, none of training's, and one line for what is wrong with one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from problem_rows import row, write_jsonl

from megatron_prorl.config.schema import DataConfig, TaskConfig
from megatron_prorl.data.blend.logic import HELD_OUT, task_names
from megatron_prorl.data.problems import TrainProblems
from megatron_prorl.errors import UserError
from megatron_prorl.evaluation.suite import Suite, about_tasks, built_in, digest, load_suite, make_problems
from megatron_prorl.types import Problem

SUITE: dict[str, Any] = {
    "description": "toys",
    "problems_per_task": 5,
    "system_prompt": "<answer></answer>",
    "tasks": [{"task": "gcd"}, {"task": "gcd", "name": "small", "params": {"max_value": 20}, "problems": 3}],
}


def write_suite(folder: Path, **changes: Any) -> Suite:
    path = folder / "toys.yaml"
    path.write_text(yaml.safe_dump(SUITE | changes))
    return load_suite(str(path))


def refusal(folder: Path, **changes: Any) -> str:
    with pytest.raises(UserError) as caught:
        make_problems(write_suite(folder, **changes))
    message = str(caught.value).replace(str(folder), "DIR")
    assert "\n" not in message
    return message


def test_the_suites_that_come_along_are_the_papers() -> None:
    assert built_in() == ["graph_color", "reasoning_gym", "reasoning_gym_ood"]
    assert load_suite("reasoning_gym").names() == task_names()
    assert load_suite("reasoning_gym_ood").names() == list(HELD_OUT)
    sizes = [entry.params for entry in load_suite("graph_color").cfg.tasks]
    assert sizes == [{"min_num_vertices": n, "max_num_vertices": n} for n in range(6, 21)]


def test_what_the_suites_that_come_along_say_of_their_tasks() -> None:
    def about(name: str) -> dict[str, dict[str, Any]]:
        suite = load_suite(name)
        problem = {"id": "", "domain": "logic", "messages": [], "verification": {}, "source": ""}
        return about_tasks(suite, [Problem(task=task, **problem) for task in suite.names()])

    sweep = about("graph_color")
    assert {entry["difficulty"]["vertices"] for entry in sweep.values()} == set(range(6, 21))
    assert {name for name, entry in sweep.items() if not entry["out_of_distribution"]} == {"graph_color_10"}
    assert {entry["family"] for entry in sweep.values()} == {"graph_color"}
    assert all(entry["out_of_distribution"] for entry in about("reasoning_gym_ood").values())
    plain = {"domain": "logic", "out_of_distribution": False, "family": "gcd", "difficulty": {}}
    assert about("reasoning_gym")["gcd"] == plain


def test_a_graph_has_as_many_vertices_as_its_task_says(tmp_path: Path) -> None:
    tasks = [entry.model_dump() | {"problems": 2} for entry in load_suite("graph_color").cfg.tasks[::7]]
    problems = make_problems(write_suite(tmp_path, tasks=tasks))
    found = {problem.task: problem.messages[-1]["content"] for problem in problems}
    for name, question in found.items():
        number = int(name.rpartition("_")[2])
        assert f"Vertices: {list(range(number))}" in question


def test_problems_are_in_the_suites_order_different_and_the_same_each_time(tmp_path: Path) -> None:
    problems = make_problems(write_suite(tmp_path))
    assert [problem.task for problem in problems] == ["gcd"] * 5 + ["small"] * 3
    assert len({problem.id for problem in problems}) == 8
    assert len({problem.messages[-1]["content"] for problem in problems}) == 8
    assert digest(make_problems(write_suite(tmp_path))) == digest(problems)
    assert digest(make_problems(write_suite(tmp_path, seed=1))) != digest(problems)
    assert digest(make_problems(write_suite(tmp_path, system_prompt="Now <answer></answer>"))) != digest(problems)


def test_no_item_is_one_of_training_or_validation_with_the_same_seed(tmp_path: Path) -> None:
    def origins(problems: list[Any]) -> list[int]:
        return [problem.verification["seed"] + problem.verification["index"] for problem in problems]

    asked = origins(make_problems(write_suite(tmp_path)))
    assert all(3 * 2**30 <= origin < 2**32 for origin in asked)
    with TrainProblems(DataConfig(tasks=[TaskConfig(task="gcd")], validation_problems=4), seed=0) as problems:
        used = origins([*problems.held_out, *(problems.problem(draw) for draw in range(8))])
    assert all(origin < 3 * 2**30 for origin in used)


def test_a_files_problems_are_a_seeded_choice_in_the_files_order(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "sums.jsonl", [row(number) for number in range(20)])
    files = [{"path": "sums.jsonl", "name": "sums", "problems": 6}]
    chosen = [problem.id for problem in make_problems(write_suite(tmp_path, tasks=[], files=files))]
    numbers = [int(name.removeprefix("sums/sum-")) for name in chosen]
    assert len(numbers) == 6
    assert numbers == sorted(set(numbers))
    assert numbers != list(range(6))
    whole = make_problems(write_suite(tmp_path, tasks=[], files=[{"path": "sums.jsonl", "name": "all"}]))
    assert [problem.id for problem in whole] == [f"all/sum-{number}" for number in range(20)]
    assert {problem.task for problem in whole} == {"all"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tasks": [{"task": "gdc"}]}, "tasks.0.task: no such Reasoning Gym task: 'gdc'; did you mean 'gcd'?"),
        ({"tasks": [{"task": "gcd", "params": {"max": 3}}]}, "tasks.0.params.max: gcd has no such parameter; there "),
        (
            {"tasks": [{"task": "tower_of_hanoi", "problems": 1000}]},
            "tasks.0: tower_of_hanoi gave 90 different questions and not 1000; ask fewer problems, or give it larger "
            "params",
        ),
        ({"tasks": [{"task": "gcd", "problms": 3}]}, "tasks.0.problms: no such option; there are task, name, params, "),
        ({"task": []}, "task: no such option; there are description, seed, problems_per_task, system_prompt, tasks, "),
        ({"tasks": [{"name": "x"}]}, "tasks.0.task: required, but not given"),
        ({"problems_per_task": 0}, "problems_per_task: expected at least 1, got 0"),
        ({"tasks": []}, "has neither tasks nor files; name something to ask"),
        ({"tasks": [{"task": "gcd"}] * 2}, "two entries are called gcd; give each a name of its own"),
        ({"files": [{"path": "a.jsonl", "name": "a/b"}]}, "files.0.name: String should match pattern"),
        ({"files": [{"path": "no.jsonl", "name": "no"}]}, "no: DIR/no.jsonl: no such file"),
    ],
)
def test_a_bad_entry_is_one_line(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    assert refusal(tmp_path, **changes).startswith(f"suite: DIR/toys.yaml: {message}")


def test_a_bad_row_of_a_file_is_one_line(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "sums.jsonl", [row(1), row(2, domain="maths")])
    message = refusal(tmp_path, files=[{"path": "sums.jsonl", "name": "sums"}])
    assert message == (
        "suite: DIR/toys.yaml: sums: DIR/sums.jsonl line 2: domain: expected one of code, instruction, logic, math, "
        "stem, got 'maths'"
    )


def test_a_suite_that_is_not_there_names_those_that_are(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"suite: rg: no such suite; give a .yaml file, or one of graph_color, reas"):
        load_suite("rg")
    with pytest.raises(UserError, match=r"suite: .*/none.yaml: no such file or directory"):
        load_suite(str(tmp_path / "none.yaml"))
