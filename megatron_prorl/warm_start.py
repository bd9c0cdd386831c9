"""The quickstart's base model: a tiny Qwen2, made and taught on the spot from the run's own task mix, so that nothing is downloaded.

Reinforcement learning sharpens what a model does now and then, so the model is taught the answer format and the tasks from answers
with slips in them, and only until it is right on TARGET of the problems that it has not seen. It then knows more than it shows.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import string
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_prorl.config.schema import DataConfig
from megatron_prorl.data.chat import render
from megatron_prorl.data.problems import TrainProblems
from megatron_prorl.errors import UserError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerFast, Qwen2ForCausalLM

TARGET = 0.35  # teaching ends when sampled answers to unseen problems are right so often
MAX_STEPS = 1200
MEASURED_STEPS = 10  # from one look at unseen problems to the next
BATCH = 64  # examples a step
PROBLEMS = 6000
UNSEEN = 192  # of these, kept for the look
SLIPS = 0.2  # share of an answer's letters and digits that are replaced by any other
LEARNING_RATE = 4e-3
WARMUP_STEPS = 30
SEED_OFFSET = 1_000_003  # the run with the same seed draws other problems
RECORD = "warm_start.json"  # what the model was made from; its presence says that the folder is ours

PAD, START, END, UNKNOWN = SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<unk>")
CHARACTERS = [chr(code) for code in range(32, 127)] + ["\n"]
FRAME = ["system\n", "user\n", "assistant\n", "<answer>", "</answer>"]
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    question: str
    prompt_token_ids: list[int]
    answer: str


def warm_start(data: DataConfig, out: str | Path, *, seed: int, target: float = TARGET) -> bool:
    """Make the model in folder `out` unless it is there already; returns whether it was made.

    The folder appears complete, by rename. The held-out problems of the run with the same `data` and `seed` are neither taught nor
    looked at. Raises UserError if `out` holds something else, or if MAX_STEPS steps do not reach the target.
    """
    out = Path(out)
    record = {"data": data.model_dump(), "seed": seed, "target": target}
    if out.exists():
        if not (out / RECORD).exists():
            raise UserError(f"{out}: not a model of the warm start's; move it away or give another model.path")
        if json.loads((out / RECORD).read_text(encoding="utf-8")) == record:
            return False
    problems = generate_problems(data, seed)
    tokenizer = make_tokenizer((problem.task, [m["content"] for m in problem.messages]) for problem in problems)
    model = make_model(tokenizer, seed)
    examples = [
        Example(
            prompt_token_ids=render(tokenizer, problem.messages),
            answer=problem.verification["answer"],
            question=problem.messages[-1]["content"],
        )
        for problem in problems
    ]
    with _progress(target) as show:
        for step, right in teach(model, tokenizer, examples, seed=seed):
            show(step, right)
            if right >= target:
                break
        else:
            raise UserError(f"data.tasks: too hard for the warm start: {right:.0%} right after {MAX_STEPS} steps; choose easier params")
    draft = out.with_name(f"{out.name}.tmp")
    shutil.rmtree(draft, ignore_errors=True)
    model.save_pretrained(draft)
    tokenizer.save_pretrained(draft)
    (draft / RECORD).write_text(json.dumps(record), encoding="utf-8")
    shutil.rmtree(out, ignore_errors=True)
    os.replace(draft, out)
    return True


def generate_problems(data: DataConfig, seed: int) -> list[Any]:
    """PROBLEMS problems of the run's mix, none of which the run with `seed` holds out."""
    with TrainProblems(data, seed) as run, TrainProblems(data, seed + SEED_OFFSET) as ours:
        held_out = {problem.messages[-1]["content"] for problem in run.held_out}
        problems = [ours.problem(draw) for draw in range(PROBLEMS)]
    return [problem for problem in problems if problem.messages[-1]["content"] not in held_out]


def make_tokenizer(problem_texts: Iterable[tuple[str, list[str]]]) -> PreTrainedTokenizerFast:
    """A tokenizer with Qwen's chat markers for problems given as (task, message texts).

    What the problems of a task have in common is one token a word, so that prompts are short; what differs is spelled out in
    characters, so that a model can count and turn letters round.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    problems_of_task: Counter[str] = Counter()
    problems_with_word: Counter[tuple[str, str]] = Counter()
    for task, texts in problem_texts:
        problems_of_task[task] += 1
        words = {word for text in texts for word in re.findall(r"\s?\S+", text) if len(word) > 2 and not re.search(r"\d", word)}
        problems_with_word.update((task, word) for word in words)
    common = {word for (task, word), n in problems_with_word.items() if n >= 0.3 * problems_of_task[task]}
    words = sorted(common.union(FRAME), key=lambda word: (-len(word), word))  # longest first: alternatives are tried in order

    vocabulary = {token: i for i, token in enumerate(dict.fromkeys([*SPECIAL, *CHARACTERS, *words]))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(
        Regex("|".join([*map(re.escape, words), r"[\s\S]"])), behavior="isolated"
    )
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END, pad_token=PAD, unk_token=UNKNOWN, clean_up_tokenization_spaces=False
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def make_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> Qwen2ForCausalLM:
    """An untrained Qwen2 of about 0.4M parameters whose layers, heads and vocabulary can be split in two."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=-(-len(tokenizer) // 16) * 16,
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        rope_theta=10000.0,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Qwen2ForCausalLM(config)


