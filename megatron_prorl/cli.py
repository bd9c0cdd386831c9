"""The `prorl` command. What a user can fix is one line on stderr and exit code 2; anything else keeps its traceback.

Nothing heavy is imported until a command needs it: a mistake in a configuration is told before torch is.
"""

from __future__ import annotations

import argparse
import errno
import json
import logging
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from megatron_prorl import __version__, ending
from megatron_prorl.errors import UserError

if TYPE_CHECKING:
    from megatron_prorl.config.schema import Config

_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def main(argv: Sequence[str] | None = None) -> int:
    """Run `prorl ARGV` and return its exit code."""
    from megatron_prorl.launch.local import end_with_launcher, let_the_cause_speak, report_user_error

    end_with_launcher()
    args = _parse(argv)
    try:
        commands = {
            "train": _train,
            "preflight": _preflight,
            "launch": _launch,
            "replay": _replay,
            "reset": _ask,
            "advance": _ask,
            "status": _status,
            "report": _report,
            "runs": _runs,
            "branch": _branch,
            "delete": _delete,
            "convert": _convert,
            "verify": _verify,
            "data": _data_show,
            "eval": _eval,
            "ablate": _ablate,
        }
        return commands[args.command](args)
    except UserError as error:
        report_user_error(error)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        let_the_cause_speak(error)
        raise


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="prorl", description="Prolonged reinforcement learning for language models.")
    parser.add_argument("--version", action="version", version=f"prorl {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    train = commands.add_parser("train", help="train, or go on training, the run that a configuration describes")
    train.add_argument("config", help="YAML file; see examples/")
    train.add_argument("overrides", nargs="*", metavar="key=value", help="for example optimizer.learning_rate=1e-6")
    train.add_argument("--dry-run", action="store_true", help="check the configuration, print it in full, and stop")
    ready = commands.add_parser("preflight", help="whether the machines are fit for a run, in less than a minute")
    ready.add_argument("config", help="YAML file; see examples/")
    ready.add_argument("overrides", nargs="*", metavar="key=value", help="as for prorl train")

    launch = commands.add_parser("launch", help="train on a cluster, as a chain of jobs, by NeMo-Run")
    launch.add_argument("config", help="YAML file; see examples/")
    launch.add_argument("overrides", nargs="*", metavar="key=value", help="as for prorl train")
    launch.add_argument("--executor", choices=("slurm", "local", "skypilot"), default="slurm", help="default: slurm")
    launch.add_argument("--site", default="site.yaml", metavar="FILE", help="see examples/site.yaml; default site.yaml")
    launch.add_argument("--nodes", type=int, metavar="N", help="the same as parallel.nodes=N")
    launch.add_argument("--time", default="04:00:00", metavar="LIMIT", help="of a job, as sbatch's (default 04:00:00)")
    launch.add_argument("--jobs", type=int, default=1, metavar="N", help="in a chain; one alone begins again itself")
    action = launch.add_mutually_exclusive_group()
    action.add_argument("--dry-run", action="store_true", help="print the script that would be submitted")
    action.add_argument("--status", action="store_true", help="how the run's jobs are")
    action.add_argument("--logs", action="store_true", help="the end of their newest log")
    action.add_argument("--cancel", action="store_true", help="cancel them")

    replay = commands.add_parser("replay", help="train again on a run's recorded rollouts, and compare the checkpoints")
    replay.add_argument("run_dir", metavar="RUN", help="its run_dir")
    replay.add_argument("out", metavar="OUT", help="run_dir of the replay; goes on where it stopped")

    for request, effect in (("reset", "reset its reference"), ("advance", "begin the next stage of its plan")):
        ask = commands.add_parser(request, help=f"ask a run to {effect} after the step it is in")
        ask.add_argument("run_dir", metavar="RUN", help="its run_dir")

    status = commands.add_parser("status", help="what a run is doing, how it stands, and what is stuck")
    status.add_argument("run_dir", metavar="RUN", help="its run_dir")
    status.add_argument("--json", action="store_true", help="print it as JSON")
    report = commands.add_parser("report", help="runs and evaluations as one HTML page, with figures and tables")
    report.add_argument("folders", nargs="+", metavar="FOLDER", help="run_dir of a run, or --out of an evaluation")
    report.add_argument("--out", metavar="DIR", help="folder to write to; default: report in the first FOLDER")
    report.add_argument(
        "--corpus",
        action="append",
        default=[],
        metavar="FILE",
        help="text that responses are compared with word by word",
    )
    runs = commands.add_parser("runs", help="the runs below a folder, branches below the run that they come from")
    runs.add_argument("folder", nargs="?", default=".", metavar="DIR", help="default: the present one")
    runs.add_argument("--picture", metavar="FILE", help="draw the tree as well, as .png or .svg")
    branch = commands.add_parser("branch", help="make a run that begins at a checkpoint of another, with other options")
    branch.add_argument("run_dir", metavar="RUN", help="run_dir of the other")
    branch.add_argument("new_dir", metavar="NEW_DIR", help="run_dir of the branch")
    branch.add_argument("overrides", nargs="*", metavar="key=value", help="for example optimizer.learning_rate=1e-6")
    branch.add_argument("--from", dest="start", default="", metavar="POINT", help="reset-3 or step-500; default newest")
    delete = commands.add_parser("delete", help="remove a run directory from which no other branches")
    delete.add_argument("run_dir", metavar="RUN", help="its run_dir")

    convert = commands.add_parser("convert", help="Hugging Face folders to Megatron checkpoints and back")
    directions = convert.add_subparsers(dest="direction", required=True, metavar="DIRECTION")
    for direction, source, target in (
        ("hf-to-megatron", "HF_DIR", "MEGATRON_DIR"),
        ("megatron-to-hf", "MEGATRON_DIR", "HF_DIR"),
    ):
        one_way = directions.add_parser(direction, help=f"{source} to {target}")
        one_way.add_argument("source", metavar=source)
        one_way.add_argument("out", metavar=target)
        one_way.add_argument("--dtype", choices=("bf16", "fp32"), help="default: that of the weights")
        one_way.add_argument("--overwrite", action="store_true", help="replace what the output folder holds")
    verify = directions.add_parser("verify", help="compare both: every tensor, and the logits")
    verify.add_argument("hf_dir", metavar="HF_DIR")
    verify.add_argument("megatron_dir", metavar="MEGATRON_DIR")
    verify.add_argument("--tensor", type=int, default=1, help="tensor-parallel ranks that load the checkpoint")
    verify.add_argument("--pipeline", type=int, default=1, help="pipeline-parallel ranks that load it")
    verify.add_argument("--json", action="store_true", help="print the result as JSON")

    score = commands.add_parser("verify", help="score answers as training does")
    score.add_argument("--problem", metavar="FILE", help="one problem, JSON (docs/data.md); - is standard input")
    score.add_argument("--response", metavar="FILE", help="the model's answer to it, text; - is standard input")
    score.add_argument("--batch", metavar="FILE", help="many, JSONL rows {problem, response}; - is standard input")
    score.add_argument("--config", metavar="CONFIG", help="of a run, for its limits, languages and chat template")

    data = commands.add_parser("data", help="make problem files, and look at a run's problems")
    looks = data.add_subparsers(dest="look", required=True, metavar="{build,show}")
    build = looks.add_parser("build", help="make the paper's mix of five domains from its public sources")
    build.add_argument("out", metavar="OUT", help="folder to make; docs/blend.md says what it will hold")
    build.add_argument("--from-dir", metavar="DIR", help="local copies of the sources, instead of the Hub")
    build.add_argument("--seed", type=int, default=0, help="of the choice and of the logic items (default 0)")
    build.add_argument(
        "--quota", action="append", default=[], metavar="DOMAIN=N", help="problems of a domain; 0 leaves it out"
    )
    show = looks.add_parser("show", help="print a few prompts of each domain, and what their gold answers score")
    show.add_argument("config", help="YAML file; see examples/")
    show.add_argument("overrides", nargs="*", metavar="key=value", help="as for prorl train")
    show.add_argument("--count", type=int, default=3, metavar="N", help="problems a domain (default 3)")

    ablation = commands.add_parser("ablate", help="train a grid of small runs, and compare what they learn")
    ablation.add_argument("grid", metavar="GRID", help="YAML file, such as examples/ablation_resets.yaml")

    evaluate = commands.add_parser("eval", help="sample a suite's problems from models, and compare their pass@k")
    evaluate.add_argument("suite", metavar="SUITE", help="YAML file, or one of reasoning_gym, reasoning_gym_ood, ...")
    evaluate.add_argument(
        "--model",
        action="append",
        required=True,
        metavar="NAME=PATH",
        help="Hugging Face folder or Megatron checkpoint; the others are compared with the first",
    )
    evaluate.add_argument("--samples", type=int, required=True, metavar="N", help="of each problem; more can follow")
    evaluate.add_argument("--out", required=True, metavar="DIR", help="samples and results; goes on where it stopped")
    evaluate.add_argument("--temperature", type=float, default=0.6, metavar="T", help="default 0.6")
    evaluate.add_argument("--top-p", type=float, default=0.95, metavar="P", help="default 0.95")
    evaluate.add_argument("--max-tokens", type=int, default=8192, metavar="N", help="of a response (default 8192)")
    evaluate.add_argument("--seed", type=int, default=0, help="of samples and intervals (default 0)")
    evaluate.add_argument("--engines", type=int, default=1, metavar="N", help="vLLM engines (default 1)")
    evaluate.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto", help="default: CUDA if any")
    evaluate.add_argument("--force", action="store_true", help="compare models whose templates or dtypes differ")

    if not (sys.argv[1:] if argv is None else argv):
        parser.print_help(sys.stderr)
        parser.exit(2)
    # argparse gives `overrides` up at the first option, so those after --dry-run come back as unknown.
    args, late = parser.parse_known_args(argv)
    takes_more = args.command in ("train", "launch", "data", "branch")
    if late and (not takes_more or any(word.startswith("-") for word in late)):
        (train if args.command == "train" else parser).error(f"unrecognized arguments: {' '.join(late)}")
    if late and not hasattr(args, "overrides"):
        build.error(f"unrecognized arguments: {' '.join(late)}")
    if late:
        args.overrides += late
    if args.command == "verify" and bool(args.batch) == bool(args.problem or args.response):
        score.error("give --problem and --response, or --batch")
    if args.command == "verify" and bool(args.problem) != bool(args.response):
        score.error("--problem and --response go together")
    if args.command == "data" and args.look == "show" and args.count < 1:
        show.error(f"--count: expected at least 1, got {args.count}")
    return args


def _train(args: argparse.Namespace) -> int:
    from megatron_prorl.config.checks import file_problems, model_problems
    from megatron_prorl.config.load import ConfigError, dump_config, load_config
    from megatron_prorl.config.run_dir import check_run_dir

    cfg = load_config(args.config, args.overrides)
    if problems := file_problems(cfg):
        raise ConfigError(problems)
    if args.dry_run and not os.path.isdir(cfg.model.path):
        print(f"warning: model.path: {cfg.model.path}: model not found yet, so not checked", file=sys.stderr)
    elif problems := model_problems(cfg):
        raise ConfigError(problems)
    check_run_dir(cfg)  # for a quick answer; the run checks again under its lock
    if args.dry_run:
        print(dump_config(cfg), end="")
        return 0

    def run() -> None:
        from megatron_prorl.train import run

        run(cfg)

    return _on_all_ranks(cfg, ["train", args.config, *args.overrides], run)


def _launch(args: argparse.Namespace) -> int:
    from megatron_prorl.launch import nemo, prorl_task
    from megatron_prorl.launch.site import Site, load_site

    nodes = [f"parallel.nodes={args.nodes}"] if args.nodes else []
    task = prorl_task(args.config, *args.overrides, *nodes)
    site = Site() if args.executor == "local" else load_site(args.site)
    plan = nemo.Plan(task=task, executor=args.executor, site=site, jobs=args.jobs, time_limit=args.time)
    actions = {"dry_run": nemo.dry_run, "status": nemo.status, "logs": nemo.logs, "cancel": nemo.cancel}
    print(next((actions[name] for name in actions if getattr(args, name)), nemo.submit)(plan))
    return 0


def _preflight(args: argparse.Namespace) -> int:
    from megatron_prorl.config.load import load_config

    cfg = load_config(args.config, args.overrides)

    def run() -> None:
        from megatron_prorl.launch.preflight import preflight

        preflight(cfg)

    return _on_all_ranks(cfg, ["preflight", args.config, *args.overrides], run)


def _replay(args: argparse.Namespace) -> int:
    from megatron_prorl.config.checks import model_problems
    from megatron_prorl.config.load import ConfigError
    from megatron_prorl.config.run_dir import check_run_dir

    _quiet()
    from megatron_prorl.replay import replay, replay_config

    cfg = replay_config(args.run_dir, args.out)
    if problems := model_problems(cfg):
        raise ConfigError(problems)
    check_run_dir(cfg)
    return _on_all_ranks(cfg, ["replay", args.run_dir, args.out], lambda: replay(args.run_dir, cfg))


def _on_all_ranks(cfg: Config, words: list[str], run: Callable[[], None]) -> int:
    """`run` as one of the ranks that a launcher started, or `prorl WORDS` on as many as this node is to have."""
    from megatron_prorl.launch.local import check_world_size, launch_ranks

    rank, layout = os.environ.get("RANK"), cfg.parallel
    if rank is None and layout.nodes == 1 and layout.ranks_per_node > 1:
        return launch_ranks(["-m", "megatron_prorl.cli", *words], num_ranks=layout.ranks_per_node)
    check_world_size(cfg)
    ending.listen()
    _quiet()
    try:
        run()
    except OSError as error:
        if error.errno not in _DISK_FULL:
            raise
        raise UserError(
            f"cannot write {error.filename or cfg.run_dir}: {os.strerror(error.errno).lower()}; "
            "make room and start again: the run goes on from its last checkpoint"
        ) from error
    return 0


def _ask(args: argparse.Namespace) -> int:
    from megatron_prorl.tracking.requests import ask

    print(ask(args.run_dir, args.command))
    return 0


def _status(args: argparse.Namespace) -> int:
    from megatron_prorl.tracking.overview import overview, render

    found = overview(args.run_dir)
    print(json.dumps(found, indent=2) if args.json else render(found))
    return 0


def _report(args: argparse.Namespace) -> int:
    from megatron_prorl.report.report import report

    print(report(args.folders, args.out, args.corpus))
    return 0


def _runs(args: argparse.Namespace) -> int:
    from megatron_prorl.tracking.tree import draw, find_runs, render

    runs = find_runs(args.folder)
    print(render(runs))
    if args.picture:
        print(draw(runs, args.picture))
    return 0


def _branch(args: argparse.Namespace) -> int:
    from megatron_prorl.checkpoint.branch import branch, branch_config
    from megatron_prorl.config.checks import file_problems, model_problems
    from megatron_prorl.config.load import ConfigError

    cfg = branch_config(args.run_dir, args.new_dir, args.overrides)
    if problems := file_problems(cfg) or model_problems(cfg):
        raise ConfigError(problems)
    print(branch(args.run_dir, cfg, args.start))
    print(f"go on there with: prorl train {args.new_dir}/config.yaml")
    return 0


def _delete(args: argparse.Namespace) -> int:
    from megatron_prorl.checkpoint.branch import delete

    print(delete(args.run_dir))
    return 0


def _convert(args: argparse.Namespace) -> int:
    _quiet()
    if args.direction == "verify":
        from megatron_prorl.weights.verify import verify

        same = verify(args.hf_dir, args.megatron_dir, tensor=args.tensor, pipeline=args.pipeline, as_json=args.json)
        if not same:
            print(f"{args.megatron_dir} is not the model in {args.hf_dir}", file=sys.stderr)
        return 0 if same else 1

    import torch

    from megatron_prorl.tracking.transfer import TransferDisplay
    from megatron_prorl.weights.convert import hf_to_megatron, megatron_to_hf

    convert = {"hf-to-megatron": hf_to_megatron, "megatron-to-hf": megatron_to_hf}[args.direction]
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32, None: None}[args.dtype]
    logging.basicConfig(format="%(levelname)s: %(message)s")
    with TransferDisplay(f"{args.source} -> {args.out}") as display:
        convert(args.source, args.out, dtype=dtype, overwrite=args.overwrite, on_progress=display)
    return 0


