"""A run as a chain of jobs, by NeMo-Run: its executors, tunnels, packagers and experiments (`prorl launch`).

Slurm: NeMo-Run's script starts one trainer rank a task. Around its srun stand the lines of `_SETUP`, which judge the
attempts as slurm/job.sh does (launch/attempts.py).
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from megatron_prorl.config.load import dump_config, load_config
from megatron_prorl.config.schema import Config
from megatron_prorl.errors import UserError
from megatron_prorl.launch.attempts import AGAIN, ATTEMPTS_FILE, CHAIN_VARIABLE
from megatron_prorl.launch.site import Site, SkypilotSite, SlurmSite
from megatron_prorl.launch.task import nemo_run

TASK = "prorl"
LOG_LINES = 100
# The folder of the job, which NeMo-Run mounts under this name, or puts into the script where there is no container.
_JOB = "/nemo_run"
_CONFIG = f"{_JOB}/configs/config.yaml"

_AS_RANK = 'export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS; exec "$@"'

_SETUP = """\
# The configuration, once for all jobs of the chain. Change in that file what may change while a run goes on.
mkdir -p {folder}/configs
[ -e {folder}/configs/config.yaml ] || cat >{folder}/configs/config.yaml <<'END_OF_CONFIG'
{config}END_OF_CONFIG
unset SLURM_UNBUFFEREDIO  # it makes the ranks' output a terminal, with a progress bar ten times a second
{setup}export MASTER_ADDR=${{MASTER_ADDR:-$head_node}} MASTER_PORT=${{MASTER_PORT:-$((20000 + SLURM_JOB_ID % 10000))}}
export {chain_variable}={chain}
attempt() {{ {on_first_node}python3 -m megatron_prorl.launch.attempts "$@" {inner_config}; }}
cd {folder}/code
# Whether there is anything to do, and when the ranks have ended, whether to begin again; docs/slurm.md. Who is told to
# end by a signal here leaves that to the next job.
attempt begin
verdict=$?
[ "$verdict" -eq {again} ] || exit "$verdict"
ended() {{
    code=$?
    set +e
    attempt end "$code"
    verdict=$?
{requeue}    exit "$verdict"
}}
trap ended EXIT
trap 'trap - EXIT; exit 143' TERM
"""
_REQUEUE = """\
    [ "$verdict" -ne {again} ] || for _ in {{1..15}}; do scontrol requeue "$SLURM_JOB_ID" && sleep 600; sleep 20; done
"""


class LocalRunEnded(UserError):
    """A local run that is not finished; with the exit code of `prorl train`."""

    def __init__(self, text: str, exit_code: int) -> None:
        super().__init__(text)
        self.exit_code = exit_code


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A run, as `prorl_task` describes it, and the jobs that it is to have. Raises UserError for what cannot be."""

    task: Any
    executor: str
    site: Site
    jobs: int = 1
    time_limit: str = "04:00:00"
    cfg: Config = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "cfg", load_config(self.task.config, self.task.overrides))
        if self.jobs < 1:
            raise UserError(f"--jobs: expected at least 1, got {self.jobs}")
        if self.executor == "local" and self.cfg.parallel.nodes > 1:
            raise UserError(f"--executor local: one node, not parallel.nodes = {self.cfg.parallel.nodes}")
        if self.executor != "local" and getattr(self.site, self.executor) is None:
            raise UserError(f"site: no section {self.executor}; examples/site.yaml has one")
        if self.executor == "slurm" and not self.slurm.checkout:
            _check_sent_along(self.cfg)

    @property
    def slurm(self) -> SlurmSite:
        assert self.site.slurm
        return self.site.slurm

    @property
    def run_dir(self) -> str:
        """Absolute, where the run is."""
        begins = self.slurm.checkout or "/" if self.executor == "slurm" else os.getcwd()
        return os.path.normpath(os.path.join(begins, self.cfg.run_dir))

    @property
    def title(self) -> str:
        """Of the run's experiments, and the beginning of its jobs' names: the run's name, and which of that name."""
        name = re.sub(r"[^A-Za-z0-9-]+", "-", Path(self.run_dir).name).strip("-")
        return f"{name}-{hashlib.sha256(self.run_dir.encode()).hexdigest()[:6]}"


