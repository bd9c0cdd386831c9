"""What a start leaves in the run directory, be it one that fails before it trains."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path

import pytest
from run_folder import make_run

from megatron_prorl.checkpoint.folders import latest_checkpoint, read_state
from megatron_prorl.config.load import ConfigError
from megatron_prorl.config.run_dir import run_config
from megatron_prorl.rank_zero import RankZero
from megatron_prorl.tracking.lineage import read_lineage
from megatron_prorl.types import Progress


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_model(tmp_path / "model", "{{ messages }}")


def write_model(folder: Path, template: str) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "chat_template.jinja").write_text(template)
    return folder


def start(run_dir: Path, model: Path, *overrides: str, fails: bool = False) -> None:
    """As `Run` starts; `fails` ends it once the run directory is its own."""
    cfg = run_config(run_dir, [f"model.path={json.dumps(str(model))}", *overrides])
    with ExitStack() as stack:
        rank_zero = RankZero(cfg, stack)
        checkpoint = rank_zero.find_checkpoint()
        if not fails:
            progress = Progress(**read_state(checkpoint)["progress"]) if checkpoint else Progress()
            rank_zero.begin_stage(cfg, progress)


def changes(run_dir: Path) -> list[list[str]]:
    return [event["changed"] for event in read_lineage(run_dir) if event["event"] == "config"]


def test_a_change_is_noted_though_a_start_with_it_failed(tmp_path: Path, model: Path) -> None:
    run_dir = make_run(tmp_path / "run", model={"path": str(model)})
    start(run_dir, model)
    start(run_dir, model, "reset.every_steps=5", "reset.score=validation/typo", fails=True)
    assert run_config(run_dir).reset.score == "validation/reward" and changes(run_dir) == []
    start(run_dir, model, "reset.every_steps=5")
    start(run_dir, model, "reset.every_steps=5")
    assert changes(run_dir) == [["reset.every_steps was 0, is 5"]]
    assert run_config(run_dir).reset.every_steps == 5


def test_a_change_of_a_run_in_stages_is_recorded_as_it_was_given(tmp_path: Path, model: Path) -> None:
    stages = [{"name": "only", "options": {"optimizer.learning_rate": 0.1}}]
    run_dir = make_run(tmp_path / "run", model={"path": str(model)}, stages=stages)
    before = run_config(run_dir)
    start(run_dir, model, "steps=200")
    assert run_config(run_dir) == before.model_copy(update={"steps": 200})


def test_the_model_that_is_kept_is_that_of_the_first_checkpoint(tmp_path: Path, model: Path) -> None:
    run_dir = make_run(tmp_path / "run", steps=0, model={"path": str(model)})
    other = write_model(tmp_path / "other", "Be terse. {{ messages }}")
    for path in (model, other):
        start(run_dir, path, fails=True)
        kept = run_dir / "hf" / "chat_template.jinja"
        assert kept.read_text() == (path / "chat_template.jinja").read_text()
    assert sorted(path.name for path in run_dir.glob("*hf")) == ["hf"]


def test_a_run_goes_on_with_the_chat_template_it_began_with(tmp_path: Path, model: Path) -> None:
    run_dir = make_run(tmp_path / "run", model={"path": str(model)})
    start(run_dir, model)
    (model / "chat_template.jinja").write_text("Be terse. {{ messages }}")
    with pytest.raises(ConfigError, match=f"chat_template.jinja of {model} changed since"):
        start(run_dir, model)
    assert (run_dir / "hf" / "chat_template.jinja").read_text() == "{{ messages }}"
    assert latest_checkpoint(run_dir)
