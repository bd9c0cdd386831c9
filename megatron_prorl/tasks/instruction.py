"""Instruction following: the 25 constraint types of IFEval (arXiv:2311.07911), scored by the share that is met.

`Problem.verification` has IFEval's own fields: {"instruction_id_list": [...], "kwargs": [{...}, ...]}, one dict for
each instruction (None is an empty one, and arguments that are None are as good as absent: tables of mixed instructions
are padded with them). "mode" is "strict" (default) or "loose"; other fields, such as "prompt", are not read.

The definitions are those of IFEval's reference implementation, with these differences:

* Keywords, section marks and postscript marks are plain text, not regular expressions: "C++" is a keyword.
* Sentences are split by rule, not by NLTK's trained Punkt model, which has to be downloaded. "IT'S" is one word.
* A text without a letter is in no language; the reference takes it to be in the one asked for.
* What the reference would choose at random, because an argument is missing or senseless, is an error.
* What asks for something to be written is not met by its form alone: there are words between the quotation marks, after
  a postscript's mark, after each section's mark and after the repeated prompt; of the options of a constrained response
  one is given, not several; JSON is an object or a list with something in it.

What can still be met with little sense, as the paper defines it so: keywords, letters, placeholders, highlights and end
phrases that stand there for their own sake, and limits from above ("less than", no comma, forbidden words), which any
short text keeps. Constraints are scored alone; what the prompt asks besides is not judged.

No check takes more than linear time in the response, whatever it says.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_prorl.tasks.answers import spoken
from megatron_prorl.types import Problem, Verdict

Check = Callable[[str], bool]


def prepare(problem: Problem) -> None:
    """Read the constraints, and load the languages if one needs them (half a second). Raises ValueError as `verify`."""
    _is_loose(problem.verification)
    for check in constraints(problem.verification):
        check("any text")


def check(verification: dict[str, Any]) -> None:
    """Raises ValueError as `verify` does."""
    _is_loose(verification)
    constraints(verification)


def verify(problem: Problem, text: str) -> Verdict:
    """Score: the share of constraints that the text after the thoughts meets. An empty one meets none.

    Reasons: "correct", "partly correct", "wrong", "no answer". Raises ValueError, naming the constraint, if there is no
    such constraint or if its arguments make no sense.
    """
    checks = constraints(problem.verification)
    loose = _is_loose(problem.verification)
    response = spoken(text).strip()
    if not response:
        return Verdict(score=0.0, reason="no answer")
    met = follows(checks, response, loose=loose)
    if all(met):
        return Verdict(score=1.0, reason="correct")
    return Verdict(score=sum(met) / len(met), reason="partly correct" if any(met) else "wrong")


def follows(checks: list[Check], response: str, *, loose: bool) -> list[bool]:
    """Whether the response meets each constraint: as it stands, or (loose) in any of its `variants`."""
    texts = variants(response) if loose else [response]
    texts = [text for text in texts if text.strip()]
    return [any(check(text) for text in texts) for check in checks]


def variants(response: str) -> list[str]:
    """The loose metric's eight: without the first line, the last or both, each with and without its asterisks."""
    lines = response.split("\n")
    cuts = [response, *("\n".join(part).strip() for part in (lines[1:], lines[:-1], lines[1:-1]))]
    return [*cuts, *(cut.replace("*", "") for cut in cuts)]


def _is_loose(verification: dict[str, Any]) -> bool:
    mode = verification.get("mode", "strict")
    if mode not in ("strict", "loose"):
        raise ValueError(f"mode: {mode!r} is neither 'strict' nor 'loose'")
    return mode == "loose"


def constraints(verification: dict[str, Any]) -> list[Check]:
    """One check for each instruction. Raises ValueError that names the instruction and the argument."""
    names, arguments = verification.get("instruction_id_list"), verification.get("kwargs")
    if not isinstance(names, list) or not names:
        raise ValueError(f"instruction_id_list: {names!r} is not a list of instructions")
    if not isinstance(arguments, list) or len(arguments) != len(names):
        raise ValueError(f"kwargs: {arguments!r} is not a list of as many dicts as there are instructions")
    return [_constraint(name, given) for name, given in zip(names, arguments, strict=True)]