def submit(plan: Plan, chain: str = "") -> str:
    """Submit the jobs and return how they are; by the local executor run them, one after the other.

    `chain` names the experiment (default: by the time). Raises UserError where the executor refuses a job, and then
    cancels those before it, and LocalRunEnded where a local run is not finished.
    """
    with _experiment(plan, chain) as experiment:
        try:
            experiment.run(
                sequential=plan.jobs > 1, detach=plan.executor != "local", tail_logs=plan.executor == "local"
            )
        except Exception as error:
            for job in experiment.jobs:
                experiment.cancel(job.id)
            if plan.executor == "local":  # told to end by a signal
                raise LocalRunEnded(f"the run was ended: {_words(error)}", 1) from error
            raise UserError(f"{plan.executor} refused: {_words(error)}") from error
    text = status(plan)
    if plan.executor == "local" and (code := _last_verdict(Path(plan.run_dir))):
        raise LocalRunEnded(f"the run ended with exit code {code}; {text}", code)
    return text


def dry_run(plan: Plan, chain: str = "") -> str:
    """The script that would be submitted, as it would be; the jobs of a chain differ by their names alone."""
    with tempfile.TemporaryDirectory() as base, _experiment(plan, chain, base) as experiment:
        experiment.dryrun(log=False, delete_exp_dir=False)
        if plan.executor == "skypilot":
            return yaml.safe_dump(experiment.jobs[0]._dryrun_info.request.task.to_yaml_config(), sort_keys=False)
        name = f"{TASK}_sbatch.sh" if plan.executor == "slurm" else f"{TASK}/scripts/{TASK}.sh"
        return Path(experiment._exp_dir, name).read_text(encoding="utf-8")


def status(plan: Plan) -> str:
    """How the jobs of the run's newest experiment are, and how its attempts ended."""
    experiment = _newest(plan)
    lines = [f"{experiment._id}:"]
    found = experiment.status(return_dict=True)
    for job in experiment.jobs:
        lines.append(f"  {job.id:<10} {found[job.id]['job_id']:<10} {found[job.id]['status'].name}")
    if attempts := _read(plan, experiment, f"tail -n 5 {shlex.quote(f'{plan.run_dir}/{ATTEMPTS_FILE}')}"):
        lines += [f"how its attempts ended ({ATTEMPTS_FILE}):", *(f"  {line}" for line in attempts.splitlines())]
    return "\n".join(lines)


def logs(plan: Plan) -> str:
    """The last lines of the log that was written last, of all ranks."""
    experiment = _newest(plan)
    executor = experiment.jobs[0].executor
    folder = executor.job_dir
    if plan.executor == "slurm":  # NeMo-Run's own `logs` knows the first attempt of a job only
        folder = f"{executor.tunnel.job_dir}/{TASK}"
    find = f"find {shlex.quote(folder)} -name 'log-*.out' -o -name 'sbatch_*.out' -o -name combined.log"
    newest = f"$({find} | xargs -r ls -1t | head -n 1)"
    return _read(plan, experiment, f'log={newest}; [ -z "$log" ] || {{ echo "$log:"; tail -n {LOG_LINES} "$log"; }}')


def cancel(plan: Plan) -> str:
    """Cancel all jobs of the newest experiment; a run in the midst of a step goes back to its last checkpoint."""
    experiment = _newest(plan)
    for job in reversed(experiment.jobs):  # so that none begins because the one before it ends
        experiment.cancel(job.id)
    return f"{experiment._id}: cancelled"


