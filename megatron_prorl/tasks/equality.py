r"""Equality of mathematical answers by their text and by exact arithmetic, without sympy.

Numbers are compared as exact fractions and lists, tuples, intervals, sets and matrices element by element. `same`
decides where text and arithmetic suffice and asks a computer algebra system where they do not. Input must be short and
shallow (`tasks.math` sees to it).
"""

from __future__ import annotations

import re
import string
from collections.abc import Callable
from dataclasses import dataclass
from math import gcd

from megatron_prorl.tasks.normalise import has_words, plain
from megatron_prorl.tasks.numbers import number
from megatron_prorl.tasks.quantities import DEGREE, RADIAN, is_same_unit_name, measure
from megatron_prorl.tasks.units import Unit, parse_unit

Leaf = Callable[[str, str], bool]  # are two expressions (gold, answer) equal that the text alone does not decide?

MAX_ITEMS = 40  # of a list; comparing regardless of order takes up to the square of it

_POINTS = re.compile(r"(\\(?:angle|triangle|overline|overrightarrow) ?)?\{?([A-Z]{2,})\}?")  # AB, \angle ABC
_BASED = re.compile(r"^(\d+)_\{?(\d+)\}?$")
_SET_BUILDER = re.compile(
    r"^\\\{([A-Za-z])(?:\\in(?: R|\\mathbb\{R\}))?(?:\\mid|:|\|)(\1[^{}:|]*|[^{}:|]*\1[^{}:|]*)\\\}$"
)
_LHS = re.compile(
    r"^([A-Za-z](?:_\{?\w+\}?|')?|\\[A-Za-z]+|[A-Za-z]+'*\([A-Za-z]\)|[A-Z]{2,3})\s*(?:=|\\in(?![A-Za-z]))(.*)$"
)


@dataclass(frozen=True, slots=True)
class Collection:
    """A list in any notation. Ordered ones compare item by item, the others regardless of order."""

    kind: str  # "list", "set", "union", or the two brackets of a tuple or an interval, or "matrix <rows>x<columns>"
    items: tuple[str, ...]

    @property
    def is_ordered(self) -> bool:
        return self.kind not in ("list", "set", "union")


def collection(text: str) -> Collection | None:
    """What plain text lists; None if it is one expression."""
    if match := re.fullmatch(r"\\begin\{pmatrix\}(.*)\\end\{pmatrix\}", text, re.DOTALL):
        if "\\begin" in match[1]:
            return None
        rows = [row.split("&") for row in match[1].removesuffix(r"\\").split(r"\\")]
        shape = f"matrix {len(rows)}x{len(rows[0])}"
        return Collection(shape if len({len(row) for row in rows}) == 1 else "ragged", tuple(sum(rows, [])))
    parts = _split(text, ",|;")
    if len(parts) > 1:
        return Collection("list", tuple(part for part in parts if part))
    parts = _split(text, r"\\cup(?![A-Za-z])|(?<=[)\]])U(?=[(\[])")
    if len(parts) > 1:
        return Collection("union", tuple(parts))
    for opening, closing in ((r"\{", r"\}"), ("{", "}"), ("(", ")"), ("[", "]"), ("(", "]"), ("[", ")")):
        if text.startswith(opening) and text.endswith(closing) and len(text) > len(opening) + len(closing):
            inner = text[len(opening) : -len(closing)]
            if _is_level(inner):
                items = _split(inner, ",|;")
                if opening == r"\{" and not re.search(r"\\mid|:|\||\\leq|\\geq|<|>", inner):
                    return Collection("set", tuple(items))
                if opening == "{" and len(items) > 1:
                    return Collection("list", tuple(items))
                if opening not in (r"\{", "{") and len(items) > 1:
                    return Collection(opening + closing, tuple(items))
    if text.count(r"\pm") == 1:
        before, _, after = text.partition(r"\pm")
        return Collection("list", (f"{before}+{after}" if before else after, f"{before}-{after}"))
    return None


