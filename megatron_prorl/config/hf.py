"""Where a model's config.json lies, what it says, and what it leaves to the model's own defaults; without torch."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from megatron_prorl.errors import UserError

ARCHITECTURES = ("Qwen2ForCausalLM", "Qwen3ForCausalLM", "Qwen3MoeForCausalLM")
_REQUIRED_KEYS = (
    "hidden_size", "intermediate_size", "max_position_embeddings", "num_attention_heads", "num_hidden_layers",
    "num_key_value_heads", "rms_norm_eps", "vocab_size",
)  # fmt: skip
_MOE_KEYS = ("moe_intermediate_size", "num_experts", "num_experts_per_tok")
# Of the JSON files: what says nothing about the model and its prompts.
_UNIMPORTANT = {
    "_name_or_path", "name_or_path", "transformers_version", "torch_dtype", "dtype", "use_cache", "auto_map",
}  # fmt: skip
_PROMPT_FILES = (
    "tokenizer*", "chat_template*", "additional_chat_templates/*", "*.model", "special_tokens_map.json",
    "added_tokens.json", "vocab.*", "merges.txt",
)  # fmt: skip
_QWEN3_HEAD_DIM = 128  # transformers' Qwen3Config, whatever the hidden size


def is_megatron_checkpoint(folder: Path) -> bool:
    """Whether this is a torch.distributed checkpoint, and not a Hugging Face folder."""
    return (folder / ".metadata").is_file()


def hf_folder(path: str | Path) -> Path:
    """Where config.json and tokenizer of the model at `path` lie.

    For a Megatron checkpoint in its own `hf` folder, or in that of the run whose checkpoint or reference it is.
    """
    folder = Path(path)
    if not is_megatron_checkpoint(folder):
        return folder
    own = folder / "hf"
    of_run = folder.absolute().parent.parent / "hf"
    return own if (own / "config.json").is_file() or not (of_run / "config.json").is_file() else of_run


def other_model_files(before: Path, now: Path) -> list[str]:
    """Names of the files that say what the model is and how its prompts read, and that differ in two folders."""
    patterns = ("config.json", *_PROMPT_FILES)
    names = {
        str(path.relative_to(folder))
        for folder in (before, now)
        for pattern in patterns
        for path in folder.glob(pattern)
        if path.is_file()
    }
    return [name for name in sorted(names) if not _say_the_same(before / name, now / name)]


def _say_the_same(one: Path, other: Path) -> bool:
    if not (one.is_file() and other.is_file()):
        return False
    contents = [path.read_bytes() for path in (one, other)]
    if contents[0] == contents[1] or one.suffix != ".json":
        return contents[0] == contents[1]
    try:
        first, second = (json.loads(content) for content in contents)
    except ValueError:
        return False
    return isinstance(first, dict) and isinstance(second, dict) and important(first) == important(second)


def important(content: dict[str, Any]) -> dict[str, Any]:
    """Of a JSON file: what says something about the model or its prompts."""
    return {key: value for key, value in content.items() if key not in _UNIMPORTANT}


def head_dim(hf: dict[str, Any]) -> int:
    """Width of an attention head. Raises KeyError if the config says too little."""
    if hf.get("head_dim"):
        return int(hf["head_dim"])
    if "Qwen3ForCausalLM" in (hf.get("architectures") or ()):
        return _QWEN3_HEAD_DIM
    return int(hf["hidden_size"]) // int(hf["num_attention_heads"])


def num_experts(hf: dict[str, Any]) -> int | None:
    """Experts of a layer that has them: 0 in a dense model, None if the config does not say."""
    if "Qwen3MoeForCausalLM" not in (hf.get("architectures") or ()):
        return 0
    return hf.get("num_experts", hf.get("num_local_experts"))  # as transformers 4 and 5 write it


def moe_layers(hf: dict[str, Any]) -> list[bool]:
    """For every layer whether it is a mixture of experts (transformers' Qwen3MoeDecoderLayer)."""
    step, dense = hf.get("decoder_sparse_step", 1), hf.get("mlp_only_layers") or ()
    return [
        bool(num_experts(hf)) and layer not in dense and (layer + 1) % step == 0
        for layer in range(hf["num_hidden_layers"])
    ]


def read_hf_config(path: str | Path) -> dict[str, Any]:
    """The folder's config.json, with what it leaves to transformers filled in as transformers does.

    Always there then: `head_dim`, `rope_theta`, `tie_word_embeddings`, and `num_experts`, 0 for a dense model.

    Raises UserError for a missing file and for anything in it that the model built here would not compute.
    """
    file = Path(path) / "config.json"
    if not file.is_file():
        raise UserError(f"{file} does not exist; give the folder of a Hugging Face model")
    try:
        hf: dict[str, Any] = json.loads(file.read_bytes())
    except ValueError as error:
        raise UserError(f"{file} is not JSON: {error}") from None
    if not isinstance(hf, dict):
        raise UserError(f"{file} is not a JSON object")
    architectures = hf.get("architectures") or ["none"]
    if architectures[0] not in ARCHITECTURES:
        raise UserError(f"{file}: architecture {architectures[0]} is not supported; use {' or '.join(ARCHITECTURES)}")

    rope = hf.get("rope_parameters") or {}  # transformers 5
    scaling = hf.get("rope_scaling") or {}  # transformers 4
    hf = hf | {
        "rope_theta": rope.get("rope_theta", hf.get("rope_theta")),
        "tie_word_embeddings": hf.get("tie_word_embeddings", False),
        "num_experts": num_experts(hf),
    }
    required = (*_REQUIRED_KEYS, "rope_theta", *(_MOE_KEYS if hf["num_experts"] != 0 else ()))
    missing = [key for key in required if hf.get(key) is None]
    if missing:
        raise UserError(f"{file}: {', '.join(missing)} missing; is the file complete?")
    for key in (*_REQUIRED_KEYS, *_MOE_KEYS, "head_dim", "decoder_sparse_step"):
        value, least = hf.get(key), 0 if key == "num_experts" else 1
        if key != "rms_norm_eps" and value is not None and (type(value) is not int or value < least):
            raise UserError(f"{file}: {key} is {value!r}; expected a whole number of at least {least}")
    hf["head_dim"] = head_dim(hf)

    # Both may be there: transformers 5 saves rope_parameters, and model cards tell to add rope_scaling, which wins.
    rope_types = [part.get("rope_type") or part.get("type") or "default" for part in (scaling, rope)]
    rope_type = next((kind for kind in rope_types if kind != "default"), "default")
    unsupported = {
        f"rope scaling {rope_type}": rope_type != "default",
        "sliding-window attention": _has_sliding_window(hf),
        f"hidden_act {hf.get('hidden_act')}": hf.get("hidden_act", "silu") != "silu",
        "attention_bias": hf.get("attention_bias", False),
        "attention_dropout": hf.get("attention_dropout", 0.0) > 0,
        "quantization_config": hf.get("quantization_config") is not None,
        # The one expert's weight would always be 1: nothing for the router to learn from, and Megatron refuses it.
        "norm_topk_prob with num_experts_per_tok 1": (
            hf["num_experts"] > 0 and hf["num_experts_per_tok"] == 1 and hf.get("norm_topk_prob", False)
        ),
    }
    for feature, is_used in unsupported.items():
        if is_used:
            raise UserError(f"{file}: {feature} is not supported; use a model without it")
    return hf


def _has_sliding_window(hf: dict[str, Any]) -> bool:
    if hf.get("layer_types"):
        return any(kind != "full_attention" for kind in hf["layer_types"])
    return bool(
        hf.get("use_sliding_window")
        and hf.get("sliding_window", 4096) is not None  # 4096 and 28 are transformers' defaults
        and hf.get("max_window_layers", 28) < hf["num_hidden_layers"]
    )


def padded_vocab_size(vocab_size: int, tensor: int) -> int:
    """Rows of the embedding and of the head over all tensor-parallel ranks.

    The same for every power of two up to 128, so a checkpoint fits other layouts; Qwen's 151936 stays as it is.
    """
    multiple = math.lcm(128, tensor)
    return math.ceil(vocab_size / multiple) * multiple