@contextmanager
def _experiment(plan: Plan, chain: str, base: str | None = None) -> Iterator[Any]:
    """With the jobs of `plan` in it; nothing has been written yet. `base` is where to, instead of NeMo-Run's folder."""
    run = nemo_run()
    _check_paths(plan)
    chain = f"{plan.title}_{chain or time.strftime('%Y%m%d%H%M%S')}"
    build = {"slurm": _slurm, "local": _local, "skypilot": _skypilot}[plan.executor]
    task, executor = build(run, plan, chain)
    with run.Experiment(
        plan.title,
        executor=executor,
        id=chain,
        base_dir=base,
        log_level="WARN",
        clean_mode=True,
        enable_goodbye_message=False,
        skip_status_at_exit=True,
        serialize_metadata_for_scripts=False,
    ) as experiment:
        for _ in range(plan.jobs):
            experiment.add(task, name=TASK, tail_logs=plan.executor == "local")
        yield experiment


def _slurm(run: Any, plan: Plan, chain: str) -> tuple[Any, Any]:
    """The ranks' command, and the executor that starts it once a rank."""
    site, layout = plan.slurm, plan.cfg.parallel
    base = site.tunnel.job_dir or f"{_home()}/experiments"
    folder = f"{base}/{plan.title}/{chain}/{TASK}"
    if site.tunnel.kind == "ssh":
        identity = site.tunnel.identity and os.path.expanduser(site.tunnel.identity)
        there = site.tunnel.model_dump(include={"host", "user", "port", "job_dir"})
        tunnel = run.SSHTunnel(identity=identity, **there)
    else:
        tunnel = run.LocalTunnel(job_dir="")
    mounts = [*site.mounts, f"{site.checkout}:{site.checkout}"] if site.checkout else list(site.mounts)
    here = ""
    if site.container:
        inside = [
            f"--container-image={site.container}",
            f"--container-mounts={','.join([*mounts, f'{folder}:{_JOB}'])}",
        ]
        words = ["srun", "--nodes=1", "--ntasks=1", "--overlap", *inside, f"--container-workdir={_JOB}/code"]
        here = f"{shlex.join(words)} "
    setup = f"{site.setup.rstrip()}\n" if site.setup.strip() else ""
    if site.venv:
        setup += f"export PATH={shlex.quote(site.venv + '/bin')}:$PATH\n"
    options = {"exclusive": True, "mem": "0"} | site.sbatch
    executor = run.SlurmExecutor(
        account=site.account,
        partition=site.partition,
        job_name_prefix=f"{plan.title}.",
        nodes=layout.nodes,
        ntasks_per_node=layout.ranks_per_node,
        gpus_per_node=site.gpus_per_node,
        time=plan.time_limit,
        signal=f"USR1@{site.warn_seconds}",  # to the ranks
        container_image=site.container,
        container_mounts=mounts,
        additional_parameters={name: value for name, value in options.items() if value is not False},
        # A rank that ends leaves the others 60 s, in which those that are well leave too; no CPU binding, because a
        # node's engines and verifiers are children of its first rank.
        srun_args=["--kill-on-bad-exit=0", "--cpu-bind=none", "--label", *site.srun],
        setup_lines=_SETUP.format(
            folder=folder,
            config=dump_config(plan.cfg, given_only=True),
            setup=setup,
            chain=chain,
            chain_variable=CHAIN_VARIABLE,
            on_first_node=here,
            inner_config=_CONFIG,
            again=AGAIN,
            requeue=_REQUEUE.format(again=AGAIN) if plan.jobs == 1 else "",
        ),
        tunnel=tunnel,
        packager=run.GitArchivePackager(symlink_from_remote_dir=site.checkout, include_submodules=False),
        dependency_type="afterany",
        poll_estimated_start_time=False,
    )
    command = ["rank", "python3", "-m", "megatron_prorl.cli", "train", _CONFIG]
    return run.Script(path="-c", args=[shlex.quote(_AS_RANK), *command]), executor


def _local(run: Any, plan: Plan, chain: str) -> tuple[Any, Any]:
    """All ranks of this node by `prorl train`, judged as on Slurm."""
    words = shlex.join([os.path.abspath(plan.task.config), *plan.task.overrides])
    python = shlex.quote(sys.executable)
    text = f"""
{python} -m megatron_prorl.launch.attempts begin {words}
verdict=$?
[ "$verdict" -eq {AGAIN} ] || exit "$verdict"
{python} -m megatron_prorl.cli train {words}
exec {python} -m megatron_prorl.launch.attempts end $? {words}
"""
    return run.Script(inline=text), run.LocalExecutor(env_vars={CHAIN_VARIABLE: chain})