_LINE = re.compile(r"-?\d*[xyz](?:[-+]\d*[xyz])+=")  # x+y=1, which 1 does not say
_DESCENDING = re.compile(r"([^<>=\\]+)(>|\\geq)([^<>=\\]+)\2([^<>=\\]+)")
_INEQUALITY = re.compile(r"[<>]|\\[lg]eq")
_BRACKET = re.compile(r"\\[A-Za-z]+|\\.|[(\[{)\]}]", re.DOTALL)


def _is_level(text: str) -> bool:
    """Whether text closes no bracket that it did not open and opens none that it does not close."""
    depth = 0
    for match in _BRACKET.finditer(text):
        depth += (match[0] in ("(", "[", "{", r"\{")) - (match[0] in (")", "]", "}", r"\}"))
        if depth < 0:
            return False
    return depth == 0


def _split(text: str, separator: str) -> list[str]:
    """Split at separators outside brackets."""
    token = re.compile(rf"(?P<separator>{separator})|{_BRACKET.pattern}", re.DOTALL)
    parts, start, depth = [], 0, 0
    for match in token.finditer(text):
        if match["separator"] and depth <= 0:
            parts.append(text[start : match.start()])
            start = match.end()
        elif match[0] in ("(", "[", "{", r"\{"):
            depth += 1
        elif match[0] in (")", "]", "}", r"\}"):
            depth -= 1
    return [*parts, text[start:]]


def same(gold: str, answer: str, leaf: Leaf) -> bool:
    """Whether two answers are equal; `leaf` is asked about expressions that text and arithmetic do not decide."""
    left, equals, _ = answer.partition("=")
    if equals and measure(left)[1] and number(plain(measure(left)[0])) and not same(gold, left, leaf):
        return False  # 5 m = 3 m
    (gold_body, gold_unit), (answer_body, answer_unit) = measure(gold), measure(answer)
    if plain(gold) == plain(answer) != "" and (gold_unit == answer_unit or not gold_unit or not answer_unit):
        return True
    one, other = parse_unit(gold_unit), parse_unit(answer_unit)
    if one == DEGREE and _is_radian(other, answer_body):
        return _same_plain(_in_radians(gold_body), plain(answer_body), leaf, depth=0)
    if other == DEGREE and _is_radian(one, gold_body):
        return _same_plain(plain(gold_body), _in_radians(answer_body), leaf, depth=0)
    if gold_unit and answer_unit and gold_unit != answer_unit:
        if one is None or other is None:
            if not is_same_unit_name(gold_unit, answer_unit):
                return False
        elif one.dimension != other.dimension:
            return False
        else:
            values = number(plain(gold_body)), number(plain(answer_body))
            if values[0] and values[1]:
                converted = float(values[1].value) * (other.factor / one.factor)
                return abs(converted - float(values[0].value)) <= 1e-9 * abs(converted)
            if one.factor != other.factor:
                return False
    # 100,200 may be a number or a list: either reading of the gold will do
    golds, answers = ({plain(body): 0, plain(body, is_list=True): 0} for body in (gold_body, answer_body))
    return any(_same_plain(one, other, leaf, depth=0) for one in golds for other in answers)


def _is_radian(unit: Unit | None, body: str) -> bool:
    r"""Whether an angle is in radians: said so, or by the \pi in it."""
    return r"\pi" in body if unit is None else unit == RADIAN


def _in_radians(degrees: str) -> str:
    name, equals, value = plain(degrees).rpartition("=")
    return rf"{name}{equals}\frac{{({value})\pi}}{{180}}"


