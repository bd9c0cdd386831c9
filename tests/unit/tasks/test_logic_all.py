"""Every task that Reasoning Gym registers, through the path of a run: made in a child process, judged in the pool."""

from __future__ import annotations

import asyncio
import re

import pytest

from megatron_prorl.config.schema import DataConfig, TaskConfig, VerifierConfig
from megatron_prorl.data.problems import TrainProblems
from megatron_prorl.errors import UserError
from megatron_prorl.tasks import logic, verify
from megatron_prorl.tasks.pool import VerifierPool
from megatron_prorl.types import Problem

# Tasks that cannot be asked with their default parameters, and why.
CANNOT = {
    # It mixes other tasks, none by default, and takes them as objects of its own, which no YAML can give: data.tasks
    # and their weights do the same.
    "composite": "Must specify at least one dataset",
}
CONTAINING = {
    "sentence": "The answer is {}",
    "remark": "{} is the answer",
    "candidates": "{} or 17",
    "twice": "{} {}",
    "more": "{}, 1",
    "longer": "{}x",
    "below": "{}\n\n7 7 7",
}
Verdicts = dict[str, tuple[float, str]]


def rush_hour_moves(question: str) -> str:
    """The moves that bring the car A out, found breadth first on the board as the question shows it."""
    rows = re.findall(r"^[A-Z.x]{6}$", question, re.MULTILINE)
    assert len(rows) == 6
    cells = {(y, x): car for y, row in enumerate(rows) for x, car in enumerate(row) if car != "."}
    cars = sorted(set(cells.values()) - {"x"})
    walls = {place for place, car in cells.items() if car == "x"}
    start, length, across = [], [], []
    for car in cars:
        places = sorted(place for place, other in cells.items() if other == car)
        across.append(places[0][0] == places[1][0])
        length.append(len(places))
        start.append(places[0][across[-1]])
    lanes = [min(place for place, other in cells.items() if other == car)[not across[i]] for i, car in enumerate(cars)]

    def cell(i: int, along: int) -> tuple[int, int]:
        return (lanes[i], along) if across[i] else (along, lanes[i])

    came_from: dict[tuple[int, ...], tuple[tuple[int, ...], str] | None] = {tuple(start): None}
    frontier = [tuple(start)]
    for state in frontier:  # grows while it is read
        if state[0] + length[0] == 6:
            moves = []
            while (step := came_from[state]) is not None:
                state, move = step
                moves.append(move)
            return " ".join(reversed(moves))
        taken = walls | {cell(i, at + k) for i, at in enumerate(state) for k in range(length[i])}
        for i, at in enumerate(state):
            for sign, ahead in (("+1", at + length[i]), ("-1", at - 1)):
                if 0 <= ahead < 6 and cell(i, ahead) not in taken:
                    following = (*state[:i], at + int(sign), *state[i + 1 :])
                    if following not in came_from:
                        came_from[following] = (state, cars[i] + sign)
                        frontier.append(following)
    raise AssertionError(f"no way out of\n{question}")


# Tasks whose entries come without a right answer: how one is found.
SOLVED_HERE = {"rush_hour": rush_hour_moves}


@pytest.fixture(scope="module")
def registered() -> list[str]:
    from reasoning_gym.factory import DATASETS

    return sorted(DATASETS)


@pytest.fixture(scope="module")
def problems(registered: list[str]) -> dict[str, Problem]:
    tasks = [TaskConfig(task=task) for task in registered if task not in CANNOT]
    cfg = DataConfig(tasks=tasks, validation_problems=len(tasks), system_prompt="Answer in <answer></answer>.")
    with TrainProblems(cfg, seed=3) as made:
        return {problem.task: problem for problem in made.held_out}


@pytest.fixture(scope="module")
def verdicts(problems: dict[str, Problem]) -> dict[str, Verdicts]:
    """By task, the verdicts on: the right answer, a wrong one, an empty one, and those that contain the right one."""

    async def judge(pool: VerifierPool, task: str) -> Verdicts:
        problem = problems[task]
        question, gold = problem.messages[-1]["content"], problem.verification["answer"]
        if task in SOLVED_HERE:
            gold = SOLVED_HERE[task](question)
        answers = {"right": gold, "empty": " ", "wrong": "definitely wrong 12345", "question": question}
        answers |= {name: text.replace("{}", gold) for name, text in CONTAINING.items()}
        texts = {name: f"So <answer>{answer}</answer>" for name, answer in answers.items()}
        found = await pool.verify_many(problem, list(texts.values()))
        return {name: (verdict.score, verdict.reason) for name, verdict in zip(texts, found, strict=True)}

    async def judge_all() -> dict[str, Verdicts]:
        with VerifierPool(VerifierConfig(workers=1, timeout_seconds=30)) as pool:
            return {task: await judge(pool, task) for task in problems}

    return asyncio.run(judge_all())


def test_every_registered_task_makes_a_problem(registered: list[str], problems: dict[str, Problem]):
    assert len(registered) >= 106
    assert sorted([*problems, *CANNOT]) == registered
    assert [task for task, problem in problems.items() if problem.verification["answer"] is None] == list(SOLVED_HERE)


def test_every_right_answer_scores_one(verdicts: dict[str, Verdicts]):
    assert {task: found["right"] for task, found in verdicts.items() if found["right"] != (1.0, "correct")} == {}


def test_no_wrong_answer_scores_anything(verdicts: dict[str, Verdicts]):
    paid = {task for task, found in verdicts.items() if found["wrong"][0] > 0.0}
    assert paid == {"spell_backward"}  # for every letter that is in its place


@pytest.mark.parametrize("how", [*CONTAINING, "question"])
def test_an_answer_that_contains_the_right_one_or_repeats_the_question_scores_nothing(
    how: str, verdicts: dict[str, Verdicts]
):
    paid = {task for task, found in verdicts.items() if found[how][0] > 0.0}
    assert paid - ({"rush_hour"} if how == "twice" else set()) == set()  # there a car that is out stays out


def test_an_empty_answer_is_none(verdicts: dict[str, Verdicts]):
    assert {task: found["empty"] for task, found in verdicts.items() if found["empty"] != (0.0, "no answer")} == {}


def test_an_empty_answer_is_right_where_it_is_the_answer():
    origins = [{"task": "ab", "params": {}, "seed": 11, "index": index} for index in range(64)]
    origin = next(origin for origin in origins if logic.load(origin)[1]["answer"] == "")
    problem = Problem(id="ab/1", domain="logic", task="ab", messages=[], verification=origin, source="reasoning_gym")
    assert verify(problem, "<answer></answer>").reason == "correct"
    assert verify(problem, "nothing is left").reason == "no answer"


@pytest.mark.parametrize("task", CANNOT)
def test_a_task_that_cannot_be_asked_is_refused_in_one_line(task: str):
    with pytest.raises(UserError, match=CANNOT[task]):
        TrainProblems(DataConfig(tasks=[TaskConfig(task=task)], validation_problems=1), seed=3)


def test_boxnet_with_several_boxes_of_a_colour_knows_its_right_answer():
    for index in range(20):
        params = {"min_box_num": 2, "max_box_num": 3}
        dataset, entry = logic.load({"task": "boxnet", "params": params, "seed": 7, "index": index})
        assert logic.score_answer(dataset, entry, entry["answer"]) == 1.0
