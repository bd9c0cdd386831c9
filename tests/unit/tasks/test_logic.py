from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import pytest

from megatron_prorl.config.schema import DataConfig, TaskConfig, VerifierConfig
from megatron_prorl.data.chat import begins_in_thought, render
from megatron_prorl.data.problems import Generator
from megatron_prorl.tasks import verify
from megatron_prorl.tasks.logic import extract_answer, load
from megatron_prorl.tasks.pool import VerifierPool
from megatron_prorl.types import Problem
from tests.tiny_model import make_tokenizer

TASKS = [
    "chain_sum", "basic_arithmetic", "gcd", "letter_counting", "spell_backward", "number_sorting",
    "arc_agi", "prime_factorization", "game_of_life_halting", "list_functions",
]  # fmt: skip


@pytest.fixture(scope="module")
def problems() -> list[Problem]:
    cfg = DataConfig(
        tasks=[TaskConfig(task=task) for task in TASKS],
        validation_problems=len(TASKS),
        system_prompt="Answer in <answer></answer>.",
    )
    return Generator({"cfg": cfg.model_dump(), "seed": 3}).validation


@pytest.fixture(scope="module")
def scores(problems: list[Problem]) -> dict[str, list[tuple[float, str]]]:
    """By task, the verdicts on: the right answer, a wrong one, none, the right one in thoughts only."""

    async def judge(pool: VerifierPool, problem: Problem) -> list[tuple[float, str]]:
        tokenizer = make_tokenizer()
        gold = problem.verification["answer"]
        texts = [
            f"Let me see.<answer>wrong</answer> No: <answer>{gold}</answer>",
            f"<answer>{gold}</answer> or rather <answer>x, y</answer>",
            f"the answer is {gold}",
            f"<think><answer>{gold}</answer></think>I do not know",
        ]
        if gold.isascii():  # what the toy tokenizer knows: take the path of a sampled response
            as_sampled = [tokenizer.encode(text) + [tokenizer.eos_token_id] for text in texts]
            texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in as_sampled]
        return [(verdict.score, verdict.reason) for verdict in await pool.verify_many(problem, texts)]

    async def judge_all(pool: VerifierPool) -> dict[str, list[tuple[float, str]]]:
        verdicts = await asyncio.gather(*(judge(pool, problem) for problem in problems))
        return dict(zip(TASKS, verdicts, strict=True))

    with VerifierPool(VerifierConfig(workers=1, timeout_seconds=30)) as pool:
        return asyncio.run(judge_all(pool))


@pytest.mark.parametrize("task", TASKS)
def test_a_right_answer_scores_one_and_every_other_has_its_own_reason(
    task: str, scores: dict[str, list[tuple[float, str]]]
):
    right, (wrong_score, wrong_reason), missing, thought = scores[task]
    assert right == (1.0, "correct")
    assert wrong_score == 0.0  # of itself arc_agi pays 0.05, prime_factorization 0.01 for the attempt
    assert wrong_reason in ("wrong", "malformed")
    assert missing == (0.0, "no answer")
    assert thought == (0.0, "no answer")


def test_text_that_a_scorer_cannot_read_is_a_wrong_answer_not_a_broken_verifier(
    scores: dict[str, list[tuple[float, str]]],
):
    assert scores["prime_factorization"][1] == (0.0, "malformed")


def test_game_of_life_halting_is_judged_by_its_answer(scores: dict[str, list[tuple[float, str]]]):
    assert scores["game_of_life_halting"][1] == (0.0, "wrong")  # Reasoning Gym's own scorer gives any text 1.0


def item(task: str, index: int = 0, **params: Any) -> tuple[Problem, dict[str, Any]]:
    origin = {"task": task, "params": params, "seed": 9, "index": index}
    _, entry = load(origin)
    asked = [{"role": "user", "content": entry["question"]}]
    problem = Problem(id=task, domain="logic", task=task, messages=asked, verification=origin, source="reasoning_gym")
    return problem, entry


def score(task: str, answer: Callable[[dict[str, Any]], str], index: int = 0, **params: Any) -> float:
    problem, entry = item(task, index, **params)
    return verify(problem, f"<answer>{answer(entry)}</answer>").score


def of(field: str, text: str = "{}") -> Callable[[dict[str, Any]], str]:
    return lambda entry: text.format(entry["metadata"][field])