def _skypilot(run: Any, plan: Plan, chain: str) -> tuple[Any, Any]:
    """Machines of a cloud, torchrun on every one; SkyPilot neither warns nor chains, so that this is one job."""
    site, layout = plan.site.skypilot, plan.cfg.parallel
    assert isinstance(site, SkypilotSite)
    if plan.jobs > 1:
        raise UserError("--jobs: SkyPilot chains no jobs; launch again what has ended")
    try:
        executor = run.SkypilotExecutor(
            infra=site.infra,
            gpus=site.gpus,
            gpus_per_node=layout.ranks_per_node,
            num_nodes=layout.nodes,
            container_image=site.image,
            storage_mounts=site.storage or None,
            setup=site.setup or None,
            cluster_name=plan.title,
            packager=run.GitArchivePackager(include_submodules=False),
            launcher="torchrun",
        )
    except AssertionError as error:
        raise UserError(f"--executor skypilot: {' '.join(str(error).split())}") from None
    words = [os.path.relpath(plan.task.config), *plan.task.overrides]
    script = run.Script(path="megatron_prorl.cli", m=True, entrypoint="python", args=["train", *words])
    return script, executor


def _newest(plan: Plan) -> Any:
    run = nemo_run()
    if not Path(_home(), "experiments", plan.title).is_dir():
        raise UserError(f"{plan.run_dir}: nothing was launched from here that trains in it")
    return run.Experiment.from_title(plan.title)


def _read(plan: Plan, experiment: Any, command: str) -> str:
    """What a shell command prints where the run is; nothing if it fails."""
    if plan.executor == "slurm":
        text: str = experiment.jobs[0].executor.tunnel.run(command, warn=True).stdout
    else:
        text = subprocess.run(command, shell=True, capture_output=True, text=True).stdout
    return text.rstrip()


def _last_verdict(run_dir: Path) -> int:
    try:
        *_, last = (run_dir / ATTEMPTS_FILE).read_text(encoding="utf-8").splitlines()
    except (FileNotFoundError, ValueError):  # none: it could not even be begun
        return 1
    return int(json.loads(last)["verdict"])


def _home() -> str:
    """Where NeMo-Run keeps experiments; on a cluster all nodes have to see it."""
    from nemo_run.config import get_nemorun_home

    return os.path.abspath(get_nemorun_home())


def _check_sent_along(cfg: Config) -> None:
    """Without a checkout on the cluster the last commit of this one is sent, in a folder that no other chain has."""
    for name, path in (("run_dir", cfg.run_dir), ("model.path", cfg.model.path)):
        if not path.startswith("/"):
            raise UserError(f"{name}: {path}: has to be absolute, or slurm.checkout given in the site file")
    found = subprocess.run(["git", "status", "--porcelain", "--untracked-files=no"], capture_output=True, text=True)
    if found.returncode:
        raise UserError("not in a checkout, whose last commit could be sent; or give slurm.checkout in the site file")
    if found.stdout:
        raise UserError("the last commit is sent, and there are changes since; commit them")


def _check_paths(plan: Plan) -> None:
    """NeMo-Run writes the folder of the job over what looks like its name for it."""
    paths: Sequence[str | None] = [_home(), plan.run_dir]
    if plan.executor == "slurm":
        paths = [*paths, plan.slurm.checkout, plan.slurm.venv, plan.slurm.tunnel.job_dir]
    for path in paths:
        if path and (_JOB in path or re.search(r"[\s'\"$]", path)):
            raise UserError(f"{path}: NeMo-Run's scripts take no {_JOB}, spaces, quotes or $ in paths; use another")


def _words(error: Exception) -> str:
    """The first line that says something, of a shell command's error output where the error is one of that."""
    text = getattr(getattr(error, "result", None), "stderr", "") or str(error)
    return next((line.strip() for line in text.splitlines() if line.strip()), type(error).__name__)
