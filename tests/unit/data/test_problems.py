from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from problem_rows import row, write_parquet

from megatron_prorl.config.schema import DataConfig, SourceConfig, TaskConfig, VerifierConfig
from megatron_prorl.data.problems import Generator, TrainProblems
from megatron_prorl.errors import UserError
from megatron_prorl.tasks.gold import gold_response
from megatron_prorl.tasks.pool import VerifierPool

PROMPT = "Answer in <answer></answer>."
# The tasks of the examples, and the five whose items change with PYTHONHASHSEED or draw from global random state.
TASKS = [
    "chain_sum", "basic_arithmetic", "gcd", "letter_counting", "spell_backward", "number_sorting", "graph_color",
    "isomorphic_strings", "polynomial_multiplication", "ransom_note", "list_functions", "pool_matrix",
]  # fmt: skip
SMALL_TASKS = [  # 90, 17 * 17 and about 28,000 different questions
    TaskConfig(task="chain_sum", params={"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}),
    TaskConfig(task="gcd", params={"max_value": 17}),
    TaskConfig(task="letter_counting"),
]


# Reasoning Gym's curriculum of gcd: 2, 3, 4 or 5 numbers; values from 100 to 1,000, 10,000 or 100,000.
LEVEL_1 = {"min_numbers": 2, "max_numbers": 3, "min_value": 100, "max_value": 10_000}


def question(problem) -> str:
    return problem.messages[-1]["content"]


def generator(cfg: DataConfig, seed: int) -> Generator:
    """What TrainProblems runs in its child process, here."""
    return Generator({"cfg": cfg.model_dump(), "seed": seed})


@pytest.fixture(scope="module")
def small() -> Generator:
    return generator(DataConfig(tasks=SMALL_TASKS, validation_problems=90, system_prompt=PROMPT), seed=0)


PRINT_PROBLEMS = """
import dataclasses, json, random, sys
from megatron_prorl.config.schema import DataConfig
from megatron_prorl.data.problems import TrainProblems

random.seed(int(sys.argv[2]))
state = random.getstate()
draws = list(range(60))
if sys.argv[2] == "2":
    draws.reverse()
with TrainProblems(DataConfig(**json.loads(sys.argv[1])), seed=11) as train:
    problems = {draw: dataclasses.asdict(train.problem(draw)) for draw in draws}
    assert random.getstate() == state, "making problems disturbs the caller's randomness"
    print(json.dumps([problems[draw] for draw in range(60)] + [dataclasses.asdict(p) for p in train.held_out]))
"""


def test_the_same_seed_gives_the_same_problems_in_every_process_and_order():
    cfg = {"tasks": [{"task": task} for task in TASKS], "validation_problems": 12, "system_prompt": PROMPT}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", PRINT_PROBLEMS, json.dumps(cfg), hash_seed],
            env=os.environ | {"PYTHONHASHSEED": hash_seed},
            stdout=subprocess.PIPE,
        )
        for hash_seed in ("1", "2")
    ]
    first, second = [json.loads(process.communicate()[0]) for process in started]
    assert first == second
    assert {problem["task"] for problem in first[:60]} == set(TASKS)


def test_no_training_question_is_held_out_even_in_small_tasks(small: Generator):
    held_out = {question(problem) for problem in small.validation}
    assert len(held_out) == 90
    training = [small.problem(draw) for draw in range(10_000)]
    assert not held_out & {question(problem) for problem in training}
    assert len({problem.id for problem in training}) == 10_000, "an item came twice"


def test_validation_is_shared_out_evenly_over_the_tasks(small: Generator):
    assert Counter(problem.task for problem in small.validation) == {"chain_sum": 30, "gcd": 30, "letter_counting": 30}


def test_a_problem_says_where_it_comes_from(small: Generator):
    from reasoning_gym import create_dataset

    for problem in [small.problem(draw) for draw in (0, 5, 2000, 123_456)]:
        origin = problem.verification
        dataset = create_dataset(origin["task"], **origin["params"], seed=origin["seed"], size=1024)
        assert dataset[origin["index"]]["question"] == question(problem)
        assert dataset[origin["index"]]["answer"] == origin["answer"]
        assert problem.messages[0] == {"role": "system", "content": PROMPT}


