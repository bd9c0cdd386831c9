r"""STEM: multiple choice by its letter, short answers by number and unit, as mathematics, or as text.

`Problem.verification` is {"answer": gold, "choices": {"A": text, ...}} for multiple choice, gold being a letter or the
text of a choice, and {"answer": gold} for a short answer. The final answer is, in the text outside thoughts, the first
of these that there is: the last `\boxed{}`; the last `<answer></answer>`; for multiple choice only, the last statement
"answer is (C)" or "Answer: C" (see `STATEMENT`).

Multiple choice: the final answer must name one letter ("C", "(c)", "C.", "option C", "C) its text"), or be the exact
text of one choice. Several letters are wrong.

Short answers: a gold number with a decimal point, a power of ten or a unit of the table (`tasks.units`) is met within
RELATIVE_TOLERANCE after conversion to its unit; an answer without a unit is taken to be in the gold's, one of
another dimension is wrong. SCP-116K (arXiv:2501.15587) states no tolerance; 1 % is ours. Other gold numbers, integers
and fractions, must be met exactly. What is no number is compared as `tasks.math` does, then as words.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from megatron_prorl.tasks import equality, normalise, numbers, quantities
from megatron_prorl.tasks import math as math_task
from megatron_prorl.tasks.answers import last_boxed, last_tagged, spoken
from megatron_prorl.tasks.units import Unit, parse_unit
from megatron_prorl.types import Problem, Verdict

RELATIVE_TOLERANCE = 0.01
KELVIN_AT_ZERO_CELSIUS = 273.15

# "answer is (C)", "the correct answer is option **C**.", "Answer: C) its text", "answer: $C$". The letter must be a
# capital and be followed by the end, punctuation, or "because": "the answer is A cat" names no letter.
STATEMENT = re.compile(
    r"(?i:answer\b[\s*_]*+(?:is|would be|must be|:)[\s:*_]*+(?:(?:option|choice)\s+)?)"
    r"(?:[\s*_$(\[{]|\\(?:text|textbf|mathrm|mathbf)\b)*+(?P<letter>[A-Z])"
    r"(?=\s*+(?:$|[.,;:)\]}*_$/&])|\s++(?:because|since|as|or|and)\b)"
)
# What stands before "=" is passed over, but not another answer: "5 or x = 3", 5 m = 3 m.
_NO_NAME = re.compile(r"[,;<>]|\\\\|\\pm|\b(?:or|and|not)\b")
_CHEMICAL = re.compile(r"(?=.*(?:\d|[A-Z].*[A-Z]))(?:\(?[A-Z][a-z]?\d*(?:\)\d*)?)+(?:\d?[+-])?")  # NaCl, Ca(OH)2, SO42-
_LETTER = re.compile(
    r"(?i:(?:final\s+|correct\s+)?(?:answer|option|choice)\b\s*(?:is)?\s*:?\s*)?\(?\s*(?P<letter>[A-Za-z])\s*(?:$|[).:]|,$|-\s|(?=\())\)?\s*(?P<text>.*)",
    re.DOTALL,
)
_SEVERAL = re.compile(r"(?:\(?\b[A-Z]\b[).:]*\s*(?:[,;/&+]|\bor\b|\band\b)\s*)+(?:or\s+|and\s+)?\(?\b[A-Z]\b(?![a-z'])")


def prepare(problem: Problem) -> None:
    """Import sympy. Raises ValueError for a gold answer that is none of the choices or that no box can hold."""
    if choices := problem.verification.get("choices"):
        gold_letter(str(problem.verification["answer"]), choices)
        math_task.prepare_sympy()
    else:
        math_task.prepare(problem)


def verify(problem: Problem, text: str) -> Verdict:
    """Reasons: "correct", "wrong", "no answer", "malformed" (a choice that names none, or nothing that can be read)."""
    if choices := problem.verification.get("choices"):
        return _verify_choice(gold_letter(str(problem.verification["answer"]), choices), choices, spoken(text))
    answer = _stated(spoken(text))
    if answer is None:
        return Verdict(score=0.0, reason="no answer")
    golds = math_task.gold_answers(problem)
    if answer in golds:
        return Verdict(score=1.0, reason="correct")
    question = "".join(message["content"] for message in problem.messages if message["role"] == "user")
    if any(math_task.is_met(gold, answer, question, is_equal) for gold in golds):
        return Verdict(score=1.0, reason="correct")
    return Verdict(score=0.0, reason="wrong" if math_task.is_readable(answer) else "malformed")


def _stated(text: str) -> str | None:
    """The last box, else the last tagged answer; None if there is neither or it is empty."""
    return last_boxed(text) or last_tagged(text) or None


def gold_letter(gold: str, choices: dict[str, str]) -> str:
    """The letter of the gold answer, a letter itself or a choice's text. Raises ValueError if it is none or several."""
    gold = gold.strip()
    if gold in choices:
        return gold
    named = [letter for letter in choices if letter == gold.strip("(). ").upper()]
    named = named or [letter for letter, choice in choices.items() if normalise.plain(choice) == normalise.plain(gold)]
    if len(named) != 1:
        raise ValueError(f"the gold answer {gold!r} is not one of the choices {', '.join(choices)}")
    return named[0]