def _constraint(name: Any, given: Any) -> Check:
    if not isinstance(name, str) or name not in CONSTRAINTS:
        raise ValueError(f"instruction_id_list: there is no instruction {name!r}")
    check, parsers = CONSTRAINTS[name]
    if not isinstance(given, dict | None):
        raise ValueError(f"{name}: its kwargs are {given!r}, not a dict")
    present = {key: value for key, value in (given or {}).items() if value is not None}
    if unknown := sorted(present.keys() - parsers):
        raise ValueError(f"{name}: it takes no {unknown[0]}")
    arguments = {}
    for key, parse in parsers.items():
        if key not in present:
            raise ValueError(f"{name}: {key} is missing")
        try:
            arguments[key] = parse(present[key])
        except ValueError as error:
            raise ValueError(f"{name}: {key}: {present[key]!r} is not {error}") from None
    return functools.partial(check, **arguments)


# What an argument may be. Each raises ValueError("a thing that the value is not").


def _count(value: Any) -> int:
    # Columns with missing values turn integers into floats.
    if isinstance(value, bool) or not isinstance(value, int | float) or value != value // 1 or value < 0:
        raise ValueError("a whole number >= 0")
    return int(value)


def _ordinal(value: Any) -> int:
    if _count(value) < 1:
        raise ValueError("a whole number >= 1")
    return _count(value)


def _relation(value: Any) -> Callable[[int, int], bool]:
    if value not in ("less than", "at least"):
        raise ValueError("'less than' or 'at least'")
    return int.__lt__ if value == "less than" else int.__ge__


def _phrase(value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError("a text")
    return value.strip()


def _phrases(value: Any) -> list[str]:
    if not isinstance(value, list) or not value:
        raise ValueError("a list of texts")
    return [_phrase(item) for item in value]


def _letter(value: Any) -> str:
    if not isinstance(value, str) or len(value.strip()) != 1:
        raise ValueError("one character")
    return value.strip().lower()


def _language(value: Any) -> str:
    known = _languages().get_lang_list()
    if value not in (*known, "zh"):
        raise ValueError(f"one of the languages {', '.join(sorted(known))}")
    return value


def _has_content(text: str) -> bool:
    """Whether there is a letter or a digit in it, of any script."""
    return re.search(r"[^\W_]", text) is not None


# The checks, in the order of the paper's table 1.


def _has_keywords(text: str, keywords: list[str]) -> bool:
    lowered = text.lower()
    return all(keyword.lower() in lowered for keyword in keywords)


def _keyword_frequency(text: str, keyword: str, frequency: int, relation: Callable[[int, int], bool]) -> bool:
    return relation(text.lower().count(keyword.lower()), frequency)


def _lacks_words(text: str, forbidden_words: list[str]) -> bool:
    return not any(re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text, re.IGNORECASE) for word in forbidden_words)


def _letter_frequency(text: str, letter: str, let_frequency: int, let_relation: Callable[[int, int], bool]) -> bool:
    return let_relation(text.lower().count(letter), let_frequency)


def _is_in_language(text: str, language: str) -> bool:
    from langdetect import LangDetectException

    detector = _languages().create()
    detector.append(text)  # reads the first 10,000 characters
    try:
        found = detector.detect()
    except LangDetectException:  # no letters, or none that it knows
        return False
    return found == language or (language == "zh" and found in ("zh-cn", "zh-tw"))


@functools.cache
def _languages() -> Any:
    """langdetect's detector factory, its languages loaded in the order of their names, its random generator seeded."""
    from langdetect import DetectorFactory
    from langdetect.detector_factory import PROFILES_DIRECTORY

    DetectorFactory.seed = 0
    factory = DetectorFactory()
    profiles = sorted(Path(PROFILES_DIRECTORY).iterdir())
    factory.load_json_profile([profile.read_text(encoding="utf-8") for profile in profiles])
    return factory


def _number_paragraphs(text: str, num_paragraphs: int) -> bool:
    """Paragraphs are separated by ***, which may also open and close the text."""
    paragraphs = [paragraph.strip() for paragraph in text.split("***")]
    return all(paragraphs[1:-1]) and sum(map(bool, paragraphs)) == num_paragraphs


def _number_words(text: str, num_words: int, relation: Callable[[int, int], bool]) -> bool:
    return relation(len(re.findall(r"\w+", text)), num_words)


def _number_sentences(text: str, num_sentences: int, relation: Callable[[int, int], bool]) -> bool:
    return relation(count_sentences(text), num_sentences)


def _nth_paragraph_first_word(text: str, num_paragraphs: int, nth_paragraph: int, first_word: str) -> bool:
    """Paragraphs are separated by an empty line; the word ends before punctuation: "I can't" starts with I."""
    paragraphs = [paragraph.strip() for paragraph in text.split("\n\n")]
    if sum(map(bool, paragraphs)) != num_paragraphs or nth_paragraph > num_paragraphs:
        return False
    words = paragraphs[nth_paragraph - 1].split(maxsplit=1)
    if not words:
        return False
    return re.split(r"[.,?!'\"]", words[0].lstrip("'").lstrip('"'), maxsplit=1)[0].lower() == first_word.lower()


