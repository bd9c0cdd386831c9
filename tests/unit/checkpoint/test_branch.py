"""What a branch begins with, what it refuses, and what may be deleted."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from run_folder import make_folder, make_run

from megatron_prorl.checkpoint import branch as module
from megatron_prorl.checkpoint.branch import branch, branch_config, delete
from megatron_prorl.checkpoint.folders import checkpoint_folder, crc32, is_committed, read_state, verify_digests
from megatron_prorl.checkpoint.lock import only_writer
from megatron_prorl.config.load import load_config
from megatron_prorl.data.order import Mixture
from megatron_prorl.errors import UserError
from megatron_prorl.tracking.lineage import LineageWriter, read_lineage
from megatron_prorl.tracking.metrics import read_metrics


@pytest.fixture
def parent(tmp_path: Path) -> Path:
    return make_run(tmp_path / "parent")


def make_branch(parent: Path, *overrides: str, start: str = "", name: str = "child") -> Path:
    child = parent.parent / name
    branch(parent, branch_config(parent, child, overrides), start)
    return child


def inodes(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_ino for path in folder.iterdir() if path.name != "COMMITTED"}


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def progress(run_dir: Path, step: int) -> dict[str, Any]:
    found: dict[str, Any] = read_state(checkpoint_folder(run_dir, step))["progress"]
    return found


@pytest.mark.parametrize(
    ("start", "step", "name"),
    [
        ("", 40, "step-000040"),
        ("step-20", 20, "step-000020"),
        ("reset-2", 20, "reset-002"),
        ("reset-003", 30, "reset-003"),
    ],
)  # fmt: skip
def test_a_branch_has_the_checkpoint_and_its_reference_and_no_other(
    parent: Path, start: str, step: int, name: str
) -> None:
    before = files(parent)
    child = make_branch(parent, start=start)
    checkpoint, reference = child / "checkpoints" / f"step-{step:06d}", progress(parent, step)["reference"]
    assert os.listdir(child / "checkpoints") == [checkpoint.name] and os.listdir(child / "references") == [reference]
    for folder in (checkpoint, child / "references" / reference):
        assert is_committed(folder) and verify_digests(folder) == []
        ours, theirs = inodes(folder), inodes(parent / folder.relative_to(child))
        own = {"state.json", "COMMITTED"} if folder == checkpoint else set()  # says that the branch begins here
        assert ours.keys() == theirs.keys(), folder
        assert {name for name in ours if ours[name] != theirs[name]} <= own, "hard links take no room"
    assert read_lineage(child)[0]["from"] == name
    assert [row["step"] for row in read_metrics(child)] == list(range(step + 1))
    assert {path: found for path, found in files(parent).items() if not path.startswith("branches")} == before
    assert sorted(os.listdir(parent.parent)) == ["child", "parent"]


def test_the_files_are_copied_where_they_cannot_be_linked(parent: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(errno.EXDEV, "another file system")

    monkeypatch.setattr(os, "link", refuse)
    child = make_branch(parent)
    checkpoint = checkpoint_folder(child, 40)
    assert verify_digests(checkpoint) == [] and not is_linked(checkpoint / "__0_0.distcp")
    shutil.rmtree(parent)
    assert (checkpoint / "__0_0.distcp").read_bytes() == b"weights 40"


def is_linked(path: Path) -> bool:
    return path.stat().st_nlink > 1


def test_its_configuration_is_the_runs_with_the_changes(parent: Path) -> None:
    child = make_branch(parent, "optimizer.learning_rate=1e-6", "algorithm.clip_high=0.3", start="reset-1")
    expected = load_config(parent / "config.yaml", [f"run_dir={child}", "optimizer.learning_rate=1e-6"])
    assert load_config(child / "config.yaml", ["algorithm.clip_high=0.4"]) == expected
    changed = {"algorithm.clip_high": [0.4, 0.3], "optimizer.learning_rate": [2e-6, 1e-6]}
    first = read_lineage(child)[0]
    assert (first["event"], first["step"], first["parent"], first["changed"]) == ("branch", 10, str(parent), changed)
    (record,) = (parent / "branches").iterdir()
    assert json.loads(record.read_text()) == {k: v for k, v in first.items() if k != "parent"} | {
        "event": "branched",
        "run": str(child),
    }


def test_where_it_comes_from_outlives_every_start(parent: Path) -> None:
    child = make_branch(parent, start="reset-1")
    for resume_step in (10, 10, 0):
        LineageWriter(child, resume_step).close()
    assert [event["event"] for event in read_lineage(child)] == ["branch", "resume", "resume", "start"]


def test_a_branch_of_a_branch(parent: Path) -> None:
    child = make_branch(parent, start="reset-3")
    grandchild = make_branch(child, "seed=1", name="grandchild")
    first, *rest = read_lineage(grandchild)
    assert (first["parent"], first["from"], first["step"], rest) == (str(child), "reset-003", 30, [])


def test_without_another_mix_the_draws_go_on_to_the_byte(parent: Path) -> None:
    child = make_branch(parent, "optimizer.learning_rate=1e-6", start="reset-1")
    ours, theirs = progress(child, 10), progress(parent, 10)
    assert ours.pop("events") == [*theirs.pop("events"), {"event": "branch", "step": 10, "scores_compare": True}]
    assert json.dumps(ours) == json.dumps(theirs)


@pytest.mark.parametrize(
    ("overrides", "counts"),
    [
        (["data.tasks.0.weight=1.0"], (0, 1)),
        (["seed=7"], (0, 1)),
        (["data.tasks=[{task: lcm}, {task: spell_backward}, {task: gcd, weight: 2.0}]"], (1, None, 0)),
        (["stages=[{name: a, options: {data.tasks.0.weight: 0}}]"], (0, 1)),
    ],
)
def test_in_another_mix_each_task_goes_on_where_it_was(
    parent: Path, overrides: list[str], counts: tuple[int | None, ...]
) -> None:
    before = Mixture([3.0, 1.0], 0).counts(120)  # what the four problems of 30 steps were
    assert sum(before) == 120 and before[0] == pytest.approx(90, abs=2)
    after = progress(make_branch(parent, *overrides, start="step-30"), 30)
    assert after["source_counts"] == [0 if place is None else before[place] for place in counts]
    assert (after["stage_start_draw"], after["next_draw"]) == (120, 120)
    changed = {"source_counts", "stage_start_draw", "stage_start_step", "events"}
    assert {k: v for k, v in after.items() if k not in changed} == {
        k: v for k, v in progress(parent, 30).items() if k not in changed
    }
    same_problems = not any(override.startswith(("seed=", "data.tasks=")) for override in overrides)
    assert after["events"][-1] == {"event": "branch", "step": 30, "scores_compare": same_problems}


def test_other_problems_held_out_are_told(parent: Path) -> None:
    def told(override: str) -> bool:
        text = branch(parent, branch_config(parent, parent.parent / override, [override]))
        return "other problems may be held out" in text

    assert told("seed=1") and told("data.validation_problems=32")
    assert not told("data.tasks.0.weight=1.0") and not told("optimizer.learning_rate=1e-6")


def test_another_plan_begins_at_its_first_stage_and_the_same_goes_on(tmp_path: Path) -> None:
    stages = [{"name": "a", "steps": 50}, {"name": "b"}]
    parent = make_run(tmp_path / "parent", stages=stages)
    same = make_branch(parent, "stages.0.steps=90", name="same")
    assert (progress(same, 40)["stage"], progress(same, 40)["stage_start_step"]) == (0, 0)
    other = make_branch(parent, "stages.0.name=c", name="other")
    assert (progress(other, 40)["stage"], progress(other, 40)["stage_start_step"]) == (0, 40)


def test_a_stage_is_added_to_a_plan_that_is_done(tmp_path: Path) -> None:
    parent = make_run(tmp_path / "parent", stages=[{"name": "a", "steps": 20}, {"name": "b", "steps": 20}])
    state = checkpoint_folder(parent, 40) / "state.json"
    content = json.loads(state.read_text())
    content["progress"] |= {"stage": 2, "stage_start_step": 40}
    state.write_text(json.dumps(content))
    listed = json.loads(state.with_name("COMMITTED").read_text())
    listed["bytes"]["state.json"], listed["crc32"]["state.json"] = state.stat().st_size, crc32(state)
    state.with_name("COMMITTED").write_text(json.dumps(listed))
    stages = "stages=[{name: a, steps: 20}, {name: b, steps: 20}, {name: c, steps: 20}]"
    child = checkpoint_folder(make_branch(parent, stages), 40)
    found = read_state(child)["progress"]
    assert (found["stage"], found["stage_start_step"]) == (2, 40)


def test_a_branch_that_resets_to_the_best_has_that_checkpoint_too(parent: Path) -> None:
    child = make_branch(parent, "reset.target=best", start="step-40")
    assert sorted(os.listdir(child / "checkpoints")) == ["step-000020", "step-000040"]
    assert sorted(os.listdir(child / "references")) == ["reset-002", "reset-003"]
    assert not (
        checkpoint_folder(make_branch(parent, "reset.target=best", start="step-20", name="at best"), 40)
    ).exists()


@pytest.mark.parametrize(("score", "best"), [("validation/reward", 20), ("validation/falling", 10)])
def test_a_branch_in_a_stage_that_resets_to_the_best_has_that_checkpoint_too(
    tmp_path: Path, score: str, best: int
) -> None:
    stages = [{"name": "only", "options": {"reset.target": "best", "reset.score": score}}]
    parent = make_run(tmp_path / "parent", stages=stages)
    content = read_state(checkpoint_folder(parent, 40))
    for row in content["progress"]["history"][10::10]:
        row["validation/falling"] = -row["step"]
    shutil.rmtree(checkpoint_folder(parent, 40))
    make_folder(checkpoint_folder(parent, 40), b"weights 40", json.dumps(content).encode())
    child = make_branch(parent)
    assert sorted(os.listdir(child / "checkpoints")) == [f"step-{best:06d}", "step-000040"]


@pytest.mark.parametrize(
    ("overrides", "start", "problem"),
    [
        ([], "reset-9", "--from reset-9: {parent} has no such checkpoint; it has step-10 (reset-001), "),
        ([], "step-15", "--from step-15: {parent} has no such checkpoint; it has "),
        ([], "best", "--from best: expected reset-<number> or step-<number>, as in reset-3 or step-500"),
        (["optimiser.learning_rate=1"], "", "config error: optimiser: no such option; did you mean optimizer?"),
        (["run_dir=elsewhere"], "", "config error: run_dir: is that of the branch already; leave it out"),
        (["steps=40"], "", "config error: steps: step-000040 is of step 40, and steps = 40 ends there; raise it"),
        (["optimizer.distributed=false"], "", "config error: optimizer.distributed: is True in {parent}, and its "),
        (["model.dtype=fp32"], "", "config error: model.dtype: is bf16 in {parent}, and its checkpoints cannot be "),
        (["model.path=other/model"], "", "config error: model.path: cannot compare other/model with the run's model"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_one_line_and_leaves_nothing(
    parent: Path, overrides: list[str], start: str, problem: str
) -> None:
    with pytest.raises(UserError) as caught:
        make_branch(parent, *overrides, start=start)
    assert str(caught.value).startswith(problem.format(parent=parent)) and "\n" not in str(caught.value)
    assert os.listdir(parent.parent) == ["parent"] and not (parent / "branches").exists()


def test_another_model_is_refused_and_the_same_elsewhere_is_not(parent: Path, tmp_path: Path) -> None:
    for folder, layers in ((parent / "hf", 2), (tmp_path / "moved", 2), (tmp_path / "deeper", 3)):
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps({"num_hidden_layers": layers, "_name_or_path": str(folder)}))
        (folder / "tokenizer.json").write_text("{}")
    child = make_branch(parent, f"model.path={tmp_path}/moved")
    assert (child / "hf" / "config.json").is_file()
    with pytest.raises(UserError, match=r"deeper is another model than the run's \(num_hidden_layers\)"):
        make_branch(parent, f"model.path={tmp_path}/deeper", name="second")
    (tmp_path / "moved" / "tokenizer.json").write_text('{"model": {}}')
    with pytest.raises(UserError, match="another tokenizer"):
        make_branch(parent, f"model.path={tmp_path}/moved", name="second")


def test_a_model_with_another_chat_template_is_refused(parent: Path, tmp_path: Path) -> None:
    for folder, template in ((parent / "hf", "{{ messages }}"), (tmp_path / "terse", "Be terse. {{ messages }}")):
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        (folder / "chat_template.jinja").write_text(template)
    with pytest.raises(UserError, match=r"another tokenizer or chat template than the run's \(chat_template\.jinja\)"):
        make_branch(parent, f"model.path={tmp_path}/terse")


def test_a_damaged_checkpoint_is_not_branched_from(parent: Path) -> None:
    path = checkpoint_folder(parent, 20) / "__0_0.distcp"
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    with pytest.raises(UserError, match=r"__0_0.distcp changed since written; branch from another checkpoint"):
        make_branch(parent, start="reset-2")
    assert os.listdir(parent.parent) == ["parent"] and not (parent / "branches").exists()


def test_a_missing_reference_is_told_where_the_kl_term_needs_it(parent: Path) -> None:
    shutil.rmtree(parent / "references" / "reset-002")
    with pytest.raises(UserError, match=r"algorithm.kl.coefficient: 0.0001 needs a reference, and .* has none"):
        make_branch(parent, start="reset-2")
    assert is_committed(checkpoint_folder(make_branch(parent, "algorithm.kl.coefficient=0.0", start="reset-2"), 20))


def test_a_folder_that_is_there_is_not_touched_but_an_empty_one_is_used(parent: Path, tmp_path: Path) -> None:
    (tmp_path / "child").mkdir()
    assert is_committed(checkpoint_folder(make_branch(parent), 40))
    with pytest.raises(UserError, match="child: is there already; give another folder for the branch"):
        make_branch(parent)


def test_a_full_disk_is_one_line_and_leaves_nothing(parent: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(folder: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))

    monkeypatch.setattr(module, "publish", refuse)
    with pytest.raises(UserError, match=r"child: cannot make it: .*/child: no space left on device"):
        make_branch(parent)
    assert os.listdir(parent.parent) == ["parent"] and os.listdir(parent / "branches") == []


def test_what_a_killed_branch_left_is_cleared_away_by_the_next(parent: Path) -> None:
    script = (
        "import os, sys; from megatron_prorl.checkpoint import branch as b; b.publish = lambda folder: os._exit(9); "
        "b.branch(sys.argv[1], b.branch_config(sys.argv[1], sys.argv[2]))"
    )
    child = parent.parent / "child"
    assert subprocess.run([sys.executable, "-c", script, str(parent), str(child)], timeout=60).returncode == 9
    assert sorted(os.listdir(parent.parent)) == [".tmp-child", "parent"]
    make_branch(parent)
    assert sorted(os.listdir(parent.parent)) == ["child", "parent"]
    with pytest.raises(UserError, match="is where .*child .* branched off"):
        delete(parent)
    delete(child)
    delete(parent)  # what the killed one noted there does not keep it


def test_a_run_goes_when_nothing_needs_it(parent: Path) -> None:
    child = make_branch(parent, start="reset-2")
    with pytest.raises(
        UserError, match=rf"{parent}: is where {child} \(at reset-002\) branched off; delete those first"
    ):
        delete(parent)
    with only_writer(child), pytest.raises(UserError, match="another process trains in"):
        subprocess_delete(child)
    assert is_committed(checkpoint_folder(child, 20))
    delete(child)
    assert list((parent / "branches").iterdir()) == []
    delete(parent)
    assert os.listdir(parent.parent) == []


def test_a_run_stays_while_a_branch_of_it_is_not_found(parent: Path) -> None:
    child = make_branch(parent, start="reset-2")
    elsewhere = child.rename(parent.parent / "moved")
    make_branch(child.parent / "moved", name="child")  # another run has taken its place
    (record,) = (parent / "branches").iterdir()
    with pytest.raises(UserError) as caught:
        delete(parent)
    assert str(caught.value) == (
        f"{parent}: is where {child} (at reset-002) branched off, which is not there now: delete it first where it was "
        f"moved to, or mount its disk; where it is gone for good, remove {record}"
    )
    assert is_committed(checkpoint_folder(parent, 40))
    delete(child)
    delete(elsewhere)
    delete(parent)


def test_a_run_goes_once_its_record_of_a_lost_branch_is_removed(parent: Path) -> None:
    shutil.rmtree(make_branch(parent))
    with pytest.raises(UserError, match="which is not there now"):
        delete(parent)
    (record,) = (parent / "branches").iterdir()
    record.unlink()
    delete(parent)


def test_a_run_stays_while_a_branch_cannot_be_looked_into(parent: Path) -> None:
    child = make_branch(parent)
    (record,) = (parent / "branches").iterdir()
    record.write_text(record.read_text().replace(str(child), f"/{'x' * 300}"))  # the system refuses so long a name
    with pytest.raises(UserError, match="which is not there now"):
        delete(parent)


def test_a_branch_that_was_killed_in_the_making_or_the_deletion_keeps_no_run(parent: Path) -> None:
    child = make_branch(parent)
    child.rename(child.with_name(".tmp-child"))
    delete(parent)


def subprocess_delete(run_dir: Path) -> None:
    command = [sys.executable, "-m", "megatron_prorl.cli", "delete", str(run_dir)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (2, "", 1)
    raise UserError(done.stderr)


def test_only_a_run_is_deleted(tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    with pytest.raises(UserError, match="thesis: no run directory"):
        delete(tmp_path / "thesis")
    assert (tmp_path / "thesis").is_dir()