def _same_plain(gold: str, answer: str, leaf: Leaf, depth: int) -> bool:
    gold, answer = (_ascending(_SET_BUILDER.sub(r"\2", text)) for text in (gold, answer))
    if not gold or not answer:
        return False
    if gold == answer:
        return True
    gold_number, answer_number = number(gold), number(answer)
    if gold_number and answer_number:
        return gold_number.equals(answer_number)
    gold_based, answer_based = _BASED.match(gold), _BASED.match(answer)
    if gold_based or answer_based:  # the answer may leave out the gold's base, but must not name another one
        return gold_based is not None and gold_based[1] == answer
    if _is_time(gold):
        return False
    if max(gold.count(":"), answer.count(":")) > 1:
        return _same_ratio(gold, answer, leaf, depth)
    if _letter(gold) and _letter(gold) == _letter(answer):
        return True
    gold_list, answer_list = collection(gold), collection(answer)
    gold_named, answer_named = _named(gold), _named(answer)
    if gold_named and answer_named and depth < 3:
        return gold_named.keys() == answer_named.keys() and all(
            _same_plain(value, answer_named[name], leaf, depth + 1) for name, value in gold_named.items()
        )
    if gold_named and answer_list:
        gold_list = _in_order(gold_named)
        if answer_list.kind in ("list", "set"):
            answer_list = Collection("()", answer_list.items)
    elif answer_named and gold_list and gold_list.kind == "()":
        answer_list = _in_order(answer_named)
    if gold_list and answer_list and depth < 3:
        return _same_items(gold_list, answer_list, leaf, depth)
    if gold_list and not answer_list and len(gold_list.items) > 1 and number(answer):
        return False
    if (
        answer_list
        and not gold_list
        and len(answer_list.items) > 1
        and (number(gold) or answer_list.kind in ("list", "set"))
    ):
        return False  # candidates
    if gold_list is None and answer_list is None and "=" in answer:
        return _same_equation(gold, answer, leaf, depth)
    if "=" not in answer and _LINE.match(gold):
        return False
    if (match := _LHS.match(gold)) and "=" not in match[2] and depth < 3:
        return _same_plain(match[2], answer, leaf, depth + 1)
    if (points := _POINTS.fullmatch(gold)) and (others := _POINTS.fullmatch(answer)):
        return points[2] == others[2] or (
            points[1] is not None and "angle" in points[1] and points[2] == others[2][::-1]
        )
    if any(re.fullmatch(r"[A-Z]{2,}|no|on", text) for text in (gold, answer)):
        is_word = has_words(gold) or gold.casefold() == "no"  # to algebra HT and TH, no and on are one product
        return is_word and gold.casefold() == answer.casefold()
    return leaf(gold, answer)


def _ascending(text: str) -> str:
    """2<x<5 for 5>x>2."""
    if (match := _DESCENDING.fullmatch(text)) is None:
        return text
    sign = "<" if match[2] == ">" else r"\leq"
    return f"{match[4]}{sign}{match[3]}{sign}{match[1]}"


def _is_time(text: str) -> bool:
    """Whether a:b is 12:30 or 3:05 rather than a ratio, which would be in lowest terms."""
    match = re.fullmatch(r"(\d{1,2}):([0-5]\d)", text)
    return match is not None and (match[2][0] == "0" or gcd(int(match[1]), int(match[2])) != 1)


def _same_ratio(gold: str, answer: str, leaf: Leaf, depth: int) -> bool:
    """a:b:c, up to a common factor if all are numbers; "x:y:z =" may stand before it."""
    names, texts = zip(*(("", text) if "=" not in text else text.split("=", 1) for text in (gold, answer)), strict=True)
    parts = [_split(text, ":") for text in texts]
    if (all(names) and names[0] != names[1]) or len(parts[0]) != len(parts[1]) or depth >= 3:
        return False
    gold_values, answer_values = ([found.value for part in side if (found := number(part))] for side in parts)
    if len(gold_values) == len(answer_values) == len(parts[0]) and any(gold_values) and any(answer_values):
        scale = sum(map(abs, gold_values)) / sum(map(abs, answer_values))
        return gold_values == [scale * value for value in answer_values]
    return all(_same_plain(a, b, leaf, depth + 1) for a, b in zip(*parts, strict=True))


