"""Duplicates and evaluation questions: what counts as the same."""

from __future__ import annotations

import random
from functools import cache

import pytest

from megatron_prorl.data.blend.overlap import BOILERPLATE_QUESTIONS, NGRAM, EvalQuestions, common_length, question_key

STORY = (
    "A ferry crosses a river that flows at two metres per second. Its captain steers straight at the other bank, three "
    "hundred metres away, at five metres per second. How far downstream does the ferry land, in metres?"
)
FILLER = [f"filler{i}" for i in range(300)]


def index(**questions: str) -> EvalQuestions:
    made = EvalQuestions()
    for name, question in questions.items():
        made.add(name, 0, question)
    return made


def found(questions: EvalQuestions, question: str) -> list[str]:
    return [hit.eval_set for hit in questions.hits(question)]


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        (r"Find $x$ if $x+1=2$.", r"find \(x\) if \[x + 1 = 2\].", True),
        (r"Find \left( x \right).", "Find (x).", True),
        ("Compute 3 + 4.", "Compute 3 - 4.", False),
        ("Compute 12 + 3.", "Compute 1 + 23.", False),
        (r"\leftarrow", "arrow", False),
        ("ﬁnd ２", "find 2", True),
        (r"Is $\dfrac{1}{n}$ or \tfrac1n more?", "is 1/n or 1/n more?", True),
        (r"$\displaystyle\frac{x+1}{x^{2}}$", "(x+1)/(x^2)", True),
        (r"\frac{\frac{1}{2}}{3}", "(1/2)/3", True),
        (r"\Bigl( 5\text{ cm} \Bigr)", r"(5 \mathrm{cm})", True),
        (r"3\frac{1}{2}", "31/2", False),
        (r"\frac{a}{b+1}", "a/b+1", False),
        (r"\sqrt{x+1}", r"\sqrt{x}+1", False),
        ("½", r"\frac12", True),
    ],
)
def test_duplicates_differ_in_case_spacing_and_latex_layout_alone(one: str, other: str, same: bool) -> None:
    assert (question_key(one) == question_key(other)) is same


def test_the_common_length_is_that_of_the_definition() -> None:
    @cache
    def by_definition(one: str, other: str) -> int:
        if not one or not other:
            return 0
        if one[0] == other[0]:
            return 1 + by_definition(one[1:], other[1:])
        return max(by_definition(one[1:], other), by_definition(one, other[1:]))

    rng = random.Random(0)
    for _ in range(300):
        one, other = ("".join(rng.choices("abc", k=rng.randrange(12))) for _ in range(2))
        assert common_length(one, other) == by_definition(one, other)


def test_a_question_is_found_though_punctuation_case_and_a_few_words_differ() -> None:
    questions = index(math=STORY)
    assert found(questions, STORY.upper().replace(".", " !")) == ["math"]
    assert found(questions, STORY.replace("captain", "pilot").replace("the ferry land", "it land")) == ["math"]


def test_a_question_inside_a_longer_one_is_found_either_way() -> None:
    longer = " ".join([*FILLER[:100], STORY, *FILLER[100:200]])
    assert found(index(math=STORY), longer) == ["math"]
    assert found(index(math=longer), STORY) == ["math"]


def test_a_phrase_in_common_is_not_enough_however_long_the_other_is() -> None:
    phrase = " ".join(STORY.split()[: NGRAM + 2])
    scattered = [word for pair in zip(STORY.split(), FILLER, strict=False) for word in (*[pair[1]] * 6, pair[0])]
    assert found(index(math=STORY), " ".join([phrase, *FILLER])) == []
    assert found(index(math=STORY), " ".join([phrase, *scattered])) == [], "all of its words, but nowhere together"


def test_fewer_words_in_a_row_than_a_gram_are_no_hit() -> None:
    words = STORY.split()
    every_thirteenth_differs = " ".join("other" if i % NGRAM == NGRAM - 1 else word for i, word in enumerate(words))
    assert found(index(math=STORY), every_thirteenth_differs) == []


