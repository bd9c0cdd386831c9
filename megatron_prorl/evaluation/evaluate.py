"""`prorl eval`: sample a suite's problems from several models, judge the samples as training does, and compare.

A model at a time has the engines. Each of its samples is drawn with a seed that depends on the evaluation's seed, the
problem and the sample's number alone, so that one that was interrupted goes on to the same samples.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from megatron_prorl import __version__
from megatron_prorl.checkpoint.lock import is_locked, only_writer
from megatron_prorl.config.schema import Config, VerifierConfig
from megatron_prorl.data.chat import begins_in_thought, render
from megatron_prorl.data.order import hash64
from megatron_prorl.errors import UserError
from megatron_prorl.evaluation.cache import SampleCache, Spec, differences
from megatron_prorl.evaluation.display import CountDisplay
from megatron_prorl.evaluation.model import Model, open_model
from megatron_prorl.evaluation.plots import pass_at_k_curves
from megatron_prorl.evaluation.results import by_task, lengths_by_domain, summarise, table
from megatron_prorl.evaluation.suite import Suite, about_tasks, digest, make_problems
from megatron_prorl.rollout.client import EngineClient, EngineDied
from megatron_prorl.rollout.dispatch import Dispatcher
from megatron_prorl.rollout.engine import EngineSupervisor
from megatron_prorl.tasks import VerifierError
from megatron_prorl.tasks.pool import VerifierPool
from megatron_prorl.types import Problem

logger = logging.getLogger(__name__)

SAMPLES_A_REQUEST = 16
JUDGED_AT_ONCE = 8  # requests beside those that the engines are busy with


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How to sample, and with what."""

    samples: int
    temperature: float
    top_p: float
    max_tokens: int
    seed: int
    engines: int
    device: Literal["auto", "cuda", "cpu"]
    force: bool  # compare models whose specs differ


def evaluate(suite: Suite, models: Mapping[str, str], settings: Settings, out: Path) -> dict[str, Any]:
    """Evaluate `models` (name: path) and write results.json, summary.md and pass_at_k.png/.svg to `out`.

    Samples that are in `out` already are not drawn again. Returns what results.json holds. Raises UserError for what a
    user can fix: a suite, a model or a cache that is not sound, models that do not compare, engines that do not start.
    """
    if is_locked(out):
        raise UserError(f"--out: another evaluation is writing {out}; let it end, or give another folder")
    with _writing(out):
        opened = [open_model(name, path, out / "models") for name, path in models.items()]
        with CountDisplay(f"problems of {suite.name}") as display:
            problems = make_problems(suite, display)
        specs = {model.name: _spec(model, problems, settings) for model in opened}
        differ = check_comparable(specs, force=settings.force)
        with VerifierPool(VerifierConfig(workers=len(os.sched_getaffinity(0)))) as pool:
            asyncio.run(_check_rows(suite, problems, pool))
            found = {
                model.name: _samples_of(model, specs[model.name], problems, settings, out, pool) for model in opened
            }
        about = about_tasks(suite, problems)
        results = {
            "suite": {
                "name": suite.name,
                "digest": digest(problems),
                "description": suite.cfg.description,
                "tasks": about,
            },
            "specs": specs,
            "differences": differ,
            "paths": {model.name: model.given for model in opened},
            **summarise(found, settings.seed),
            "lengths": lengths_by_domain(found, {task: of_task["domain"] for task, of_task in about.items()}),
        }
        _write(out / "results.json", json.dumps(results, indent=1) + "\n")
        _write(out / "summary.md", _head(results) + table(results))
        for suffix in ("png", "svg"):
            pass_at_k_curves(results, out / f"pass_at_k.{suffix}")
        return results


@contextmanager
def _writing(out: Path) -> Iterator[None]:
    """With `out` made and locked."""
    with ExitStack() as stack:
        try:
            stack.enter_context(only_writer(out))
        except UserError as error:
            raise UserError(f"--out: {str(error).removeprefix('run_dir: ')}") from None
        yield


def check_comparable(specs: Mapping[str, Spec], *, force: bool) -> list[str]:
    """In what, besides the model, each model's spec differs from the first's. Raises UserError unless `force`."""
    (first, reference), *others = specs.items()
    found = []
    for name, spec in others:
        found += [
            f"{first} and {name} differ in {difference}"
            for difference in differences(reference | {"model": ""}, spec | {"model": ""})
        ]
    if found and not force:
        raise UserError(f"--model: {'; '.join(found)}; evaluate them apart, or compare them all the same with --force")
    return found


