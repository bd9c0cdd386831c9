"""Instruction following. The cases marked "reference" are facts of IFEval's own tests (google-research's
instruction_following_eval), told in this project's words where the text does not matter."""

from __future__ import annotations

import time
from typing import Any

import pytest

from megatron_prorl.tasks import DOMAINS, VerifierError, prepare, verify
from megatron_prorl.tasks.instruction import CONSTRAINTS, count_sentences, variants
from megatron_prorl.types import Problem, Verdict

PARAGRAPHS = "Wow. This is long.\n\nI can't.\n\n{}\n\nI can't, but I guess it is.\n\nHaha, you got that right."
ENGLISH = "The weather in the mountains is often cold in the winter and the roads are closed."
FRENCH = "Le temps est souvent froid en hiver et les routes de la montagne sont fermées."


# (constraint, responses that meet it, responses that do not)
Case = tuple[tuple[str, dict[str, Any]], list[str], list[str]]


def problem(*constraints: tuple[str, dict[str, Any] | None], **fields: Any) -> Problem:
    verification = {
        "instruction_id_list": [name for name, _ in constraints],
        "kwargs": [kwargs for _, kwargs in constraints],
        "prompt": "Do as you are told.",
        **fields,
    }
    return Problem(
        id="instruction/1", domain="instruction", task="ifeval", messages=[], verification=verification, source="test"
    )


def both(name: str, met: list[str], unmet: list[str], of: str = "relation", **kwargs: Any) -> list[Case]:
    """The cases of "at least", and of "less than", which just the other responses meet."""
    return [((name, {**kwargs, of: "at least"}), met, unmet), ((name, {**kwargs, of: "less than"}), unmet, met)]


def num(name: str, **kwargs: Any) -> tuple[str, dict]:
    return name, kwargs


