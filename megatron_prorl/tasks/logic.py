"""Logic: Reasoning Gym tasks, scored by the task's own `score_answer` on the last <answer></answer>, without the credit
that it pays for form alone (docs/decisions/0006).

`Problem.verification` says where the item comes from, {"task", "params", "seed", "index", "answer"}: the verifier makes
the entry again rather than read it from JSON, which turns tuples into lists and with them arc_agi's right answers into
wrong ones. `reasoning_gym` takes a second and 100 MB to import, depends on the hash seed and uses global random state:
only child processes (`tasks.child`) import it.
"""

from __future__ import annotations

import functools
import json
import random
import re
from fractions import Fraction
from typing import Any

from megatron_prorl.tasks.answers import last_tagged, spoken
from megatron_prorl.types import Problem, Verdict

# Items a dataset holds. Some tasks build all of theirs when created, and word_ladder refuses more than 20000.
DATASET_SIZE = 1024
# Tasks pay up to so much for an answer that can be read, whatever it says (docs/decisions/0006).
FORM_CREDIT = 0.1
# Theirs is a share of the right answer's length for any text that holds it, and for no other.
PAY_FOR_CONTAINING = ("chain_sum", "manipulate_matrix", "products", "tsumego")

_FUNCTION = re.compile(r"(?:a?(?:sin|cos|tan|cot|sec|csc)h?|exp|log|ln|sqrt|pi|[Aa]bs|erf|[SCE]i)")
_FORMULA = re.compile(r"(?:[^\W_]|[\s+*/^()-]|\.(?=\d)|(?<=\d)\.)+")
_ARITHMETIC = re.compile(r"(?:[\d\s.+/()-]|(?<!\*)\*(?!\*))+")
_MOVES = re.compile(r"(?:[A-Z][+-]\d+[\s,]*)+")
_TOKEN = re.compile(r"\d+(?:\.\d+)?|[^\W\d_]+|\S")


def check(verification: dict[str, Any]) -> None:
    """Raises ValueError, the field first, for what names no item; whether Reasoning Gym makes it is left open."""
    for name, kind in (("task", str), ("params", dict), ("seed", int), ("index", int)):
        if not isinstance(verification.get(name), kind) or isinstance(verification[name], bool):
            what = {str: "a text", dict: "an object", int: "a whole number"}[kind]
            raise ValueError(f"{name}: {what} is needed, not {verification.get(name)!r}")
    if not 0 <= verification["index"] < DATASET_SIZE:
        raise ValueError(f"index: expected at least 0 and less than {DATASET_SIZE}, got {verification['index']}")
    if not 0 <= verification["seed"] < 2**32:
        raise ValueError(f"seed: expected at least 0 and less than 2**32, got {verification['seed']}")


def prepare(problem: Problem) -> None:
    """Make the problem's entry, which takes up to 0.2 s, so that `verify` finds it made."""
    load(problem.verification)


def verify(problem: Problem, text: str) -> Verdict:
    """Reasons: "correct", "partly correct", "wrong", "no answer", "malformed" (the task's scorer cannot read it)."""
    dataset, entry = load(problem.verification)
    answer = extract_answer(text)
    if answer is None or (not answer and entry["answer"] != ""):  # which is what some of ab's rewrite to
        return Verdict(score=0.0, reason="no answer")
    try:
        score = score_answer(dataset, entry, answer)
    except Exception:
        # Scorers such as prime_factorization's raise on text they cannot read. One that raises without it is broken:
        # let that out.
        score_answer(dataset, entry, entry["answer"])
        return Verdict(score=0.0, reason="malformed")
    if score >= 1.0:
        return Verdict(score=1.0, reason="correct")
    return Verdict(score=score, reason="partly correct" if score > 0.0 else "wrong")


def extract_answer(text: str) -> str | None:
    """The last complete <answer></answer> outside the model's thoughts, stripped; None if there is none."""
    return last_tagged(spoken(text))


def score_answer(dataset: Any, entry: dict[str, Any], answer: str | None) -> float:
    """The task's own score, from 0 to 1, but nothing for form, for copying, or for merely containing the right answer
    (docs/decisions/0006). Raises what the task's scorer raises.
    """
    gold, task = entry["answer"], entry["metadata"].get("source_dataset")
    if answer is None:
        return 0.0
    if task == "game_of_life_halting":
        # The task's own scorer compares bool(answer) with bool("False"): any text at all would be right.
        return float(answer.lower() == gold.lower())
    is_gold = gold is not None and answer.strip() == gold.strip()
    if not is_gold and not _is_harmless(task, answer):
        return 0.0
    score = min(1.0, float(dataset.score_answer(answer, entry)))
    if is_gold:
        return score
    if score <= FORM_CREDIT or (
        score < 1.0 and (_pays_for_containing(dataset, task) or _find(answer, entry["question"]))
    ):
        return 0.0
    if gold and (match := _find(gold, answer)) and (score < 1.0 or re.search(r"[^\W_]", _around(match))):
        return (
            0.0  # other words or numbers beside it; punctuation may be there where the task's own scorer overlooks it
        )
    return score if _is_asked_for(dataset, entry, answer) else 0.0


def _pays_for_containing(dataset: Any, task: str | None) -> bool:
    from reasoning_gym.dataset import ProceduralDataset

    return task in PAY_FOR_CONTAINING or type(dataset).score_answer is ProceduralDataset.score_answer


def _find(text: str, where: str) -> re.Match[str] | None:
    """Text, whatever its case and spaces; a number not as a part of another."""
    text, where = (" ".join(_TOKEN.findall(one.casefold())) for one in (text, where))
    if not text or len(text) > len(where):
        return None
    start, end = (r"(?<![\d.])" if text[:1].isdigit() else "", r"(?![\d.])" if text[-1:].isdigit() else "")
    return re.search(start + re.escape(text) + end, where)


