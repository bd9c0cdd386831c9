r"""Math: the last `\boxed{}`, accepted if either of two judges accepts it, as in ProRL (arXiv:2505.24864).

`Problem.verification` is {"answer": gold} or {"answer": [gold, ...]}, LaTeX or plain text; any one of a list will do.
The judges are `tasks.equality`, which compares text and exact numbers, and math-verify, which compares with sympy what
the former leaves open. Rational numbers are exact: 0.333333 is not 1/3. A decimal meets an irrational gold answer if it
agrees to six decimal places when rounded, as math-verify has it: 1.414214 is \sqrt{2}, 1.41421 is not.

What would keep sympy busy (towers of exponents, large factorials, sums, deep nesting, long text) is not given to it:
`is_excessive` looks at the text alone. What that misses ends at the deadline of `tasks.pool`; math-verify's own time
limits, which need the main thread and swallow what they interrupt, are off.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import re
from collections.abc import Callable
from math import gcd
from typing import Any

from megatron_prorl.tasks import equality, normalise, numbers, quantities
from megatron_prorl.tasks.answers import is_boxable, last_boxed, spoken
from megatron_prorl.tasks.units import parse_unit
from megatron_prorl.types import Problem, Verdict

MAX_CHARACTERS = 1500
MAX_NESTING = 24
MAX_COMMANDS = 200
MAX_EXPONENT_DIGITS = 4
MAX_FACTORIAL_DIGITS = 3


def prepare(problem: Problem) -> None:
    """Import sympy, so that no answer pays for it. Raises ValueError for a gold answer that no box can hold."""
    for gold in gold_answers(problem):
        if not is_boxable(gold):
            raise ValueError(f"the gold answer {gold!r} is empty or its braces do not match")
    prepare_sympy()


def prepare_sympy() -> None:
    """Import sympy and let it parse and compare once, which loads the grammar."""
    _sympy_equal("x+1", "1+x")


def gold_answers(problem: Problem) -> list[str]:
    """The accepted answers, each out of its box or dollars if it has any."""
    answers = problem.verification["answer"]
    texts = [str(answer).strip() for answer in (answers if isinstance(answers, list) else [answers])]
    if not texts:
        raise ValueError("there is no gold answer")
    return [last_boxed(text) or text for text in texts]


def verify(problem: Problem, text: str) -> Verdict:
    """Reasons: "correct", "wrong", "no answer" (no box), "malformed" (nothing reads it, or it asks too much)."""
    answer = last_boxed(spoken(text))
    if answer is None:
        return Verdict(score=0.0, reason="no answer")
    golds = gold_answers(problem)
    if answer in golds:
        return Verdict(score=1.0, reason="correct")
    question = "".join(message["content"] for message in problem.messages if message["role"] == "user")
    if any(is_met(gold, answer, question, is_equal) for gold in golds):
        return Verdict(score=1.0, reason="correct")
    return Verdict(score=0.0, reason="wrong" if is_readable(answer) else "malformed")


def is_met(gold: str, answer: str, question: str, is_equal: Callable[[str, str], bool]) -> bool:
    """Whether the answer is equal and not the question over again; 5% is 5 where the question speaks of percent."""
    golds = [gold]
    is_percent = normalise.plain(answer).endswith("%") and re.search(r"%|per\s?cent", question)
    if is_percent and numbers.number(normalise.plain(gold)) and "%" not in gold:
        golds.append(gold + "%")
    return any(is_equal(one, answer) for one in golds) and not is_echo(answer, question, gold)


def is_equal(gold: str, answer: str) -> bool:
    """Whether either judge takes the answer for the gold one; by their text alone if one of them is excessive."""
    if max(len(gold), len(answer)) > MAX_CHARACTERS:
        return False
    if is_excessive(gold) or is_excessive(answer):
        return normalise.plain(gold) == normalise.plain(answer) != ""
    return equality.same(gold, answer, _sympy_equal)


def is_echo(answer: str, question: str, gold: str) -> bool:
    r"""Whether the answer is still to be worked out: 12 \cdot 34, or 6/8 for 3/4.

    For a gold number whatever is no number by itself, if the question has numbers to begin with; for other gold answers
    what stands in the question.
    """
    if normalise.words(answer) == normalise.words(gold):
        return False
    sides = re.split(r"=|\\in(?![A-Za-z])", normalise.clean(answer))
    texts = [normalise.plain(quantities.split_loosely(side.strip())[0]) for side in sides]
    body, unit = quantities.split_loosely(normalise.clean(gold))
    gold_text, text = normalise.plain(body), texts[-1]
    if numbers.number(gold_text):
        is_angle = parse_unit(unit) == quantities.DEGREE is not None and r"\pi" in text
        has_numbers = re.search(r"\d", question) is not None
        return has_numbers and not is_angle and not any(_is_worked_out(side, gold_text, question) for side in texts)
    if not re.search(r"[-+*/^!({\\]", text.lstrip("-")) or numbers.number(text) or equality.collection(text):
        return False
    forms, gold_forms = _forms(text), _forms(gold_text)
    if forms[0] == gold_forms[0]:
        return False  # \pi/2 for \frac{\pi}{2}: another notation, no work left
    in_question = _forms_in(question)
    return (
        _stands_in(text, question)
        or forms[0] in in_question
        or (forms[1] != gold_forms[1] and forms[1] in in_question)  # (x+1)(x+1) for (x+1)^2
    )


def _is_worked_out(text: str, gold: str, question: str) -> bool:
    """Whether plain text is an integer, decimal, percentage, mixed number, fraction in lowest terms or as in the gold,
    or a power of ten that is not the question's."""
    text = text.removeprefix(r"\{").removesuffix(r"\}")
    if numbers.number(text) is None:
        return False
    if "/" in text or r"\frac" in text:
        parts = re.findall(r"\d+", text)
        return "." not in text and (gcd(int(parts[-2]), int(parts[-1])) == 1 or parts == re.findall(r"\d+", gold))
    return "^" not in text or not _stands_in(text, question)