CASES: list[Case] = [
    (
        num("keywords:existence", keywords=["romantic", "river", "Mona Lisa"]),  # reference
        ["The ROMANTIC river runs past the museum of the Mona Lisa.", "romantic rivers, mona lisa"],
        ["Its romantic river cruises and its stylish people.", "romantic river Mona  Lisa"],
    ),
    (num("keywords:existence", keywords=["C++"]), ["I like c++."], ["I like C.", "CCC"]),
    *both(
        "keywords:frequency",  # reference
        ["keyword, Keyword, KEYWORD", "keywords KEYWORDkeyword"],
        ["keyword Keyword", "none"],
        keyword="  keyword ",
        frequency=3,
    ),
    (
        num("keywords:forbidden_words", forbidden_words=["HOUSE", "POWER", "BECOME"]),  # reference
        ["Dinosaurs were a diverse group of reptiles.", "powerful households"],
        ["They came to power in 1933.", "It's (house)."],
    ),
    (
        num("keywords:forbidden_words", forbidden_words=["GENE", "TRANSFORM"]),  # reference: parts of words may stand
        ["A Generative Pre-trained Transformer."],
        ["The gene-pool."],
    ),
    (num("keywords:forbidden_words", forbidden_words=["C++"]), ["C is fine, ABC++ too"], ["I like C++."]),
    *both(
        "keywords:letter_frequency",  # reference
        ["There is the T. Four T's.", "tttt"],
        ["tTt", "none a"],
        of="let_relation",
        letter="T",
        let_frequency=4,
    ),
    (
        num("keywords:letter_frequency", letter="a", let_frequency=4, let_relation="less than"),  # reference
        ["asdfghjkl!!aA"],
        ["aaaa"],
    ),
    (num("keywords:letter_frequency", letter="!", let_frequency=2, let_relation="at least"), ["Oh!!"], ["Oh!"]),
    (
        num("language:response_language", language="en"),
        ["The response is English", "Today we visit the Louvre", ENGLISH],  # the first two: reference
        [FRENCH, "12345", "---"],
    ),
    (num("language:response_language", language="es"), ["Desayunamos en McDonald's hoy"], [ENGLISH]),  # reference
    (num("language:response_language", language="fr"), [FRENCH], [ENGLISH, f"{ENGLISH} {ENGLISH} oui"]),
    (num("language:response_language", language="zh"), ["今天天气很好，我们去公园散步吧。"], [ENGLISH]),
    (
        num("length_constraints:number_paragraphs", num_paragraphs=3),  # reference
        ["paragraph 1\n***\nparagraph 2\n***\nparagraph 3", "***\n1\n***\n2\n***\n3", "1\n***\n2 *** 3\n***"],
        ["1\n***\n2", "1\n***\n2\n***\n3\n***\n4", "1\n***\n\n***\n2\n***\n3", "1\n\n2\n\n3"],
    ),
    (num("length_constraints:number_paragraphs", num_paragraphs=2), ["1 *** 2"], ["1\n***\n2\n***\n***"]),  # reference
    *both(
        "length_constraints:number_words",
        ["d3sCRi7 lArge lAnguagE M0del w1tH 20 w0RdS now.", "a-b c-d e-f g-h"],
        ["one two three four five six 7!"],
        num_words=8,
    ),
    (num("length_constraints:number_words", num_words=8, relation="less than"), ["M0del w1tH 20 w0RdS."], ["a " * 8]),
    *both(
        "length_constraints:number_sentences",  # reference
        ["xx,x. xx,x! xx/x. x{x}x?", "xxxx. xx,x! xxxx. x(x)x?"],
        ["xx. xx! xx?", "Mr. X met Dr. Y at 5 p.m. today."],
        num_sentences=4,
    ),
    (
        num("length_constraints:nth_paragraph_first_word", num_paragraphs=3, nth_paragraph=2, first_word="I"),
        ["1\n\nI paragraph 2\n\n3", "1\n\n  'i, too'\n\n3"],  # the first: reference
        ["1\n\nI paragraph 2", "1\n\nfail paragraph 2\n\n3", "1\nI 2\n3", "1\n\n2\n\nI 3"],  # the first two: reference
    ),
    (
        num("length_constraints:nth_paragraph_first_word", num_paragraphs=5, nth_paragraph=5, first_word="haha"),
        [PARAGRAPHS.format("Really more than three? No way!")],  # reference
        [PARAGRAPHS.format("Really more than three?\n\nNo way!")],
    ),
    (
        num("length_constraints:nth_paragraph_first_word", num_paragraphs=5, nth_paragraph=3, first_word="Really"),
        [PARAGRAPHS.format('"Really?! more than three? No way!"')],  # reference
        [PARAGRAPHS.format("Rea!lly more than three? No way!")],
    ),
    (
        num("length_constraints:nth_paragraph_first_word", num_paragraphs=2, nth_paragraph=3, first_word="a"),
        [],
        ["a\n\na", "a\n\na\n\na"],
    ),
    (
        num("detectable_content:postscript", postscript_marker="P.S."),  # reference
        ["Done.\n\nP.S. I hope so.", "The end. (no new line) P.S. I hope so!", "Done.\nP. S. With spaces."],
        ["Done.", "PS I hope so.", "P.S I hope so", "Done.\n\nP.S.", "P.S. ..."],
    ),
    (
        num("detectable_content:postscript", postscript_marker="P.P.S"),  # reference
        ["Done.\n\nP.P.S. I am happy.", "it is one.\np.p.s what if all is lower case?", "P. P. S. Spaces."],
        ["Done. P.S. No.", "P.P.S."],
    ),
    (num("detectable_content:postscript", postscript_marker="PS:"), ["Done. ps: yes"], ["P.S. No"]),  # reference
    (
        num("detectable_content:number_placeholders", num_placeholders=5),  # reference
        ["Five:\n[Name]\n[Email]\n[Phone]\n[Address]\n[Website]\nfor you.", "[1][2][3][4][5] [6]"],
        ["[1] [2] [3] [4]", "[1] [2] [3] [4] [5\n]", "[[[[[1]]]]]", "1] 2] 3] 4] 5]"],
    ),
    (
        num("detectable_content:number_placeholders", num_placeholders=7),  # reference
        [],
        ["My [adjective] [noun] is [adjective] [noun]. I [verb] and [verb]."],
    ),
    (
        num("detectable_format:number_bullet_lists", num_bullets=3),  # reference
        [
            "An asterisk (*):\n  * This is one.\n  *(no space)Another.\n * One more.\n to-do",
            "Three:\n  - I am.\n  - I was.\n  -I shall be.",
            "* a\n- b\n\n\n* c",
        ],
        ["* a\n* b", "* a\n* b\n* c\n* d", "** a\n** b\n** c", "1. a\n2. b\n3. c", "* a * b * c"],
    ),
    (
        num("detectable_format:number_bullet_lists", num_bullets=2),  # reference
        ["Inline (*), *, do not count:\n    * One.\n    * Another.\n    . not a dot"],
        ["*"],
    ),
    (
        num("detectable_format:number_bullet_lists", num_bullets=1),  # reference
        ["Paragraph 1\n***\nParagraph 2\n***\nParagraph 3\n* only one"],
        ["Paragraph 1\n***\nParagraph 2"],
    ),
    (
        num("detectable_format:title"),  # reference
        ["<<Song of Joy>>\nLa la la.", "At the end?\n<<This is the title>>", "<<a>>"],
        ["<< >>\nNone.", "<<Not a title.\nA paragraph.>>", "<Song>", "<<>>", ">>a<<"],
    ),
    (
        num("detectable_format:constrained_response"),  # reference
        ["\n My answer is no.\n", "My answer is no.   ", "My answer is maybe. I am still learning."],
        ["No.", "My answer is no", "my answer is yes.", "My answer is yes. My answer is no. My answer is maybe."],
    ),
    (
        num("detectable_format:number_highlighted_sections", num_highlights=2),  # reference
        ["you would type:*hello*, or bold: **hello** ", "*a* and *b*"],
        ["Methods:\n*Finite difference\n*Finite element*\n*Boundary element\n*Monte Carlo", "*a* ** * *", "**a**"],
    ),
    (
        num("detectable_format:number_highlighted_sections", num_highlights=4),  # reference
        ["*two different* highlighted *sections in one*\nline. **This too** for **double ones.**"],
        ["*a* *b* **c**"],
    ),
    (
        num("detectable_format:multiple_sections", section_spliter="Section", num_sections=2),  # reference
        ["Section 1\n[content]\nSection 2\n[content]", "Section 1 a Section2 b Section 3"],
        ["Section 1\nonly", "SECTION 1\nSECTION 2", "Section one Section two", "Section 1 Section 2 Section 3 text"],
    ),
    (
        num("detectable_format:multiple_sections", section_spliter="SECTION", num_sections=1),
        ["SECTION 1: x"],
        ["Section 1: x", "SECTION 1"],
    ),
    (
        num("detectable_format:json_format"),
        ['{"a": [1, 2]}', '```json\n{"a": 1}\n```', '```\n[1]\n```', '```JSON\n{"a": null}```'],
        ["{'a': 1}", 'Here: {"a": 1}', '{"a": 1', '```json\n{"a": 1}\n```\nDone.', "{}", "[]", "5", '"text"', "null"],
    ),
    (
        num("combination:repeat_prompt", prompt_to_repeat="Write a CL description."),  # reference
        ["Write a CL description. Hi, please check this.", "  write a cl description.\nSure."],
        ["Hi. Write a CL description. Ok.", "Write a CL.", "Write a CL description.", "Write a CL description. ..."],
    ),
    (
        num("combination:two_responses"),  # reference
        ["This is response 1.\n******\nThis is response 2.", "******\nResponse 1\n******\nResponse 2\n******"],
        ["1\n******\n1", "1\n******\n2\n******\n3", "******\n1\n******\n******\n2\n******", "1\n***\n2", "1\n******"],
    ),
    *both(
        "change_case:capital_word_frequency",  # reference
        ["THERE are Four FULLY CAPITAL WORDS. Many Others Are Only Partially So.", "I, A; (B): WELL-KNOWN!"],
        ["HERE there are THREE FUlly CAPITAL words.", "123 456 789 !!!", "WELL-KNOWN-AND-USED"],
        of="capital_relation",
        capital_frequency=4,
    ),
    (
        num("change_case:english_capital"),  # reference
        ["THIS IS AN ENGLISH SENTENCE. EVERY LETTER IS CAPITALIZED!!! AMAZING."],
        ["Every Word Is Capitalized.", FRENCH.upper(), "123"],
    ),
    (
        num("change_case:english_lowercase"),  # reference
        ["every letter is lowercase."],
        ["Almost every letter is lowercase.", FRENCH.lower(), "123"],
    ),
    (
        num("startend:end_checker", end_phrase="\n  Any more questions?\n "),  # reference
        ["The answer is 7. Any more questions?\n  ", '"It is 7. ANY MORE QUESTIONS?"'],
        ["Any more questions? Paris is cool.", "Any questions?"],
    ),
    (
        num("startend:quotation"),  # reference
        ['"This entire message is wrapped."', '  "a"\n'],
        ['"This is wrapped." But not everything.', '"', "'a'", "“a”", '""', '" "'],
    ),
    (
        num("punctuation:no_comma"),  # reference
        ["Every sentence is short. There is no need for one."],
        ["Since the start of time, people have found a way."],
    ),
]  # fmt: skip
MET = [(constraint, text) for constraint, met, _ in CASES for text in met]
UNMET = [(constraint, text) for constraint, _, unmet in CASES for text in unmet if text]