def _around(match: re.Match[str]) -> str:
    return match.string[: match.start()] + match.string[match.end() :]


def _is_harmless(task: str | None, answer: str) -> bool:
    """Whether an answer that goes to sympy or `eval` is a formula or a list, and nothing that works one out, as
    integrate(...), expand(...) and the scorer's own variables do; and whether others are in their notation."""
    match task:
        case "simple_integration" | "intermediate_integration" | "polynomial_multiplication":
            names = re.findall(r"[^\W\d_]+", answer)
            is_formula = _FORMULA.fullmatch(answer) is not None
            return is_formula and all(len(name) == 1 or _FUNCTION.fullmatch(name) for name in names)
        case "countdown" | "puzzle24":
            return _ARITHMETIC.fullmatch(answer) is not None
        case "binary_matrix" | "n_queens" | "spiral_matrix" | "string_insertion":
            return answer.isalpha() or re.search(r"[^\W\d]{2}", answer.replace("_", " ")) is None
        case "propositional_logic":
            return re.fullmatch(r"[A-Z\s()¬∧∨→↔]+", answer) is not None
        case "rush_hour":
            return _MOVES.fullmatch(answer) is not None
    return True


def _is_asked_for(dataset: Any, entry: dict[str, Any], answer: str) -> bool:
    """Whether the answer is what was asked for, where the task's own scorer does not look."""
    metadata = entry["metadata"]
    match metadata.get("source_dataset"):
        case "puzzle24":  # any four numbers that make 24 would do, and 24.9 is 24
            from sympy.parsing.sympy_parser import parse_expr

            numbers = sorted(int(number) for number in re.findall(r"\d+", answer))
            return numbers == sorted(metadata["numbers"]) and bool(parse_expr(answer) == 24)
        case "prime_factorization":  # 12 x 1 has the right product, too
            factors = [int(number) for number in re.findall(r"\d+", answer)]
            return all(1 < factor < metadata["number"] for factor in factors) or factors == metadata["factors"]
        case "coin_flip":  # a prefix would do, so 0 always
            return abs(Fraction(answer) / Fraction(entry["answer"]) - 1) < Fraction(1, 1000)
        case "game_of_life":  # further rows and columns would not count
            board, right = (json.loads(text) for text in (answer, entry["answer"]))
            return [len(row) for row in board] == [len(row) for row in right]
        case "propositional_logic":
            return _says_something(dataset, metadata["premises"], answer)
    return True


def _says_something(dataset: Any, premises: list[str], conclusion: str) -> bool:
    """Whether a conclusion is neither one of the premises, which follows from itself, nor true in any case."""
    from reasoning_gym.logic.propositional_logic import Expression

    said = Expression.from_string(conclusion)
    return not dataset._is_valid_conclusion([], said) and not any(
        dataset._is_valid_conclusion([premise], said) and dataset._is_valid_conclusion([said], premise)
        for premise in map(Expression.from_string, premises)
    )


@functools.lru_cache(maxsize=64)  # a group's responses come together
def _load(verification: str) -> tuple[Any, dict[str, Any]]:
    origin = json.loads(verification)
    dataset = _dataset(origin["task"], json.dumps(origin["params"], sort_keys=True), origin["seed"])
    _seed_globals(origin["seed"] + origin["index"])
    try:
        entry = dataset[origin["index"]]
    except Exception:
        _dataset.cache_clear()  # word_ladder changes itself when an item fails: the next item must not see it
        raise
    if entry["answer"] is None:
        entry["answer"] = _gold_answer(entry["metadata"])
    return dataset, entry


def _gold_answer(metadata: dict[str, Any]) -> str | None:
    """A right answer where the task has many and names none; None for rush_hour, whose puzzles take a search."""
    match metadata["source_dataset"]:
        case "boxnet":
            return json.dumps(_carry_boxes(metadata["initial_state"]))
        case "graph_color":
            return json.dumps(metadata["possible_answer"])
        case "propositional_logic":
            return metadata["example_answer"]
        case "rubiks_cube":
            return metadata["example_correct_answer"]
    return None


def _carry_boxes(squares: dict[str, list[str]]) -> list[dict[str, str]]:
    """boxnet's moves, one a turn, that carry every box to a target of its colour: along its column, then its row."""
    moves = []
    targets = [(item, place) for place, items in squares.items() for item in items if item.startswith("target_")]
    for start, box in [(place, item) for place, items in squares.items() for item in items if item.startswith("box_")]:
        target = next(target for target in targets if target[0] == box.replace("box_", "target_"))
        targets.remove(target)
        here, goal = ([float(number) for number in place.split("_")] for place in (start, target[1]))
        for axis in (0, 1):
            while here[axis] != goal[axis]:
                agent = f"Agent{here}"
                here[axis] += 1.0 if here[axis] < goal[axis] else -1.0
                moves.append({agent: f"move({box}, square{here})"})
        moves.append({f"Agent{here}": f"move({box}, {target[0]})"})
    return moves


def load(origin: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Reasoning Gym's (dataset, entry) at {"task", "params", "seed", "index"}; the same in every child process."""
    return _load(json.dumps({key: origin[key] for key in ("task", "params", "seed", "index")}))


@functools.lru_cache(maxsize=256)
def _dataset(task: str, params: str, seed: int) -> Any:
    import reasoning_gym

    _seed_globals(seed)
    return reasoning_gym.create_dataset(task, **json.loads(params), seed=seed, size=DATASET_SIZE)


def _seed_globals(seed: int) -> None:
    # list_functions and pool_matrix draw from the global generators.
    import numpy as np

    random.seed(seed)
    np.random.seed(seed)
