"""Each analysis on a small evaluation, against values found by hand."""

from __future__ import annotations

import json
import random
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from evaluation_folder import make_evaluation

from megatron_prorl.errors import UserError
from megatron_prorl.evaluation.analysis import (
    Evaluation,
    distribution_shift,
    domain_curves,
    lengths,
    out_of_distribution,
    read_evaluation,
    regimes,
    relative_gains,
    spearman,
    sweeps,
)

COUNTS = {
    "base": {"gcd": [0, 2, 4, 0], "sums": [1, 1], "cut": [0, 0], "far": [0, 0, 1]},
    "mid": {"gcd": [1, 2, 4, 0], "sums": [2, 3], "cut": [0, 0], "far": [0, 0, 0]},
    "final": {"gcd": [4, 0, 4, 0], "sums": [4, 4], "cut": [0, 4], "far": [4, 0, 0]},
}


@pytest.fixture
def evaluation(tmp_path: Path) -> Evaluation:
    outside = {"out_of_distribution": True}
    folder = make_evaluation(tmp_path / "out", COUNTS, 4, sums={"domain": "math"}, cut=outside, far=outside)
    return read_evaluation(folder)


def test_pass_at_k_by_domain_is_the_mean_over_its_tasks(evaluation: Evaluation) -> None:
    found = domain_curves(evaluation)
    assert list(found) == ["logic", "math"]
    hits = [any(i < right for i in pair) for right in (1, 1) for pair in combinations(range(4), 2)]
    assert found["math"]["base"][1].mean == pytest.approx(sum(hits) / len(hits))
    assert found["logic"]["final"][0].mean == pytest.approx((2 / 4 + 1 / 2 + 1 / 3) / 3)


def test_gains_are_relative_to_the_base_models_pass_at_k(evaluation: Evaluation) -> None:
    found = relative_gains(evaluation)
    assert found.base == pytest.approx({"gcd": 0.5, "sums": 1.0, "cut": 0.0, "far": 1 / 3})
    assert found.relative == pytest.approx({"gcd": 0.0, "sums": 0.0, "far": 0.0})
    assert found.correlation is None  # of three tasks


def test_spearmans_correlation_is_that_of_ranks_with_ties_in_the_middle() -> None:
    pairs = [(1.0, 10.0), (2.0, 8.0), (2.0, 9.0), (4.0, 1.0), (7.0, 2.0), (9.0, -5.0)]
    found = spearman(pairs, seed=0)
    assert found is not None
    expected = np.corrcoef([1, 2.5, 2.5, 4, 5, 6], [6, 4, 5, 2, 3, 1])[0, 1]
    assert (found.value, found.num) == (pytest.approx(expected), 6)
    # Of the 720 orders of six ranks (two of them the same, twice over) so many are as far from 0.
    rng = random.Random(0)
    ranks, drawn = [6, 4, 5, 2, 3, 1], []
    for _ in range(20_000):
        rng.shuffle(ranks)
        drawn.append(abs(np.corrcoef([1, 2.5, 2.5, 4, 5, 6], ranks)[0, 1]) >= abs(expected) - 1e-9)
    assert found.p == pytest.approx(np.mean(drawn), abs=0.01)
    assert found.low <= found.value <= found.high


@pytest.mark.parametrize("pairs", [[(0.0, 1.0)] * 3, [(1.0, float(i)) for i in range(9)]])
def test_there_is_no_correlation_of_few_or_equal_values(pairs: list[tuple[float, float]]) -> None:
    assert spearman(pairs, seed=0) is None


def test_noise_alone_correlates_with_the_gain_unless_the_samples_are_split(tmp_path: Path) -> None:
    """Sixty equal tasks that two equal models were asked: only samples differ."""
    rng = np.random.default_rng(1)
    tasks = [f"t{i}" for i in range(60)]
    counts = {model: {task: rng.binomial(32, 0.03, 20).tolist() for task in tasks} for model in ("base", "final")}
    found = relative_gains(read_evaluation(make_evaluation(tmp_path / "out", counts, 32)))
    assert found.correlation is not None and found.apart is not None
    assert found.correlation.value < -0.5 and found.correlation.p < 0.001
    assert abs(found.apart.value) < 0.3


