"""A mistake in a site file is one line that names it."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from megatron_prorl.config.load import ConfigError
from megatron_prorl.launch.site import load_site

LEAST = {"account": "me", "venv": "/shared/venv"}
SSH = {"kind": "ssh", "host": "login", "user": "me", "job_dir": "/shared/jobs"}


def load(folder: Path, **slurm: object) -> str:
    """The mistakes of a site, without the file's name; empty if there are none."""
    path = folder / "site.yaml"
    path.write_text(yaml.safe_dump({"slurm": LEAST | slurm}))
    try:
        load_site(path)
    except ConfigError as error:
        return str(error).replace(f"config error: {path}: ", "")
    return ""


def test_the_example_is_a_site() -> None:
    assert load_site(Path(__file__).parents[3] / "examples" / "site.yaml").slurm


@pytest.mark.parametrize(
    ("slurm", "line"),
    [
        ({"acount": "me"}, "slurm.acount: no such option; did you mean slurm.account?"),
        ({"tunnel": SSH | {"usr": "me"}}, "slurm.tunnel.usr: no such option; did you mean slurm.tunnel.user?"),
        ({"account": None}, "slurm.account: expected text, got nothing"),
        ({"venv": "venv"}, "slurm.venv: expected an absolute path, got venv"),
        ({"venv": None}, "slurm: give venv or container"),
        ({"container": "/prorl.sqsh"}, "slurm: give venv or container"),
        ({"mounts": ["/shared:/shared"]}, "slurm.mounts: belong to a container"),
        ({"tunnel": {"kind": "ssh", "host": "login"}}, "slurm.tunnel: ssh needs user, job_dir"),
        ({"tunnel": {"host": "login"}}, "slurm.tunnel: host belong to kind: ssh"),
        ({"gpus_per_node": 0}, "slurm.gpus_per_node: expected at least 1, got 0"),
        ({}, ""),
        ({"tunnel": SSH}, ""),
    ],
)
def test_a_mistake_is_one_line(tmp_path: Path, slurm: dict[str, object], line: str) -> None:
    assert load(tmp_path, **slurm) == line


def test_an_executor_that_does_not_exist_is_named(tmp_path: Path) -> None:
    path = tmp_path / "site.yaml"
    path.write_text("slrm: {}")
    with pytest.raises(ConfigError, match=r"slrm: no such option; did you mean slurm\?"):
        load_site(path)
