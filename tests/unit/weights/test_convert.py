"""Hugging Face folders to Megatron checkpoints and back, compared with what transformers itself reads and writes."""

from __future__ import annotations

import json
import logging
import pickle
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiny_model import make_tiny_qwen
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from megatron_prorl.checkpoint.pieces import Piece, write_pieces
from megatron_prorl.checkpoint.spans import tensor_chunks
from megatron_prorl.checkpoint.stream import CheckpointReader
from megatron_prorl.errors import UserError
from megatron_prorl.weights import convert
from megatron_prorl.weights.convert import hf_to_megatron, megatron_to_hf
from megatron_prorl.weights.load import load_weights

UP, V = "model.layers.0.mlp.up_proj.weight", "model.layers.1.self_attn.v_proj.weight"
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def same_bits(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    """Names, dtypes and values; NaN equals NaN of the same bits."""
    return first.keys() == second.keys() and all(
        tensor.dtype == second[name].dtype and torch.equal(tensor.view(torch.uint8), second[name].view(torch.uint8))
        for name, tensor in first.items()
    )


def there_and_back(hf: Path, work: Path, **options: Any) -> Path:
    hf_to_megatron(hf, work / "megatron", **options)
    megatron_to_hf(work / "megatron", work / "back")
    return work / "back"


@pytest.fixture
def hf(tmp_path: Path) -> Path:
    folder = make_tiny_qwen(tmp_path / "model", num_hidden_layers=2)
    GenerationConfig(do_sample=True, temperature=0.6, eos_token_id=2).save_pretrained(folder)
    return folder


def error_of(action: Callable[[], Any]) -> str:
    with pytest.raises(UserError) as error:
        action()
    (line,) = str(error.value).splitlines()
    return line


@st.composite
def models(draw: st.DrawFn) -> dict[str, Any]:
    """Shapes of a Qwen: head_dim need not be hidden / heads, the vocabulary is a multiple of nothing."""
    groups = draw(st.sampled_from([1, 2, 3, 4]))
    heads = groups * draw(st.integers(1, 3))
    family = draw(st.sampled_from(["qwen2", "qwen3"]))
    shape = {
        "family": family,
        "num_key_value_heads": groups,
        "num_attention_heads": heads,
        "hidden_size": heads * 2 * draw(st.integers(2, 6)),
        "intermediate_size": draw(st.integers(5, 40)),
        "num_hidden_layers": draw(st.integers(1, 3)),
        "vocab_size": draw(st.integers(100, 300)),
        "tie_word_embeddings": draw(st.booleans()),
    }
    return shape | ({"head_dim": 2 * draw(st.integers(2, 8))} if family == "qwen3" else {})


@settings(max_examples=12, deadline=None)
@given(shape=models(), dtype=st.sampled_from(["bf16", "fp32"]))
def test_there_and_back_is_bit_identical_and_the_model_is_transformers_own(shape: dict[str, Any], dtype: str) -> None:
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        hf = make_tiny_qwen(work / "hf", dtype=DTYPES[dtype], **shape)
        back = there_and_back(hf, work)
        assert same_bits(tensors_of(back), tensors_of(hf))
        before, after = (AutoModelForCausalLM.from_pretrained(folder) for folder in (hf, back))
        assert after.dtype == DTYPES[dtype]
        assert before.config.to_diff_dict() | {"_name_or_path": ""} == after.config.to_diff_dict() | {
            "_name_or_path": ""
        }
        assert same_bits(dict(after.state_dict()), dict(before.state_dict()))


def test_the_folder_that_comes_back_is_a_complete_model(hf: Path, tmp_path: Path) -> None:
    back = there_and_back(hf, tmp_path)
    kept = {path.name for path in hf.iterdir()}
    assert {path.name for path in back.iterdir()} == kept
    messages = [{"role": "user", "content": "Hi?"}]
    first, second = (AutoTokenizer.from_pretrained(p).apply_chat_template(messages) for p in (hf, back))
    assert first == second
    assert GenerationConfig.from_pretrained(back).temperature == 0.6


@pytest.mark.parametrize("key", ["rope_theta", "rope_parameters"])
def test_configs_of_transformers_4_and_5_come_back_as_they_were(hf: Path, tmp_path: Path, key: str) -> None:
    config = json.loads((hf / "config.json").read_text())
    config.pop("rope_parameters", None)
    config |= (
        {"rope_theta": 5e5} if key == "rope_theta" else {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}
    )
    (hf / "config.json").write_text(json.dumps(config))
    assert json.loads((there_and_back(hf, tmp_path) / "config.json").read_text()) == config


@pytest.mark.parametrize("to", ["bf16", "fp32"])
def test_another_dtype_rounds_as_transformers_does(hf: Path, tmp_path: Path, to: str) -> None:
    source = make_tiny_qwen(tmp_path / "source", dtype=DTYPES["fp32" if to == "bf16" else "bf16"])
    hf_to_megatron(source, tmp_path / "megatron", dtype=DTYPES[to])
    megatron_to_hf(tmp_path / "megatron", tmp_path / "back")
    expected = {name: tensor.to(DTYPES[to]) for name, tensor in tensors_of(source).items()}
    assert same_bits(tensors_of(tmp_path / "back"), expected)
    hf_to_megatron(source, tmp_path / "as it is")
    megatron_to_hf(tmp_path / "as it is", tmp_path / "back 2", dtype=DTYPES[to])
    assert same_bits(tensors_of(tmp_path / "back 2"), expected)


def test_pieces_and_files_may_be_small(hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convert, "PIECE_BYTES", 4096)
    hf_to_megatron(hf, tmp_path / "megatron")
    sizes = {key: len(entry.chunks) for key, entry in CheckpointReader(tmp_path / "megatron").tensors.items()}
    assert sizes["embedding.word_embeddings.weight"] == 128 * 64 * 4 // 4096
    megatron_to_hf(tmp_path / "megatron", tmp_path / "back")
    assert same_bits(tensors_of(tmp_path / "back"), tensors_of(hf))


def test_a_sharded_folder_is_read_and_its_shards_must_all_be_there(hf: Path, tmp_path: Path) -> None:
    AutoModelForCausalLM.from_pretrained(hf).save_pretrained(tmp_path / "sharded", max_shard_size="50KB")
    AutoTokenizer.from_pretrained(hf).save_pretrained(tmp_path / "sharded")
    assert same_bits(tensors_of(there_and_back(tmp_path / "sharded", tmp_path)), tensors_of(hf))
    shard = sorted((tmp_path / "sharded").glob("*.safetensors"))[1]
    shard.unlink()
    line = error_of(lambda: hf_to_megatron(tmp_path / "sharded", tmp_path / "other"))
    assert f"{shard.name} is missing" in line
    assert not (tmp_path / "other").exists()


def rewritten(hf: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    tensors = load_file(hf / "model.safetensors")
    change(tensors)
    save_file(tensors, hf / "model.safetensors", metadata={"format": "pt"})


def warnings_in(caplog: Any) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def test_weights_that_are_not_finite_are_kept_and_named(hf: Path, tmp_path: Path, caplog: Any) -> None:
    names = ["model.layers.1.mlp.up_proj.weight", "model.layers.0.self_attn.k_proj.weight"]

    def spoil(tensors: dict[str, Tensor]) -> None:
        tensors[names[0]][3, 5] = float("nan")
        tensors[names[1]][1, 1] = -float("inf")

    rewritten(hf, spoil)
    with caplog.at_level(logging.WARNING):
        back = there_and_back(hf, tmp_path)
    assert same_bits(tensors_of(back), tensors_of(hf))
    assert sorted(warnings_in(caplog)) == sorted(2 * [f"{name} holds values that are not finite" for name in names])


def test_values_that_become_infinite_are_named(hf: Path, tmp_path: Path, caplog: Any) -> None:
    rewritten(hf, lambda tensors: tensors["model.norm.weight"].fill_(3.4e38))
    hf_to_megatron(hf, tmp_path / "megatron", dtype=torch.bfloat16)
    assert warnings_in(caplog) == ["model.norm.weight holds values that are not finite"]


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (lambda t: t.pop("model.norm.weight"), "model.norm.weight is missing"),
        (lambda t: t.update(stray=torch.zeros(2)), "stray is left over"),
        (lambda t: t.update({"model.norm.weight": torch.zeros(3)}), "model.norm.weight has shape [3]"),
        (lambda t: t.update({"model.layers.1.input_layernorm.weight": torch.zeros(64).half()}), "give --dtype"),
        (lambda t: t.update({UP: t[UP].bfloat16()}), f"{UP} differ in dtype; give --dtype"),
        (lambda t: t.update({V: t[V].bfloat16()}), f"{V} differ in dtype; give --dtype"),
    ],
)
def test_a_folder_that_is_not_the_model_is_refused(hf: Path, tmp_path: Path, change: Any, part: str) -> None:
    rewritten(hf, change)
    assert part in error_of(lambda: hf_to_megatron(hf, tmp_path / "megatron"))
    assert not (tmp_path / "megatron").exists()


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"architectures": ["LlamaForCausalLM"]}, "LlamaForCausalLM is not supported; use Qwen2ForCausalLM"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}}, "yarn is not supported"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope scaling dynamic is not supported"),
    ],
)
def test_an_unknown_model_or_rope_is_refused_by_name(hf: Path, tmp_path: Path, change: Any, part: str) -> None:
    config = json.loads((hf / "config.json").read_text())
    del config["rope_parameters"]
    (hf / "config.json").write_text(json.dumps(config | {"rope_theta": 1e4} | change))
    assert part in error_of(lambda: hf_to_megatron(hf, tmp_path / "megatron"))


