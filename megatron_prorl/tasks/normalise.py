r"""Equality of mathematical answers by their text and by exact arithmetic, without sympy.

In the manner of `is_equiv` of Hendrycks' MATH, OpenAI's prm800k and DeepScaleR, which strip units, \text, dollars,
percent and degree signs and write fractions one way; on top of that, numbers are compared as exact fractions and lists,
tuples, intervals, sets and matrices element by element. `same` decides where this suffices and says None where it does
not, for a computer algebra system to be asked. Input must be short and shallow (`tasks.math` sees to it).
"""

from __future__ import annotations

import re
import string
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from math import gcd

from megatron_prorl.tasks.units import Unit, parse_unit

Leaf = Callable[[str, str], bool]  # are two expressions (gold, answer) equal that the text alone does not decide?

MAX_DIGITS = 400  # of a number that is read: enough for any answer, fast to calculate with
MAX_ITEMS = 40  # of a list; comparing regardless of order takes up to the square of it

_CHARACTERS = str.maketrans(
    {
        "−": "-", "–": "-", "×": r"\times ", "·": r"\cdot ", "⋅": r"\cdot ", "÷": "/", "π": r"\pi ", "√": r"\sqrt ",
        "∞": r"\infty ", "°": r"^\circ ", "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "∪": r"\cup ", "∩": r"\cap ",
        "∈": r"\in ", "±": r"\pm ", "½": r"\frac{1}{2}", "⟨": r"\langle ", "⟩": r"\rangle ",
        "≈": r"\approx ", "，": ",", "（": "(", "）": ")", "θ": r"\theta ", "∅": r"\emptyset ", "µ": "μ", "\u00a0": " ",
        "\u202f": " ", "\u2009": " ",
    }
)  # fmt: skip
_RAISED = re.compile("[⁺⁻]?[⁰¹²³⁴⁵⁶⁷⁸⁹]+|[⁺⁻]")
_LOWERED = re.compile("[₀₁₂₃₄₅₆₇₈₉]+")
_AS_DIGITS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻₀₁₂₃₄₅₆₇₈₉", "0123456789+-0123456789")
_TEXT = (
    r"\\(?:text|textbf|textit|textrm|textsf|texttt|textnormal|mathrm|mathbf|mathit|mathsf|mbox|hbox"
    r"|ce|operatorname|boldsymbol|bm|rm)\*?"
)
_REWRITES: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"\\\\\s*\[\s*-?[\d.]+\s*\w*\s*\]", r"\\\\"),  # \\[4pt]
        (r"(?<!\\)\\[()\[\]]", " "),
        (r"\\?\$", ""),
        (r"[€£¥]|\\(?:euro|pounds)\b", ""),
        (r"\\(?:left|right|middle)\s*\.", ""),
        (r"\\(?:left|right|middle|[bB]igg?[lrm]?)(?![A-Za-z])", ""),
        (r"\\(?:displaystyle|textstyle|limits|nolimits|phantom\{\}|hfill)(?![A-Za-z])", ""),
        (r"\\[dtc]frac(?![A-Za-z])", r"\\frac"),
        (r"\\!", ""),
        (r"(?<!\\)\\[,;:> ]|\\(?:q?quad|enspace|thinspace)(?![A-Za-z])|~", " "),
        (r"\\(?:cdot|times|ast)(?![A-Za-z])", "*"),
        (r"\\div(?![A-Za-z])", "/"),
        (r"\\lbrace(?![A-Za-z])", r"\\{"),
        (r"\\rbrace(?![A-Za-z])", r"\\}"),
        (r"\\leq?(?:slant)?(?![A-Za-z])|<=", r"\\leq "),
        (r"\\geq?(?:slant)?(?![A-Za-z])|>=", r"\\geq "),
        (r"\\neq?(?![A-Za-z])|!=", r"\\neq "),
        (r"\\lt(?![A-Za-z])", "<"),
        (r"\\gt(?![A-Za-z])", ">"),
        (r"\\(?:approx|simeq)(?![A-Za-z])", "="),
        (r"\\(?:varnothing|O(?![A-Za-z]))", r"\\emptyset "),
        (r"\\(?:langle|lparen)(?![A-Za-z])", "("),
        (r"\\(?:rangle|rparen)(?![A-Za-z])", ")"),
        (r"\\(?:lbrack)(?![A-Za-z])", "["),
        (r"\\(?:rbrack)(?![A-Za-z])", "]"),
        (r"\\%", "%"),
        (rf"(?<=[\d}}])\s*(?:{_TEXT}\s*\{{\s*per\s?cent\s*\}}|per\s?cent(?![A-Za-z]))", "%"),
        (r"\\#", "#"),
        (r"\^\s*(?:\{\s*0?\.5\s*\}|0?\.5(?!\d))", "^{1/2}"),
        (r"\\log\s*_\s*(?:e(?![A-Za-z])|\{\s*e\s*\})", r"\\ln "),
        (r"(?<![A-Za-z\\])[Pp]i(?![A-Za-z])", r"\\pi "),
        (r"(?<![A-Za-z\\])(sin|cos|tan|cot|sec|csc|ln|log)(?=\s*[\\(x\d]|\s+[a-z](?![A-Za-z]))", r"\\\1 "),
        (r"(?<=\d)\s*[xX]\s*(?=10\s*\^)", "*"),
        (r"\^\s*(?:\\circ|\{\s*\\circ\s*\})\s*(?:\\(?:text|mathrm)\s*\{\s*([CF])\s*\}|([CF])\b)", r"\\text{°\1\2}"),
    )
)
_THOUSANDS_MARK = r"(?:\{,\}|,?\\!|\\[,;: ]|\\thinspace)"  # 1{,}234 and 1\,234 are never pairs, as 1,234 may be
_MARKED_THOUSANDS = re.compile(rf"(?<![\d.,])[1-9]\d{{0,2}}(?:{_THOUSANDS_MARK}\d{{3}})+(?!\d)")
_THOUSANDS_OR_BRACKET = re.compile(r"(?P<number>(?<![\d.,])[1-9]\d{0,2}(?:,\d{3})+(?!\d|,\d))|\\[{}]|[(\[)\]]")
_SPACED_THOUSANDS = re.compile(r"(?<![\d.,^_])[1-9]\d{0,2}(?: \d{3})+(?!\d| \d)")
# matrices of every style become one environment; vmatrix is a determinant
_MATRIX_ENVIRONMENT = re.compile(r"\\(begin|end)\{(?:[pbB]?matrix|smallmatrix|array)\*?\}(?:\{[clr| ]*\})?")
_DEGREES = re.compile(
    rf"\s*(?:\^\s*(?:\\circ|\{{\s*\\circ\s*\}})|\\degrees?(?![A-Za-z])|\s(?:{_TEXT}\s*\{{\s*degrees?\s*\}}|degrees?\b))"
)
_TRIGONOMETRIC = re.compile(r"(?<![A-Za-z])(?:sin|cos|tan|cot|sec|csc)(?![A-Za-df-z])")
_IN_DEGREES = re.compile(r"(\d+(?:\.\d+)?|(?<![A-Za-z])[A-Za-z]|\\[A-Za-z]+)\s*\}?°")
_UNIT_IN_TEXT = re.compile(
    _TEXT + r"\s*\{(?P<unit>[^{}]*)\}\s*(?:\^\s*\{?(?P<power>-?\d)\}?|\{\^(?P<power2>-?\d)\})?\s*\.?$"
)
_NUMBER = r"\d+\.\d*|\.?\d+"
_GROUPED = rf"[1-9]\d{{0,2}}(?:,\d{{3}})+(?:\.\d+)?|{_NUMBER}"
_MEASURE = re.compile(
    rf"(?P<body>[-+]?(?:(?:(?:{_GROUPED})\s*\*\s*)?10\s*\^\s*(?:\{{[^{{}}]*\}}|[+-]?\d{{1,3}})|(?:{_GROUPED})[eE][-+]?\d+|(?:{_GROUPED})(?:/\d+)?"
    r"|\d*\s*\\frac\s*\{\d+\}\s*\{\d+\}))(?P<unit>[^\d.,{}+\-=)\]].*)",
    re.DOTALL,
)
_GROUP = r"\{((?:[^{}\d]|[\^]-?\d|\{[^{}]*\})*)\}"
_UNIT_FRACTION = re.compile(rf"\\frac\s*{_GROUP}\s*{_GROUP}")
_UNIT_CHARACTERS = re.compile(r"[A-Za-zμΩÅ°%/*^() .\d'-]*[A-Za-zμΩÅ°%][A-Za-zμΩÅ°%/*^() .\d'-]*")
_NOT_UNITS = re.compile(
    r"(?<![A-Za-z])(?:a\.m|p\.m|[ap]m|or|and|not|to|more|less|than|if|for|as|mod|base|sin|cos|tan|log|ln|exp|sqrt|pi"
    r"|either|neither|nor|both|but|except|else|otherwise|instead|versus|vs|maybe|perhaps|possibly|probably|likely"
    r"|about|around|approx|approximately|roughly|nearly|almost|exactly|wrong|incorrect|correct|false|true|error|guess"
    r"|unsure|unknown|undefined|impossible|invalid|none|nothing|never|no|is|was|equals|mill?|quadrillions?|plus|minus|divided|multiplied"
    r"|factorial|root|power|half(?!-?li)|halves|thirds?|fifths?|sixths?|eighths?|tenths?|hundredths?|thousandths?|zero|one|two"
    r"|three|four|five|six|seven|eight|nine|ten|eleven|twelve|(?:thir|four|fif|six|seven|eigh|nine)t(?:een|y)|twenty"
    r"|forty)(?![A-Za-z])|^(?:squared|cubed)(?![A-Za-z])",
    re.IGNORECASE,
)
_MULTIPLIERS = {"dozen": 12, "hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_MULTIPLIER = re.compile(rf"(?P<name>{'|'.join(_MULTIPLIERS)})s?(?![A-Za-z])\s*(?P<unit>.*)", re.DOTALL)
_CURRENCIES = {
    r"\$": "dollars",
    "€": "euros",
    r"\euro": "euros",
    "£": "pounds sterling",
    r"\pounds": "pounds sterling",
    "¥": "yen",
}
DEGREE, RADIAN = parse_unit("°"), parse_unit("rad")
_BASED = re.compile(r"^(\d+)_\{?(\d+)\}?$")
_SET_BUILDER = re.compile(
    r"^\\\{([A-Za-z])(?:\\in(?: R|\\mathbb\{R\}))?(?:\\mid|:|\|)(\1[^{}:|]*|[^{}:|]*\1[^{}:|]*)\\\}$"
)
_LHS = re.compile(
    r"^([A-Za-z](?:_\{?\w+\}?|')?|\\[A-Za-z]+|[A-Za-z]+\([A-Za-z]\)|[A-Z]{2,3})\s*(?:=|\\in(?![A-Za-z]))(.*)$"
)


def clean(text: str) -> str:
    r"""One way of writing for what is written in many; spaces stay where they part words or mixed numbers."""
    text = _RAISED.sub(lambda match: f"^{{{match[0].translate(_AS_DIGITS)}}}", text)
    text = _LOWERED.sub(lambda match: f"_{{{match[0].translate(_AS_DIGITS)}}}", text)
    text = re.sub(r"\s+", " ", text.translate(_CHARACTERS)).strip()
    while (match := re.fullmatch(r"\\(?:boxed|fbox)\s*\{(.*)\}", text, re.DOTALL)) is not None:
        text = match[1].strip()
    text = _MARKED_THOUSANDS.sub(lambda match: re.sub(r"\D", "", match[0]), text)
    for pattern, replacement in _REWRITES:
        text = pattern.sub(replacement, text)
    text = _MATRIX_ENVIRONMENT.sub(r"\\\1{pmatrix}", text)
    text = re.sub(r"°\s*(?=(?i:celsius|fahrenheit)\b)", " ", _DEGREES.sub("°", text))
    if _TRIGONOMETRIC.search(text):
        text = _IN_DEGREES.sub(lambda match: rf"{{(\frac{{{match[1]}\pi}}{{180}})}}", text)
    # \frac12, \frac1{x}, \sqrt2 with their braces
    text = re.sub(r"\\frac\s*([0-9A-Za-z])\s*([0-9A-Za-z])", r"\\frac{\1}{\2}", text)
    text = re.sub(r"\\frac\s*([0-9A-Za-z])\s*\{", r"\\frac{\1}{", text)
    text = re.sub(r"(\\frac\s*\{[^{}]*\})\s*([0-9A-Za-z])", r"\1{\2}", text)
    text = re.sub(r"\\sqrt\s*([0-9A-Za-z])", r"\\sqrt{\1}", text)
    text = re.sub(r"(?<![A-Za-z\\])sqrt\s*\(([^()]*)\)", r"\\sqrt{\1}", text)
    text = re.sub(r"([_^])\s*\{\s*(\w)\s*\}", r"\1\2", text)
    text = re.sub(r"\s+", " ", text).strip()
    return text.rstrip(".;, ")


def plain(text: str, *, is_list: bool = False) -> str:
    r"""`clean` without \text and the like, with commas for "and" and "or", without the spaces that part no names.

    Commas that group thousands go, so that those that stay separate items: 1,234 is 1234 unless it `is_list`. In
    brackets they group only where another comma is followed by a space: (0, 1,000) is a pair, and so is (1,234).
    """
    text = re.sub(r"°(?![CF])", " ", clean(text))
    text = re.sub(_TEXT + r"\s*\{([^{}]*)\}", r" \1 ", text)
    text = re.sub(_TEXT + r"(?![A-Za-z])", "", text)
    if not is_list:
        text = _without_thousands(text)
    text = re.sub(r"\s*,?\s*(?<![A-Za-z\\])(?:or|and)(?![A-Za-z])\s*", ",", text)
    text = re.sub(r"(\d)\s+(\d+)/(\d+)\s*$", r"\1\\frac{\2}{\3}", text)  # 1 1/2 is not 11/2
    text = _SPACED_THOUSANDS.sub(lambda match: match[0].replace(" ", ""), text)  # 2 3 is not 23, but 1 000 is 1000
    text = re.sub(r"(?<![_^]\d)(?<=\d)\s+(?=\d)", ",", text)
    text = re.sub(r"(?<!\\)(\\[A-Za-z]+)\s+(?=[A-Za-z])", "\\1\0", text)  # \pi r is not \pir
    return re.sub(r"\s", "", text).replace("\0", " ").removesuffix(".")


def _without_thousands(text: str) -> str:
    groups_anywhere = re.search(r",\s", text) is not None
    depth = 0  # of brackets; the braces of LaTeX's arguments are none

    def replacement(match: re.Match[str]) -> str:
        nonlocal depth
        if match["number"]:
            return match[0].replace(",", "") if groups_anywhere or depth <= 0 else match[0]
        depth += 1 if match[0] in ("(", "[", r"\{") else -1
        return match[0]

    return _THOUSANDS_OR_BRACKET.sub(replacement, text)


def words(text: str) -> str:
    """The letters and digits of text in lower case, its words parted by one space: to compare what is no formula."""
    text = re.sub(_TEXT + r"\s*\{([^{}]*)\}", r" \1 ", clean(text))
    return " ".join(re.findall(r"[^\W_]+", text)).casefold()


def has_words(text: str) -> bool:
    """Whether plain text has words in it, which a parser of formulas takes for products, "east" for "seat"."""
    names = re.findall(
        r"[A-Za-z]{3,}",
        re.sub(r"\\[A-Za-z]+|(?:sin|cos|tan|cot|sec|csc|log|ln|exp|sqrt|pi|max|min|gcd|lcm)", " ", text),
    )
    return any(len(name) > 3 or set(name.lower()) & set("eiou") for name in names)


def split_unit(text: str) -> tuple[str, str]:
    r"""(what is measured, unit or "") of cleaned text: "5 \text{ cm}^2" -> ("5", "cm^2"), "2 dozen" -> ("24", "").

    Letters right after a number are variables ("2x", "3ab") unless marked as text. Those that stand apart are a unit if
    they are a word ("3 apples") or in the table of units.
    """
    if text.count("=") == 1 and not text.startswith("="):
        name, value = text.split("=")
        body, unit = split_unit(value.strip())
        return (text, "") if body == value.strip() else (f"{name}={body}", unit)
    if (match := _MEASURE.fullmatch(text)) is not None:
        body, raw = match["body"].strip(), re.sub(r"\^\s*\{\s*(-?\d+)\s*\}", r"^\1", match["unit"])
        raw = _UNIT_FRACTION.sub(r"(\1)/(\2)", raw)
        raw = re.sub(r"\\mu(?![A-Za-z])\s*", "μ", re.sub(r"\\Omega(?![A-Za-z])", "Ω", raw)).replace(r"\AA", "Å")
        unit = re.sub(r"\\rm(?![A-Za-z])|[{}]", "", re.sub(_TEXT + r"\s*\{([^{}]*)\}", r" \1", raw))
        unit = re.sub(r"μ\s+", "μ", unit).strip(" *.")
        if multiplied := _MULTIPLIER.fullmatch(unit):
            return _multiplied(text, body, multiplied)
        if _UNIT_CHARACTERS.fullmatch(unit) and _is_unit(unit) and unit != "%":
            is_apart = raw[0] == " " and (parse_unit(unit) or re.match(r"[A-Za-z]{3}", unit))
            if is_apart or "\\" in raw or unit == "°":
                return body, unit
    if match := _UNIT_IN_TEXT.search(text):
        body, unit = text[: match.start()].strip().removesuffix("*").strip(), match["unit"].strip()
        if power := match["power"] or match["power2"]:
            unit += f"^{power}"
        is_value = re.search(r"\d|\\pi|\\sqrt", body) and re.search(r"[\w})]$", body)
        if is_value and unit and _is_unit(unit) and not _MULTIPLIER.match(unit):
            return body, unit
    return text, ""


def _is_unit(text: str) -> bool:
    """Whether text after a number is a unit: in the table, or words that say nothing else, digits only as exponents."""
    if _NOT_UNITS.search(text):
        return False
    if parse_unit(text):
        return True
    return re.search(r"[A-Za-z]{3}", text) is not None and re.search(r"(?<!\^)(?<!\^-)\d|,", text) is None


def _multiplied(text: str, body: str, multiplier: re.Match[str]) -> tuple[str, str]:
    """5 million cm as (5000000, cm)."""
    value, unit = number(plain(body)), multiplier["unit"]
    if value is None or (unit and not _is_unit(unit)):
        return text, ""
    return str(value.value * _MULTIPLIERS[multiplier["name"]]), unit


def split_loosely(text: str) -> tuple[str, str]:
    """`split_unit` of what may also follow "about" and of a unit of the table that follows its number at once, 10kg."""
    text = re.sub(r"^(?:\\sim|about|approximately|~)\s*", "", text)
    body, unit = split_unit(text)
    if not unit and (match := re.fullmatch(r"([-+]?[\d.,]*\d)\s*([A-Za-zμΩÅ°][A-Za-zμΩÅ°/^*\d-]*)", text)):
        body, unit = (match[1], match[2]) if parse_unit(match[2]) else (body, "")
    return body, unit


def measure(text: str) -> tuple[str, str]:
    r"""`split_unit` of text as it was written, where a sign of a currency is a unit: "\$3" -> ("3", "dollars")."""
    body, unit = split_unit(clean(text))
    return body, unit or currency(text)


def currency(text: str) -> str:
    return next((name for sign, name in _CURRENCIES.items() if sign in text), "")


def is_same_unit_name(gold: str, answer: str) -> bool:
    """For units of which the table lacks one: "red apples" is "apple", "dollars per hour" is not "dollars"."""
    one, other = ({word.rstrip("s") for word in words(text).split()} for text in (gold, answer))
    if "unit" in one | other:
        return True
    return (one <= other or other <= one) and not (one ^ other) & {"per", "square", "cubic"}


@dataclass(frozen=True, slots=True)
class Number:
    value: Fraction  # without the percent sign: "50%" has 50
    is_percent: bool

    def equals(self, other: Number) -> bool:
        """Whether the other answers this gold: 50% by 50, the sign left out, and by 1/2; but 50 is not met by 50%."""
        if other.is_percent and not self.is_percent:
            return self.value == other.value / 100
        return self.value == other.value or (self.is_percent != other.is_percent and self.value / 100 == other.value)


_DECIMAL = re.compile(rf"(?:{_NUMBER})")
_MIXED = re.compile(r"(\d+)\\frac\{(\d+)\}\{(\d+)\}")
_SCIENTIFIC = re.compile(
    rf"(?:({_NUMBER})\*)?10\^(?:(\d)|\{{([+-]?\d{{1,3}})\}}|([+-]?\d{{1,3}}))|({_NUMBER})[eE]([+-]?\d{{1,3}})"
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
