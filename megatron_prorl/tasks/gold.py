"""Gold answers: whether a problem names any that its verifier can read, and the response that should then score 1."""

from __future__ import annotations

from typing import Any

from megatron_prorl.tasks import stem
from megatron_prorl.tasks.answers import is_boxable, last_boxed
from megatron_prorl.types import Problem


def check_answers(verification: dict[str, Any], *, may_have_choices: bool) -> None:
    """Raises ValueError, the field first, for no gold answer, for one that no box holds or that is none of the choices.

    math and STEM.
    """
    answer = verification.get("answer")
    if answer is None:
        raise ValueError(f"answer: required, but not given; found {', '.join(verification) or 'nothing'}")
    choices = verification.get("choices") if may_have_choices else None
    if choices:
        texts = isinstance(choices, dict) and all(isinstance(choice, str) for choice in choices.values())
        if not texts or not isinstance(answer, str):
            raise ValueError("answer, choices: a letter or a choice's text, and an object of texts, are needed")
        try:
            stem.gold_letter(answer, choices)
        except ValueError as error:
            raise ValueError(f"answer: {error}") from None
        return
    answers = answer if isinstance(answer, list) else [answer]
    if not answers or not all(isinstance(one, str | int | float) for one in answers):
        raise ValueError(f"answer: a text or a number, or a list of at least 1, is needed, not {answer!r}")
    for text in (str(one).strip() for one in answers):
        if not is_boxable(last_boxed(text) or text):
            raise ValueError(f"answer: {text!r} is empty or its braces do not match")


def gold_response(problem: Problem) -> str | None:
    r"""The text of a right response; None where the problem names no answer.

    `verification["gold"]` is such a text. Without it, math and STEM have their answer in a `\boxed{}`, logic has it
    in <answer></answer>, code and instruction have none.
    """
    gold, answer = (problem.verification.get(key) for key in ("gold", "answer"))
    if gold is not None:
        return str(gold)
    if isinstance(answer, list):
        answer = next(iter(answer), None)
    if answer is None:
        return None
    match problem.domain:
        case "logic":
            return f"<answer>{answer}</answer>"
        case "math" | "stem":
            return rf"\boxed{{{answer}}}"
    return None
