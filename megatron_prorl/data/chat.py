"""The tokenizer of a model folder and its chat template."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, cast

from megatron_prorl.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a Hugging Face model folder, never downloaded. Raises UserError if it is not a chat model's."""
    if not Path(path).is_dir():
        raise UserError(f"model.path: {path}: no such folder; give a Hugging Face model folder on this machine")
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    except Exception as error:  # transformers raises OSError, ValueError, KeyError and more on incomplete folders
        first_line = str(error).strip().partition("\n")[0]
        raise UserError(
            f"model.path: {path}: cannot load its tokenizer ({first_line}); is tokenizer.json there?"
        ) from error
    if not tokenizer.chat_template:
        raise UserError(f"model.path: {path}: its tokenizer has no chat template; add chat_template.jinja")
    if tokenizer.eos_token_id is None:
        raise UserError(f"model.path: {path}: its tokenizer has no eos_token; responses would never end")
    return tokenizer


def render(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]]) -> list[int]:
    """Token ids of the chat up to where the assistant begins to write."""
    token_ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)
    return cast(list[int], token_ids)


def begins_in_thought(tokenizer: PreTrainedTokenizerBase, prompt_token_ids: list[int]) -> bool:
    """Whether the template has opened <think> already (DeepSeek-R1's does), so that a response starts inside it."""
    return str(tokenizer.decode(prompt_token_ids[-16:])).rstrip().endswith("<think>")
