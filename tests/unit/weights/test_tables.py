"""The name tables and layouts, against transformers' own modules and hand-made layouts; no process group."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from tiny_model import make_tiny_qwen
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from megatron_prorl.config.hf import read_hf_config
from megatron_prorl.weights.load import local_rows
from megatron_prorl.weights.tables import GateUp, GroupedQkv, ModelSizes, VocabularyRows, hf_shapes, row_groups

HF = {
    "architectures": ["Qwen2ForCausalLM"], "vocab_size": 112, "hidden_size": 8, "intermediate_size": 24, "head_dim": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 3, "tie_word_embeddings": False,
}  # fmt: skip


@pytest.fixture(scope="module", params=["qwen2", "qwen2 tied", "qwen3", "qwen3 tied"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    family, *tied = request.param.split()
    return make_tiny_qwen(tmp_path_factory.mktemp("model"), family, tie_word_embeddings=bool(tied))


def test_the_names_and_shapes_are_those_of_transformers(folder: Path):
    model = AutoModelForCausalLM.from_pretrained(folder)
    expected = {name: tuple(p.shape) for name, p in model.named_parameters()}  # a tied head is named once
    assert hf_shapes(read_hf_config(folder)) == expected


@pytest.mark.parametrize("dense", [{}, {"mlp_only_layers": [1, 2]}, {"decoder_sparse_step": 2}])
def test_the_names_and_shapes_of_experts_are_those_that_transformers_writes(tmp_path: Path, dense: dict[str, Any]):
    folder = make_tiny_qwen(tmp_path, "qwen3_moe", **dense)  # in memory transformers stacks them
    expected = {name: tuple(tensor.shape) for name, tensor in load_file(folder / "model.safetensors").items()}
    assert hf_shapes(read_hf_config(folder)) == expected


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_full_tensors_come_back_bit_for_bit_from_any_number_of_ranks(data: st.DataObject):
    num_ranks = data.draw(st.sampled_from([1, 2, 3, 4, 8]), "ranks")
    groups = data.draw(st.integers(1, 4), "groups")
    heads = groups * data.draw(st.integers(1, 4), "heads a group")
    head_dim = num_ranks * data.draw(st.integers(1, 3), "head_dim / ranks")
    hf = HF | {
        "architectures": [data.draw(st.sampled_from(["Qwen2ForCausalLM", "Qwen3ForCausalLM", "Qwen3MoeForCausalLM"]))],
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "head_dim": head_dim,
        "hidden_size": data.draw(st.integers(1, 9), "hidden"),
        "intermediate_size": num_ranks * data.draw(st.integers(1, 5), "intermediate / ranks"),
        "vocab_size": data.draw(st.integers(1, 700), "vocabulary"),
        "num_experts": data.draw(st.integers(1, 3), "experts"),
        "moe_intermediate_size": num_ranks * data.draw(st.integers(1, 5), "intermediate of an expert / ranks"),
        "mlp_only_layers": [0],
        "num_hidden_layers": 2,
        "tie_word_embeddings": data.draw(st.booleans()),
    }
    dtype = data.draw(st.sampled_from([torch.bfloat16, torch.float32]))
    sizes = ModelSizes.of(hf)
    for row in (row for group in row_groups(hf) for row in group):
        full = [torch.randn(shape).to(dtype) for shape in row.shapes(sizes).values()]
        shards = [row.layout.shard(full, sizes, rank, num_ranks) for rank in range(num_ranks)]
        assert {shard.shape for shard in shards} == {row.shard_shape(sizes, num_ranks)}
        back = row.layout.full(shards, sizes)
        assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(back, full, strict=True))
        assert all(tensor.is_contiguous() for tensor in back)


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_a_rank_projects_its_own_heads_as_transformers_does(folder: Path, num_ranks: int):
    model = AutoModelForCausalLM.from_pretrained(folder)
    attention, config = model.model.layers[1].self_attn, model.config
    sizes = ModelSizes.of(read_hf_config(folder))
    x = torch.randn(5, config.hidden_size)
    projections = [attention.q_proj, attention.k_proj, attention.v_proj]
    for rank in range(num_ranks):
        out = x @ GroupedQkv().shard([p.weight for p in projections], sizes, rank, num_ranks).T
        if attention.q_proj.bias is not None:
            out += GroupedQkv().shard([p.bias for p in projections], sizes, rank, num_ranks)
        # As Megatron's SelfAttention cuts it: [T, groups here, (heads a group + 2) * head_dim].
        heads, groups = config.num_attention_heads // num_ranks, config.num_key_value_heads // num_ranks
        head_dim = sizes.head_dim
        parts = out.view(5, groups, -1).split([heads // groups * head_dim, head_dim, head_dim], dim=2)
        for part, projection, count in zip(parts, projections, (heads, groups, groups), strict=True):
            expected = projection(x).view(5, -1, head_dim)[:, rank * count : (rank + 1) * count]
            torch.testing.assert_close(part.reshape(5, count, head_dim), expected, rtol=1e-5, atol=1e-5)


def test_query_heads_are_followed_by_the_keys_and_values_of_their_group():
    # Two groups of two heads, one number a row: q rows 0-3, k rows 10-11, v rows 20-21.
    sizes = ModelSizes.of(HF | {"head_dim": 1})
    full = [torch.arange(4), torch.arange(10, 12), torch.arange(20, 22)]
    assert GroupedQkv().shard(full, sizes, 0, 1).tolist() == [0, 1, 10, 20, 2, 3, 11, 21]
    assert GroupedQkv().shard(full, sizes, 1, 2).tolist() == [2, 3, 11, 21]
    assert GroupedQkv().shard(full, sizes, 1, 4).tolist() == [10, 20]  # more ranks than groups: part of a group


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_the_parts_of_a_gated_mlp_sum_to_that_of_transformers(folder: Path, num_ranks: int):
    model = AutoModelForCausalLM.from_pretrained(folder)
    mlp = model.model.layers[2].mlp
    hf = read_hf_config(folder)
    sizes = ModelSizes.of(hf)
    (down,) = [row for group in row_groups(hf) for row in group if "model.layers.2.mlp.down_proj.weight" in row.hf]
    x = torch.randn(5, hf["hidden_size"])
    total = torch.zeros(5, hf["hidden_size"])
    for rank in range(num_ranks):
        gate, up = (x @ GateUp("I").shard([mlp.gate_proj.weight, mlp.up_proj.weight], sizes, rank, num_ranks).T).chunk(
            2, -1
        )
        total += (nn.functional.silu(gate) * up) @ down.layout.shard([mlp.down_proj.weight], sizes, rank, num_ranks).T
    torch.testing.assert_close(total, mlp(x), rtol=1e-5, atol=1e-4)  # another order of sums of 128 numbers of size 10


def test_padded_vocabulary_rows_are_zero_and_do_not_come_back():
    sizes = ModelSizes.of(HF)  # 112 rows padded to 128
    embedding = torch.ones(112, 8)
    shards = [VocabularyRows().shard([embedding], sizes, rank, 4) for rank in range(4)]
    assert [int(shard.sum()) // 8 for shard in shards] == [32, 32, 32, 16]
    assert all(shard.shape == (32, 8) for shard in shards)
    assert VocabularyRows().full(shards, sizes)[0].shape == (112, 8)


class Model(nn.Module):
    """Parameters under given names, as `local_rows` sees a pipeline stage."""

    def __init__(self, names: list[str], first_layer: int, num_layers: int) -> None:
        super().__init__()
        self.decoder = nn.Module()
        self.decoder.layers = nn.ModuleList(nn.Module() for _ in range(num_layers))
        for i, layer in enumerate(self.decoder.layers):
            layer.layer_number = first_layer + i + 1  # Megatron counts from 1, over the whole model
        for name in names:
            *path, last = name.split(".")
            module: Any = self
            for part in path:
                if not hasattr(module, part):
                    module.add_module(part, nn.Module())
                module = getattr(module, part)
            module.register_parameter(last, nn.Parameter(torch.zeros(1)))


LAYER = [
    "self_attention.linear_qkv.weight", "self_attention.linear_qkv.bias", "self_attention.linear_proj.weight",
    "mlp.linear_fc1.weight", "mlp.linear_fc2.weight",
]  # fmt: skip
ATTENTION = [*LAYER[:1], LAYER[2], "self_attention.q_layernorm.weight", "self_attention.k_layernorm.weight"]
LOCAL_NORMS = ["input_layernorm.weight", "pre_mlp_layernorm.weight"]
FUSED_NORMS = ["self_attention.linear_qkv.layer_norm_weight", "mlp.linear_fc1.layer_norm_weight"]


MOE = HF | {
    "architectures": ["Qwen3MoeForCausalLM"], "num_experts": 4, "moe_intermediate_size": 6, "num_hidden_layers": 1,
}  # fmt: skip


def stage(layer_names: list[str], *others: str, first_layer: int = 0, num_layers: int = 3) -> list[nn.Module]:
    names = [f"decoder.layers.{i}.{name}" for i in range(num_layers) for name in layer_names]
    return [Model([*names, *others], first_layer, num_layers)]


def names_of(groups: list[list[tuple[Any, Tensor]]]) -> list[list[str]]:
    return [[name for row, _ in group for name in row.hf] for group in groups]


def test_local_and_transformer_engine_layers_hold_the_same_tensors():
    local, fused = (names_of(local_rows(stage(LAYER + norms), HF)) for norms in (LOCAL_NORMS, FUSED_NORMS))
    assert local == fused
    assert "model.layers.2.post_attention_layernorm.weight" in fused[3]
    assert len(fused[3]) == 12


def test_a_later_pipeline_stage_numbers_its_layers_over_the_whole_model():
    chunks = stage(
        LAYER + LOCAL_NORMS, "decoder.final_layernorm.weight", "output_layer.weight", first_layer=1, num_layers=2
    )
    groups = names_of(local_rows(chunks, HF))
    assert groups[0] == groups[1] == []
    assert groups[2][0] == "model.layers.1.input_layernorm.weight"
    assert groups[4] == ["model.norm.weight", "lm_head.weight"]


@pytest.mark.parametrize("linear", ["local_experts.{}.linear_fc{}.weight", "linear_fc{1}.weight{0}"])
def test_experts_are_numbered_over_the_whole_model_in_modules_and_in_grouped_layers(linear: str):
    experts = [f"mlp.experts.{linear.format(expert, part)}" for expert in (0, 1) for part in (1, 2)]
    chunks = stage([*ATTENTION, *LOCAL_NORMS, "mlp.router.weight", *experts], num_layers=1)
    chunks[0].decoder.layers[0].mlp.local_expert_indices = [2, 3]  # as Megatron tells the second of two ranks
    _, layer, *groups, _ = names_of(local_rows(chunks, MOE))
    assert layer[-1] == "model.layers.0.mlp.gate.weight"
    assert groups[:2] == [[], []]
    assert [group[0] for group in groups[2:]] == [
        "model.layers.0.mlp.experts.2.gate_proj.weight",
        "model.layers.0.mlp.experts.3.gate_proj.weight",
    ]
    assert all(len(group) == 3 for group in groups[2:])


def test_the_last_stage_loads_tied_embeddings_as_its_head_and_does_not_own_them():
    hf = HF | {"tie_word_embeddings": True}
    last = [Model(["decoder.final_layernorm.weight", "output_layer.weight"], 0, 0)]
    (norm, _), (head, _) = local_rows(last, hf)[-1]
    assert (list(norm.hf), norm.copied) == (["model.norm.weight"], False)
    assert (list(head.hf), head.copied) == (["model.embed_tokens.weight"], True)


def test_a_parameter_without_a_hugging_face_name_is_named():
    with pytest.raises(
        RuntimeError, match=r"no Hugging Face name is known for decoder\.layers\.0\.mlp\.router\.weight"
    ):
        local_rows(stage([*LAYER, *LOCAL_NORMS, "mlp.router.weight"], num_layers=1), HF)


def test_a_layer_without_one_of_its_parameters_is_named():
    qwen3 = HF | {"architectures": ["Qwen3ForCausalLM"]}
    with pytest.raises(RuntimeError, match=r"no decoder\.layers\.0\.self_attention\.q_layernorm\.weight"):
        local_rows(stage([name for name in LAYER if "bias" not in name] + LOCAL_NORMS), qwen3)


def test_one_weight_under_two_names_is_named():
    with pytest.raises(RuntimeError, match=r"input_layernorm\.weight and .*layer_norm_weight are both"):
        local_rows(stage(LAYER + LOCAL_NORMS + FUSED_NORMS), HF)
