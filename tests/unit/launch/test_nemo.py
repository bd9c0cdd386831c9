"""The scripts that `prorl launch` would submit, in full; `python tests/unit/launch/test_nemo.py` writes them anew."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_prorl.errors import UserError
from megatron_prorl.launch import prorl_task
from megatron_prorl.launch.site import Site, SlurmSite, Tunnel

config = pytest.importorskip("nemo_run.config", reason="NeMo-Run is not installed")

from megatron_prorl.launch import nemo  # noqa: E402

REPOSITORY = Path(__file__).parents[3]
SCRIPTS = Path(__file__).parent / "scripts"
HOME = "/home/me/.nemo_run"
CHECKOUT = "/shared/me/megatron_prorl"
VENV = SlurmSite(
    account="my_account",
    partition="batch",
    gpus_per_node=8,
    checkout=CHECKOUT,
    venv=f"{CHECKOUT}/.venv",
    setup="module load cuda\nexport NCCL_SOCKET_IFNAME=ib0\n",
    sbatch={"qos": "high"},
)
CONTAINER = SlurmSite(
    account="my_account",
    gpus_per_node=8,
    checkout=CHECKOUT,
    container="/shared/me/prorl.sqsh",
    mounts=["/shared/me:/shared/me"],
    warn_seconds=900,
    srun=["--mpi=pmix"],
    tunnel=Tunnel(kind="ssh", host="login.cluster.example", user="me", job_dir="/shared/me/jobs"),
)
LAUNCHES: dict[str, dict[str, Any]] = {
    "venv_chain.sh": {"site": VENV, "jobs": 20},
    "venv_one_job.sh": {"site": VENV, "jobs": 1, "time_limit": "2-00:00:00"},
    "container_ssh_chain.sh": {"site": CONTAINER, "jobs": 20},
}
CONFIG = {
    "run_dir": "runs/golden",
    "steps": 3000,
    "model": {"path": "models/model"},
    "parallel": {"nodes": 4, "ranks_per_node": 8},
    "data": {"tasks": [{"task": "gcd"}]},
    "rollout": {
        "prompts_per_step": 256,
        "rollouts_per_prompt": 16,
        "max_prompt_tokens": 1024,
        "max_response_tokens": 7168,
        "engines": {"count": 32},
    },
    "optimizer": {"learning_rate": 2e-6},
}


@pytest.fixture(autouse=True)
def home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "_NEMORUN_HOME", HOME)  # read when it is imported


def plan(folder: Path, site: SlurmSite | None, *overrides: str, **options: Any) -> nemo.Plan:
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(CONFIG))
    executor = options.pop("executor", "slurm")
    return nemo.Plan(task=prorl_task(path, *overrides), executor=executor, site=Site(slurm=site), **options)


def script(folder: Path, name: str) -> str:
    return nemo.dry_run(plan(folder, **LAUNCHES[name]), chain="20260101000000")


@pytest.mark.parametrize("name", LAUNCHES)
def test_the_script_is_this_one(tmp_path: Path, name: str) -> None:
    assert script(tmp_path, name) == (SCRIPTS / name).read_text()


@pytest.mark.parametrize("name", LAUNCHES)
def test_the_script_is_one_that_bash_reads(name: str) -> None:
    subprocess.run(["bash", "-n", str(SCRIPTS / name)], check=True)


def test_the_example_prints_the_script_of_the_papers_recipe() -> None:
    command = [sys.executable, str(REPOSITORY / "examples" / "launch_slurm.py"), "--dry-run"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "\n#SBATCH --nodes=4\n#SBATCH --ntasks-per-node=8\n" in done.stdout


def test_a_dry_run_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "_NEMORUN_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    before = sorted([*os.listdir(tmp_path), "config.yaml"])
    script(tmp_path, "venv_chain.sh")
    assert sorted(os.listdir(tmp_path)) == before


def test_the_local_executor_judges_its_attempts_too(tmp_path: Path) -> None:
    local = plan(tmp_path, None, "parallel.nodes=1", "rollout.engines.count=8", executor="local")
    words = f"{tmp_path}/config.yaml parallel.nodes=1 rollout.engines.count=8"
    assert [line for line in nemo.dry_run(local).splitlines() if sys.executable in line] == [
        f"{sys.executable} -m megatron_prorl.launch.attempts begin {words}",
        f"{sys.executable} -m megatron_prorl.cli train {words}",
        f"exec {sys.executable} -m megatron_prorl.launch.attempts end $? {words}",
    ]


def test_the_task_is_a_fiddle_configuration_that_can_be_changed(tmp_path: Path) -> None:
    task = plan(tmp_path, VENV).task
    task.overrides.append("steps=10")
    changed = nemo.Plan(task=task, executor="slurm", site=Site(slurm=VENV))
    assert changed.cfg.steps == 10
    assert "\nsteps: 10\n" in nemo.dry_run(changed)


@pytest.mark.parametrize(
    ("site", "options", "line"),
    [
        (VENV, {"jobs": 0}, "--jobs: expected at least 1, got 0"),
        (None, {}, "site: no section slurm; examples/site.yaml has one"),
        (VENV, {"executor": "local"}, "--executor local: one node, not parallel.nodes = 4"),
        (
            VENV.model_copy(update={"checkout": None}),
            {},
            "run_dir: runs/golden: has to be absolute, or slurm.checkout given in the site file",
        ),
    ],
)
def test_what_cannot_be_launched_is_one_line(
    tmp_path: Path, site: SlurmSite | None, options: dict[str, Any], line: str
) -> None:
    with pytest.raises(UserError) as caught:
        plan(tmp_path, site, **options)
    assert str(caught.value) == line


def git(folder: Path, *words: str) -> None:
    me = ["-c", "user.name=me", "-c", "user.email=me@cluster.example"]
    subprocess.run(["git", *me, *words], cwd=folder, check=True, capture_output=True)


def test_without_a_checkout_there_the_last_commit_is_sent_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkout, site = tmp_path / "checkout", VENV.model_copy(update={"checkout": None})
    checkout.mkdir()
    monkeypatch.chdir(checkout)
    monkeypatch.setattr("sys.stdin", io.StringIO())  # NeMo-Run's shell commands read it, which pytest forbids
    absolute = ("run_dir=/shared/me/run", "model.path=/shared/me/model")
    with pytest.raises(UserError, match="not in a checkout, whose last commit could be sent"):
        plan(tmp_path, site, *absolute)
    git(checkout, "init")
    (checkout / "code.py").write_text("1\n")
    git(checkout, "add", "code.py")
    git(checkout, "commit", "-m", "one")
    (checkout / "not_added.py").write_text("2\n")
    script = nemo.dry_run(plan(tmp_path, site, *absolute))
    (workdir,) = re.findall(r" --chdir (\S+) ", script)
    assert re.fullmatch(r"/home/me/\.nemo_run/experiments/run-\w+/run-\w+/prorl/code", workdir)
    planned = plan(tmp_path, site, *absolute)
    with nemo._experiment(planned, "1", str(tmp_path / "base")) as found:
        found.dryrun(log=False, delete_exp_dir=False)
    (code,) = (tmp_path / "base").glob("experiments/*/*/prorl/code")
    assert os.listdir(code) == ["code.py"]
    (checkout / "code.py").write_text("3\n")
    with pytest.raises(UserError, match="the last commit is sent, and there are changes since; commit them"):
        plan(tmp_path, site, *absolute)


@pytest.mark.parametrize("venv", ["/shared/nemo_run/venv", "/shared/my venv", "/shared/$USER/venv"])
def test_a_path_that_breaks_nemo_runs_scripts_is_refused(tmp_path: Path, venv: str) -> None:
    site = VENV.model_copy(update={"venv": venv})
    with pytest.raises(UserError, match="NeMo-Run's scripts take no /nemo_run, spaces, quotes or "):
        nemo.dry_run(plan(tmp_path, site))


def test_without_nemo_run_there_is_one_clear_line(tmp_path: Path) -> None:
    """A finder that knows no nemo_run stands for a machine without it; reading the module imports it not."""
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    code = (
        "import sys; sys.modules['nemo_run'] = None; from megatron_prorl.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    words = ["launch", str(tmp_path / "config.yaml"), "--site", str(REPOSITORY / "examples" / "site.yaml"), "--dry-run"]
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (2, "error: NeMo-Run is not installed here; pip install -e '.[launch]'\n")


if __name__ == "__main__":
    config.set_nemorun_home(HOME)
    with tempfile.TemporaryDirectory() as written:
        for each in LAUNCHES:
            (SCRIPTS / each).write_text(script(Path(written), each))
