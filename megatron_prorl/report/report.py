"""`prorl report FOLDER ...`: looks at what each folder is, a run or an evaluation, and writes the report on all."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from megatron_prorl.errors import UserError
from megatron_prorl.evaluation.analysis import RESULTS_FILE, read_evaluation
from megatron_prorl.report import evaluation, page, training
from megatron_prorl.report.content import Report, Section
from megatron_prorl.tracking.metrics import METRICS_FILE


def report(folders: Sequence[str], out: str | None = None, corpus: Sequence[str] = ()) -> Path:
    """Write the report on these runs and evaluations; returns the page's path.

    `out` is by default the folder `report` in the first of them. Raises UserError for a folder that is neither.
    """
    kinds = [(folder, _is_run(folder)) for folder in folders]
    runs = [folder for folder, is_run in kinds if is_run]
    evaluations = [read_evaluation(folder) for folder, is_run in kinds if not is_run]
    if corpus and not evaluations:
        raise UserError(
            "--corpus: responses are compared with it that `prorl eval` sampled; give an evaluation's folder"
        )
    sections: list[Section] = []
    about = [f"Made {time.strftime('%Y-%m-%d %H:%M:%S %Z')}."]
    warnings = []
    if runs:
        read = training.read_runs(runs)
        sections += training.sections(read)
        about += [f"{run.name}: {run.path.resolve()}" for run in read]
        for run in read:
            if run.found["state"] in ("running", "STALLED"):
                warnings.append(
                    f"{run.name} is in progress ({run.found['state']}: {run.found['detail']}): "
                    f"figures up to step {run.found['step']} of {run.found['steps']}"
                )
    for number, found in enumerate(evaluations, 1):
        prefix = f"eval{number}_" if len(folders) > 1 else ""
        sections += evaluation.sections(found, corpus, prefix, named=len(evaluations) > 1)
        about += [f"{found.name}: {found.folder.resolve()}"]
        about += [f"{found.name}, {name}: {path}" for name, path in found.results["paths"].items()]
    title = ", ".join("/".join(Path(folder).resolve().parts[-2:]) for folder in folders)
    whole = Report(title=title, about=about, sections=sections, warnings=warnings)
    return page.write(whole, Path(out) if out else Path(folders[0]) / "report")


def _is_run(folder: str) -> bool:
    path = Path(folder)
    if (path / RESULTS_FILE).is_file():
        return False
    if (path / METRICS_FILE).is_file() or (path / "config.yaml").is_file():
        return True
    if not path.is_dir():
        raise UserError(f"{folder}: no such folder; give a run directory, or the --out of an evaluation")
    raise UserError(f"{folder}: neither a run ({METRICS_FILE}) nor a finished evaluation ({RESULTS_FILE})")