def test_rope_scaling_beside_rope_parameters_is_seen(hf: Path, tmp_path: Path) -> None:
    """As a config that transformers 5 saved is after what model cards tell to add for long contexts."""
    config = json.loads((hf / "config.json").read_text())
    assert config["rope_parameters"]["rope_type"] == "default"
    (hf / "config.json").write_text(json.dumps(config | {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}))
    assert "rope scaling yarn is not supported" in error_of(lambda: hf_to_megatron(hf, tmp_path / "megatron"))


@pytest.mark.parametrize(("content", "part"), [("{", "is not JSON"), ("[]", "is not a JSON object")])
def test_a_broken_config_is_one_line(hf: Path, tmp_path: Path, content: str, part: str) -> None:
    (hf / "config.json").write_text(content)
    assert part in error_of(lambda: hf_to_megatron(hf, tmp_path / "megatron"))


def test_an_index_says_which_file_holds_a_tensor(hf: Path, tmp_path: Path) -> None:
    AutoModelForCausalLM.from_pretrained(hf).save_pretrained(tmp_path / "sharded", max_shard_size="50KB")
    shard = sorted((tmp_path / "sharded").glob("*.safetensors"))[-1]
    tensors = load_file(shard)
    save_file(tensors | {"model.embed_tokens.weight": torch.zeros(112, 64)}, shard)
    line = error_of(lambda: hf_to_megatron(tmp_path / "sharded", tmp_path / "megatron"))
    assert "model.embed_tokens.weight is in no line of model.safetensors.index.json for this file" in line