def _verify_choice(gold: str, choices: dict[str, str], text: str) -> Verdict:
    answer = _stated(text)
    if answer is None:
        statements = [(line, match) for line in text.splitlines() for match in STATEMENT.finditer(line)]
        if not statements:
            return Verdict(score=0.0, reason="no answer")
        line, match = statements[-1]
        rest = line[match.start("letter") :]
        answer = rest if _SEVERAL.match(rest) else match["letter"]
    if len(answer) > math_task.MAX_CHARACTERS:
        return Verdict(score=0.0, reason="malformed")
    letter = _chosen(answer, choices)
    if letter is None:
        several = _SEVERAL.search(_unwrapped(answer)) or re.fullmatch(rf"[{''.join(choices)}]{{2,}}", answer)
        readable = several or normalise.words(answer)
        return Verdict(score=0.0, reason="wrong" if readable else "malformed")
    return Verdict(score=1.0, reason="correct") if letter == gold else Verdict(score=0.0, reason="wrong")


def _chosen(answer: str, choices: dict[str, str]) -> str | None:
    """The one letter that the answer names; None if it names none, several, or a letter with another's text."""
    plain = normalise.plain(answer)
    if equal := [letter for letter, choice in choices.items() if plain and normalise.plain(choice) == plain]:
        return equal[0] if len(equal) == 1 else None
    match = _LETTER.fullmatch(_unwrapped(answer))
    if match is None or (letter := match["letter"].upper()) not in choices:
        return None
    text, choice = normalise.plain(match["text"]), normalise.plain(choices[letter])
    return letter if text in ("", choice, f"({choice})") else None


def _unwrapped(answer: str) -> str:
    answer = re.sub(r"\\(?:text|textbf|mathrm|mathbf|textit|mathit|mathsf|mbox|bf|rm)\b|[{}$*]|\\[()]", " ", answer)
    return re.sub(r"\s+", " ", answer).strip()


@dataclass(frozen=True, slots=True)
class Quantity:
    value: float
    is_exact: bool  # written as an integer or a fraction
    unit_text: str
    unit: Unit | None


def quantity(text: str) -> Quantity | None:
    r"""A number with or without a unit ("9.8 \mathrm{m/s^2}", "v = 3 \times 10^8 m/s", "20\%"); None if it is none."""
    if math_task.is_excessive(text):
        return None
    name, _, value = normalise.clean(text).rpartition("=")
    if "=" in name or _NO_NAME.search(name) or numbers.number(normalise.plain(quantities.split_loosely(name)[0])):
        return None
    cleaned = re.sub(r"^pH\s+", "", value.strip())
    body, unit_text = quantities.split_loosely(cleaned)
    unit_text = unit_text or quantities.currency(text)
    plain = normalise.plain(body)
    number = numbers.number(plain)
    if number is None:
        return None
    is_exact = not re.search(r"\.\d|10\^|\d[eE]", plain)
    if number.is_percent:
        unit_text = unit_text or "%"
    try:
        return Quantity(float(number.value), is_exact, unit_text, parse_unit(unit_text))
    except OverflowError:
        return None