def teach(
    model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerFast, examples: list[Example], *, seed: int
) -> Iterator[tuple[int, float]]:
    """Supervised steps on the tokens of the responses; every MEASURED_STEPS yields the step and how often the model is right.

    That is `probability_right` on problems that are never taught.
    """
    import torch

    rng = random.Random(seed)
    unseen = list({example.question: example for example in examples}.values())[-UNSEEN:]
    questions = {example.question for example in unseen}
    taught = [example for example in examples if example.question not in questions]
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: min(1.0, (n + 1) / WARMUP_STEPS))
    for step in range(1, MAX_STEPS + 1):
        batch = [(example.prompt_token_ids, slip(example.answer, rng)) for example in rng.sample(taught, BATCH)]
        logprobs_BT, num_tokens = _answer_logprobs(model, tokenizer, batch)
        optimizer.zero_grad()
        (-logprobs_BT.sum() / num_tokens).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % MEASURED_STEPS == 0:
            yield step, probability_right(model, tokenizer, unseen)


def slip(answer: str, rng: random.Random) -> str:
    """The answer with each of its letters and digits replaced, with probability SLIPS, by another of its kind."""
    return "".join(
        rng.choice([other for other in kind if other != character]) if kind and rng.random() < SLIPS else character
        for character, kind in ((character, _kind(character)) for character in answer)
    )


def _kind(character: str) -> str:
    return next((kind for kind in (string.digits, string.ascii_lowercase, string.ascii_uppercase) if character in kind), "")


def probability_right(model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerFast, examples: list[Example]) -> float:
    """The mean probability that a response sampled at temperature 1 is the right answer, exactly as it would be written."""
    import torch

    with torch.no_grad():
        logprobs_BT, _ = _answer_logprobs(model, tokenizer, [(example.prompt_token_ids, example.answer) for example in examples])
    return logprobs_BT.sum(dim=1).exp().mean().item()


def _answer_logprobs(
    model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerFast, prompts_with_answers: list[tuple[list[int], str]]
) -> tuple[torch.Tensor, int]:
    """Log-probs [B, T] of the tokens of each response, its end token included, and 0.0 elsewhere; and how many tokens these are."""
    import torch

    sequences = []
    for prompt, answer in prompts_with_answers:
        response = tokenizer.encode(f"<answer>{answer}</answer>", add_special_tokens=False) + [tokenizer.eos_token_id]
        sequences.append((prompt, response))
    length = max(len(prompt) + len(response) for prompt, response in sequences)
    token_ids_BT = torch.full((len(sequences), length), tokenizer.pad_token_id)  # on the right, where causal attention never looks
    taught_BT = torch.zeros_like(token_ids_BT, dtype=torch.bool)
    for row, (prompt, response) in enumerate(sequences):
        end = len(prompt) + len(response)
        token_ids_BT[row, :end] = torch.tensor(prompt + response)
        taught_BT[row, len(prompt) - 1 : end - 1] = True
    hidden_BTH = model.model(input_ids=token_ids_BT, use_cache=False).last_hidden_state
    logprobs_NV = model.lm_head(hidden_BTH[taught_BT]).log_softmax(dim=-1)
    targets_N = token_ids_BT.roll(-1, dims=1)[taught_BT]
    logprobs_BT = logprobs_NV.new_zeros(taught_BT.shape)
    logprobs_BT[taught_BT] = logprobs_NV.gather(1, targets_N[:, None])[:, 0]
    return logprobs_BT, len(targets_N)


@contextmanager
def _progress(target: float) -> Iterator[Callable[[int, float], None]]:
    """Gives a function that shows (step, how often the model is right): a bar on a terminal, a line now and then elsewhere."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    if not sys.stdout.isatty():
        def show_line(step: int, right: float) -> None:
            if step % 100 == 0 or right >= target:
                print(f"warm start: step {step}, right on {right:.0%} of unseen problems, until {target:.0%}", flush=True)

        yield show_line
        return
    with Progress(TextColumn("[bold]warm start"), BarColumn(), TextColumn("{task.description}"), TimeElapsedColumn()) as bars:
        bar = bars.add_task("", total=target)

        def show_bar(step: int, right: float) -> None:
            bars.update(bar, completed=right, description=f"right on {right:.0%} of unseen problems, until {target:.0%}; step {step}")

        yield show_bar
