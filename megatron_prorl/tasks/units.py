"""SI units and what is used beside them, with prefixes: from text to a factor and a dimension."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

Dimension = tuple[Fraction, ...]  # exponents of BASE
BASE = (
    "m",
    "kg",
    "s",
    "A",
    "K",
    "mol",
    "cd",
    "rad",
    "bit",
    "degC",
    "degF",
    "dB",
)  # °C has an offset: not a factor of K


@dataclass(frozen=True, slots=True)
class Unit:
    factor: float  # how many SI base units one of it is
    dimension: Dimension


def _dimension(**exponents: int) -> Dimension:
    return tuple(Fraction(exponents.get(name, 0)) for name in BASE)


_NONE = _dimension()
_ENERGY = _dimension(kg=1, m=2, s=-2)
_PRESSURE = _dimension(kg=1, m=-1, s=-2)

# Units that take prefixes, by symbol and by name: (symbols and names, factor, dimension).
_PREFIXED: tuple[tuple[str, float, Dimension], ...] = (
    ("m meter metre", 1, _dimension(m=1)),
    ("g gram gramme", 1e-3, _dimension(kg=1)),
    ("s sec secs second", 1, _dimension(s=1)),
    ("A ampere amp", 1, _dimension(A=1)),
    ("K kelvin", 1, _dimension(K=1)),
    ("mol mole", 1, _dimension(mol=1)),
    ("cd candela", 1, _dimension(cd=1)),
    ("Hz hertz", 1, _dimension(s=-1)),
    ("N newton", 1, _dimension(kg=1, m=1, s=-2)),
    ("Pa pascal", 1, _PRESSURE),
    ("bar", 1e5, _PRESSURE),
    ("J joule", 1, _ENERGY),
    ("eV electronvolt", 1.602176634e-19, _ENERGY),
    ("cal calorie", 4.184, _ENERGY),
    ("Wh", 3600, _ENERGY),
    ("Nm", 1, _ENERGY),
    ("Ah", 3600, _dimension(A=1, s=1)),
    ("W watt", 1, _dimension(kg=1, m=2, s=-3)),
    ("C coulomb", 1, _dimension(A=1, s=1)),
    ("V volt", 1, _dimension(kg=1, m=2, s=-3, A=-1)),
    ("F farad", 1, _dimension(kg=-1, m=-2, s=4, A=2)),
    ("Ω ohm", 1, _dimension(kg=1, m=2, s=-3, A=-2)),
    ("S siemens", 1, _dimension(kg=-1, m=-2, s=3, A=2)),
    ("Wb weber", 1, _dimension(kg=1, m=2, s=-2, A=-1)),
    ("T tesla", 1, _dimension(kg=1, s=-2, A=-1)),
    ("H henry", 1, _dimension(kg=1, m=2, s=-2, A=-2)),
    ("L l liter litre", 1e-3, _dimension(m=3)),
    ("M molar", 1e3, _dimension(mol=1, m=-3)),
    ("Bq becquerel", 1, _dimension(s=-1)),
    ("Gy gray Sv sievert", 1, _dimension(m=2, s=-2)),
    ("rad radian", 1, _dimension(rad=1)),
    ("B byte", 8, _dimension(bit=1)),
    ("bit", 1, _dimension(bit=1)),
    ("lm lumen", 1, _dimension(cd=1)),
    ("pc parsec", 3.0856775814913673e16, _dimension(m=1)),
)
_PLAIN: tuple[tuple[str, float, Dimension], ...] = (
    ("min mins minute", 60, _dimension(s=1)),
    ("h hr hrs hour", 3600, _dimension(s=1)),
    ("d day", 86400, _dimension(s=1)),
    ("week", 604800, _dimension(s=1)),
    ("yr year", 365.25 * 86400, _dimension(s=1)),
    ("Å angstrom", 1e-10, _dimension(m=1)),
    ("in inch inches", 0.0254, _dimension(m=1)),
    ("ft foot feet", 0.3048, _dimension(m=1)),
    ("yd yard", 0.9144, _dimension(m=1)),
    ("mi mile", 1609.344, _dimension(m=1)),
    ("AU", 149597870700, _dimension(m=1)),
    ("ly lightyear", 9.4607304725808e15, _dimension(m=1)),
    ("t ton tonne", 1e3, _dimension(kg=1)),
    ("u amu Da dalton", 1.66053906892e-27, _dimension(kg=1)),
    ("lb lbs pound", 0.45359237, _dimension(kg=1)),
    ("atm atmosphere", 101325, _PRESSURE),
    ("torr Torr mmHg", 101325 / 760, _PRESSURE),
    ("psi", 6894.757293168, _PRESSURE),
    ("erg", 1e-7, _ENERGY),
    ("hp horsepower", 745.69987158227, _dimension(kg=1, m=2, s=-3)),
    ("ha hectare", 1e4, _dimension(m=2)),
    ("rpm", 1 / 60, _dimension(s=-1)),
    ("mph", 0.44704, _dimension(m=1, s=-1)),
    ("kph kmh", 1 / 3.6, _dimension(m=1, s=-1)),
    ("cc", 1e-6, _dimension(m=3)),
    ("deg degree °", 3.141592653589793 / 180, _dimension(rad=1)),
    ("% percent pct", 0.01, _NONE),
    ("ppm", 1e-6, _NONE),
    ("°C degC celsius", 1, _dimension(degC=1)),
    ("°F degF fahrenheit", 1, _dimension(degF=1)),
    ("dB decibel", 1, _dimension(dB=1)),
)
_PREFIXES = {
    "Q": 1e30, "R": 1e27, "Y": 1e24, "Z": 1e21, "E": 1e18, "P": 1e15, "T": 1e12, "G": 1e9, "M": 1e6, "k": 1e3, "h": 1e2,
    "da": 1e1, "d": 1e-1, "c": 1e-2, "m": 1e-3, "μ": 1e-6, "u": 1e-6, "n": 1e-9, "p": 1e-12, "f": 1e-15, "a": 1e-18,
}  # fmt: skip
_PREFIX_NAMES = {
    "tera": 1e12, "giga": 1e9, "mega": 1e6, "kilo": 1e3, "centi": 1e-2, "milli": 1e-3, "micro": 1e-6, "nano": 1e-9,
    "pico": 1e-12, "femto": 1e-15,
}  # fmt: skip


def _table() -> dict[str, Unit]:
    table: dict[str, Unit] = {}
    for row, prefixed in [*((row, True) for row in _PREFIXED), *((row, False) for row in _PLAIN)]:
        names, factor, dimension = row
        for name in names.split():
            is_word = (
                len(name) > 2
                and name.islower()
                and name not in ("mol", "cal", "bar", "rad", "min", "mins", "hrs", "secs")
            )
            prefixes = (_PREFIX_NAMES if is_word else _PREFIXES) if prefixed else {}
            if name == "bit":
                prefixes = _PREFIXES | _PREFIX_NAMES
            for prefix, scale in [("", 1.0), *prefixes.items()]:
                unit = Unit(factor * scale, dimension)
                table.setdefault(prefix + name, unit)
                if is_word or name == "bit":
                    table.setdefault(prefix + name + "s", unit)
        # A unit's own symbol wins over a prefixed one: "min" is a minute, "cd" a candela, "Pa" a pascal.
        for name in names.split():
            table[name] = Unit(factor, dimension)
    return table


UNITS = _table()
_TOKEN = re.compile(r"\s*(?:(?P<name>[A-Za-zμΩÅ°%]+)|(?P<op>[*/()]|\bper\b)|(?P<one>1(?=/)))")
_EXPONENT = re.compile(r"\s*\^\s*(?:\(\s*(-?\d{1,2})\s*\)|(-?\d{1,2}))|(?<=[A-Za-z])(-?[1-9])(?![\d.])")


def parse_unit(text: str) -> Unit | None:
    """The unit that plain `text` names ("kg*m/s^2", "J/(mol K)", "meters per second"), None if it is not known.

    All that follows a slash divides, as chemists read "J/mol K" and "W/m^2*K", save what has a negative exponent of its
    own, "J/mol K^-1"; text in parentheses belongs together. ms^-1 is m s^-1, and °C in a product is K.
    """
    text = re.sub(r"\bper\b", "/", text.strip()).replace("·", "*").replace("µ", "μ")
    text = re.sub(r"(?<![A-Za-zμ])([kcm]?m)s(?=\s*\^?\s*[({]?\s*-)", r"\1 s", text)
    text = re.sub(r"\b(?:square|sq\.?)\s+(\w+)", r"\1^2", text)
    text = re.sub(r"\bcubic\s+(\w+)", r"\1^3", text)
    text = re.sub(r"([A-Za-z]+) squared\b", r"\1^2", re.sub(r"([A-Za-z]+) cubed\b", r"\1^3", text))
    if not text or len(text) > 100:
        return None
    unit, position = _product(text, 0, 0)
    return _with_kelvins(unit) if unit and not text[position:].strip() else None


def _with_kelvins(unit: Unit) -> Unit:
    """Differences of temperature as those of kelvin: all but a temperature itself."""
    exponents = dict(zip(BASE, unit.dimension, strict=True))
    if unit.dimension in (UNITS["degC"].dimension, UNITS["degF"].dimension):
        return unit
    celsius, fahrenheit = exponents.pop("degC"), exponents.pop("degF")
    exponents["K"] += celsius + fahrenheit
    dimension = tuple(exponents.get(name, Fraction(0)) for name in BASE)
    return Unit(unit.factor * (5 / 9) ** float(fahrenheit), dimension)


def _product(text: str, position: int, depth: int) -> tuple[Unit | None, int]:
    factor, dimension, sign, any_name = 1.0, _NONE, 1, False
    is_new = False  # whether a slash stands right before
    while match := _TOKEN.match(text, position):
        if match["op"] == ")":
            break
        position = match.end()
        if match["op"] in ("*", "/"):
            is_new = match["op"] == "/"
            sign = -1 if is_new else sign
            continue
        if match["one"]:
            any_name = True
            continue
        if match["op"] == "(":
            inner, position = _product(text, position, depth + 1) if depth < 5 else (None, position)
            if inner is None or text[position : position + 1] != ")":
                return None, position
            position += 1
        else:
            inner = UNITS.get(match["name"]) or UNITS.get(match["name"].lower() if len(match["name"]) > 3 else "")
        if inner is None:
            return None, position
        exponent = 1
        if power := _EXPONENT.match(text, position):
            exponent = int(power[1] or power[2] or power[3])
            position = power.end()
        if is_new or exponent > 0:
            exponent *= sign
        factor *= inner.factor**exponent
        dimension = tuple(a + exponent * b for a, b in zip(dimension, inner.dimension, strict=True))
        is_new, any_name = False, True
    return (Unit(factor, dimension) if any_name else None), position