def _has_postscript(text: str, postscript_marker: str) -> bool:
    """The marker and words behind it."""
    marker = {"P.S.": r"p\.\s?s\.", "P.P.S": r"p\.\s?p\.\s?s"}.get(postscript_marker, re.escape(postscript_marker))
    match = re.search(marker, text, re.IGNORECASE)
    return match is not None and _has_content(text[match.end() :])


def _number_placeholders(text: str, num_placeholders: int) -> bool:
    """At least so many [placeholders], each on one line."""
    count = 0
    for line in text.split("\n"):  # a regular expression would take quadratic time over "[[[[["
        end = 0
        while (start := line.find("[", end)) >= 0 and (end := line.find("]", start)) >= 0:
            count += 1
    return count >= num_placeholders


def _number_bullets(text: str, num_bullets: int) -> bool:
    """Exactly so many lines that start with "-", or with one "*" and more behind it."""
    return len(re.findall(r"^[^\S\n]*(?:\*[^*\n]|-)", text, re.MULTILINE)) == num_bullets


def _has_title(text: str) -> bool:
    """A line with <<title>>, not blank."""
    for line in text.split("\n"):
        start, end = line.find("<<"), line.rfind(">>")
        if 0 <= start < end and line[start:end].strip("<>").strip():
            return True
    return False


def _is_one_of_the_options(text: str) -> bool:
    return sum(f"My answer is {option}." in text for option in ("yes", "no", "maybe")) == 1


def _number_highlights(text: str, num_highlights: int) -> bool:
    """At least so many *highlights* or **highlights**, not blank, each on one line."""
    singles = re.findall(r"\*([^\n*]*)\*", text)
    doubles = re.findall(r"\*\*([^\n*]*)\*\*", text)
    return sum(bool(highlight.strip()) for highlight in (*singles, *doubles)) >= num_highlights


def _multiple_sections(text: str, section_spliter: str, num_sections: int) -> bool:
    """At least so many marks such as "Section 1" with words behind each."""
    sections = re.split(rf"{re.escape(section_spliter)}\s?\d+", text)[1:]
    return sum(map(_has_content, sections)) >= num_sections


def _is_json(text: str) -> bool:
    """The whole text, or the whole of the one fence around it, is a JSON object or list that is not empty."""
    inner = text.strip()
    for opening in ("```json", "```Json", "```JSON", "```"):
        inner = inner.removeprefix(opening)
    try:
        value = json.loads(inner.removesuffix("```").strip())
    except (ValueError, RecursionError):
        return False
    return isinstance(value, dict | list) and bool(value)


def _repeats_prompt(text: str, prompt_to_repeat: str) -> bool:
    """The prompt and then words of its own."""
    start, rest = text.strip()[: len(prompt_to_repeat)], text.strip()[len(prompt_to_repeat) :]
    return start.lower() == prompt_to_repeat.lower() and _has_content(rest)


def _two_responses(text: str) -> bool:
    """Two different responses, separated by ******, which may also open and close the text."""
    responses = [response.strip() for response in text.split("******")]
    given = [response for response in responses if response]
    return all(responses[1:-1]) and len(given) == 2 and given[0] != given[1]


def _is_english_capital(text: str) -> bool:
    return text.isupper() and _is_in_language(text, "en")


def _is_english_lowercase(text: str) -> bool:
    return text.islower() and _is_in_language(text, "en")


def _capital_words(text: str, capital_frequency: int, capital_relation: Callable[[int, int], bool]) -> bool:
    """Words all in capitals: "I" is one, and so is a hyphenated word."""
    words = re.findall(r"[^\s,;@#$%&?!:\"()\[\]{}<>`“”…—]+", text)
    return capital_relation(sum(map(str.isupper, words)), capital_frequency)


def _ends_with(text: str, end_phrase: str) -> bool:
    return text.strip().strip('"').lower().endswith(end_phrase.lower())


def _is_quoted(text: str) -> bool:
    stripped = text.strip()
    return len(stripped) > 1 and stripped[0] == stripped[-1] == '"' and _has_content(stripped)


def _has_no_comma(text: str) -> bool:
    return "," not in text


