"""`prorl` as a user meets it: a process of its own, what it prints, how long it takes."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from model_files import model_folder

from megatron_prorl import __version__

ROOT = Path(__file__).parents[2]
RECIPE = str(ROOT / "examples" / "prorl_1p5b.yaml")


def prorl(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "megatron_prorl.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=ROOT, env=os.environ | environment)


def test_a_dry_run_prints_the_effective_configuration_though_the_model_is_not_there_yet(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    done = prorl("train", RECIPE, f"run_dir={run_dir}", "seed=3", "--dry-run", "optimizer.learning_rate=1e-6")
    assert done.returncode == 0
    path = "models/DeepSeek-R1-Distill-Qwen-1.5B"
    assert done.stderr == f"warning: model.path: {path}: model not found yet, so not checked\n"
    effective = yaml.safe_load(done.stdout)
    assert (effective["seed"], effective["optimizer"]["learning_rate"]) == (3, 1e-6)
    assert effective["optimizer"]["beta2"] == 0.999  # a default is printed as well
    assert not run_dir.exists()


def processor_seconds() -> float:
    """Processor time of the children that have ended: what a command takes on a machine that does nothing else."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def test_a_dry_run_takes_less_than_a_second() -> None:
    before = processor_seconds()
    assert prorl("train", RECIPE, "--dry-run").returncode == 0
    assert processor_seconds() - before < 1.0


def test_a_dry_run_imports_nothing_heavy() -> None:
    script = "import sys; from megatron_prorl.cli import main; main(sys.argv[1:]); print('\\n', *sys.modules)"
    command = [sys.executable, "-c", script, "train", RECIPE, "--dry-run"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=ROOT, check=True)
    modules = set(done.stdout.splitlines()[-1].split())
    assert "pydantic" in modules
    assert not modules & {"torch", "numpy", "megatron.core", "vllm", "transformers", "reasoning_gym"}


@pytest.mark.parametrize(
    ("arguments", "lines"),
    [
        (["no.yaml"], ["config error: no.yaml: no such file or directory"]),
        ([RECIPE, "parallel.tensr=2"], ["config error: parallel.tensr: no such option; did you mean parallel.tensor?"]),
        (
            [RECIPE, "parallel.tensor=3", "steps=5", "optimizer.updates_per_step=3"],
            [
                "config error: parallel: tensor*pipeline*context = 3*1*1 = 3 does not divide world size 32",
                "config error: optimizer.updates_per_step: 3 does not divide rollout.prompts_per_step = 256",
            ],
        ),
        (
            [RECIPE, "model.path=no/model"],
            [
                "config error: model.path: no/model: no such folder; "
                "give one with config.json, *.safetensors and tokenizer.json, or a Megatron checkpoint"
            ],
        ),
    ],
)  # fmt: skip
def test_what_a_user_can_fix_is_one_line_and_exit_code_2(arguments: list[str], lines: list[str]) -> None:
    done = prorl("train", *arguments)
    assert (done.returncode, done.stdout, done.stderr.splitlines()) == (2, "", lines)


def test_another_number_of_ranks_than_configured_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    model = model_folder(tmp_path / "model", max_position_embeddings=131072)
    arguments = ["train", RECIPE, f"model.path={model}", f"run_dir={tmp_path / 'run'}"]
    line = (
        "config error: parallel: nodes*ranks_per_node = 4*8 = 32 ranks, but {} started; "
        "more than one node needs srun or torchrun\n"
    )
    alone = prorl(*arguments)
    assert (alone.returncode, alone.stderr) == (2, line.format(1))
    started = prorl(*arguments, RANK="0", WORLD_SIZE="16", LOCAL_RANK="0")
    assert (started.returncode, started.stderr) == (2, line.format(16))
    silent = prorl(*arguments, RANK="5", WORLD_SIZE="16", LOCAL_RANK="5")  # local rank 0 of each node speaks
    assert (silent.returncode, silent.stderr) == (2, "")
    assert not (tmp_path / "run").exists()


def test_version_and_help() -> None:
    assert prorl("--version").stdout == f"prorl {__version__}\n"
    assert "train" in prorl("--help").stdout
    unknown = prorl("train", RECIPE, "--quick")
    assert (unknown.returncode, unknown.stderr.splitlines()[-1]) == (
        2,
        "prorl train: error: unrecognized arguments: --quick",
    )


def test_without_a_command_it_lists_them() -> None:
    done = prorl()
    assert (done.returncode, done.stdout) == (2, "")
    assert all(f"\n    {command} " in done.stderr for command in ("train", "convert", "report", "launch"))
