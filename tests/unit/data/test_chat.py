from __future__ import annotations

from pathlib import Path

import pytest

from megatron_prorl.data.chat import load_tokenizer, render
from megatron_prorl.errors import UserError
from tests.tiny_model import make_tokenizer

MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1 + 1?"}]


def test_a_rendered_chat_reads_as_the_template_says_and_ends_where_the_assistant_begins(tmp_path: Path):
    make_tokenizer().save_pretrained(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    token_ids = render(tokenizer, MESSAGES)
    assert all(isinstance(token, int) for token in token_ids)
    assert tokenizer.decode(token_ids) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n1 + 1?<|im_end|>\n<|im_start|>assistant\n"
    )


def test_a_folder_that_holds_no_chat_tokenizer_is_one_line(tmp_path: Path):
    with pytest.raises(UserError, match="no such folder"):
        load_tokenizer(tmp_path / "missing")
    with pytest.raises(UserError, match="cannot load its tokenizer"):
        load_tokenizer(tmp_path)
    tokenizer = make_tokenizer()
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="no chat template") as caught:
        load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)
