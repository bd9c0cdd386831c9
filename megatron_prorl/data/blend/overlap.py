"""Which questions are the same: for duplicates to the letter, for evaluation sets by what they have in common.

Decontamination is Qwen2.5-Math's (arXiv:2409.12122, section 4): a question goes if it shares 13 words in a row with one
of an evaluation set and their longest common subsequence of words is more than 0.6. Of what, the paper leaves open:
here of the shorter question, beside the stretch of the longer one that it lies along. Words in a row that more than 10
evaluation questions have are boilerplate ("The first line contains a single integer t, the number of test cases") and
do not count, as in GPT-3 (arXiv:2005.14165, appendix C), which also says how short an n-gram may get: 8 words. An
evaluation question of 8 to 12 words is looked for word by word anywhere in the other; a shorter one, such as "Solve for
x", has to be the whole of the other.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

NGRAM = 13
LEAST_COMMON_RATIO = 0.6
BOILERPLATE_QUESTIONS = 10
SHORTEST = 8  # words of an evaluation question that is looked for inside others
MAX_NESTED_FRACTIONS = 8

_LAYOUT = re.compile(
    r"\\[()\[\],;:! ]|[$~]"
    r"|\\(?:left|right|(?:big|bigg)[lrm]?|q?quad|displaystyle|textstyle|limits|nolimits)(?![a-z])"
)
_FONT = re.compile(
    r"\\(?:text|textrm|textbf|textit|mathrm|mathbf|mathit|mbox|operatorname)(?:\s*\{([^{}]*)\}|(?![a-z]))"
)
_ARGUMENT = r"\s*(?:\{((?:[^{}]|\{[^{}]*\})*+)\}|(\\[a-z]+|[a-z\d]))"
_FRACTION = re.compile(rf"(\d\s*)?\\[dtc]?frac(?![a-z]){_ARGUMENT}{_ARGUMENT}")


def question_key(question: str) -> int:
    """64 bits of a question; those that differ in case, spacing and LaTeX layout alone have the same.

    Signs stay: 3 + 4 and 3 - 4 are two questions.
    """
    text = re.sub(r"\s", "", _plain(question))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest())


def words(text: str) -> list[str]:
    """Runs of letters and digits of the plain text; punctuation and LaTeX's own signs separate them."""
    return re.findall(r"[^\W_]+", _plain(text))


def _plain(text: str) -> str:
    r"""In lower case (NFKC), without LaTeX's layout: \left( is (, \text{cm} is cm, \frac{a}{b+1} is a/(b+1)."""
    text = unicodedata.normalize("NFKC", text).lower().replace("\N{FRACTION SLASH}", "/")
    text = _FONT.sub(r" \1 ", _LAYOUT.sub(" ", text))
    text = re.sub(r"([\^_])\{(\w)\}", r"\1\2", text)
    for _ in range(MAX_NESTED_FRACTIONS):
        text, found = _FRACTION.subn(_quotient, text)
        if not found:
            break
    return text


def _quotient(fraction: re.Match[str]) -> str:
    parts = [(part or "").strip() for part in (fraction[2] or fraction[3], fraction[4] or fraction[5])]
    over, under = (part if re.fullmatch(r"\\?\w+", part) else f"({part})" for part in parts)
    return f"{fraction[1]}&{over}/{under} " if fraction[1] else f" {over}/{under} "  # a mixed number is not 31/2


def common_length(one: Sequence[str], other: Sequence[str]) -> int:
    """Length of the longest common subsequence, a bit a word of `one` (Hyyrö 2004)."""
    places: dict[str, int] = defaultdict(int)
    for i, word in enumerate(one):
        places[word] |= 1 << i
    full = (1 << len(one)) - 1
    row = full
    for word in other:
        matched = row & places.get(word, 0)
        row = (row + matched | row - matched) & full
    return len(one) - row.bit_count()


@dataclass(frozen=True, slots=True)
class Hit:
    eval_set: str
    eval_row: int
    ratio: float  # `common_ratio`


class EvalQuestions:
    """The questions of the evaluation sets, found again by any 13 words in a row, or all if they are fewer: about 200
    bytes of memory a word.
    """

    def __init__(self) -> None:
        self._questions: list[tuple[str, int, list[str]]] = []
        self._grams: dict[int, list[int]] = defaultdict(list)
        self._sizes: set[int] = set()  # of the grams, in words

    def add(self, eval_set: str, row: int, question: str) -> None:
        text = words(question)
        size = min(NGRAM, len(text))
        self._sizes.add(size)
        for gram in set(_grams(text, size)):
            self._grams[gram].append(len(self._questions))
        self._questions.append((eval_set, row, text))

    def hits(self, question: str) -> list[Hit]:
        """For each evaluation set that holds this question, the first row that is it."""
        text = words(question)
        found: dict[str, Hit] = {}
        shared: set[int] = set()
        for size in self._sizes:
            if size >= SHORTEST or size == len(text):
                for gram in _grams(text, size):
                    places = self._grams.get(gram, ())
                    if size < NGRAM or len(places) <= BOILERPLATE_QUESTIONS:
                        shared.update(places)
        for place in sorted(shared):
            eval_set, row, other = self._questions[place]
            ratio = common_ratio(text, other) if len(other) >= NGRAM else 1.0
            if eval_set not in found and ratio > LEAST_COMMON_RATIO:
                found[eval_set] = Hit(eval_set, row, ratio)
        return list(found.values())


def common_ratio(one: list[str], other: list[str]) -> float:
    """The share of the shorter text that is a subsequence of the stretch of the longer one which it lies along.

    They lie as most of the words in a row that they share do; they have to share some.
    """
    short, long = sorted((one, other), key=len)
    places = {gram: i for i, gram in reversed(list(enumerate(_grams(short))))}
    starts = Counter(i - places[gram] for i, gram in enumerate(_grams(long)) if gram in places)
    start, slack = starts.most_common(1)[0][0], len(short) // 4
    return common_length(short, long[max(0, start - slack) : start + len(short) + slack]) / len(short)


def _grams(text: list[str], size: int = NGRAM) -> list[int]:
    return [hash(tuple(text[i : i + size])) for i in range(len(text) - size + 1)] if size else []
