"""The creativity index against a search that tries every run of words."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest

from megatron_prorl.errors import UserError
from megatron_prorl.evaluation.creativity import (
    LENGTHS,
    LONGEST,
    Corpus,
    creativity,
    first_samples,
    read_corpus,
    uniqueness,
    words,
)


def by_hand(documents: list[str], text: str) -> list[float]:
    """L-uniqueness by trying every run of L words of the text in every document."""
    text_words, found = words(text), []
    for length in LENGTHS:
        known = {
            tuple(of_document[i : i + length])
            for of_document in map(words, documents)
            for i in range(len(of_document) - length + 1)
        }
        covered = set()
        for i in range(len(text_words) - length + 1):
            if tuple(text_words[i : i + length]) in known:
                covered |= set(range(i, i + length))
        found.append(1 - len(covered) / len(text_words))
    return found


@pytest.mark.parametrize("seed", range(20))
def test_uniqueness_is_what_a_search_of_every_run_finds(seed: int) -> None:
    """Few different words, so that there are long runs by chance; copies on top, over documents' ends too."""
    rng = random.Random(seed)
    vocabulary = "abcdefgh"[: rng.randint(1, 8)]
    documents = [" ".join(rng.choices(vocabulary, k=rng.randint(0, 60))) for _ in range(6)]
    texts = [" ".join(rng.choices(vocabulary + "xyz", k=rng.randint(6, 40))) for _ in range(5)]
    place = rng.randint(0, 20)
    texts.append("x y " + " ".join(" ".join(documents).split()[place : place + 20]) + " x z a b c d")
    expected = [by_hand(documents, text) for text in texts]
    assert np.array(uniqueness(Corpus(documents), texts)) == pytest.approx(np.array(expected))


def test_a_copy_has_no_creativity_and_an_unheard_text_all_of_it() -> None:
    document = "The quick brown fox jumps over the lazy dog, and then sleeps for the rest of the day."
    corpus = Corpus([document, "Something else entirely."])
    copied, new = "the quick BROWN fox jumps over the lazy dog, and then sleeps", "one two three four five six seven"
    assert uniqueness(corpus, [copied, new]) == [[0.0] * len(LENGTHS), [1.0] * len(LENGTHS)]
    # Seven of twelve words copied: covered up to L = 7.
    [half] = uniqueness(corpus, ["the quick brown fox jumps over the cat on a red mat"])
    assert half == pytest.approx([5 / 12] * 3 + [1.0] * 5)


def test_no_match_goes_over_the_end_of_a_document_or_of_a_text() -> None:
    corpus = Corpus(["a b c d e f", "g h i j k l"])
    assert uniqueness(corpus, ["d e f g h i", "a b c d", "e f g h i j k l"])[0] == [1.0] * len(LENGTHS)
    assert uniqueness(corpus, ["x a b c", "d e f x x x"]) == [None, [1.0] * len(LENGTHS)]


def test_tasks_weigh_the_same_and_short_texts_are_counted() -> None:
    corpus = Corpus(["a b c d e f g h i j k l m n"])
    copy, new = "a b c d e f g h i j k l", "x x x x x x x"
    found = creativity(corpus, {"copies": [copy] * 9, "new": [new, "too short"], "none": ["x"]})
    assert found["copies"].index is not None and found["copies"].index.mean == 0.0
    assert found["overall"].index is not None and found["overall"].index.mean == pytest.approx(len(LENGTHS) / 2)
    assert (found["overall"].texts, found["overall"].too_short) == (12, 2)
    assert (found["none"].index, found["none"].uniqueness) == (None, [])


def test_an_empty_corpus_knows_nothing() -> None:
    corpus = Corpus([""])
    assert corpus.num_words == 0
    assert uniqueness(corpus, ["a b c d e f g"]) == [[1.0] * len(LENGTHS)]


def test_longest_matches_end_at_the_longest_that_counts() -> None:
    corpus = Corpus([" ".join(map(str, range(100)))])
    assert corpus.longest_matches(corpus.numbers(" ".join(map(str, range(50, 80))))).max() == LONGEST


def test_a_corpus_is_text_files_and_rows_with_a_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one two")
    (tmp_path / "b.jsonl").write_text('{"text": "three"}\n{"text": "four", "id": 1}\n')
    assert list(read_corpus([str(tmp_path / "a.txt"), str(tmp_path / "b.jsonl")])) == ["one two", "three", "four"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.txt", None, "no such file or directory"),
        ("bytes.txt", b"\xff\xfe", "not UTF-8 text"),
        ("rows.jsonl", b'{"text": 1}\n', "line 1: expected an object with the text in 'text'"),
        ("cut.jsonl", b'{"text": "a"}\n{"te\n', "line 2: not JSON"),
    ],
)
def test_a_corpus_that_cannot_be_read_is_one_line(
    tmp_path: Path, name: str, content: bytes | None, message: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as caught:
        list(read_corpus([str(tmp_path / name)]))
    assert str(caught.value).startswith("--corpus: ") and message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_of_each_problem_the_first_sample_is_read(tmp_path: Path) -> None:
    rows = [{"problem": f"gcd/{p}", "sample": s, "score": 0.0, "text": f"{p}-{s}"} for p in (1, 2) for s in (1, 0)]
    path = tmp_path / "m.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in [{"suite": "x"}, *rows]))
    assert first_samples(path) == {"gcd": ["1-0", "2-0"]}
    path.write_text('{"suite": "x"}\n{"problem": "gcd/1", "sample": 0, "sco\n')
    with pytest.raises(UserError, match="line 2: not JSON"):
        first_samples(path)
    with pytest.raises(UserError, match="no such file"):
        first_samples(tmp_path / "none.jsonl")
