"""The exact value of a number in plain text (`tasks.normalise`)."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

MAX_DIGITS = 400  # of a number that is read: enough for any answer, fast to calculate with
NUMBER = r"\d+\.\d*|\.?\d+"


@dataclass(frozen=True, slots=True)
class Number:
    value: Fraction  # without the percent sign: "50%" has 50
    is_percent: bool

    def equals(self, other: Number) -> bool:
        """Whether the other answers this gold: 50% by 50, the sign left out, and by 1/2; but 50 is not met by 50%."""
        if other.is_percent and not self.is_percent:
            return self.value == other.value / 100
        return self.value == other.value or (self.is_percent != other.is_percent and self.value / 100 == other.value)


_DECIMAL = re.compile(rf"(?:{NUMBER})")
_MIXED = re.compile(r"(\d+)\\frac\{(\d+)\}\{(\d+)\}")
_SCIENTIFIC = re.compile(
    rf"(?:({NUMBER})\*)?10\^(?:(\d)|\{{([+-]?\d{{1,3}})\}}|([+-]?\d{{1,3}}))|({NUMBER})[eE]([+-]?\d{{1,3}})"
)
_REPEATING = re.compile(r"(\d*)\.(\d*)\\overline\{(\d+)\}")
_FRACTION = re.compile(r"\\frac\{([^{}]*)\}\{([^{}]*)\}|\(?([^()/]*)\)?/\(?([^()/]*)\)?")


def number(text: str) -> Number | None:
    r"""The exact value of plain text: 1234.50, -\frac{3}{4}, 1\frac{1}{2}, 3/4, 2.5*10^{-3}, 12.5%; None otherwise."""
    if len(text) > MAX_DIGITS:
        return None
    body = text.removesuffix("%")
    value = _rational(body)
    return None if value is None else Number(value, is_percent=body != text)


def _rational(text: str) -> Fraction | None:
    sign = 1
    while text[:1] in ("-", "+"):
        sign, text = (-sign if text[0] == "-" else sign), text[1:]
    while len(text) > 2 and (text[0], text[-1]) in (("(", ")"), ("{", "}")) and not re.search(r"[(){}]", text[1:-1]):
        text = text[1:-1]
        while text[:1] in ("-", "+"):
            sign, text = (-sign if text[0] == "-" else sign), text[1:]
    value = _unsigned(text)
    return None if value is None else sign * value


def _unsigned(text: str) -> Fraction | None:
    if _DECIMAL.fullmatch(text):
        return Fraction(text)
    if match := _MIXED.fullmatch(text):
        whole, above, below = (int(group) for group in match.groups())
        return whole + Fraction(above, below) if below else None
    if match := _REPEATING.fullmatch(text):
        period = Fraction(int(match[3]), (10 ** len(match[3]) - 1) * 10 ** len(match[2]))
        return Fraction(f"{match[1] or 0}.{match[2] or 0}") + period
    if match := _SCIENTIFIC.fullmatch(text):
        coefficient = Fraction(match[1] or match[5] or "1")
        return coefficient * Fraction(10) ** int(match[2] or match[3] or match[4] or match[6])
    if match := _FRACTION.fullmatch(text):
        above_text, below_text = (group for group in match.groups() if group is not None)
        numerator, denominator = _signed_decimal(above_text), _signed_decimal(below_text)
        if numerator is not None and denominator:
            return numerator / denominator
    return None


def _signed_decimal(text: str) -> Fraction | None:
    sign = -1 if text.startswith("-") else 1
    text = text.lstrip("+-") if len(text) - len(text.lstrip("+-")) <= 1 else ""
    return sign * Fraction(text) if _DECIMAL.fullmatch(text) else None
