"""Which folder may import what (see CONTRIBUTING.md): read from the source, so that a lazy import counts as well."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "megatron_prorl"
MAY_IMPORT = {
    "megatron": {"policy", "weights", "checkpoint"},
    "transformer_engine": {"policy", "weights", "checkpoint"},
    "vllm": {"rollout", "weights"},
    "nemo_run": {"launch"},
    "ray": set(),
    "apex": set(),
}
WITHOUT_TORCH = (
    "cli",
    "errors",
    "types",
    "config.load",
    "config.run_dir",
    "ending",
    "launch.attempts",
    "launch.local",
    "launch.nemo",
    "stalls",
    "checkpoint.branch",
    "tracking.tree",
    "report.report",
)


def imports() -> list[tuple[Path, str]]:
    """(file, imported module) for every import statement of the package, wherever in the file it stands."""
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found += [(path, alias.name) for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                found += [(path, f"{node.module}.{alias.name}") for alias in node.names]
    return found


@pytest.mark.parametrize("library", MAY_IMPORT)
def test_a_library_is_imported_only_in_its_folders(library: str) -> None:
    offenders = [
        f"{path.relative_to(PACKAGE)} imports {module}"
        for path, module in imports()
        if module.partition(".")[0] == library and path.relative_to(PACKAGE).parts[0] not in MAY_IMPORT[library]
    ]
    assert offenders == []


def test_megatron_core_is_the_only_megatron() -> None:
    offenders = [
        f"{path.relative_to(PACKAGE)} imports {module}"
        for path, module in imports()
        if module.partition(".")[0] == "megatron" and not f"{module}.".startswith("megatron.core.")
    ]
    assert offenders == []


def test_configuration_and_command_line_need_no_torch() -> None:
    modules = ", ".join(f"megatron_prorl.{name}" for name in WITHOUT_TORCH)
    script = f"import sys, {modules}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], timeout=60).returncode == 0


def test_converting_needs_no_megatron() -> None:
    """Its import takes as long as copying gigabytes."""
    script = "import sys, megatron_prorl.weights.convert; sys.exit('megatron' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], timeout=60).returncode == 0


def test_pure_parts_know_no_other_part_of_the_system() -> None:
    """algo and config look at nothing but types, errors, files and themselves."""
    allowed = {"algo": ("algo", "types", "config", "errors"), "config": ("config", "errors", "files")}
    offenders = [
        f"{path.relative_to(PACKAGE)} imports {module}"
        for path, module in imports()
        for folder, parts in allowed.items()
        if path.relative_to(PACKAGE).parts[0] == folder
        and module.startswith("megatron_prorl.")
        and module.split(".")[1] not in parts
    ]
    assert offenders == []