def test_the_cases_cover_the_25_types():
    assert len(CONSTRAINTS) == 25
    assert {constraint[0] for constraint, _ in MET} == {constraint[0] for constraint, _ in UNMET} == set(CONSTRAINTS)


@pytest.mark.parametrize(("constraint", "text"), MET)
def test_a_response_that_meets_its_constraint_is_correct(constraint: tuple[str, dict], text: str):
    assert verify(problem(constraint), f"<think>Hm.</think>\n\n{text}") == Verdict(score=1.0, reason="correct")


@pytest.mark.parametrize(("constraint", "text"), UNMET)
def test_a_response_that_does_not_is_wrong(constraint: tuple[str, dict], text: str):
    assert verify(problem(constraint), text) == Verdict(score=0.0, reason="wrong")


NO_COMMA = num("punctuation:no_comma")
TITLE = num("detectable_format:title")


def test_the_score_is_the_share_of_constraints_met():
    three = problem(NO_COMMA, TITLE, num("length_constraints:number_words", num_words=3, relation="at least"))
    assert verify(three, "<<A title>> and words") == Verdict(score=1.0, reason="correct")
    assert verify(three, "<<A title>>, and words") == Verdict(score=2 / 3, reason="partly correct")
    assert verify(three, "No.") == Verdict(score=1 / 3, reason="partly correct")
    assert verify(three, "No,") == Verdict(score=0.0, reason="wrong")


