"""How much of a model's text stands word by word in a corpus: the creativity index of Lu et al., arXiv:2410.04265.

A word of a text is covered at L if it lies in a run of at least L words that stands in the corpus. The text's
L-uniqueness is the share of its words that are not covered, and its creativity index the sum of L-uniqueness over
L = 5, ..., 12: 8 for a text that shares no five words in a row with the corpus, 0 for a copy. This is the verbatim part
of DJ Search; its near-verbatim one, by embeddings, is left out. docs/evaluation.md has the limits.

Matches come from a suffix array of the corpus, sorted to 12 words by prefix doubling (Manber and Myers 1993).
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megatron_prorl.data.files import read_json
from megatron_prorl.errors import UserError
from megatron_prorl.evaluation.estimators import Interval, bootstrap

SHORTEST, LONGEST = 5, 12
LENGTHS = range(SHORTEST, LONGEST + 1)
SEPARATOR, UNKNOWN = 0, -1  # between documents of the corpus; a word that it does not have
MOST_WORDS = 100_000_000  # of a corpus; 9 GB while it is sorted

Ints = NDArray[np.int64]


def words(text: str) -> list[str]:
    """Runs of letters, digits and underscores, and every other visible character, without regard to case and width."""
    return re.findall(r"\w+|[^\w\s]", unicodedata.normalize("NFKC", text).casefold())


class Corpus:
    """The documents' words, and where each run of up to LONGEST of them stands."""

    def __init__(self, documents: Iterable[str]) -> None:
        self._ids: dict[str, int] = {}
        numbers: list[int] = []
        for document in documents:
            numbers += [self._ids.setdefault(word, len(self._ids) + 1) for word in words(document)]
            numbers.append(SEPARATOR)
            if len(numbers) > MOST_WORDS:
                raise UserError(f"--corpus: more than {MOST_WORDS:,} words; give a part of it")
        self.num_words = len(numbers) - numbers.count(SEPARATOR)
        self._words: Ints = np.array(numbers + [SEPARATOR] * LONGEST, dtype=np.int64)
        self._suffixes = _suffix_array(self._words[: len(numbers)], LONGEST)

    def longest_matches(self, text_T: Ints) -> Ints:
        """[T]: how many words from each place on stand in the corpus as well, LONGEST at most."""
        T = len(text_T)
        padded = np.append(text_T, np.full(LONGEST, UNKNOWN))
        low, high = np.zeros(T, dtype=np.int64), np.full(T, len(self._suffixes))
        matched = np.zeros(T, dtype=np.int64)
        active = np.arange(T)
        for depth in range(LONGEST):
            wanted = padded[active + depth]
            start = self._bound(low[active], high[active], wanted, depth)
            end = self._bound(low[active], high[active], wanted + 1, depth)
            found = (start < end) & (wanted > SEPARATOR)
            active = active[found]
            low[active], high[active] = start[found], end[found]
            matched[active] = depth + 1
        return matched

    def numbers(self, text: str) -> Ints:
        return np.array([self._ids.get(word, UNKNOWN) for word in words(text)], dtype=np.int64)

    def _bound(self, low: Ints, high: Ints, wanted: Ints, depth: int) -> Ints:
        """First suffix in each [low, high) whose word at `depth` is not below the wanted one; all agree before it."""
        low, high = low.copy(), high.copy()
        while (open_ := low < high).any():
            middle = (low + high) // 2
            places = self._suffixes[np.minimum(middle, len(self._suffixes) - 1)]
            below = self._words[places + depth] < wanted
            low = np.where(open_ & below, middle + 1, low)
            high = np.where(open_ & ~below, middle, high)
        return low


def uniqueness(corpus: Corpus, texts: Sequence[str]) -> list[list[float] | None]:
    """L-uniqueness of each text for each L of LENGTHS; None for a text of no more than SHORTEST words."""
    numbers = [corpus.numbers(text) for text in texts]
    # At once, with a word between them over which no match goes.
    joined = np.concatenate([part for of_text in numbers for part in (of_text, [UNKNOWN])] or [np.zeros(0, np.int64)])
    matched = corpus.longest_matches(joined.astype(np.int64))
    covered = np.array([_covered(matched, length) for length in LENGTHS])
    found: list[list[float] | None] = []
    start = 0
    for of_text in numbers:
        end = start + len(of_text)
        found.append((1.0 - covered[:, start:end].mean(axis=1)).tolist() if len(of_text) > SHORTEST else None)
        start = end + 1
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Creativity:
    """Of a model's texts on one task."""

    texts: int
    too_short: int
    uniqueness: list[float]  # mean over the texts, for each L of LENGTHS
    index: Interval | None  # None where all texts are too short


