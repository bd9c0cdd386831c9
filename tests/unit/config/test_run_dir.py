"""A run goes on only with the configuration it began with, but for what cannot change what is learned."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from megatron_prorl.config.load import ConfigError, load_config
from megatron_prorl.config.run_dir import check_data, check_run_dir, record_config
from megatron_prorl.config.schema import Config
from megatron_prorl.tracking.rows import cut_off

EXAMPLE = Path(__file__).parents[3] / "examples" / "quickstart.yaml"


TASKS = "data.tasks=[{task: chain_sum, params: {max_terms: 2}}]"


def config(run_dir: Path, *overrides: str) -> Config:
    return load_config(EXAMPLE, [f"run_dir={run_dir}", TASKS, *overrides])


@pytest.fixture
def begun(tmp_path: Path) -> Path:
    """The directory of a run that has a checkpoint."""
    record_config(config(tmp_path / "run"))
    (tmp_path / "run" / "checkpoints" / "step-000010").mkdir(parents=True)
    return tmp_path / "run"


def test_the_recorded_configuration_is_the_one_in_force(tmp_path: Path) -> None:
    cfg = config(tmp_path / "run", "seed=7", "optimizer.learning_rate=1e-5")
    record_config(cfg)
    assert load_config(tmp_path / "run" / "config.yaml") == cfg
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["config.yaml"]


def test_a_resumed_run_refuses_another_configuration_and_names_every_difference(begun: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        check_run_dir(
            config(begun, "seed=7", "data.tasks.0.params.max_terms=3", "steps=99", "algorithm.kl.log_ratio_clamp=10")
        )
    assert str(caught.value) == (
        f"config error: run_dir: {begun} was made with another configuration: "
        "algorithm.kl.log_ratio_clamp was None, is 10.0; data.tasks.0.params.max_terms was 2, is 3; seed was 0, is 7; "
        "use a new run_dir, put it back, or change it in a branch (prorl branch)"
    )


def test_what_may_change_is_named(begun: Path) -> None:
    assert check_run_dir(config(begun)) == []
    assert check_run_dir(config(begun, "steps=99", "reset.every_steps=7", "guards.kl.high=1")) == [
        "guards.kl was None, is absent", "guards.kl.action was absent, is warn", "guards.kl.high was absent, is 1.0",
        "guards.kl.low was absent, is None", "guards.kl.steps was absent, is 1", "reset.every_steps was 20, is 7",
        "steps was 50, is 99",
    ]  # fmt: skip


def test_an_option_that_came_after_the_run_began_has_its_default_there(begun: Path) -> None:
    recorded = (begun / "config.yaml").read_text().splitlines(keepends=True)
    (begun / "config.yaml").write_text("".join(line for line in recorded if "cosine_penalty" not in line))
    assert check_run_dir(config(begun)) == []
    with pytest.raises(ConfigError, match=r"algorithm\.shaping\.cosine_penalty was 0\.0, is 0\.5"):
        check_run_dir(config(begun, "algorithm.shaping.cosine_penalty=0.5"))


def test_an_option_that_is_gone_is_a_difference(begun: Path) -> None:
    (begun / "config.yaml").write_text((begun / "config.yaml").read_text() + "gone: 3\n")
    with pytest.raises(ConfigError, match="gone was 3, is absent"):
        check_run_dir(config(begun))


def test_a_task_added_to_a_resumed_run_is_a_difference(begun: Path) -> None:
    cfg = config(begun)
    task = cfg.data.tasks[0].model_copy(update={"task": "gcd"})
    more = cfg.model_copy(update={"data": cfg.data.model_copy(update={"tasks": [*cfg.data.tasks, task]})})
    with pytest.raises(ConfigError, match=r"data\.tasks\.1\.task was absent, is gcd"):
        check_run_dir(more)


@pytest.mark.parametrize(
    "override",
    ["steps=999", "parallel.ranks_per_node=2", "batching.tokens_per_microbatch=9999", "checkpoint.keep=9",
     "tracking.wandb.project=x", "model.recompute=full", "rollout.engines.count=2", "verifier.workers=3"],
)  # fmt: skip
def test_a_resumed_run_may_change_what_does_not_change_what_is_learned(begun: Path, override: str) -> None:
    check_run_dir(config(begun, override))


def test_a_moved_run_goes_on(begun: Path, tmp_path: Path) -> None:
    check_run_dir(config(begun.rename(tmp_path / "elsewhere")))


def test_a_run_without_a_checkpoint_may_start_again_with_another_configuration(tmp_path: Path) -> None:
    record_config(config(tmp_path / "run"))
    check_run_dir(config(tmp_path / "run", "seed=7"))


def test_a_resumed_run_refuses_a_problem_file_that_was_edited_and_names_it(begun: Path) -> None:
    cfg = config(begun)
    check_data(cfg, {"math.jsonl": "0123456789012345", "held_out.jsonl": "1e10", "code.parquet": "cc"})
    recorded = (begun / "data.json").read_bytes()
    check_data(cfg, {"math.jsonl": "0123456789012345", "held_out.jsonl": "1e10", "code.parquet": "cc"})
    with pytest.raises(ConfigError) as caught:
        check_data(cfg, {"math.jsonl": "0123456789012346", "held_out.jsonl": "1e11", "code.parquet": "cc"})
    assert str(caught.value) == (
        f"config error: run_dir: {begun} was made with other problems: held_out.jsonl, math.jsonl changed since; "
        "use a new run_dir or put it back"
    )
    assert (begun / "data.json").read_bytes() == recorded


def test_a_run_without_a_checkpoint_may_start_again_with_other_problems(tmp_path: Path) -> None:
    cfg = config(tmp_path / "run")
    check_data(cfg, {"math.jsonl": "aa"})
    check_data(cfg, {"math.jsonl": "bb"})
    (tmp_path / "run" / "checkpoints" / "step-000001").mkdir(parents=True)
    check_data(cfg, {"math.jsonl": "bb"})
    with pytest.raises(ConfigError, match=r"math\.jsonl changed since"):
        check_data(cfg, {"math.jsonl": "aa"})
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["checkpoints", "data.json"]


@pytest.mark.parametrize("aside", [".incomplete-", ".corrupt-", ".replaced-"])
def test_a_checkpoint_that_was_set_aside_counts(begun: Path, aside: str) -> None:
    folder = begun / "checkpoints"
    check_data(config(begun), {"math.jsonl": "aa"})
    (folder / "step-000010").rename(folder / f"{aside}step-000010")
    with pytest.raises(ConfigError, match="seed was 0, is 7"):
        check_run_dir(config(begun, "seed=7"))
    with pytest.raises(ConfigError, match=r"math\.jsonl changed since"):
        check_data(config(begun), {"math.jsonl": "bb"})


MODEL_FILES: dict[str, dict[str, Any] | str] = {
    "config.json": {"num_hidden_layers": 2, "_name_or_path": "here", "dtype": "float32"},
    "generation_config.json": {"top_p": 0.9},
    "tokenizer.json": {"model": {"type": "BPE"}},
    "tokenizer_config.json": {"chat_template": "{{ messages }}", "name_or_path": "here"},
    "chat_template.jinja": "{{ messages }}",
    "merges.txt": "a b",
    "additional_chat_templates/rag.jinja": "{{ documents }}",
}


def write_model(folder: Path) -> None:
    for name, content in MODEL_FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))


@pytest.fixture
def model(begun: Path, tmp_path: Path) -> Path:
    """The model of the run that has begun, which has kept its files."""
    write_model(begun / "hf")
    write_model(tmp_path / "model")
    record_config(config(begun, f"model.path={tmp_path}/model"))
    return tmp_path / "model"


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("config.json", '{"num_hidden_layers": 3}'),
        ("tokenizer.json", "{}"),
        ("tokenizer_config.json", '{"chat_template": "Be terse. {{ messages }}"}'),
        ("tokenizer_config.json", '{"chat_templ'),
        ("chat_template.jinja", "Be terse. {{ messages }}"),
        ("merges.txt", None),
        ("additional_chat_templates/rag.jinja", "{{ messages }}"),
        ("special_tokens_map.json", "{}"),
    ],
)
def test_a_resumed_run_refuses_another_model_or_tokenizer_and_names_the_files(
    begun: Path, model: Path, name: str, text: str | None
) -> None:
    cfg = config(begun, f"model.path={model}")
    assert check_run_dir(cfg) == []
    (model / name).unlink() if text is None else (model / name).write_text(text)
    with pytest.raises(ConfigError) as caught:
        check_run_dir(cfg)
    assert str(caught.value) == (
        f"config error: run_dir: {begun} was made with another model or tokenizer: {name} of {model} changed since; "
        "use a new run_dir or put it back"
    )


def test_what_says_nothing_of_model_and_prompts_may_change(begun: Path, model: Path) -> None:
    (model / "config.json").write_text('{"num_hidden_layers": 2, "torch_dtype": "bfloat16"}')
    (model / "generation_config.json").write_text("{}")
    (model / "model.safetensors.index.json").write_text("{}")
    assert check_run_dir(config(begun, f"model.path={model}")) == []


def test_a_checkpoint_that_was_only_begun_does_not_count(begun: Path) -> None:
    (begun / "checkpoints" / "step-000010").rename(begun / "checkpoints" / ".tmp-step-000010")
    assert check_run_dir(config(begun, "seed=7")) == []


def test_a_run_without_a_checkpoint_may_start_again_with_another_model(begun: Path, model: Path) -> None:
    (model / "chat_template.jinja").write_text("Be terse. {{ messages }}")
    (begun / "checkpoints" / "step-000010").rmdir()
    assert check_run_dir(config(begun, f"model.path={model}")) == []


def test_what_is_recorded_is_on_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    replace = os.replace

    def checked(draft: Path, target: Path) -> None:
        assert os.stat(draft).st_ino in synced, target
        replace(draft, target)

    monkeypatch.setattr(os, "fsync", lambda file: synced.append(os.fstat(file).st_ino))
    monkeypatch.setattr(os, "replace", checked)
    record_config(config(tmp_path / "run"))
    check_data(config(tmp_path / "run"), {"math.jsonl": "aa"})
    (tmp_path / "rows.jsonl").write_text('{"step": 1}\n{"step": 2}\n')
    cut_off(tmp_path / "rows.jsonl", lambda row: row["step"] < 2)
    assert (tmp_path / "rows.jsonl").read_text() == '{"step": 1}\n'


def test_a_run_directory_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(
        ConfigError, match=r"^config error: run_dir: cannot write .*/file/run/config\.yaml: not a directory$"
    ):
        record_config(config(tmp_path / "file" / "run"))