def test_another_seed_gives_other_problems():
    cfg = DataConfig(tasks=[TaskConfig(task="chain_sum")], validation_problems=8, system_prompt=PROMPT)
    one, other = generator(cfg, 0), generator(cfg, 1)
    assert not {question(p) for p in one.validation} & {question(p) for p in other.validation}
    assert not {question(one.problem(draw)) for draw in range(8)} & {question(other.problem(draw)) for draw in range(8)}


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        ([{"task": "gdc"}], "data.tasks.0.task: no such Reasoning Gym task: 'gdc'; did you mean 'gcd'?"),
        (
            [{"task": "gcd", "params": {"max_valu": 9}}],
            "data.tasks.0.params.max_valu: gcd has no such parameter; did you mean 'max_value'?",
        ),
        (
            [{"task": "chain_sum"}, {"task": "gcd", "params": {"min_numbers": 1}}],
            'data.tasks.1.params: gcd refuses {"min_numbers": 1}: min_numbers must be at least 2',
        ),
        (
            [{"task": "gcd", "params": {"max_value": 3}}],
            "data.tasks.0: gcd: too few different problems to hold any out; "
            "choose larger params or fewer data.validation_problems",
        ),
        ([{"task": "gcd", "level": 4}], "data.tasks.0.level: gcd has the levels 0 to 3, not 4"),
        (
            [{"task": "gsm_symbolic", "level": 0}],
            "data.tasks.0.level: gsm_symbolic has no curriculum in Reasoning Gym; set its params instead",
        ),
        (
            [{"task": "gcd", "level": 1}, {"task": "gcd", "params": LEVEL_1}],
            "data.tasks.1: gcd with these params is there twice; give it one entry and a larger weight",
        ),
    ],
)
def test_a_bad_task_is_one_line(tasks: list[dict], message: str):
    with pytest.raises(UserError) as caught:
        generator(DataConfig(tasks=tasks, system_prompt=PROMPT), seed=0)
    assert str(caught.value) == message


def test_a_level_sets_the_parameters_of_the_curriculum_and_given_ones_go_before():
    tasks = [
        TaskConfig(task="gcd", level=1),
        TaskConfig(task="gcd", level=3, params={"max_value": 200}),
        TaskConfig(task="gcd"),
    ]
    made = generator(DataConfig(tasks=tasks, validation_problems=3, system_prompt=PROMPT), seed=0)
    hardest = {"min_numbers": 2, "max_numbers": 5, "min_value": 100, "max_value": 200}
    assert [problem.verification["params"] for problem in made.validation] == [LEVEL_1, hardest, {}]


def test_a_level_gives_the_problems_of_its_parameters():
    level, spelt_out = (
        generator(DataConfig(tasks=[task], validation_problems=5, system_prompt=PROMPT), seed=3)
        for task in (TaskConfig(task="gcd", level=1), TaskConfig(task="gcd", params=LEVEL_1))
    )
    assert level.validation == spelt_out.validation
    assert [level.problem(draw) for draw in range(20)] == [spelt_out.problem(draw) for draw in range(20)]


def test_a_bad_task_is_told_before_a_run_starts_anything_else():
    with pytest.raises(UserError, match="'gcd'"):
        TrainProblems(DataConfig(tasks=[TaskConfig(task="gdc")], system_prompt=PROMPT), seed=0)


def test_a_problem_maker_that_is_killed_is_replaced_and_makes_the_same_problems():
    cfg = DataConfig(tasks=SMALL_TASKS, validation_problems=3, system_prompt=PROMPT)
    with TrainProblems(cfg, seed=0) as train:
        before = train.problem(7)
        train._child.kill()
        assert train.problem(7) == before


def test_an_item_that_would_write_a_file_is_made_as_the_verifier_makes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    file = write_parquet(tmp_path / "a.parquet", [row(number) for number in range(9)])
    sources = [SourceConfig(path=str(file), weight=0)]
    cfg = DataConfig(tasks=[TaskConfig(task="codeio")], sources=sources, validation_problems=2)
    with TrainProblems(cfg, seed=0) as made:
        problem = made.problem(142)
    assert problem.id == "codeio/144745851", "another item: find one that writes"
    assert list(tmp_path.iterdir()) == [file]
    with VerifierPool(VerifierConfig(workers=1, timeout_seconds=30)) as pool:
        [verdict] = asyncio.run(pool.verify_many(problem, [gold_response(problem) or ""]))
    assert verdict.score == 1.0