def creativity(corpus: Corpus, texts: Mapping[str, Sequence[str]]) -> dict[str, Creativity]:
    """By task, and "overall" as the mean over the tasks; intervals are over texts."""
    found, strata = {}, []
    for task, of_task in texts.items():
        rows = [row for row in uniqueness(corpus, of_task) if row is not None]
        values = np.array(rows).reshape(-1, len(LENGTHS))
        if rows:
            strata.append(values)
        found[task] = Creativity(
            texts=len(of_task),
            too_short=len(of_task) - len(rows),
            uniqueness=values.mean(axis=0).tolist() if rows else [],
            index=bootstrap([values.sum(axis=1)], seed=0)[0] if rows else None,
        )
    found["overall"] = Creativity(
        texts=sum(task.texts for task in found.values()),
        too_short=sum(task.too_short for task in found.values()),
        uniqueness=np.mean([values.mean(axis=0) for values in strata], axis=0).tolist() if strata else [],
        index=bootstrap([values.sum(axis=1) for values in strata], seed=0)[0] if strata else None,
    )
    return found


def read_corpus(paths: Sequence[str]) -> Iterator[str]:
    """The documents of text files, a file each, and of JSONL files, the field `text` of each row.

    Raises UserError for a file that cannot be read.
    """
    for name in paths:
        path = Path(name)
        try:
            if path.suffix != ".jsonl":
                yield path.read_text(encoding="utf-8")
                continue
            with path.open("rb") as lines:
                for number, line in enumerate(lines, 1):
                    row = read_json(line, f"--corpus: {path} line {number}")
                    if not isinstance(row, dict) or not isinstance(row.get("text"), str):
                        raise UserError(f"--corpus: {path} line {number}: expected an object with the text in 'text'")
                    yield row["text"]
        except UnicodeDecodeError:
            raise UserError(f"--corpus: {path}: not UTF-8 text") from None
        except OSError as error:
            raise UserError(f"--corpus: {path}: {(error.strerror or str(error)).lower()}") from None


def first_samples(path: Path) -> dict[str, list[str]]:
    """The text of each problem's first sample, by task, from a file of `prorl eval`'s samples.

    Raises UserError for a file that is missing or damaged.
    """
    found: dict[str, list[str]] = {}
    try:
        with path.open("rb") as lines:
            next(lines, None)  # the spec
            for number, line in enumerate(lines, 2):
                if b'"sample": 0,' not in line:
                    continue  # most lines, without the time to parse them
                row = read_json(line, f"{path} line {number}")
                try:
                    if row["sample"] == 0:
                        found.setdefault(row["problem"].partition("/")[0], []).append(row["text"])
                except (LookupError, TypeError, AttributeError):
                    raise UserError(f"{path} line {number}: not a sample; run the evaluation again") from None
    except OSError as error:
        raise UserError(f"{path}: {(error.strerror or str(error)).lower()}; --corpus needs the samples") from None
    return found


def _suffix_array(words_N: Ints, depth: int) -> Ints:
    """Places of `words_N` in the order of the `depth` words from each on."""
    rank, length = words_N, 1
    while length < depth:
        following = np.zeros(len(rank), dtype=np.int64)
        following[: max(0, len(rank) - length)] = rank[length:] + 1
        _, rank = np.unique(rank * (int(rank.max(initial=0)) + 2) + following, return_inverse=True)
        length *= 2
    return np.argsort(rank, kind="stable")


def _covered(matched_T: Ints, length: int) -> NDArray[np.bool_]:
    """[T]: whether a match of at least `length` words goes over a place."""
    starts = np.flatnonzero(matched_T >= length)
    edges = np.zeros(len(matched_T) + 1, dtype=np.int64)
    edges[starts] += 1
    np.subtract.at(edges, starts + matched_T[starts], 1)
    return np.cumsum(edges[:-1]) > 0