def is_equal(gold: str, answer: str) -> bool:
    """Whether the answer says what the gold one does, by the rules at the top of this module."""
    one, other = quantity(gold), quantity(answer)
    if one and other:
        return _is_close(one, other)
    if max(len(gold), len(answer)) <= math_task.MAX_CHARACTERS:
        formulas = [_formula_text(text) for text in (gold, answer)]
        if re.fullmatch("[A-Z][a-z]", formulas[0]):  # an element, or a word as short; CO is neither Co nor "co"
            return formulas[1] in (formulas[0], formulas[0].lower())
        if any(_CHEMICAL.fullmatch(text) for text in formulas):  # to algebra CO and Co, H2O and HO2 are products
            return formulas[0] == formulas[1]
    return math_task.is_equal(gold, answer) or _same_words(gold, answer)


def _formula_text(text: str) -> str:
    return re.sub(r"[_^{}$\s]", "", normalise.plain(text))


def _is_close(gold: Quantity, answer: Quantity) -> bool:
    value = answer.value
    if "%" in (gold.unit_text, answer.unit_text) and not (gold.unit_text and answer.unit_text):
        if answer.unit_text:
            return _is_near(value / 100, gold.value, RELATIVE_TOLERANCE)
        return any(_is_near(gold.value * scale, value, RELATIVE_TOLERANCE) for scale in (1, 0.01))  # 20 % is 20 and 0.2
    if gold.unit and answer.unit:
        converted = _convert(value, answer, gold)
        if converted is None:
            return False
        value = converted
    elif gold.unit_text and answer.unit_text and not quantities.is_same_unit_name(gold.unit_text, answer.unit_text):
        return False
    is_in_degrees = gold.unit == quantities.DEGREE == (answer.unit or gold.unit)
    tolerance = 0.0 if gold.is_exact and (gold.unit is None or is_in_degrees) else RELATIVE_TOLERANCE
    return _is_near(value, gold.value, tolerance)


def _is_near(value: float, gold: float, tolerance: float) -> bool:
    return abs(value - gold) <= (tolerance + 1e-12) * abs(gold)  # the hair is for the rounding of binary fractions


def _convert(value: float, source: Quantity, target: Quantity) -> float | None:
    """The value in the target's unit; None between dimensions. Celsius and kelvin differ by an offset."""
    assert source.unit and target.unit
    if source.unit.dimension == target.unit.dimension:
        return value * (source.unit.factor / target.unit.factor)
    celsius, kelvin = parse_unit("°C"), parse_unit("K")
    if (source.unit, target.unit) == (celsius, kelvin):
        return value + KELVIN_AT_ZERO_CELSIUS
    if (source.unit, target.unit) == (kelvin, celsius):
        return value - KELVIN_AT_ZERO_CELSIUS
    return None


def _same_words(gold: str, answer: str) -> bool:
    """Equal as words, articles aside; capitals count where they may tell apart (CO and Co, pH)."""
    if max(len(gold), len(answer)) > math_task.MAX_CHARACTERS or equality.collection(normalise.plain(answer)):
        return False
    one, other = _formula_text(gold), _formula_text(answer)
    if one == other != "":
        return True
    if any(re.search(r"\w[A-Z]", text) and " " not in text.strip() for text in (gold, answer)):
        return False
    if re.search(r"[-+=<>^/*]", one + other) or not normalise.has_words(gold):
        return False  # a formula: signs and brackets carry meaning
    without_article = [re.sub(r"^(?:the|an|a) ", "", normalise.words(text)) for text in (gold, answer)]
    return without_article[0] == without_article[1] != ""
