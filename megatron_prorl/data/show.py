"""`prorl data show`: what a run's model will be asked, and whether its verifiers know the right answers."""

from __future__ import annotations

import asyncio
import os
from typing import TYPE_CHECKING

from megatron_prorl.config.schema import Config
from megatron_prorl.data.chat import begins_in_thought, load_tokenizer, render
from megatron_prorl.data.problems import TrainProblems, mixture
from megatron_prorl.tasks import VerifierError
from megatron_prorl.tasks.gold import gold_response
from megatron_prorl.tasks.pool import VerifierPool
from megatron_prorl.types import Problem, Verdict

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MAX_DRAWS = 256


def show(cfg: Config, count: int) -> None:
    """Print, for each domain, the first `count` problems of the run's first MAX_DRAWS, as the model will read them, and
    the verdicts on their gold answers; domains, tasks and sources of which none comes up are named. Raises UserError
    for problems that cannot be made.
    """
    tokenizer = load_tokenizer(cfg.model.path) if os.path.isdir(cfg.model.path) else None
    with TrainProblems(cfg.data, cfg.seed) as source:
        shown = _first_of_each_domain(source, count)
        num_held_out, domains = len(source.held_out), set(source.domains)
    if tokenizer is None:
        print(f"model.path: {cfg.model.path}: not there yet, so prompts are shown as messages")
    with VerifierPool(cfg.verifier, cfg.tasks) as pool:
        for domain, problems in sorted(shown.items()):
            for problem in problems:
                print(f"\n=== {domain} · {problem.task} · {problem.id} · {problem.source}")
                print(_prompt(problem, tokenizer, cfg.rollout.max_prompt_tokens))
                print(f"--- {_gold_line(problem, pool, tokenizer)}")
    drawn = ", ".join(f"{domain} {len(problems)}" for domain, problems in sorted(shown.items()))
    print(f"\nshown: {drawn}; held out for validation: {num_held_out}")
    if absent := _absent(cfg, domains - shown.keys()):
        print(f"not among the first {MAX_DRAWS} problems, so not shown: {', '.join(absent)}")


def _first_of_each_domain(source: TrainProblems, count: int) -> dict[str, list[Problem]]:
    found: dict[str, list[Problem]] = {}
    for draw in range(MAX_DRAWS):
        problem = source.problem(draw)
        problems = found.setdefault(problem.domain, [])
        if len(problems) < count:
            problems.append(problem)
    return found


def _absent(cfg: Config, domains: set[str]) -> list[str]:
    """What of the mix is not drawn: these domains, and tasks and sources."""
    order = mixture(cfg.data, cfg.seed, 0, ())
    drawn = {order.source(draw) for draw in range(MAX_DRAWS)}
    parts = [f"task {task.task}" for task in cfg.data.tasks] + [f"source {source.path}" for source in cfg.data.sources]
    return [f"domain {domain}" for domain in sorted(domains)] + [
        part for place, part in enumerate(parts) if place not in drawn
    ]


def _prompt(problem: Problem, tokenizer: PreTrainedTokenizerBase | None, max_prompt_tokens: int) -> str:
    if tokenizer is None:
        return "\n".join(f"{message['role']}: {message['content']}" for message in problem.messages)
    token_ids = render(tokenizer, problem.messages)
    text = str(tokenizer.decode(token_ids, skip_special_tokens=False))
    too_long = f", more than rollout.max_prompt_tokens = {max_prompt_tokens}: it will be dropped"
    return f"{text}\n--- {len(token_ids)} tokens{too_long if len(token_ids) > max_prompt_tokens else ''}"


def _gold_line(problem: Problem, pool: VerifierPool, tokenizer: PreTrainedTokenizerBase | None) -> str:
    response = gold_response(problem)
    if response is None:
        return "no gold answer"
    if tokenizer and begins_in_thought(tokenizer, render(tokenizer, problem.messages)):
        response = f"<think></think>{response}"
    try:
        verdict: Verdict = asyncio.run(pool.verify_many(problem, [response]))[0]
    except VerifierError as error:
        return f"cannot be verified: {str(error).strip().rpartition(chr(10))[2]}"
    return f"gold answer scores {verdict.score:g} ({verdict.reason}): {response}"
