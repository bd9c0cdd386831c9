"""A site: what `prorl launch` has to know of a cluster, in one YAML file with a section for each executor.

examples/site.yaml is one with every option. Imports no NeMo-Run, so that a mistake is told at once.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from megatron_prorl.config.load import ConfigError, describe, read_yaml
from megatron_prorl.config.schema import NonEmpty, Positive, Section


def _absolute(path: str) -> str:
    if not path.startswith("/"):
        raise PydanticCustomError("relative", "expected an absolute path, got {path}", {"path": path})
    return path


Absolute = Annotated[str, AfterValidator(_absolute)]


class Tunnel(Section):
    """How Slurm's commands are reached."""

    kind: Literal["local", "ssh"] = Field("local", description="local: this machine has them")
    host: NonEmpty | None = Field(None, description="of ssh: a login node")
    user: NonEmpty | None = Field(None, description="of ssh")
    job_dir: Absolute | None = Field(None, description="of ssh: folder there for scripts and logs, seen by all nodes")
    port: Positive | None = Field(None, description="of ssh, if it is not 22")
    identity: NonEmpty | None = Field(None, description="of ssh: file of a private key")

    @model_validator(mode="after")
    def _check(self) -> Tunnel:
        given = [name for name in ("host", "user", "job_dir", "port", "identity") if getattr(self, name) is not None]
        missing = [name for name in ("host", "user", "job_dir") if name not in given]
        if self.kind == "ssh" and missing:
            raise _problems(f"slurm.tunnel: ssh needs {', '.join(missing)}")
        if self.kind == "local" and given:
            raise _problems(f"slurm.tunnel: {', '.join(given)} belong to kind: ssh")
        return self


class SlurmSite(Section):
    account: NonEmpty
    partition: NonEmpty | None = None
    gpus_per_node: Positive | None = Field(None, description="to ask for; without it none are named")
    checkout: Absolute | None = Field(
        None, description="of this repository on the cluster, where runs begin; without it this one's HEAD is sent"
    )
    venv: Absolute | None = Field(None, description="virtual environment on all nodes")
    container: NonEmpty | None = Field(None, description="image for pyxis, instead of a virtual environment")
    mounts: list[NonEmpty] = Field(
        default_factory=list, description="of the container, /there:/inside; checkout is one"
    )
    setup: str = Field("", description="shell lines before the ranks start: modules, network interface, caches")
    warn_seconds: Positive = Field(
        600, description="from the warning to the time limit: an update, and what saving takes"
    )
    sbatch: dict[str, str | int | bool] = Field(default_factory=dict, description="further options of sbatch: qos, ...")
    srun: list[NonEmpty] = Field(default_factory=list, description="further words for srun, such as --mpi=pmix")
    tunnel: Tunnel = Field(default_factory=Tunnel)

    @model_validator(mode="after")
    def _check(self) -> SlurmSite:
        if (self.venv is None) == (self.container is None):
            raise _problems("slurm: give venv or container")
        if self.mounts and self.container is None:
            raise _problems("slurm.mounts: belong to a container")
        return self


class SkypilotSite(Section):
    infra: NonEmpty = Field(description="where, in SkyPilot's words: aws/us-east-1, k8s/my-context, ...")
    gpus: NonEmpty = Field(description="kind of GPU, such as H100")
    image: NonEmpty | None = Field(None, description="docker:... or a machine image")
    setup: str = Field("", description="shell lines once for a new machine, such as pip install -e '.[gpu]'")
    storage: dict[str, dict[str, Any]] = Field(
        default_factory=dict, description="SkyPilot's storage mounts; run_dir has to be on one"
    )


class Site(Section):
    slurm: SlurmSite | None = None
    skypilot: SkypilotSite | None = None


def load_site(path: str | Path) -> Site:
    """The site in a YAML file. Raises ConfigError, one line a mistake."""
    try:
        return Site.model_validate(read_yaml(path), strict=True)
    except ValidationError as error:
        problems = [f"{path}: {problem}" for detail in error.errors() for problem in describe(detail, Site)]
        raise ConfigError(problems) from None


def _problems(text: str) -> PydanticCustomError:
    return PydanticCustomError("problems", "{problems}", {"problems": [text]})