def test_a_tied_head_that_is_stored_too_must_be_the_embedding(tmp_path: Path, caplog: Any) -> None:
    hf = make_tiny_qwen(tmp_path / "model", tie_word_embeddings=True)
    embedding = "model.embed_tokens.weight"
    rewritten(hf, lambda tensors: tensors.update({"lm_head.weight": tensors[embedding].clone()}))
    back = there_and_back(hf, tmp_path)
    [warning] = warnings_in(caplog)
    assert "it is stored once" in warning
    expected = tensors_of(hf)
    del expected["lm_head.weight"]
    assert same_bits(tensors_of(back), expected)
    rewritten(hf, lambda tensors: tensors["lm_head.weight"][-1].add_(1))
    assert "lm_head.weight differs from the embedding" in error_of(lambda: hf_to_megatron(hf, tmp_path / "other"))


def test_nothing_but_a_model_or_a_checkpoint_is_overwritten(hf: Path, tmp_path: Path) -> None:
    """Least of all what is being converted, or a folder that it lies in."""
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    for out in (hf, tmp_path, tmp_path.parent):
        line = error_of(lambda out=out: hf_to_megatron(hf, out, overwrite=True))  # type: ignore[misc]
        assert line.endswith("holds what is to be converted; give another folder")
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "thesis.tex").write_text("years of work")
    line = error_of(lambda: hf_to_megatron(hf, tmp_path / "notes", overwrite=True))
    assert "holds neither a model nor a checkpoint, so it is not overwritten" in line
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    assert "a link" in error_of(lambda: hf_to_megatron(hf, tmp_path / "link", overwrite=True))