def _spec(model: Model, problems: list[Problem], settings: Settings) -> Spec:
    """All that a model's samples and their verdicts depend on."""
    verifiers = ("reasoning-gym", "math-verify")
    return {
        "suite": digest(problems),
        "model": model.digest,
        "template": model.template,
        "dtype": model.dtype,
        "temperature": settings.temperature,
        "top_p": settings.top_p,
        "max_tokens": settings.max_tokens,
        "seed": settings.seed,
        "verifiers": ", ".join([f"megatron-prorl {__version__}", *(f"{name} {version(name)}" for name in verifiers)]),
    }


async def _check_rows(suite: Suite, problems: list[Problem], pool: VerifierPool) -> None:
    """Raise UserError for the first row of a file that its verifier cannot read, before anything is sampled."""
    names = {entry.name for entry in suite.cfg.files}
    for problem in problems:
        if problem.task in names:
            await _judge(pool, problem, [""])


@dataclass(frozen=True, slots=True)
class _Request:
    problem: Problem
    prompt: list[int]
    first: int  # sample
    num: int


def _samples_of(
    model: Model, spec: Spec, problems: list[Problem], settings: Settings, out: Path, pool: VerifierPool
) -> dict[str, list[Sequence[Any]]]:
    """The model's samples by task, after drawing those that the cache lacks."""
    path = out / "samples" / f"{model.name}.jsonl"
    with SampleCache(path, spec, [problem.id for problem in problems]) as cache:
        prompts = {problem.id: render(model.tokenizer, problem.messages) for problem in problems}
        missing = list(_missing(cache, problems, prompts, settings.samples))
        if missing:
            cfg = _engine_config(model, settings, out, longest_prompt=max(map(len, prompts.values())))
            _draw(model, cfg, missing, settings, cache, pool, total=len(problems) * settings.samples)
        numbers = range(settings.samples)
        return by_task([(p.task, [cache.samples[p.id][number] for number in numbers]) for p in problems])


def _missing(
    cache: SampleCache, problems: list[Problem], prompts: Mapping[str, list[int]], num_samples: int
) -> Iterator[_Request]:
    """Requests for the samples that are not there, in runs of neighbours."""
    for problem in problems:
        known = cache.samples[problem.id]
        first = 0
        while first < num_samples:
            num = 0
            while first + num < num_samples and first + num not in known and num < SAMPLES_A_REQUEST:
                num += 1
            if num:
                yield _Request(problem, prompts[problem.id], first, num)
            first += num or 1


def _engine_config(model: Model, settings: Settings, out: Path, longest_prompt: int) -> Config:
    """What the engines read of a run's configuration; the rest is there to be complete."""
    if longest_prompt + settings.max_tokens > model.max_tokens:
        raise UserError(
            f"--max-tokens: {settings.max_tokens} and the longest prompt's {longest_prompt} are more than the "
            f"{model.max_tokens} positions of {model.name}; give at most {max(0, model.max_tokens - longest_prompt)}"
        )
    tokens = longest_prompt + settings.max_tokens
    return Config.model_validate(
        {
            "run_dir": str(out / "models" / model.name),
            "steps": 1,
            "seed": settings.seed,
            "device": settings.device,
            "model": {"path": str(model.folder), "dtype": model.dtype},
            # Engines that share GPUs with trainer ranks have the first ones; here nobody else is there.
            "parallel": {"ranks_per_node": settings.engines},
            "data": {"tasks": [{"task": "any"}]},
            "rollout": {
                "prompts_per_step": 4 * settings.engines,
                "rollouts_per_prompt": 2,
                "max_prompt_tokens": longest_prompt,
                "max_response_tokens": settings.max_tokens,
                "engines": {"count": settings.engines, "gpu_memory_fraction": 0.9},
            },
            "batching": {"tokens_per_microbatch": tokens},
        }
    )


def _draw(
    model: Model,
    cfg: Config,
    requests: list[_Request],
    settings: Settings,
    cache: SampleCache,
    pool: VerifierPool,
    *,
    total: int,
) -> None:
    num_known = total - sum(request.num for request in requests)
    print(f"{model.name}: starting {settings.engines} vLLM engine(s)", flush=True)
    supervisor = EngineSupervisor(cfg, cfg.model.path, cfg.run_dir)
    try:
        with supervisor:
            supervisor.wait_ready()
            clients = [address.client(cfg) for address in supervisor.addresses]
            with CountDisplay(model.name, num_known) as display:
                asyncio.run(
                    _Drawing(model, cfg, supervisor, clients, settings, cache, pool, display, total).run(requests)
                )
    except EngineDied as error:
        logs = f"{cfg.run_dir}/engines"
        raise UserError(f"--model {model.name}: {error}; see {logs}, and start again: what is sampled stays") from None
    except UserError as error:
        raise UserError(f"--model {model.name}: {str(error).removeprefix('model.path: ')}") from None


