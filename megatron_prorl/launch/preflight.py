"""`prorl preflight`: whether the machines are fit for a run, in less than a minute, before it takes them for weeks.

Every rank that the run is to have takes part, and no Megatron, vLLM or model is loaded. A check is a function of all
ranks together that gives one row of the table; what it measures on each rank comes together over gloo. A rank that does
not come, and one that hangs in a check, are known from the store where the ranks meet.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from rich.text import Text

from megatron_prorl.config.schema import Config
from megatron_prorl.errors import UserError
from megatron_prorl.launch.footprint import footprint
from megatron_prorl.launch.local import report_user_error
from megatron_prorl.launch.machines import Failed, Machines, Row, in_words, numbered
from megatron_prorl.launch.readiness import CHECKS

TOTAL_SECONDS = 55.0  # after which the check that hangs is named, with the ranks that are not through it
FORM_SECONDS = 30.0  # for the ranks to come: srun starts all at once, but imports from a shared disk take their time
COLLECTIVE_SECONDS = 20.0


class NotReady(UserError):
    """A check is red; raised on every rank."""

    is_of_all_ranks = True


def preflight(cfg: Config) -> None:
    """Print the table, on rank 0. Raises NotReady on every rank if a check is red."""
    began = time.monotonic()
    rank, num_ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    kind: Literal["cuda", "cpu"] = "cuda" if cfg.device != "cpu" and torch.cuda.is_available() else "cpu"
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if kind == "cuda" else torch.device("cpu")
    machines = Machines(cfg, rank, num_ranks, kind, device, footprint(cfg))
    rows: list[Row] = []

    def finish() -> None:
        if rank == 0:
            show(rows, time.monotonic() - began)
        if any(row.state == "red" for row in rows):
            raise NotReady(summary(rows))

    store, present, kinds = _meet(rank, num_ranks, kind)
    if len(present) < num_ranks:
        rows.append(_missing_row(cfg, present, num_ranks))
        return finish()
    machines.tell = lambda what, text: store.set(f"{what}/{rank}", text)
    machines.hosts = [present[number] for number in range(num_ranks)]
    if blind := [number for number in kinds if kinds[number] == "cpu" and "cuda" in kinds.values()]:
        seen = f"{numbered('rank', blind)}: torch sees none, the others do"
        rows.append(Row("GPUs", "red", seen, "", "look at the driver, and at nvidia-smi", machines.nodes_of(blind)))
        return finish()

    def give_up() -> None:
        rows.append(_late_row(machines, store, CHECKS[len(rows) - 1][0] if rows else "ranks"))
        try:
            finish()
        except NotReady as error:
            report_user_error(error)
        os._exit(NotReady.exit_code)  # the main thread stands in a collective, or in front of a disk

    # Rank 0 first: a launcher, and the store that it serves, end with it.
    timer = threading.Timer(TOTAL_SECONDS - (time.monotonic() - began) + (0.0 if rank == 0 else 2.0), give_up)
    timer.daemon = True
    timer.start()
    if kind == "cuda":
        torch.cuda.set_device(device)
    # Both, so that what comes together needs no GPU, and what is measured is what the training uses.
    try:
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo",
            store=dist.PrefixStore("group", store),
            rank=rank,
            world_size=num_ranks,
            timeout=timedelta(seconds=COLLECTIVE_SECONDS),
        )
    except RuntimeError as error:
        failures = _failures(store, rank, num_ranks, in_words(error))
        rows.append(_failed_row(machines, "ranks", _causes(failures) or failures))
        timer.cancel()
        return finish()
    rows.append(_ranks_row(machines, time.monotonic() - began))
    for name, check in CHECKS:
        try:
            rows.append(check(machines))
        except Failed as failed:
            rows.append(_failed_row(machines, name, failed.failures))
            machines.tell("failed", "")
        except Exception as error:  # of this rank alone, or of another's end: no collective is of use any more
            causes = _causes(_failures(store, rank, num_ranks, in_words(error)))
            late = _late_row(machines, store, name)
            rows.append(_failed_row(machines, name, causes) if causes else late)
            timer.cancel()
            return finish()
    rows = machines.of_first(lambda: rows)  # a node may have seen another size of the model
    timer.cancel()
    dist.destroy_process_group()
    finish()


def summary(rows: Sequence[Row]) -> str:
    """The one line of a preflight that is not green."""
    red = [row.name for row in rows if row.state == "red"]
    nodes = list(dict.fromkeys(node for row in rows if row.state == "red" for node in row.nodes))
    return f"preflight: {', '.join(red)}: not fit for a run" + (f"; look at {', '.join(nodes)}" if nodes else "")


def show(rows: Sequence[Row], seconds: float) -> None:
    colours = {"green": "green", "amber": "yellow", "red": "bold red", "skipped": "dim"}
    table = Table(title=None, box=None, pad_edge=False, header_style="dim")
    for column in ("", "check", "found", "asked", "to do"):
        table.add_column(column, overflow="fold")
    for row in rows:
        advice = "; ".join(part for part in (", ".join(row.nodes), row.advice) if part)
        table.add_row(Text(row.state, colours[row.state]), row.name, row.seen, row.limit, advice)
    console = Console(width=None if sys.stdout.isatty() else 200)
    console.print(table)
    states = [row.state for row in rows]
    counts = ", ".join(f"{states.count(state)} {state}" for state in colours if state in states)
    console.print(f"{counts}; {seconds:.0f} s")


def _meet(rank: int, num_ranks: int, kind: str) -> tuple[Any, dict[int, str], dict[int, str]]:
    """The store, and hosts and kinds of the ranks that came in time. UserError where rank 0 cannot be reached."""
    if "RANK" not in os.environ:
        return dist.HashStore(), {0: socket.gethostname()}, {0: kind}
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    serves = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"  # else torchrun does
    try:
        connected: Any = dist.TCPStore(
            address, port, num_ranks, serves, timeout=timedelta(seconds=FORM_SECONDS), wait_for_workers=False
        )
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        what = "cannot serve" if rank == 0 else f"{socket.gethostname()} (rank {rank}) cannot reach rank 0 at"
        raise UserError(f"preflight: {what} MASTER_ADDR:MASTER_PORT = {address}:{port}: {reason}") from None
    store = dist.PrefixStore("prorl-preflight", connected)
    store.set_timeout(timedelta(seconds=2 * FORM_SECONDS))
    store.set(f"here/{rank}", json.dumps([socket.gethostname(), kind]))
    if rank > 0:
        return store, *_hosts_and_kinds(json.loads(store.get("present")))
    deadline = time.monotonic() + FORM_SECONDS
    present: dict[str, list[str]] = {}
    while len(present) < num_ranks and time.monotonic() < deadline:
        time.sleep(0.02)
        for number in range(num_ranks):
            if str(number) not in present and store.check([f"here/{number}"]):
                present[str(number)] = json.loads(store.get(f"here/{number}"))
    store.set("present", json.dumps(present))
    if len(present) < num_ranks:
        time.sleep(1.0)  # for the others to read it, before its server ends
    return store, *_hosts_and_kinds(present)


def _hosts_and_kinds(present: Mapping[str, list[str]]) -> tuple[dict[int, str], dict[int, str]]:
    found = sorted((int(number), host, kind) for number, (host, kind) in present.items())
    return {number: host for number, host, _ in found}, {number: kind for number, _, kind in found}


def _missing_row(cfg: Config, present: Mapping[int, str], num_ranks: int) -> Row:
    missing = [rank for rank in range(num_ranks) if rank not in present]
    nodes = sorted({rank // cfg.parallel.ranks_per_node for rank in missing})
    names = []
    for node in nodes:
        ranks = range(node * cfg.parallel.ranks_per_node, (node + 1) * cfg.parallel.ranks_per_node)
        names.append(next((present[rank] for rank in ranks if rank in present), f"node {node}"))
    return Row(
        "ranks",
        "red",
        f"{len(present)} of {num_ranks} came; missing: {numbered('rank', missing)}",
        f"all within {FORM_SECONDS:.0f} s",
        "look at what these were started with, and at their way to MASTER_ADDR",
        tuple(names),
    )


def _late_row(machines: Machines, store: Any, name: str) -> Row:
    """Of a check that hangs: the ranks that have come the least far, as the store knows."""
    reached: list[int] = []
    with contextlib.suppress(Exception):  # the rank that serves it is gone
        for rank in range(machines.num_ranks):
            key = f"reached/{rank}"
            reached.append(int(store.get(key)) if store.check([key]) else 0)
    late = [rank for rank, number in enumerate(reached) if number == min(reached)]
    seen = "does not end" + (f"; still in it: {numbered('rank', late)}" if late else "")
    nodes = machines.nodes_of(late) if len(late) < machines.num_ranks else ()
    return Row(name, "red", seen, "", "look at these ranks' nodes, and at the network and disk between them", nodes)


def _failed_row(machines: Machines, name: str, failures: Mapping[int, str]) -> Row:
    ranks = sorted(failures)
    seen = f"{numbered('rank', ranks)}: {failures[ranks[0]]}"
    return Row(name, "red", seen, nodes=machines.nodes_of(ranks))


def _failures(store: Any, rank: int, num_ranks: int, text: str) -> dict[int, str]:
    """What went wrong, by rank: here, and where others have told so within a second."""
    failures = {rank: text}
    with contextlib.suppress(Exception):  # the rank that serves the store is gone
        if not (store.check([f"failed/{rank}"]) and store.get(f"failed/{rank}")):  # or what came of it hides the cause
            store.set(f"failed/{rank}", text)
        time.sleep(1.0)
        for other in range(num_ranks):
            if store.check([f"failed/{other}"]):
                failures[other] = store.get(f"failed/{other}").decode()
    return {other: text for other, text in failures.items() if text}


def _causes(failures: Mapping[int, str]) -> dict[int, str]:
    """Those that are not that another rank is missed."""
    return {rank: text for rank, text in failures.items() if not re.search("connect|timed out|timeout", text.lower())}


def _ranks_row(machines: Machines, seconds: float) -> Row:
    layout = machines.cfg.parallel
    split = [
        f"node {node}"
        for node, leader in enumerate(machines.leaders)
        if len(set(machines.hosts[leader : leader + layout.ranks_per_node])) > 1
    ]
    hosts = len(set(machines.hosts))
    seen = f"{machines.num_ranks} on {hosts} host{'s' if hosts > 1 else ''}, after {seconds:.1f} s"
    if split:
        advice = "ranks k*ranks_per_node to (k+1)*ranks_per_node - 1 have to be on one host: block distribution"
        return Row("ranks", "red", seen, f"{layout.ranks_per_node} together a node", advice, tuple(split))
    return Row("ranks", "green", seen, f"within {FORM_SECONDS:.0f} s")