@pytest.mark.parametrize("text", ["", " \n", "<think>no</think>", "<think>no</think> \n", "<think>on and on"])
def test_an_empty_response_meets_nothing(text: str):
    assert verify(problem(NO_COMMA, num("keywords:forbidden_words", forbidden_words=["x"])), text) == Verdict(
        score=0.0, reason="no answer"
    )


def test_thoughts_neither_help_nor_harm():
    assert verify(problem(TITLE), "<think><<Title>></think>none").score == 0.0
    assert verify(problem(NO_COMMA), "<think>a, b</think>c").score == 1.0


@pytest.mark.parametrize(
    ("constraint", "text"),
    [
        (num("combination:repeat_prompt", prompt_to_repeat="Say hi."), "Sure:\nSay hi.\nHi."),  # first line
        (num("startend:end_checker", end_phrase="The end."), "It was.\nThe end.\nMay I help?"),  # last line
        (num("startend:quotation"), 'Here:\n"Hi."\nBye.'),  # both
        (num("startend:end_checker", end_phrase="The end."), "It was.\n**The end.**"),  # asterisks
        (num("startend:quotation"), '**Here:**\n*"Hi."*\nBye.'),  # both, and asterisks
    ],
)
def test_loose_forgives_what_surrounds_the_answer(constraint: tuple[str, dict], text: str):
    assert verify(problem(constraint), text).score == 0.0
    assert verify(problem(constraint, mode="strict"), text).score == 0.0
    assert verify(problem(constraint, mode="loose"), text).score == 1.0


