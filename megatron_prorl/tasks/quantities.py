"""What an answer measures and in which unit, from cleaned text (`tasks.normalise`)."""

from __future__ import annotations

import re

from megatron_prorl.tasks.normalise import TEXT, clean, plain, words
from megatron_prorl.tasks.numbers import NUMBER, number
from megatron_prorl.tasks.units import parse_unit

_UNIT_IN_TEXT = re.compile(
    TEXT + r"\s*\{(?P<unit>[^{}]*)\}\s*(?:\^\s*\{?(?P<power>-?\d)\}?|\{\^(?P<power2>-?\d)\})?\s*\.?$"
)
_GROUPED = rf"[1-9]\d{{0,2}}(?:,\d{{3}})+(?:\.\d+)?|{NUMBER}"
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
        unit = re.sub(r"\\rm(?![A-Za-z])|[{}]", "", re.sub(TEXT + r"\s*\{([^{}]*)\}", r" \1", raw))
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