def test_the_shift_of_a_domain_counts_problems(evaluation: Evaluation) -> None:
    final = distribution_shift(evaluation)["logic"]["final"]
    # gcd, cut and far have nine problems: base 0 2 4 0 | 0 0 | 0 0 1, final 4 0 4 0 | 0 4 | 4 0 0.
    assert (final.never, final.always) == (pytest.approx(5 / 9), pytest.approx(4 / 9))
    assert (final.newly, final.lost) == (pytest.approx(3 / 9), pytest.approx(2 / 9))
    assert final.histogram == pytest.approx([5 / 9, *[0] * 8, 4 / 9])
    assert final.distance == pytest.approx((2 + 3 + 4) / 4 / 9)  # 0 0 0 0 0 0 1 2 4 to 0 0 0 0 0 4 4 4 4, less 4
    assert final.change.mean == pytest.approx(((8 - 6) / 16 + 4 / 8 + (4 - 1) / 12) / 3)


def test_lengths_are_of_the_samples_of_a_domain(evaluation: Evaluation) -> None:
    """10 tokens where right, 20 where wrong; wrong ones of the task "cut" are cut."""
    final = lengths(evaluation)["logic"]["final"]
    right = 4 + 4 + 4 + 4
    assert (final.samples, final.tokens) == (9 * 4, pytest.approx((10 * right + 20 * (36 - right)) / 36))
    assert (final.tokens_right, final.tokens_wrong) == (10.0, 20.0)
    assert final.truncated == pytest.approx(4 / 36)
    assert lengths(evaluation)["math"]["final"].tokens_wrong is None


def test_tasks_out_of_distribution_are_compared_with_the_base_model(evaluation: Evaluation) -> None:
    found = out_of_distribution(evaluation)
    assert list(found) == ["cut", "far", "mean of these", "mean in distribution"]
    assert found["cut"].change["final"].mean == pytest.approx(0.5)
    assert found["mean of these"].pass_at_1["final"].mean == pytest.approx((1 / 2 + 1 / 3) / 2)
    assert found["mean in distribution"].pass_at_1["base"].mean == pytest.approx((6 / 16 + 1 / 4) / 2)
    assert found["cut"].p["final"] == pytest.approx(min(1.0, 2 * found["cut"].change["final"].p))


def test_a_sweep_is_a_family_by_what_is_varied(tmp_path: Path) -> None:
    counts = {"base": {name: [1] for name in ("g20", "g6", "g10", "alone", "other")}}
    vertices = {n: {"family": "graph", "difficulty": {"vertices": n}} for n in (6, 10, 20)}
    about = {"g20": vertices[20], "g6": vertices[6], "g10": vertices[10], "alone": {"difficulty": {"letters": 3}}}
    found = sweeps(read_evaluation(make_evaluation(tmp_path / "out", counts, 2, **about)))
    assert found == {("graph", "vertices"): [(6, "g6"), (10, "g10"), (20, "g20")]}


def test_regimes_need_three_models(tmp_path: Path, evaluation: Evaluation) -> None:
    assert list(regimes(evaluation)) == ["gcd", "sums", "cut", "far"]
    two = {model: COUNTS[model] for model in ("base", "final")}
    assert regimes(read_evaluation(make_evaluation(tmp_path / "two", two, 4))) == {}


@pytest.mark.parametrize("content", ["{", "[]", '{"suite": {"name": "toys"}, "models": {"m": {}}}', "\x00"])
def test_results_that_are_damaged_are_one_line(tmp_path: Path, content: str) -> None:
    (tmp_path / "results.json").write_text(content)
    with pytest.raises(UserError) as caught:
        read_evaluation(tmp_path)
    assert str(caught.value) == (
        f"{tmp_path}/results.json: not the results of prorl eval; run the evaluation again, its samples stay"
    )


def test_results_whose_tasks_have_other_problems_are_damaged(evaluation: Evaluation) -> None:
    results = json.loads((evaluation.folder / "results.json").read_text())
    results["models"]["final"]["tasks"]["gcd"]["correct"].pop()
    (evaluation.folder / "results.json").write_text(json.dumps(results))
    with pytest.raises(UserError):
        read_evaluation(evaluation.folder)