def _stands_in(text: str, question: str) -> bool:
    spaced = r"\s*".join(re.escape(character) for character in text if character != " ")
    return re.search(rf"(?<![\w.]){spaced}(?![\w^])", normalise.clean(question[:10_000])) is not None


_FORMULA = re.compile(r"\$\$?([^$]{3,200})\$|\\\((.{3,200}?)\\\)|\\\[(.{3,200}?)\\\]", re.DOTALL)
MAX_FORMULAS = 20


@functools.lru_cache(maxsize=64)  # a group's answers meet the same question
def _forms_in(question: str) -> frozenset[str]:
    """The `_forms` of the sides of the question's formulas."""
    formulas = ["".join(match.groups(default="")) for match in _FORMULA.finditer(question[:10_000])][:MAX_FORMULAS]
    sides = (normalise.plain(side) for formula in formulas if not is_excessive(formula) for side in formula.split("="))
    return frozenset(form for side in sides if side for form in _forms(side))


def _forms(text: str) -> tuple[str, str]:
    """How sympy writes the expression, its terms in order: not worked out, and like factors and terms put together."""
    expression = _parse(text)[0]
    try:
        return str(expression), str(expression.doit()) if hasattr(expression, "doit") else text
    except Exception:  # numbers too long to print, what sympy cannot work out; its errors have no common class
        return text, text


def is_readable(answer: str) -> bool:
    """Whether anything can be made of the answer: a number, words, or what math-verify parses."""
    if is_excessive(answer):
        return False
    text = normalise.plain(answer)
    if not re.search(r"[^\W_]", text):
        return bool(re.search(r"\\(?:infty|emptyset)", text))
    if numbers.number(text) or equality.collection(text) or normalise.has_words(text):
        return True
    return any(not isinstance(item, str) for item in _parse(text))