RATIONAL = r"Let $f(x) = \dfrac{x+1}{x-1}$ for $x > 1$. Find the least value of $\left(x^2+1\right) f(x)$."


@pytest.mark.parametrize(
    "copy",
    [
        RATIONAL.replace(r"\dfrac", r"\frac").replace(r"\left", "").replace(r"\right", ""),
        RATIONAL.replace(r"\dfrac{x+1}{x-1}", "(x+1)/(x-1)").replace(r"\left", r"\big").replace(r"\right", r"\big"),
        RATIONAL.replace("$f(x) =", r"$\displaystyle \mathrm{f}(x) =").replace(r"^2", "^{2}"),
    ],
)
def test_latex_layout_hides_no_copy(copy: str) -> None:
    assert [hit.ratio for hit in index(math=RATIONAL).hits(copy)] == [1.0]
    assert [hit.ratio for hit in index(math=copy).hits(RATIONAL)] == [1.0]


@pytest.mark.parametrize(
    ("short", "longer", "hit"),
    [
        ("What is 2 + 2?", "what is $2+2$", True),
        ("What is 2 + 2?", "What is 2 + 3?", False),
        ("What is 2 + 2?", "What is 2 + 2? Answer in binary and explain every step of your work in full.", False),
        ("Solve for x.", "Solve for x: 3x = 9.", False),
        ("Solve for x.", "SOLVE for $x$", True),
        (r"Compute $\sin 60^\circ$.", r"Compute \(\sin 60^{\circ}\)", True),
        ("Find one two three four five six.", "Find one two three four five six. Explain.", False),
        ("Find one two three four five six seven.", "Find one two three four five six seven. Explain.", True),
        ("Find one two three four five six seven.", "Explain. Find: one two three, four five six seven!", True),
        ("Find one two three four five six seven.", "Find one two three four five six eight. Explain.", False),
        (r"Find the sum of $\frac{1}{n}$ over all n.", "Find the sum of 1/n over all n. Prove nothing.", True),
        ("Find x.", "find $x$", True),
        ("Find x.", "Find x and y.", False),
        ("What is 2 + 2?", "?!", False),
    ],
)
def test_a_short_question_is_found_whole_inside_another_if_it_has_eight_words(
    short: str, longer: str, hit: bool
) -> None:
    assert found(index(math=short), longer) == (["math"] if hit else [])


def test_a_short_question_that_many_sets_ask_is_no_boilerplate() -> None:
    short = "What is the sum 2 + 2 in base 3?"
    questions = index(**{f"set{i}": short for i in range(BOILERPLATE_QUESTIONS + 1)})
    assert len(found(questions, f"{short} Explain.")) == BOILERPLATE_QUESTIONS + 1


def test_a_short_evaluation_question_removes_no_rows_that_begin_like_it() -> None:
    questions = index(math="Solve for x.", code="Find the sum.")
    rows = [f"Solve for x: {a} x + {b} = 0. Find the sum of its digits." for a in range(40) for b in range(40)]
    assert [row for row in rows if questions.hits(row)] == []


def test_boilerplate_of_many_questions_does_not_count_until_something_else_is_shared() -> None:
    boilerplate = " ".join(FILLER[:30])
    questions = index(**{f"set{i}": f"{boilerplate} {i}" for i in range(BOILERPLATE_QUESTIONS + 1)})
    assert found(questions, f"{boilerplate} and more") == []
    few = index(**{f"set{i}": f"{boilerplate} {i}" for i in range(BOILERPLATE_QUESTIONS)})
    assert len(found(few, f"{boilerplate} and more")) == BOILERPLATE_QUESTIONS


def test_every_set_is_reported_once_with_its_first_row() -> None:
    questions = EvalQuestions()
    for eval_set, row in (("a", 0), ("b", 3), ("a", 1)):
        questions.add(eval_set, row, STORY)
    assert [(hit.eval_set, hit.eval_row, hit.ratio) for hit in questions.hits(STORY)] == [("a", 0, 1.0), ("b", 3, 1.0)]