class _Drawing:
    """Several requests under way at once, from the engines through the verifiers into the cache."""

    def __init__(
        self,
        model: Model,
        cfg: Config,
        supervisor: EngineSupervisor,
        clients: list[EngineClient],
        settings: Settings,
        cache: SampleCache,
        pool: VerifierPool,
        display: CountDisplay,
        total: int,
    ) -> None:
        def revive(index: int) -> EngineClient:
            supervisor.restart([index])
            return clients[index]

        max_sequences = 2 * cfg.rollout.engines.max_running
        self._dispatcher = Dispatcher(clients, max_sequences=max_sequences, revive=revive)
        self._num_workers = len(clients) * max_sequences // SAMPLES_A_REQUEST + JUDGED_AT_ONCE
        self._tokenizer = model.tokenizer
        self._decoding = ThreadPoolExecutor(1, thread_name_prefix="decode")  # fast tokenizers are not for two threads
        self._settings = settings
        self._cache = cache
        self._pool = pool
        self._display = display
        self._total = total

    async def run(self, requests: list[_Request]) -> None:
        waiting = iter(requests)
        num_done = self._total - sum(request.num for request in requests)

        async def work() -> None:
            nonlocal num_done
            for request in waiting:
                self._cache.add(request.problem.id, request.first, await self._rows(request))
                num_done += request.num
                self._display(num_done, self._total)

        workers = [asyncio.create_task(work()) for _ in range(min(self._num_workers, len(requests)))]
        try:
            await asyncio.gather(*workers)
        finally:
            for worker in workers:
                worker.cancel()
            await asyncio.gather(*workers, return_exceptions=True)
            await self._dispatcher.close()
            self._decoding.shutdown()

    async def _rows(self, request: _Request) -> list[dict[str, Any]]:
        settings = self._settings
        completions = await self._dispatcher.generate(
            request.prompt,
            n=request.num,
            temperature=settings.temperature,
            top_p=settings.top_p,
            max_tokens=settings.max_tokens,
            on_retry=lambda: None,  # the dispatcher says so
            seed=sample_seed(settings.seed, request.problem.id, request.first),
        )
        token_ids = [completion.token_ids.tolist() for completion in completions]
        loop = asyncio.get_running_loop()
        opening, texts = await loop.run_in_executor(self._decoding, self._decode, request.prompt, token_ids)
        verdicts = await _judge(self._pool, request.problem, [opening + text for text in texts])
        return [
            {
                "score": float(verdict.score),
                "reason": verdict.reason,
                "tokens": len(completion.token_ids),
                "finish_reason": completion.finish_reason,
                "text": text,
            }
            for completion, verdict, text in zip(completions, verdicts, texts, strict=True)
        ]

    def _decode(self, prompt: list[int], token_ids: list[list[int]]) -> tuple[str, list[str]]:
        opening = "<think>" if begins_in_thought(self._tokenizer, prompt) else ""
        return opening, [str(self._tokenizer.decode(ids, skip_special_tokens=True)) for ids in token_ids]


def sample_seed(seed: int, problem_id: str, number: int) -> int:
    """Of a problem's sample `number`; its neighbours' follow, as an engine gives them to a request's responses."""
    return hash64("sample", seed, problem_id) % 2**48 + number


async def _judge(pool: VerifierPool, problem: Problem, texts: list[str]) -> list[Any]:
    try:
        return await pool.verify_many(problem, texts)
    except VerifierError as error:
        # The last line of the worker's traceback says what is wrong with the problem.
        reason = str(error).strip().rpartition("\n")[2].rpartition("VerifierError: ")[2]
        raise UserError(f"suite: {reason}") from error


def _head(results: Mapping[str, Any]) -> str:
    suite = results["suite"]
    lines = [
        f"# {suite['description']}",
        "",
        f"Suite `{suite['name']}` {suite['digest']}, {results['samples']} samples",
    ]
    for name, spec in results["specs"].items():
        said = ", ".join(f"{key} {value}" for key, value in spec.items() if key != "suite")
        lines.append(f"* {name}: {results['paths'][name]}: {said}")
    lines += [f"* **{difference}**" for difference in results["differences"]]
    return "\n".join([*lines, "", ""])


def _write(path: Path, content: str) -> None:
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(content, encoding="utf-8")
    partial.replace(path)