_EXPONENT = re.compile(r"(?:\^|\*\*)\s*")
_HEAVY = re.compile(
    r"\\(?:sum|prod|i*nt|oint|lim|limsup|liminf|coprod|bigcup|bigcap|det|overbrace|underbrace)(?![A-Za-z])"
)


def is_excessive(text: str) -> bool:
    """Whether to parse or evaluate text might take long, from its looks: linear in its length, evaluating nothing."""
    if len(text) > MAX_CHARACTERS or text.count("\\") > MAX_COMMANDS or _nesting(text) > MAX_NESTING:
        return True
    if _HEAVY.search(text) or re.search(rf"\d{{{numbers.MAX_DIGITS}}}", text):
        return True
    compact = re.sub(r"\s|\\[,;:! ]|\\(?:left|right)(?![A-Za-z])|(?<=\d)(?:,|\{,\})(?=\d{3})", "", text)
    if "!" in compact and not _has_small_factorials(compact):
        return True
    if re.search(r"\\[dt]?binom", compact) and re.search(r"\d{4}", compact):
        return True
    if re.search(r"(?:\\sqrt|\\frac|-|\+|\(){12}", re.sub(r"[{}\s]", "", text)):
        return True
    return _has_excessive_power(compact)


def _nesting(text: str) -> int:
    depth = deepest = 0
    for character in text:
        if character in "{([":
            depth += 1
            deepest = max(deepest, depth)
        elif character in "})]":
            depth -= 1
    return deepest


def _has_small_factorials(text: str) -> bool:
    # n!, 7!, (n+1)!: what stands before the mark has few digits and no power, and no second mark follows
    for match in re.finditer("!", text):
        before = re.search(r"(\d+|[A-Za-z]|[)}])$", text[: match.start()])
        if text[match.end() : match.end() + 1] == "=":
            continue  # !=
        if before is None or "!!" in text:
            return False
        if before[0].isdigit() and len(before[0]) > MAX_FACTORIAL_DIGITS:
            return False
        if before[0] in ")}" and re.search(rf"\d{{{MAX_FACTORIAL_DIGITS + 1}}}|\^|!", text[: match.start()]):
            return False
    return True


def _has_excessive_power(text: str) -> bool:
    # A power is read as (what stands directly before the caret) ^ (a group or a run of digits or one character).
    for match in _EXPONENT.finditer(text):
        exponent, end = _exponent(text, match.end())
        if re.search(rf"\d{{{MAX_EXPONENT_DIGITS + 1}}}", exponent) or "!" in exponent:
            return True
        has_power = "^" in exponent or "**" in exponent
        if has_power and (not re.search(r"[A-Za-z]", re.sub(r"\\[A-Za-z]+", "", exponent)) or exponent.count("^") > 1):
            return True  # numbers in the exponent's exponent, or three storeys
        if _EXPONENT.match(text, end):
            return True  # 9^9^9
        base = text[: match.start()]
        if base.endswith((")", "}", "]")) and len(re.findall(r"\d", exponent)) > 1:
            group = base[_opening(base) :]
            if "^" in group or "!" in group or re.search(r"\d{5}", group):
                return True
        digits = re.search(r"\d+$", base)
        if digits and len(digits[0]) * _value(exponent) > 20_000:
            return True
    return False


def _exponent(text: str, start: int) -> tuple[str, int]:
    if text[start : start + 1] in ("{", "("):
        depth = 0
        for end in range(start, len(text)):
            depth += (text[end] in "{(") - (text[end] in "})")
            if depth == 0:
                return text[start : end + 1], end + 1
        return text[start:], len(text)
    match = re.compile(r"[-+]?(?:\d+|\\[A-Za-z]+|.)", re.DOTALL).match(text, start)
    return (match[0], match.end()) if match else ("", start)


def _opening(text: str) -> int:
    depth = 0
    for start in range(len(text) - 1, -1, -1):
        depth += (text[start] in "})]") - (text[start] in "{([")
        if depth == 0:
            return start
    return 0


def _value(exponent: str) -> int:
    return max((int(digits) for digits in re.findall(r"\d+", exponent)), default=0)