def test_loose_never_takes_an_empty_variant():
    assert verify(problem(NO_COMMA, mode="loose"), "a, b").score == 0.0  # without its first line nothing is left
    no_words = num("length_constraints:number_words", num_words=1, relation="less than")
    assert verify(problem(no_words, mode="loose"), "a").score == 0.0


def test_the_eight_variants():
    cuts = ["*a*\nb\n c\n*d*", "b\n c\n*d*", "*a*\nb\n c", "b\n c"]
    assert variants("*a*\nb\n c\n*d*") == [*cuts, *(cut.replace("*", "") for cut in cuts)]


@pytest.mark.parametrize(
    ("constraint", "complaint"),
    [
        (("keywords:exist", {}), "there is no instruction 'keywords:exist'"),
        ((["keywords"], {}), "there is no instruction"),
        (("keywords:existence", {}), "keywords:existence: keywords is missing"),
        (("keywords:existence", None), "keywords:existence: keywords is missing"),
        (("keywords:existence", {"keywords": None}), "keywords:existence: keywords is missing"),
        (("keywords:existence", {"keywords": "word"}), "keywords: 'word' is not a list of texts"),
        (("keywords:existence", {"keywords": []}), "is not a list of texts"),
        (("keywords:existence", {"keywords": ["a", 1]}), "is not a"),
        (("keywords:existence", "a"), "kwargs are 'a', not a dict"),
        (("punctuation:no_comma", {"num_words": 3}), "punctuation:no_comma: it takes no num_words"),
        (("length_constraints:number_words", {"num_words": 3, "relation": "at most"}), "'at most' is not 'less than'"),
        (("length_constraints:number_words", {"num_words": -1, "relation": "at least"}), "-1 is not a whole number"),
        (("length_constraints:number_words", {"num_words": 2.5, "relation": "at least"}), "2.5 is not a whole number"),
        (("length_constraints:number_words", {"num_words": "3", "relation": "at least"}), "'3' is not a whole number"),
        (("length_constraints:number_words", {"num_words": float("nan"), "relation": "at least"}), "nan is not"),
        (("length_constraints:number_words", {"num_words": float("inf"), "relation": "at least"}), "inf is not"),
        (("length_constraints:number_words", {"num_words": True, "relation": "at least"}), "True is not"),
        (("language:response_language", {"language": "xx"}), "'xx' is not one of the languages af, ar"),
        (("keywords:letter_frequency", {"letter": "ab", "let_frequency": 1, "let_relation": "at least"}), "not one"),
        (
            ("length_constraints:nth_paragraph_first_word", {"nth_paragraph": 0, "num_paragraphs": 1}),
            "nth_paragraph: 0 is not a whole number >= 1",
        ),
        (("startend:end_checker", {"end_phrase": " "}), "end_phrase: ' ' is not a text"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("text", ["a", ""])
def test_a_bad_constraint_is_a_broken_problem_not_a_wrong_answer(constraint: Any, complaint: str, text: str):
    broken = problem(NO_COMMA, constraint)
    for act in (lambda: verify(broken, text), lambda: prepare(broken)):
        with pytest.raises(VerifierError, match="instruction/1") as raised:
            act()
        assert complaint in str(raised.value)


@pytest.mark.parametrize(
    "fields",
    [{"instruction_id_list": []}, {"instruction_id_list": "title"}, {"kwargs": []}, {"kwargs": None}, {"mode": "lose"}],
)
def test_a_malformed_problem_names_the_field(fields: dict[str, Any]):
    with pytest.raises(VerifierError, match=next(iter(fields))):
        verify(problem(NO_COMMA, **fields), "a")


def test_arguments_padded_by_a_table_are_read():
    padded = num("length_constraints:number_words", num_words=2.0, relation="at least", keywords=None, letter=None)
    assert verify(problem(padded, ("punctuation:no_comma", None)), "two words").score == 1.0


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("xx,x. xx,x! xx/x. x{x}x? x.", 5),  # reference
        ("xx,x! xxxx. x(x)x?", 3),  # reference
        ("xxxx. xx,x! xx|x. x&x x?", 4),  # reference
        ("xx-x]xx,x! x{x}xx,x.", 2),  # reference
        ("", 0),
        ("No end", 1),
        ("Dr. Smith met Mrs. J. K. Jones, e.g. at 3.5 km from www.example.com.", 1),
        ("He lives in the U.S. The end.", 2),
        ("He lives in the U.S. and works at Acme Inc. in Boston.", 1),
        ('She said "Go." (He went.) **Both did!** And so on...', 4),
        ("Well... maybe. Really?! Yes!!!", 3),
        ("In 1998. It was so.\n1. do this\n2. do that", 3),
    ],
)  # fmt: skip
def test_sentences_are_counted(text: str, expected: int):
    assert count_sentences(text) == expected


ARGUMENTS = {  # for every type, arguments that make its check look at the whole text
    "keywords": ["zz zz", "y"], "forbidden_words": ["zz", "a b"], "keyword": "zz", "letter": "z", "language": "en",
    "relation": "at least", "let_relation": "at least", "capital_relation": "at least", "postscript_marker": "P.P.S",
    "first_word": "a", "section_spliter": "Section", "prompt_to_repeat": "zz", "end_phrase": "zz", "nth_paragraph": 1,
}  # fmt: skip
PATHOLOGICAL = [
    "\n", "*", " * ", "***", "-\n", "[", "[]", "<", "<<", "{", "'", '"', ".", "P.", "p. ", "1.", "1", "a", "É ", "_",
    "@", "a@", "http://", "Section ", " ", "\t\n", "\u00a0",
]  # fmt: skip


@pytest.mark.parametrize("mode", ["strict", "loose"])
def test_no_text_takes_long(mode: str):
    kwargs = [{key: ARGUMENTS.get(key, 10**6) for key in arguments} for _, arguments in CONSTRAINTS.values()]
    everything = problem(*zip(CONSTRAINTS, kwargs, strict=True), mode=mode)
    prepare(everything)
    taken = {}
    for unit in PATHOLOGICAL:
        text = "x" + unit * (100_000 // len(unit)) + "x"
        start = time.process_time()
        verify(everything, text)
        taken[unit] = time.process_time() - start
    assert {unit: seconds for unit, seconds in taken.items() if seconds > 1.0} == {}


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 20_000, "1" * 100_000, "[" * 100_000 + "]" * 100_000])
def test_json_too_deep_or_too_long_is_no_json(text: str):
    assert verify(problem(num("detectable_format:json_format")), text) == Verdict(score=0.0, reason="wrong")


def test_a_language_is_found_alike_every_time():
    ambiguous = problem(num("language:response_language", language="en"))
    assert len({verify(ambiguous, "no idea, por favor la casa is here and der Hund").score for _ in range(20)}) == 1


def test_the_domain_is_registered():
    assert "instruction" in DOMAINS
