r"""One way of writing for answers that are written in many: LaTeX's layout, units' marks, thousands, words.

In the manner of `is_equiv` of Hendrycks' MATH, OpenAI's prm800k and DeepScaleR, which strip units, \text, dollars,
percent and degree signs and write fractions one way.
"""

from __future__ import annotations

import re

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
TEXT = (
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
        (rf"(?<=[\d}}])\s*(?:{TEXT}\s*\{{\s*per\s?cent\s*\}}|per\s?cent(?![A-Za-z]))", "%"),
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
    rf"\s*(?:\^\s*(?:\\circ|\{{\s*\\circ\s*\}})|\\degrees?(?![A-Za-z])|\s(?:{TEXT}\s*\{{\s*degrees?\s*\}}|degrees?\b))"
)
_TRIGONOMETRIC = re.compile(r"(?<![A-Za-z])(?:sin|cos|tan|cot|sec|csc)(?![A-Za-df-z])")
_IN_DEGREES = re.compile(r"(\d+(?:\.\d+)?|(?<![A-Za-z])[A-Za-z]|\\[A-Za-z]+)\s*\}?°")


def clean(text: str) -> str:
    r"""One way of writing for what is written in many; spaces stay where they part words or mixed numbers."""
    text = _RAISED.sub(lambda match: f"^{{{match[0].translate(_AS_DIGITS)}}}", text)
    text = _LOWERED.sub(lambda match: f"_{{{match[0].translate(_AS_DIGITS)}}}", text)
    text = re.sub(r"\s+", " ", text.translate(_CHARACTERS)).strip()
    while (match := re.fullmatch(r"\\(?:boxed|fbox)\s*\{(.*)\}", text, re.DOTALL)) is not None:
        text = match[1].strip()
    if (match := re.fullmatch(TEXT + r"\s*\{\s*([-+]?\.?\d[^{}]*)\}", text)) is not None:
        text = match[1]  # \text{6 feet}
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
    text = re.sub(TEXT + r"\s*\{([^{}]*)\}", r" \1 ", text)
    text = re.sub(TEXT + r"(?![A-Za-z])", "", text)
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
    text = re.sub(TEXT + r"\s*\{([^{}]*)\}", r" \1 ", clean(text))
    return " ".join(re.findall(r"[^\W_]+", text)).casefold()


def has_words(text: str) -> bool:
    """Whether plain text has words in it, which a parser of formulas takes for products, "east" for "seat"."""
    names = re.findall(
        r"[A-Za-z]{3,}",
        re.sub(r"\\[A-Za-z]+|(?:sin|cos|tan|cot|sec|csc|log|ln|exp|sqrt|pi|max|min|gcd|lcm)", " ", text),
    )
    return any(len(name) > 3 or set(name.lower()) & set("eiou") for name in names)