def _sympy_equal(gold: str, answer: str) -> bool:
    if normalise.has_words(gold) or normalise.has_words(answer):
        return normalise.words(gold) == normalise.words(answer) != ""
    if gold.endswith("+C"):
        answer = re.sub(r"\+c$", "+C", answer)  # the constant of an integral has no name of its own
    if _differ_in_case(gold, answer) or any(_OPEN.search(text) for text in (gold, answer)):
        return False
    if len(_MARK.findall(gold)) != len(_MARK.findall(answer)):
        return False
    one, other = _parse(gold), _parse(answer)
    accepted = _math_verify().verify(one, other, allow_set_relation_comp=True, timeout_seconds=None)
    return bool(accepted) and not _differ_by_little(one[0], other[0])


_SYMBOL = re.compile(r"\\[A-Za-z]+|[A-Za-z]")
# 2\ldots, 1..3; 5', which is 5 feet or minutes; d/dx of something: sympy would make a number or work it out
_OPEN = re.compile(
    r"\\[lcvd]?dots|\.\.|(?<![_\w])\d+(?:\.\d+)?(?:'|\^\{?\\prime)|\\frac\{d(?:\^\d)?\}\{d[A-Za-z](?:\^\d)?\}"
)
_MARK = re.compile(r"'|\\prime|\d_")  # A' and 3_5, of which the parser sees A and 3


def _differ_in_case(gold: str, answer: str) -> bool:
    """Whether the answer has a letter in a case that the gold, which has the letter, lacks: X for x.

    math-verify's comparison of lone symbols and of e is blind to it.
    """
    letters = set(_SYMBOL.findall(gold))
    folded = {letter.casefold() for letter in letters}
    return any(letter not in letters and letter.casefold() in folded for letter in _SYMBOL.findall(answer))


def _differ_by_little(one: Any, other: Any) -> bool:
    """Whether two numbers differ after all: to math-verify, which looks at 15 digits, 1 - 2^{-100} is 1 - 2^{-101}."""
    import sympy

    if not all(isinstance(item, sympy.Expr) and item.is_number for item in (one, other)):
        return False
    if one.has(sympy.UnevaluatedExpr, sympy.Float) or other.has(sympy.UnevaluatedExpr, sympy.Float):
        return False  # a percent sign, which may stand for nothing, or what is rounded already
    try:
        difference = (one - other).doit()
        if difference.is_Rational:
            return bool(difference != 0)
        return bool(abs(difference.evalf()) > 1e-90)  # sympy looks at 100 digits to tell a number from 0
    except (TypeError, ValueError, ArithmeticError, RecursionError):  # infinities, numbers too long to print
        return False


@functools.lru_cache(maxsize=64)  # a group's answers meet the same gold
def _parse(text: str) -> list[Any]:
    """As `math_verify.parse`: [expression, text], or [text] of what is none; but x and X stay two variables there."""
    from latex2sympy2_extended.latex2sympy2 import ConversionConfig, latex2sympy, normalize_latex
    from math_verify.grader import should_treat_as_complex

    # Units are ours to take off: math-verify's way makes 5 of 5m, were m a mass or a slope.
    config = dataclasses.replace(_math_verify().LatexExtractionConfig().normalization_config, units=False)
    text = re.sub(r"\\[Dd]elta ?([A-Za-z])(?![A-Za-z_])", r"\1_{Delta}", text)  # one quantity, no product
    text = re.sub(r"(?<=\d)i(?![A-Za-z])", " i", text)  # by itself it is taken for the imaginary unit
    text = normalize_latex(text, config)
    try:
        expression = latex2sympy(
            text,
            is_real=not should_treat_as_complex(text),
            normalization_config=None,
            conversion_config=ConversionConfig(lowercase_symbols=False),
        )
    except Exception:  # its errors have no common class
        return [text]
    return [expression, text]


@functools.cache
def _math_verify() -> Any:
    import math_verify

    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its time limits are off
    return math_verify
