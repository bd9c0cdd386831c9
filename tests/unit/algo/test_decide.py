"""What a run does after a step, from its history alone."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import asdict
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_prorl.algo.decide import Decision, best_step, check_score, decide, left_behind, observe
from megatron_prorl.config.schema import Config
from megatron_prorl.errors import UserError
from megatron_prorl.types import Progress


def config(**sections: Any) -> Config:
    document = {
        "run_dir": "run", "steps": 1000, "model": {"path": "model"}, "data": {"tasks": [{"task": "gcd"}]},
        "rollout": {"prompts_per_step": 4, "rollouts_per_prompt": 2, "max_prompt_tokens": 8, "max_response_tokens": 8},
    }  # fmt: skip
    return Config.model_validate(document | sections)


def play(cfg: Config, rows: list[dict[str, float]], requests: dict[int, list[str]] | None = None) -> list[Decision]:
    """The decisions of a run with these metrics, a row a step from step 1 on; events are noted as the run does."""
    progress = Progress()
    return [take_step(progress, cfg, row, (requests or {}).get(i + 1, [])) for i, row in enumerate(rows)]


def take_step(progress: Progress, cfg: Config, row: dict[str, float], requests: list[str]) -> Decision:
    progress.step += 1
    observe(progress, row)
    decision = decide(progress, cfg, requests)
    if decision.action == "go on":
        return decision
    event = {"event": decision.action, "step": progress.step}
    if decision.action == "reset":
        progress.last_reset_step = progress.step
    if decision.action == "advance":
        progress.stage, progress.stage_start_step = min(progress.stage + 1, len(cfg.stages) - 1), progress.step
    if decision.action == "rollback":
        event["last_good_step"] = event["to_step"] = decision.last_good_step
        event["ground_step"] = decision.ground_step
    progress.events.append(event)
    return decision


def scores(*values: float) -> list[dict[str, float]]:
    return [{"validation/reward": value} for value in values]


def steps(decisions: list[Decision], action: str = "reset") -> list[int]:
    return [step for step, decision in enumerate(decisions, 1) if decision.action == action]


def test_a_reset_comes_every_so_many_steps() -> None:
    assert steps(play(config(reset={"every_steps": 200}), [{}] * 650)) == [200, 400, 600]
    assert steps(play(config(), [{}] * 50)) == []


def test_the_interval_counts_from_the_last_reset_whatever_made_it() -> None:
    assert steps(play(config(reset={"every_steps": 10}), [{}] * 20, {4: ["reset"]})) == [4, 14]


def test_validation_that_stagnates_resets_after_patience() -> None:
    cfg = config(reset={"plateau": {"patience": 2, "min_delta": 0.1}})
    assert steps(play(cfg, scores(0.1, 0.3, 0.35, 0.39))) == [4]  # never 0.1 above 0.3
    assert steps(play(cfg, scores(0.1, 0.3, 0.35, 0.41))) == []
    # The reset's own validation is what the next ones are compared with.
    assert steps(play(cfg, scores(0.1, 0.3, 0.35, 0.39, 0.2, 0.3))) == [4, 6]


def test_steps_without_validation_are_no_sign_of_stagnation() -> None:
    cfg = config(reset={"plateau": {"patience": 1}})
    assert steps(play(cfg, [*scores(0.5), {}, {}, *scores(0.5), {}])) == [4]


def test_a_drop_resets() -> None:
    cfg = config(reset={"drop": {"by": 0.1, "patience": 2}})
    assert steps(play(cfg, scores(0.5, 0.3, 0.45, 0.39, 0.4))) == [5]


def test_the_score_may_be_that_of_one_domain() -> None:
    cfg = config(reset={"drop": {"by": 0.1}, "score": "validation/domain/math"})
    rows = [{"validation/reward": 0.9, "validation/domain/math": v} for v in (0.5, 0.5, 0.3)]
    assert steps(play(cfg, rows)) == [3]


@pytest.mark.parametrize(
    ("guard", "key", "quiet", "loud"),
    [
        ({"entropy": {"low": 0.1}}, "policy/entropy", 0.2, 0.05),
        ({"entropy": {"high": 2.0}}, "policy/entropy", 0.2, 2.5),
        ({"kl": {"high": 0.5}}, "policy/kl_reference", 0.2, 0.6),
        ({"truncation": {"high": 0.5}}, "rollout/truncated_fraction", 0.5, 0.6),
        ({"mismatch": {"high": 0.1}}, "mismatch/logprob_diff_mean", 0.1, 0.2),
        ({"non_finite": {}}, "policy/grad_norm", 1e30, math.nan),
        ({"entropy": {"low": 0.1}}, "policy/entropy", 0.2, math.nan),
        ({"silent_domain": {}}, "reward/mean", 1e-9, 0.0),
        ({"silent_domain": {}}, "domain/code/reward", 1e-9, 0.0),
    ],
)
@pytest.mark.parametrize("action", ["reset", "stop", "rollback"])
def test_guards_act_after_so_many_steps_in_a_row(guard: dict, key: str, quiet: float, loud: float, action: str) -> None:
    [(name, options)] = guard.items()
    off = {"non_finite": None, "silent_domain": None}
    cfg = config(guards=off | {name: options | {"steps": 3, "action": action}})
    decisions = play(cfg, [{key: value} for value in [quiet, loud, loud, quiet, loud, loud, loud]])
    if action == "reset" and name == "entropy" and math.isnan(loud):
        assert steps(decisions, action) == [] and decisions[-1].warnings[0][0] == "guards.entropy"
        return
    assert steps(decisions, action) == [7]
    assert decisions[-1].trigger == f"guards.{name}" and decisions[-1].reason.startswith(key)
    last_good = 4 if name == "non_finite" else 3  # figures of step 5 are of the weights after step 4
    assert decisions[-1].last_good_step == (last_good if action == "rollback" else 0)


def test_a_guard_that_warns_says_so_every_so_many_steps_and_nothing_else_happens() -> None:
    decisions = play(config(guards={"silent_domain": {"steps": 2}}), [{"reward/mean": 0.0}] * 5)
    assert {decision.action for decision in decisions} == {"go on"}
    assert [len(decision.warnings) for decision in decisions] == [0, 1, 0, 1, 0]
    assert decisions[1].warnings[0][0] == "guards.silent_domain"


def test_a_domain_that_a_step_did_not_draw_is_no_gap_in_its_silence() -> None:
    row = {"reward/mean": 0.5, "domain/code/reward": 0.0}
    decisions = play(config(guards={"silent_domain": {"steps": 2}}), [row, {"reward/mean": 0.5}, row])
    assert [len(decision.warnings) for decision in decisions] == [0, 0, 1]


def test_a_rollback_goes_back_before_the_first_step_of_its_ground() -> None:
    """The domain is drawn every second step and gives nothing from step 3 on."""
    cfg = config(guards={"silent_domain": {"steps": 2, "action": "rollback"}})
    rows = [{"reward/mean": 0.5, "domain/code/reward": float(step < 3)} if step % 2 else {} for step in range(1, 6)]
    (decision,) = [decision for decision in play(cfg, rows) if decision.action == "rollback"]
    assert decision.last_good_step == 2


def test_a_rollback_after_a_rollback_goes_further_back_and_not_to_its_copy() -> None:
    """An update in step 7 broke the policy, and with it what steps 8 and 9 show."""
    cfg = config(guards={"entropy": {"high": 1.0, "steps": 2, "action": "rollback"}}, checkpoint={"every_steps": 1})
    progress = Progress()
    found = []
    for step in range(1, 16):
        row = {"policy/entropy": 2.0 if step >= 8 else 0.5}
        decision = take_step(progress, cfg, row, [])
        if decision.action != "go on":
            found.append((step, decision.action, decision.last_good_step))
    assert found == [(9, "rollback", 6), (11, "rollback", 5), (13, "rollback", 4), (15, "stop", 0)]
    assert [step for step in range(1, 14) if left_behind(progress, step)] == [5, 6, 7, 8, 9, 10, 11, 12]


def test_good_steps_after_a_rollback_are_gone_back_to() -> None:
    cfg = config(guards={"entropy": {"high": 1.0, "action": "rollback"}}, checkpoint={"every_steps": 1})
    rows = [{"policy/entropy": 2.0 if step in (4, 8) else 0.5} for step in range(1, 9)]
    decisions = play(cfg, rows)
    assert [(step, decisions[step - 1].last_good_step) for step in steps(decisions, "rollback")] == [(4, 2), (8, 6)]


def test_nothing_finite_stops_the_run_though_another_guard_resets() -> None:
    cfg = config(
        guards={"kl": {"high": 0.3, "steps": 2, "action": "reset"}, "non_finite": {"steps": 3, "action": "stop"}}
    )
    row = {"policy/kl_reference": math.nan, "policy/loss": math.nan, "policy/grad_norm": math.nan}
    decisions = play(cfg, [row] * 3)
    assert steps(decisions) == [] and steps(decisions, "stop") == [3]
    loud = {"policy/kl_reference": 0.5, "policy/loss": math.nan}
    assert steps(play(cfg, [loud] * 3), "stop") == [3], "its streak goes on over the reset in step 2"


def test_resets_between_rollbacks_do_not_make_them_endless() -> None:
    cfg = config(
        guards={"entropy": {"high": 1.0, "steps": 3, "action": "rollback"}, "max_rollbacks": 2},
        reset={"every_steps": 5},
        checkpoint={"every_steps": 10},
    )
    decisions = play(cfg, [{"policy/entropy": 2.0}] * 13)
    assert (steps(decisions), steps(decisions, "rollback"), steps(decisions, "stop")) == ([5, 10], [3, 8], [13])


def test_the_interval_counts_from_the_stage_s_begin() -> None:
    stages = [{"name": name, "ends_on_trigger": True} for name in "abc"]
    decisions = play(config(reset={"every_steps": 5}, stages=stages), [{}] * 12)
    assert steps(decisions, "advance") == [5, 10]


def test_a_branch_begins_the_windows_anew() -> None:
    progress = Progress(step=3, events=[{"event": "branch", "step": 3, "scores_compare": False}])
    progress.history = [{"step": step, "validation/reward": 0.9, "policy/entropy": 2.0} for step in range(4)]
    cfg = config(reset={"drop": {"by": 0.1}}, guards={"entropy": {"high": 1.0, "steps": 2, "action": "rollback"}})
    first = take_step(progress, cfg, {"validation/reward": 0.2, "policy/entropy": 2.0}, [])
    assert first.action == "go on" and best_step(progress, "validation/reward") == 4
    assert take_step(progress, cfg, {"policy/entropy": 2.0}, []).last_good_step == 3, "not before there is anything"
    progress.events[0]["scores_compare"] = True
    assert best_step(progress, "validation/reward") == 1


def test_rollbacks_that_do_not_help_stop_the_run() -> None:
    cfg = config(
        guards={"entropy": {"high": 1.0, "action": "rollback"}, "max_rollbacks": 2}, checkpoint={"every_steps": 3}
    )
    loud, quiet = {"policy/entropy": 2.0}, {"policy/entropy": 0.5}
    in_a_row = play(cfg, [loud, loud, loud])
    assert [decision.action for decision in in_a_row] == ["rollback", "rollback", "stop"]
    almost = play(cfg, [loud, quiet, quiet, loud, quiet, loud])
    assert steps(almost, "rollback") == [1, 4] and steps(almost, "stop") == [6]
    apart = play(cfg, [loud, quiet, quiet, quiet, loud, loud, quiet, quiet, quiet, loud])
    assert steps(apart, "rollback") == [1, 5, 6, 10]


def test_no_reset_but_one_by_hand_comes_in_the_cool_down() -> None:
    cfg = config(reset={"plateau": {"patience": 1}, "cooldown_steps": 4}, guards={"kl": {"high": 0, "action": "reset"}})
    rows = [row | {"policy/kl_reference": 1.0} for row in scores(*[0.5] * 9)]
    assert steps(play(cfg, rows)) == [4, 8]
    assert steps(play(cfg, rows, {5: ["reset"]})) == [4, 5, 9]


def test_stages_end_after_their_steps_or_by_hand() -> None:
    cfg = config(stages=[{"name": "a", "steps": 3}, {"name": "b"}, {"name": "c", "steps": 2}])
    decisions = play(cfg, [{}] * 9, {7: ["advance"]})
    assert steps(decisions, "advance") == [3, 7, 9]


def test_a_stage_that_ends_on_a_trigger_is_not_reset() -> None:
    cfg = config(
        reset={"plateau": {"patience": 1}}, stages=[{"name": "a", "ends_on_trigger": True, "steps": 9}, {"name": "b"}]
    )
    decisions = play(cfg, scores(0.5, 0.5, 0.5, 0.5))
    assert steps(decisions, "advance") == [2] and steps(decisions) == [4]
    assert decisions[1].trigger == "reset.plateau"


def test_validations_of_weights_that_are_gone_are_no_measure() -> None:
    cfg = config(guards={"kl": {"high": 1.0, "action": "rollback"}}, reset={"plateau": {"patience": 2}})
    rows = scores(0.5, 0.6, 0.9, 0.7, 0.75, 0.8)
    rows[2]["policy/kl_reference"] = 2.0
    progress = Progress()
    decisions = [take_step(progress, cfg, row, []) for row in rows]
    assert steps(decisions, "rollback") == [3] and steps(decisions) == []
    assert best_step(progress, "validation/reward") == 6
    assert best_step(progress, "validation/reward", among=[1, 2, 3, 4]) == 4


def test_best_is_of_the_stage() -> None:
    """Another stage may validate otherwise."""
    cfg = config(stages=[{"name": "a", "steps": 2}, {"name": "b"}])
    progress = Progress()
    for row in scores(0.5, 0.9, 0.1, 0.2):
        take_step(progress, cfg, row, [])
    assert best_step(progress, "validation/reward") == 4


def test_best_is_the_first_of_the_highest_scores() -> None:
    progress = Progress()
    assert best_step(progress, "validation/reward") is None
    for score in (0.1, 0.5, 0.5, 0.2):
        progress.step += 1
        observe(progress, {"validation/reward": score})
    assert best_step(progress, "validation/reward") == 2


def test_a_score_that_validations_do_not_give_is_named() -> None:
    check_score("validation/gcd", {"validation/gcd": 0.0})
    with pytest.raises(UserError, match="reset.score: validations give no validation/gdc; they give validation/gcd$"):
        check_score("validation/gdc", {"validation/gcd": 0.5, "time/validate": 1.0})


metric_rows = st.lists(
    st.fixed_dictionaries(
        {},
        optional={
            "validation/reward": st.sampled_from([0.1, 0.2, 0.3]),
            "policy/entropy": st.sampled_from([0.05, 0.5, 3.0]),
            "policy/kl_reference": st.sampled_from([0.0, 0.9]),
            "policy/grad_norm": st.sampled_from([1.0, math.inf]),
            "reward/mean": st.sampled_from([0.0, 0.5]),
        },
    ),
    max_size=40,
)


@settings(max_examples=200, deadline=None)
@given(rows=metric_rows, crashes=st.lists(st.integers(0, 39)), every=st.integers(1, 7))
def test_a_run_that_crashes_anywhere_decides_as_one_that_does_not(
    rows: list[dict[str, float]], crashes: list[int], every: int
) -> None:
    """A crash loses the steps since the last checkpoint, which are done again from its JSON with the same metrics."""
    cfg = config(
        reset={
            "every_steps": 15,
            "plateau": {"patience": 2},
            "drop": {"by": 0.1},
            "cooldown_steps": 3,
        },
        guards={
            "entropy": {"low": 0.1, "high": 2.0, "steps": 2, "action": "rollback"},
            "kl": {"high": 0.5, "steps": 3, "action": "reset"},
            "silent_domain": {"steps": 2},
        },
        stages=[{"name": "a", "steps": 10}, {"name": "b", "ends_on_trigger": True}, {"name": "c"}],
    )
    uninterrupted = play(cfg, rows)
    progress, saved, found = Progress(), json.dumps(asdict(Progress())), {}
    pending = sorted(set(crashes))
    while progress.step < len(rows):
        if pending and progress.step == pending[0]:
            pending.pop(0)
            progress = Progress(**json.loads(saved))
            continue
        decision = take_step(progress, cfg, copy.deepcopy(rows[progress.step]), [])
        found[progress.step] = decision
        if decision.action != "go on" or progress.step % every == 0:
            saved = json.dumps(asdict(progress))
    assert [found[step] for step in sorted(found)] == uninterrupted
