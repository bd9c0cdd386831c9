"""Grids that are refused, and differences between arms by hand."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_prorl.config.load import ConfigError, load_config
from megatron_prorl.evaluation.ablate import _plan, compare, load_grid, student_quantile

EXAMPLE = Path(__file__).parents[3] / "examples" / "ablation_resets.yaml"
GRID: dict[str, Any] = {
    "base": "base.yaml", "out": "out", "seeds": [0, 1], "control": "a", "arms": {"a": {}, "b": {"seed": 3}},
}  # fmt: skip


def test_students_quantiles_are_those_of_the_tables() -> None:
    for degrees, expected in ((1, 12.7062), (2, 4.30265), (5, 2.57058), (30, 2.04227)):
        assert student_quantile(0.975, degrees) == pytest.approx(expected, rel=1e-5)


def test_differences_are_paired_by_seed() -> None:
    """b is above a by 0.1, 0.2 and 0.3: mean 0.2, standard error 0.1 / sqrt(3); t = 3.4641 with 2 degrees, p 0.0742."""
    scores = {"a": {0: 0.5, 1: 0.1, 2: 0.3}, "b": {0: 0.6, 1: 0.3, 2: 0.6}}
    control, arm = compare(scores, "a")
    assert control.difference is None and control.mean == pytest.approx(0.3)
    assert arm.difference == pytest.approx(0.2)
    reach = 4.302653 * 0.1 / math.sqrt(3)
    assert (arm.low, arm.high) == (pytest.approx(0.2 - reach, abs=1e-6), pytest.approx(0.2 + reach, abs=1e-6))
    assert arm.p == pytest.approx(0.0742, abs=1e-4)


def test_p_is_corrected_for_the_number_of_arms_and_one_seed_has_no_interval() -> None:
    scores = {"a": {0: 0.5, 1: 0.1, 2: 0.3}, "b": {0: 0.6, 1: 0.3, 2: 0.6}, "c": {0: 0.6, 1: 0.3, 2: 0.6}}
    assert [row.p for row in compare(scores, "a")[1:]] == pytest.approx([0.1484, 0.1484], abs=1e-4)
    [_, alone] = compare({"a": {0: 0.5, 1: 0.1}, "b": {1: 0.3}}, "a")
    assert alone.difference == pytest.approx(0.2) and alone.low is None and alone.p is None


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"control": "c"}, "control: c is none of the arms: a, b"),
        ({"arms": {"a": {}}}, "arms: "),
        ({"seeds": []}, "seeds: expected a list of at least 1"),
        ({"sedes": [0]}, "sedes: no such option; did you mean seeds?"),
        ({"arms": {"a": {}, "a b": {}, "a-b": {}}}, "arms: two names differ in nothing"),
    ],
)
def test_a_grid_with_a_mistake_is_one_line(tmp_path: Path, change: dict[str, Any], line: str) -> None:
    path = tmp_path / "grid.yaml"
    path.write_text(yaml.safe_dump(GRID | change))
    with pytest.raises(ConfigError) as error:
        load_grid(path)
    assert line in str(error.value) and len(str(error.value).splitlines()) == 1


def test_an_arm_may_bring_a_preset_below_its_own_options(tmp_path: Path) -> None:
    arms = {"preset": {"extends": str(EXAMPLE.parent / "presets" / "justrl.yaml"), "algorithm.clip_high": 0.5}, "a": {}}
    path = tmp_path / "grid.yaml"
    base = str(EXAMPLE.parent / "quickstart.yaml")
    path.write_text(yaml.safe_dump(GRID | {"base": base, "arms": arms, "out": str(tmp_path / "out")}, sort_keys=False))
    runs = _plan(path, load_grid(path))
    assert [(run.arm, run.seed) for run in runs] == [("preset", 0), ("a", 0), ("preset", 1), ("a", 1)]
    cfg = load_config(runs[2].words()[0], runs[2].words()[1:])
    assert (cfg.seed, cfg.algorithm.clip_high, cfg.algorithm.kl.coefficient) == (1, 0.5, 0.0)
    assert (cfg.reset.every_steps, cfg.rollout.rollouts_per_prompt, cfg.model.path) == (0, 16, "runs/quickstart/model")


def test_the_example_s_runs_are_valid_and_differ_in_what_they_are_called_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    runs = _plan(EXAMPLE, load_grid(EXAMPLE))
    found = {run.arm: load_config(run.words()[0], run.words()[1:]) for run in runs}
    assert len(runs) == 12 and len({run.run_dir for run in runs}) == 12
    resets = {arm: (cfg.algorithm.kl.coefficient > 0, cfg.reset.every_steps) for arm, cfg in found.items()}
    assert resets == {
        "no KL": (False, 0), "KL": (True, 0), "KL + reset keep": (True, 20), "KL + reset clear": (True, 20),
    }  # fmt: skip
    assert [found[f"KL + reset {kind}"].reset.optimizer for kind in ("keep", "clear")] == ["keep", "clear"]