def test_what_appears_while_it_converts_is_kept(hf: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"

    def someone_writes(done: int, total: int) -> None:
        out.mkdir(exist_ok=True)
        (out / "config.json").write_text("{}")

    line = error_of(lambda: hf_to_megatron(hf, out, on_progress=someone_writes))
    assert line == f"{out}: is not empty; give another folder, or --overwrite"
    assert [path.name for path in out.iterdir()] == ["config.json"]


def test_what_is_there_is_kept_unless_told_otherwise(hf: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    hf_to_megatron(hf, out)  # an empty folder is nothing
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    assert error_of(lambda: hf_to_megatron(hf, out)) == f"{out}: is not empty; give another folder, or --overwrite"
    assert error_of(lambda: megatron_to_hf(out, hf)) == f"{hf}: is not empty; give another folder, or --overwrite"
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
    other = make_tiny_qwen(tmp_path / "other", seed=1)
    hf_to_megatron(other, out, overwrite=True)
    megatron_to_hf(out, hf, overwrite=True)
    assert same_bits(tensors_of(hf), tensors_of(other))


class Interrupted(Exception):
    pass


def test_an_interrupted_conversion_leaves_nothing(hf: Path, tmp_path: Path) -> None:
    def stop(done: int, total: int) -> None:
        if done > total / 2:
            raise Interrupted

    hf_to_megatron(hf, tmp_path / "megatron")
    for run in (
        lambda: hf_to_megatron(hf, tmp_path / "out", on_progress=stop),
        lambda: megatron_to_hf(tmp_path / "megatron", tmp_path / "out", on_progress=stop),
    ):
        with pytest.raises(Interrupted):
            run()
        assert sorted(path.name for path in tmp_path.iterdir()) == ["megatron", "model"]


KILLED = """
import os, signal, sys
from megatron_prorl.weights.convert import hf_to_megatron

def kill(done, total):
    if done > total / 2:
        os.kill(os.getpid(), signal.SIGKILL)

hf_to_megatron(sys.argv[1], sys.argv[2], on_progress=kill)
"""


def test_a_killed_conversion_leaves_nothing_that_looks_whole(hf: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    killed = subprocess.run([sys.executable, "-W", "ignore", "-c", KILLED, str(hf), str(out)])
    assert killed.returncode == -signal.SIGKILL
    assert not out.exists() and list(tmp_path.glob(".tmp-out*"))
    hf_to_megatron(hf, out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "out"]
    megatron_to_hf(out, tmp_path / "back")
    assert same_bits(tensors_of(tmp_path / "back"), tensors_of(hf))


@pytest.fixture
def megatron(hf: Path, tmp_path: Path) -> Path:
    hf_to_megatron(hf, tmp_path / "megatron")
    return tmp_path / "megatron"


def test_a_damaged_checkpoint_is_told_in_one_line(megatron: Path, tmp_path: Path) -> None:
    file = max(megatron.glob("*.distcp"), key=lambda path: path.stat().st_size)
    whole = file.read_bytes()

    file.write_bytes(whole[:-100])
    assert error_of(lambda: megatron_to_hf(megatron, tmp_path / "out")).startswith(f"{file}: cut off")
    file.write_bytes(bytes(len(whole)))
    line = error_of(lambda: megatron_to_hf(megatron, tmp_path / "out"))
    assert line == f"{megatron}: {file.name} changed since the checkpoint was written; take another checkpoint"
    (megatron / "COMMITTED").unlink()  # as another Megatron's
    assert "cannot be read" in error_of(lambda: megatron_to_hf(megatron, tmp_path / "out"))
    file.unlink()
    assert f"{file.name} missing" in error_of(lambda: megatron_to_hf(megatron, tmp_path / "out"))
    (megatron / ".metadata").write_bytes(b"nonsense")
    assert "no torch.distributed checkpoint" in error_of(lambda: megatron_to_hf(megatron, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_of_another_model_is_told_in_one_line(megatron: Path, tmp_path: Path) -> None:
    config = json.loads((megatron / "hf" / "config.json").read_text())
    for change, part in (
        ({"num_hidden_layers": 3}, "has shape [2, 64], but hf/config.json means [3, 64]"),
        ({"intermediate_size": 96}, "has shape"),
        ({"vocab_size": 400}, "too small for this model"),
        ({"tie_word_embeddings": True}, "output_layer.weight is left over"),
        ({"architectures": ["Qwen3ForCausalLM"], "head_dim": 16}, "q_layernorm.weight is missing"),
    ):
        (megatron / "hf" / "config.json").write_text(json.dumps(config | change))
        assert part in error_of(lambda: megatron_to_hf(megatron, tmp_path / "out"))


def test_without_a_config_it_says_where_to_put_one(megatron: Path, tmp_path: Path) -> None:
    (megatron / "hf" / "config.json").unlink()
    assert "no hf/config.json" in error_of(lambda: megatron_to_hf(megatron, tmp_path / "out"))
    line = error_of(lambda: megatron_to_hf(tmp_path, tmp_path / "out"))
    assert line == f"{tmp_path}: no torch.distributed checkpoint; it has megatron"


def test_a_checkpoint_with_a_tensor_for_each_layer_and_another_padding_is_read(
    megatron: Path, hf: Path, tmp_path: Path
) -> None:
    """As Megatron writes models whose layers differ, and with --make-vocab-size-divisible-by of another value."""
    reader = CheckpointReader(megatron)

    def values(key: str, offset: tuple[int, ...], shape: tuple[int, ...]) -> Tensor:
        out = torch.empty(shape)
        reader.read(key, offset, out)
        return out

    pieces = []
    for key, entry in reader.tensors.items():
        shape = tuple(entry.size)
        if key.startswith("decoder.layers."):
            for layer in range(shape[0]):
                tensor = values(key, (layer,) + (0,) * (len(shape) - 1), shape[1:])
                name = key.replace("decoder.layers.", f"decoder.layers.{layer}.")
                pieces.append(whole_tensor(name, tensor))
            continue
        tensor = values(key, (0,) * len(shape), shape)
        pieces.append(whole_tensor(key, tensor[:112] if tensor.dim() == 2 else tensor))  # a vocabulary without padding
    other = tmp_path / "other"
    other.mkdir()
    write_pieces(other, pieces)
    (megatron / "hf").rename(other / "hf")
    megatron_to_hf(other, tmp_path / "back")
    assert same_bits(tensors_of(tmp_path / "back"), tensors_of(hf))


def whole_tensor(key: str, tensor: Tensor) -> Piece:
    shape = tuple(tensor.shape)
    return Piece(
        key=key, global_shape=shape, offset=(0,) * len(shape), shape=shape, dtype=tensor.dtype,
        chunks=partial(tensor_chunks, tensor),
    )  # fmt: skip


class Harmful:
    def __reduce__(self) -> Any:
        return print, ("this must not run",)


def test_a_model_to_start_from_runs_no_code(megatron: Path, capsys: Any) -> None:
    (megatron / ".metadata").write_bytes(pickle.dumps(Harmful()))
    error_of(lambda: load_weights([], megatron, {}))
    assert capsys.readouterr().out == ""


def test_a_source_that_changes_meanwhile_is_named(hf: Path, megatron: Path, tmp_path: Path) -> None:
    def touch(file: Path) -> Callable[[int, int], None]:
        def on_progress(done: int, total: int) -> None:
            shutil.copyfile(file, tmp_path / "copy")
            (tmp_path / "copy").replace(file)

        return on_progress

    file = hf / "model.safetensors"
    line = error_of(lambda: hf_to_megatron(hf, tmp_path / "out", on_progress=touch(file)))
    assert line.startswith(f"{file}: changed while it was read")
    file = max(megatron.glob("*.distcp"))
    line = error_of(lambda: megatron_to_hf(megatron, tmp_path / "out", on_progress=touch(file)))
    assert line.startswith(f"{file}: changed while it was read")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("prefix", [".tmp-", ".replaced-"])
def test_what_a_killed_run_left_is_not_cleared_away_when_it_is_the_source(
    hf: Path, tmp_path: Path, prefix: str
) -> None:
    source = hf.rename(tmp_path / f"{prefix}out")
    before = tensors_of(source)
    assert "would be removed, which is to be converted" in error_of(lambda: hf_to_megatron(source, tmp_path / "out"))
    assert same_bits(tensors_of(source), before)


def test_a_file_that_goes_is_named_and_not_taken_for_a_full_disk(hf: Path, tmp_path: Path) -> None:
    def remove(done: int, total: int) -> None:
        (hf / "model.safetensors").unlink(missing_ok=True)

    line = error_of(lambda: hf_to_megatron(hf, tmp_path / "out", on_progress=remove))
    assert line == f"cannot read {hf / 'model.safetensors'}: no such file or directory"


def test_a_link_to_nothing_is_named(hf: Path, tmp_path: Path) -> None:
    (hf / "tokenizer.json").unlink()
    (hf / "tokenizer.json").symlink_to(tmp_path / "gone")
    assert "tokenizer.json: is a link to nothing" in error_of(lambda: hf_to_megatron(hf, tmp_path / "out"))


def test_both_names_of_the_dtype_are_changed(hf: Path, tmp_path: Path) -> None:
    config = json.loads((hf / "config.json").read_text())
    (hf / "config.json").write_text(json.dumps(config | {"dtype": "float32", "torch_dtype": "float32"}))
    hf_to_megatron(hf, tmp_path / "megatron", dtype=torch.bfloat16)
    found = json.loads((tmp_path / "megatron" / "hf" / "config.json").read_text())
    assert (found["dtype"], found["torch_dtype"]) == ("bfloat16", "bfloat16")


def test_a_dtype_that_safetensors_files_of_ours_lack_is_named(megatron: Path, tmp_path: Path) -> None:
    reader, wide = CheckpointReader(megatron), tmp_path / "wide"
    wide.mkdir()
    pieces = []
    for key, entry in reader.tensors.items():
        values = torch.empty(entry.size)
        reader.read(key, (0,) * values.dim(), values)
        pieces.append(whole_tensor(key, values.double()))
    write_pieces(wide, pieces)
    (megatron / "hf").rename(wide / "hf")
    assert "and 23 more are of type float64; give --dtype" in error_of(lambda: megatron_to_hf(wide, tmp_path / "out"))
    megatron_to_hf(wide, tmp_path / "out", dtype=torch.float32)


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"num_hidden_layers": "2"}, "num_hidden_layers is '2'; expected a whole number of at least 1"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0; expected a whole number of at least 1"),
        ({"hidden_size": 64.0}, "hidden_size is 64.0; expected a whole number"),
        ({"head_dim": "x"}, "head_dim is 'x'; expected"),
    ],
)
def test_a_size_that_is_none_is_one_line(hf: Path, tmp_path: Path, change: dict[str, Any], part: str) -> None:
    config = json.loads((hf / "config.json").read_text())
    (hf / "config.json").write_text(json.dumps(config | change))
    assert part in error_of(lambda: hf_to_megatron(hf, tmp_path / "out"))