_CLOSING = "\"')]}*:;_”’»"
_OPENING = "\"'([{*_“‘«"
_NEVER_LAST = frozenset(
    ["mr", "mrs", "ms", "dr", "prof", "st", "rev", "hon", "gen", "col", "lt", "capt", "sgt", "maj", "gov", "sen", "rep"]
    + ["mt", "ft", "vs", "e.g", "i.e", "cf"]
)
_ABBREVIATIONS = frozenset(
    ["a.m", "p.m", "a.d", "b.c", "u.s", "u.s.a", "u.k", "u.n", "d.c", "ph.d", "m.d", "b.a", "m.a", "b.s", "etc", "inc"]
    + ["ltd", "co", "corp", "jr", "sr", "dept", "ave", "blvd", "no", "vol", "fig", "ed"]
    + ["jan", "feb", "mar", "apr", "aug", "sept", "oct", "nov", "dec"]
)
_STARTERS = frozenset(
    ["the", "this", "that", "these", "those", "he", "she", "it", "they", "we", "you", "i", "his", "her", "its", "their"]
    + ["our", "my", "your", "a", "an", "in", "on", "at", "as", "for", "but", "and", "or", "so", "if", "when", "while"]
    + ["after", "before", "however", "there", "what", "who", "why", "how", "then"]
)


def count_sentences(text: str) -> int:
    """Sentences end with . ? or ! before white space; with an abbreviation or "..." only before "The" and such."""
    words = text.split()
    return sum(_ends_sentence(*pair) for pair in zip(words, words[1:], strict=False)) + bool(words)


def _ends_sentence(word: str, following: str) -> bool:
    bare = word.rstrip(_CLOSING)
    if not bare.endswith((".", "?", "!", "…")):
        return False
    following = following.lstrip(_OPENING)
    stem = bare.lstrip(_OPENING)[:-1].lower()
    if bare[-1] == "." and stem.isdigit():  # "1. do this" is no sentence's end
        return not following[:1].islower()
    is_initial = len(stem) == 1 and stem.isalpha()
    if bare.endswith(("..", "…")) or (bare[-1] == "." and (stem in _ABBREVIATIONS or is_initial)):
        return following[:1].isupper() and following.rstrip(",.;:!?").partition("'")[0].lower() in _STARTERS
    return bare[-1] != "." or stem not in _NEVER_LAST


# IFEval's instruction: (its check, its arguments).
CONSTRAINTS: dict[str, tuple[Callable[..., bool], dict[str, Callable[[Any], Any]]]] = {
    "keywords:existence": (_has_keywords, {"keywords": _phrases}),
    "keywords:frequency": (_keyword_frequency, {"keyword": _phrase, "frequency": _count, "relation": _relation}),
    "keywords:forbidden_words": (_lacks_words, {"forbidden_words": _phrases}),
    "keywords:letter_frequency": (
        _letter_frequency,
        {"letter": _letter, "let_frequency": _count, "let_relation": _relation},
    ),
    "language:response_language": (_is_in_language, {"language": _language}),
    "length_constraints:number_paragraphs": (_number_paragraphs, {"num_paragraphs": _count}),
    "length_constraints:number_words": (_number_words, {"num_words": _count, "relation": _relation}),
    "length_constraints:number_sentences": (_number_sentences, {"num_sentences": _count, "relation": _relation}),
    "length_constraints:nth_paragraph_first_word": (
        _nth_paragraph_first_word,
        {"num_paragraphs": _count, "nth_paragraph": _ordinal, "first_word": _phrase},
    ),
    "detectable_content:postscript": (_has_postscript, {"postscript_marker": _phrase}),
    "detectable_content:number_placeholders": (_number_placeholders, {"num_placeholders": _count}),
    "detectable_format:number_bullet_lists": (_number_bullets, {"num_bullets": _count}),
    "detectable_format:title": (_has_title, {}),
    "detectable_format:constrained_response": (_is_one_of_the_options, {}),
    "detectable_format:number_highlighted_sections": (_number_highlights, {"num_highlights": _count}),
    "detectable_format:multiple_sections": (
        _multiple_sections,
        {"section_spliter": _phrase, "num_sections": _count},  # the reference's spelling
    ),
    "detectable_format:json_format": (_is_json, {}),
    "combination:repeat_prompt": (_repeats_prompt, {"prompt_to_repeat": _phrase}),
    "combination:two_responses": (_two_responses, {}),
    "change_case:capital_word_frequency": (
        _capital_words,
        {"capital_frequency": _count, "capital_relation": _relation},
    ),
    "change_case:english_capital": (_is_english_capital, {}),
    "change_case:english_lowercase": (_is_english_lowercase, {}),
    "startend:end_checker": (_ends_with, {"end_phrase": _phrase}),
    "startend:quotation": (_is_quoted, {}),
    "punctuation:no_comma": (_has_no_comma, {}),
}