def _verify(args: argparse.Namespace) -> int:
    from megatron_prorl.tasks.score import verify_batch, verify_one

    cfg = None
    if args.config:
        from megatron_prorl.config.load import load_config

        cfg = load_config(args.config)
    if args.batch:
        verify_batch(args.batch, cfg)
    else:
        verify_one(args.problem, args.response, cfg)
    return 0


def _data_build(args: argparse.Namespace) -> int:
    from megatron_prorl.data.blend.build import build, parse_quotas
    from megatron_prorl.data.blend.datasheet import summary

    manifest = build(args.out, args.from_dir, args.seed, parse_quotas(args.quota))
    print("\n".join(summary(manifest)))
    for line in manifest["missing"]:
        print(f"warning: {line}", file=sys.stderr)
    if manifest["missing"]:
        print(f"incomplete: {args.out} was built without the {len(manifest['missing'])} above", file=sys.stderr)
    return 1 if manifest["missing"] else 0


def _data_show(args: argparse.Namespace) -> int:
    if args.look == "build":
        return _data_build(args)

    from megatron_prorl.config.checks import file_problems
    from megatron_prorl.config.load import ConfigError, load_config

    cfg = load_config(args.config, args.overrides)
    if problems := file_problems(cfg):
        raise ConfigError(problems)
    from megatron_prorl.data.show import show

    show(cfg, args.count)
    return 0


