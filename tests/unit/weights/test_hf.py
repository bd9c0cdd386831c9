"""Reading and writing Hugging Face folders; every damaged folder gives one line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_model import make_tiny_qwen
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_prorl.checkpoint.spans import tensor_chunks
from megatron_prorl.config.hf import read_hf_config
from megatron_prorl.errors import UserError
from megatron_prorl.weights.hf import HfTensors, TensorSpec, check_tokenizer_fits, copy_small_files, write_tensors
from megatron_prorl.weights.tables import hf_shapes

EMBEDDING, NORM = "model.embed_tokens.weight", "model.norm.weight"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_qwen(tmp_path_factory.mktemp("model"), num_hidden_layers=1)


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(whole, tmp_path / "model"))


@pytest.fixture
def sharded(whole: Path, tmp_path: Path) -> Path:
    model = AutoModelForCausalLM.from_pretrained(whole)
    model.save_pretrained(tmp_path / "sharded", max_shard_size="40KB")
    shutil.copy(whole / "tokenizer.json", tmp_path / "sharded")
    return tmp_path / "sharded"


def open_and_check(folder: Path) -> HfTensors:
    tensors = HfTensors(folder)
    tensors.check(hf_shapes(read_hf_config(folder)))
    return tensors


def error_of(call: Callable[[], object]) -> str:
    with pytest.raises(UserError) as error:
        call()
    line = str(error.value)
    assert "\n" not in line
    return line


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_slices_of_one_file_and_of_shards_are_those_of_transformers(folder: Path, sharded: Path):
    assert len(list(sharded.glob("*.safetensors"))) > 2
    expected = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    for tensors in (open_and_check(folder), open_and_check(sharded)):
        assert tensors.shapes == {name: tuple(t.shape) for name, t in expected.items()}
        assert all(torch.equal(tensors.slice(name)[1:3], t[1:3]) for name, t in expected.items())


def test_a_missing_folder_is_one_line(tmp_path: Path):
    assert f"{tmp_path / 'absent'}: no such folder" in error_of(lambda: HfTensors(tmp_path / "absent"))


def test_a_folder_without_safetensors_is_one_line(folder: Path):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert "neither model.safetensors nor model.safetensors.index.json" in error_of(lambda: HfTensors(folder))


def test_a_missing_shard_is_named(sharded: Path):
    shard = sorted(sharded.glob("*.safetensors"))[1]
    shard.unlink()
    assert f"{shard.name} is missing" in error_of(lambda: HfTensors(sharded))


@pytest.mark.parametrize("damage", ["", "half a head", "short by one", "garbage"])
def test_a_truncated_or_damaged_file_is_named(folder: Path, damage: str):
    path = folder / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(
        {"": b"", "half a head": content[:100], "short by one": content[:-1], "garbage": b"x" * 999}[damage]
    )
    line = error_of(lambda: HfTensors(folder))
    assert line.startswith(f"{path}: not a complete safetensors file")


def test_a_truncated_index_is_named(sharded: Path):
    index = sharded / "model.safetensors.index.json"
    index.write_text(index.read_text()[:50])
    assert f"{index}: not a complete safetensors index" in error_of(lambda: HfTensors(sharded))


def test_a_tensor_that_its_shard_lacks_is_named(sharded: Path):
    index = sharded / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    first, *_, last = sorted(set(content["weight_map"].values()))
    name = next(name for name, file in content["weight_map"].items() if file == first)
    content["weight_map"][name] = last
    index.write_text(json.dumps(content))
    assert f"{sharded / last}: {name} is missing" in error_of(lambda: HfTensors(sharded))


def test_missing_tensors_are_named(folder: Path):
    rewrite(folder, lambda tensors: tensors.pop(NORM))
    assert f"{NORM} is missing" in error_of(lambda: open_and_check(folder))
    rewrite(folder, lambda tensors: [tensors.pop(name) for name in sorted(tensors) if ".layers." in name])
    assert "and 9 more are missing" in error_of(lambda: open_and_check(folder))


def test_a_left_over_tensor_is_named(folder: Path):
    rewrite(folder, lambda tensors: tensors.update({"model.layers.1.mlp.up_proj.weight": torch.zeros(2)}))
    assert "model.layers.1.mlp.up_proj.weight is left over" in error_of(lambda: open_and_check(folder))


def test_a_shape_that_config_json_does_not_mean_is_named_with_both(folder: Path):
    rewrite(folder, lambda tensors: tensors.update({EMBEDDING: torch.zeros(112, 32)}))
    line = error_of(lambda: open_and_check(folder))
    assert f"{EMBEDDING} has shape [112, 32], but config.json means [112, 64]" in line


def test_a_tokenizer_may_be_smaller_than_the_vocabulary_but_not_larger(whole: Path):
    hf = read_hf_config(whole)
    check_tokenizer_fits(hf, 112)
    check_tokenizer_fits(hf, len(AutoTokenizer.from_pretrained(whole)))
    line = error_of(lambda: check_tokenizer_fits(hf, 113))
    assert "113 tokens" in line and "vocab_size is 112" in line


def write_copy(source: Path, out: Path, shard_bytes: int) -> None:
    tensors = load_file(source / "model.safetensors")
    out.mkdir()
    copy_small_files(source, out, torch.float32)
    specs = [TensorSpec(name, tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()]
    write_tensors(out, specs, lambda spec: tensor_chunks(tensors[spec.name]), shard_bytes=shard_bytes)


@pytest.mark.parametrize("shard_bytes", [10**9, 40_000])
def test_a_written_folder_is_the_same_model_to_transformers(folder: Path, tmp_path: Path, shard_bytes: int):
    out = tmp_path / "out"
    write_copy(folder, out, shard_bytes)
    files = [load_file(path) for path in out.glob("*.safetensors")]
    assert all(sum(tensor.nbytes for tensor in file.values()) <= shard_bytes for file in files)
    assert (out / "model.safetensors").is_file() == (shard_bytes == 10**9)
    before, after = (AutoModelForCausalLM.from_pretrained(path).state_dict() for path in (folder, out))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    messages = [{"role": "user", "content": "Hi?"}]
    first, second = (AutoTokenizer.from_pretrained(p).apply_chat_template(messages) for p in (folder, out))
    assert first == second
    open_and_check(out)


def test_a_written_config_names_the_dtype_of_the_written_weights(folder: Path, tmp_path: Path):
    copy_small_files(folder, tmp_path, torch.bfloat16)
    assert AutoModelForCausalLM.from_pretrained(folder).dtype == torch.float32
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"


def test_a_dtype_that_megatron_lacks_is_refused_by_name(folder: Path):
    rewrite(folder, lambda tensors: tensors.update({NORM: tensors[NORM].to(torch.float8_e4m3fn)}))
    assert f"{NORM} is of type F8_E4M3; only BF16, F16, F32" in error_of(lambda: HfTensors(folder))