def _named(text: str) -> dict[str, str] | None:
    """The values by name of "x=1,y=2" or "(x,y)=(1,2)"; None if that is not what plain text is."""
    if match := re.fullmatch(r"\(([A-Za-z](?:,[A-Za-z])+)\)=\((.*)\)", text):
        pairs = list(zip(match[1].split(","), _split(match[2], ",|;"), strict=False))
        num_items = match[1].count(",") + 1 if len(pairs) == len(_split(match[2], ",|;")) else 0
    else:
        listed = collection(text)
        items = listed.items if listed and listed.kind in ("()", "list", "set") else ()
        pairs = [(m[1], m[2]) for item in items if (m := _LHS.match(item)) and "=" not in m[2]]
        num_items = len(items)
    values = dict(pairs)
    return values if len(values) == num_items > 1 else None


def _in_order(named: dict[str, str]) -> Collection:
    """The values as a tuple: in the order of the alphabet for x, y, z or neighbours in it, else as written."""
    names = sorted(named)
    is_alphabetic = "".join(names) in string.ascii_lowercase or names == ["x", "z"]
    return Collection("()", tuple(named[name] for name in (names if is_alphabetic else named)))


def _same_equation(gold: str, answer: str, leaf: Leaf, depth: int) -> bool:
    """x = 4/2 = 2 says 2; so does 2 = 4/2; but 3 = 2 and x = 3 = 2 do not: every side with a value must be the gold."""
    if "=" in gold:
        left, right = _LHS.match(gold), _LHS.match(answer)
        if left and answer == f"{left[2]}={left[1]}":
            return True
        if left and right and "=" not in left[2] and "=" not in right[2]:
            return left[1] == right[1] and depth < 3 and _same_plain(left[2], right[2], leaf, depth + 1)
        if left and number(left[2]):  # x - 3 = 0 is an equation for x = 3, not its solution
            value, _, name = answer.partition("=")
            return name == left[1] and depth < 3 and _same_plain(left[2], value, leaf, depth + 1)
        return leaf(gold, answer)
    sides = answer.split("=")
    if not all(sides) or depth >= 3 or len(sides) > 5:
        return False
    # What is equated with the answer stands on the left and has a name: f(x), \sin 30, AB
    values = sides[1:] if re.search(r"[A-Za-z]", sides[0]) else sides
    return all(_same_plain(gold, side, leaf, depth + 1) for side in values)


def _same_items(gold: Collection, answer: Collection, leaf: Leaf, depth: int) -> bool:
    if len(gold.items) != len(answer.items) or len(gold.items) > MAX_ITEMS:
        return False
    if gold.is_ordered or answer.is_ordered:
        matrices = [item.kind.startswith("matrix") for item in (gold, answer)]
        if gold.kind != answer.kind and not (any(matrices) and not all(matrices) and _is_vector(gold, answer)):
            return False
        return all(_same_plain(a, b, leaf, depth + 1) for a, b in zip(gold.items, answer.items, strict=True))
    if "union" in (gold.kind, answer.kind) and gold.kind != answer.kind:
        listed = answer if gold.kind == "union" else gold
        if listed.kind != "list" or not all(_INEQUALITY.search(item) for item in listed.items):
            return False  # x<2 or x>3 is a union
    left = list(answer.items)
    for item in gold.items:
        found = next((i for i, other in enumerate(left) if _same_plain(item, other, leaf, depth + 1)), None)
        if found is None:
            return False
        del left[found]
    return True


def _is_vector(gold: Collection, answer: Collection) -> bool:
    """Whether one is a column or a row and the other the same numbers in parentheses."""
    kinds = {gold.kind, answer.kind}
    size = len(gold.items)
    return bool(kinds & {"()", "[]"}) and bool(kinds & {f"matrix {size}x1", f"matrix 1x{size}"})


def _letter(text: str) -> str | None:
    match = re.fullmatch(r"\(?([A-Z])\)?", text)
    return match[1] if match else None