def _ablate(args: argparse.Namespace) -> int:
    from megatron_prorl.evaluation.ablate import ablate

    print(ablate(args.grid), end="")
    return 0


def _eval(args: argparse.Namespace) -> int:
    from megatron_prorl.evaluation.suite import load_suite

    suite, models = load_suite(args.suite), _named_models(args.model)
    for option, least in (("samples", 1), ("max_tokens", 1), ("engines", 1), ("seed", 0)):
        if (value := getattr(args, option)) < least:
            raise UserError(f"--{option.replace('_', '-')}: expected at least {least}, got {value}")
    if not 0.0 < args.temperature < float("inf"):
        raise UserError(f"--temperature: expected more than 0, got {args.temperature:g}")
    if not 0.0 < args.top_p <= 1.0:
        raise UserError(f"--top-p: expected more than 0 and at most 1, got {args.top_p:g}")
    _quiet()
    from pathlib import Path

    from megatron_prorl.evaluation.evaluate import Settings, evaluate
    from megatron_prorl.evaluation.results import table

    options = ("samples", "temperature", "top_p", "max_tokens", "seed", "engines", "device", "force")
    results = evaluate(suite, models, Settings(**{name: getattr(args, name) for name in options}), Path(args.out))
    for difference in results["differences"]:
        print(f"warning: {difference}", file=sys.stderr)
    print(f"\n{table(results)}\nresults.json, summary.md and pass_at_k.png are in {args.out}")
    return 0


def _named_models(given: Sequence[str]) -> dict[str, str]:
    models: dict[str, str] = {}
    for text in given:
        name, _, path = text.partition("=")
        if not path or not name.replace("-", "").replace("_", "").replace(".", "").isalnum():
            raise UserError(f"--model: expected NAME=PATH with a name of letters, digits, . - and _, got {text!r}")
        if name in models:
            raise UserError(f"--model: {name} is given twice")
        models[name] = path
    return models


def _quiet() -> None:
    """Megatron-Core says a dozen times at import that they are absent; both are optional."""
    warnings.filterwarnings("ignore", r"(Transformer Engine and )?Apex (is|are) not installed")


if __name__ == "__main__":
    sys.exit(main())