@pytest.mark.parametrize(
    ("task", "answer"),
    [
        ("simple_integration", of("integrand", "integrate({}, X)")),
        ("simple_integration", of("integrand", "Integral({}, X)")),
        ("intermediate_integration", of("integrand", "Integral({}, x)")),
        ("polynomial_multiplication", of("polynomial_expr", "expand({})")),
        ("polynomial_multiplication", lambda entry: f"sympify('{entry['answer']}')"),
        ("puzzle24", lambda _: "6*4*1*1"),
        ("countdown", of("target", "int({})")),
        ("prime_factorization", of("number", "{} × 1")),
        ("fraction_simplification", lambda entry: "{numerator}/{denominator}".format(**entry["metadata"])),
        ("propositional_logic", lambda entry: entry["metadata"]["premises"][0]),
        ("propositional_logic", lambda entry: f"(({entry['metadata']['premises'][0]}))"),
        ("propositional_logic", lambda _: "(P ∨ ¬P)"),
        ("word_sorting", lambda entry: ", ".join(entry["metadata"]["original_words"])),
        ("word_sorting", lambda entry: ",".join([*entry["metadata"]["sorted_words"], "zebra"])),
        ("spell_backward", lambda entry: entry["answer"] + "s"),
        ("letter_jumble", lambda entry: " ".join(entry["metadata"]["scrambled_words"])),
        ("game_of_life", lambda entry: entry["answer"][:-1] + ",[1]]"),
        ("game_of_life", lambda entry: "[[" + entry["question"].rpartition("[[")[2].strip(". ")),
        ("n_queens", lambda _: r"[row.split() for row in valid_solutions[0].split('\n')]"),
        ("n_queens", lambda _: "setattr(type(self), 'score_answer', lambda *_: 1.0)"),
        ("spiral_matrix", lambda _: "oracle_answer.split()"),
        ("coin_flip", lambda _: "0"),
        ("gcd", lambda entry: entry["answer"] + "0"),
        ("acre", lambda _: "None or on or off or undetermined"),
        ("calendar_arithmetic", lambda _: "Monday"),
    ],
)
def test_no_scorer_of_a_task_pays_for_less_than_was_asked(task: str, answer: Callable[[dict[str, Any]], str]):
    assert [score(task, answer, index) for index in range(4)] == [0.0] * 4


@pytest.mark.parametrize(
    ("task", "answer", "least", "most"),
    [
        ("simple_integration", lambda entry: entry["answer"].replace(" ", ""), 1.0, 1.0),
        ("puzzle24", lambda entry: f"({entry['answer']})", 1.0, 1.0),
        ("countdown", lambda entry: f"({entry['answer']})", 1.0, 1.0),
        ("chain_sum", lambda entry: f"{int(entry['answer']):+05d}.0", 1.0, 1.0),
        ("word_sorting", lambda entry: entry["answer"].replace(" ", ""), 1.0, 1.0),
        ("coin_flip", lambda entry: f"{float(entry['answer']):.8g}", 1.0, 1.0),
        ("propositional_logic", lambda entry: f" {entry['answer']} ", 1.0, 1.0),
        ("letter_jumble", lambda entry: entry["answer"].rpartition(" ")[0] + " x", 0.5, 0.99),
        ("rectangle_count", lambda entry: str(int(entry["answer"]) + 1), 0.3, 0.99),
        ("sudoku", lambda entry: entry["answer"][:-1] + "0", 0.5, 0.99),
        ("boxnet", lambda entry: json.dumps(json.loads(entry["answer"])[:-1]), 0.2, 0.99),
    ],
)
def test_other_notations_are_right_and_what_a_task_pays_for_getting_near_stays(
    task: str, answer: Callable[[dict[str, Any]], str], least: float, most: float
):
    params = {"min_box_num": 2, "max_box_num": 3} if task == "boxnet" else {}
    for index in range(3):
        assert least <= score(task, answer, index, **params) <= most


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("<answer>1</answer><answer> 2\n</answer>", "2"),
        ("<answer>1<answer>2</answer>", "2"),
        ("<answer>1</answer> then <answer>2", "1"),
        ("<answer></answer>", ""),
        ("<answer>1", None),
        ("1</answer>", None),
        ("</answer>1<answer>", None),
        ("a</think><answer>1</answer>", "1"),
        ("<answer>1</answer></think>", None),
        ("<think><answer>1</answer>", None),
        ("<answer>1</answer><think>hm", "1"),
        ("<think>a</think>b</think><answer>1</answer>", "1"),
    ],
)
def test_the_last_answer_after_the_thoughts_counts(text: str, answer: str | None):
    assert extract_answer(text) == answer


def test_a_template_that_opens_the_thoughts_is_noticed():
    tokenizer = make_tokenizer()
    message = [{"role": "user", "content": "<think>"}]
    assert not begins_in_thought(tokenizer, render(tokenizer, message))
    tokenizer.chat_template += "{% if add_generation_prompt %}<think>\n{% endif %}"
    assert begins_in_thought(tokenizer, render(tokenizer, message))
