"""The Megatron model computes what transformers computes, and refuses what it would compute differently."""

from __future__ import annotations

import json

import pytest
import torch
from policy_setup import packed_inputs, random_sequences, tiny_config
from tiny_model import make_tiny_qwen
from transformers import AutoConfig, AutoModelForCausalLM

from megatron_prorl.config.hf import padded_vocab_size, read_hf_config
from megatron_prorl.errors import UserError
from megatron_prorl.policy.device import init_device, shutdown_device
from megatron_prorl.policy.model import build_model, token_multiple
from megatron_prorl.weights.load import load_hf_weights

LENGTHS = [5, 17, 40, 1, 38]
MODELS = {
    "qwen2": ("qwen2", {}),
    "qwen2 with tied embeddings": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3 with heads wider than hidden / heads": ("qwen3", {"head_dim": 24, "rope_theta": 1e6}),
    "qwen3 mixture of experts": ("qwen3_moe", {}),
    "qwen3 mixture of experts in every second layer": ("qwen3_moe", {"decoder_sparse_step": 2}),
}


@pytest.fixture(params=MODELS.values(), ids=MODELS.keys())
def folder(request, tmp_path):
    family, overrides = request.param
    return make_tiny_qwen(tmp_path, family, **overrides)


@pytest.fixture
def qwen2(tmp_path):
    return make_tiny_qwen(tmp_path)


@pytest.fixture
def build():
    """Build and load a model in this process; the process group is left again after the test."""
    started = []

    def build_loaded(cfg, *, trainable=False):
        if not started:
            started.append(init_device(cfg))
        hf = read_hf_config(cfg.model.path)
        chunks = build_model(hf, cfg, started[0], trainable=trainable)
        load_hf_weights(chunks, cfg.model.path, hf)
        return chunks[0]

    yield build_loaded
    if started:
        shutdown_device()


def logits_TV(model, sequences, vocab_size=112):
    hidden_TH = model(**packed_inputs(sequences)).squeeze(1)
    return hidden_TH @ model.head_weight()[:vocab_size].T


@torch.no_grad()
def transformers_logits_TV(folder, sequences, dtype=torch.float32):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    return torch.cat([model(torch.tensor([sequence])).logits[0] for sequence in sequences])


def test_logits_of_a_packed_batch_are_those_of_transformers_for_each_sequence_alone(folder, build):
    sequences = random_sequences(LENGTHS)
    actual = logits_TV(build(tiny_config(folder)), sequences)
    expected = transformers_logits_TV(folder, sequences)
    assert expected.abs().max() > 1  # the bound below means something
    assert (actual - expected).abs().max() <= 1e-4


def test_a_sequence_has_the_same_logits_in_any_company(qwen2, build):
    sequences = random_sequences(LENGTHS)
    model = build(tiny_config(qwen2))
    packed = logits_TV(model, sequences)
    alone = torch.cat([logits_TV(model, [sequence]) for sequence in sequences])
    assert (packed - alone).abs().max() <= 1e-5


def test_bf16_logits_are_as_close_to_fp32_as_those_of_transformers(folder, build):
    sequences = random_sequences(LENGTHS)
    exact = transformers_logits_TV(folder, sequences)
    theirs = transformers_logits_TV(folder, sequences, torch.bfloat16)
    mine = logits_TV(build(tiny_config(folder, dtype="bf16")), sequences)
    assert mine.dtype == torch.bfloat16
    # Both round after every operation, not always in the same order: their mean errors are alike.
    assert (mine - exact).abs().mean() <= 1.25 * (theirs - exact).abs().mean()


def test_the_transformers_4_spelling_of_rope_theta_gives_the_same_model(qwen2):
    new = read_hf_config(qwen2)
    document = json.loads((qwen2 / "config.json").read_text())
    document["rope_theta"] = document.pop("rope_parameters")["rope_theta"]
    (qwen2 / "config.json").write_text(json.dumps(document | {"rope_scaling": None}))
    assert read_hf_config(qwen2)["rope_theta"] == new["rope_theta"] == 10000.0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"architectures": ["LlamaForCausalLM"]}, "architecture LlamaForCausalLM"),
        ({"architectures": ["Qwen3MoeForCausalLM"]}, "moe_intermediate_size, num_experts, num_experts_per_tok missing"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}}, "rope scaling yarn"),
        ({"rope_parameters": None, "rope_theta": 1e4, "rope_scaling": {"type": "yarn"}}, "rope scaling yarn"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding-window attention"),
        ({"hidden_act": "gelu"}, "hidden_act gelu"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
        ({"rope_parameters": None}, "rope_theta missing"),
        ({"rms_norm_eps": None}, "rms_norm_eps missing"),
    ],
)
def test_what_would_be_computed_differently_is_refused_by_name_in_one_line(qwen2, change, words):
    document = json.loads((qwen2 / "config.json").read_text())
    (qwen2 / "config.json").write_text(json.dumps(document | change))
    with pytest.raises(UserError, match=words) as error:
        read_hf_config(qwen2)
    assert "\n" not in str(error.value)


def test_sliding_window_is_refused_only_where_a_layer_uses_it(qwen2):
    document = json.loads((qwen2 / "config.json").read_text())
    del document["layer_types"]
    unused = document | {"sliding_window": 4096, "use_sliding_window": False}
    (qwen2 / "config.json").write_text(json.dumps(unused))
    read_hf_config(qwen2)
    (qwen2 / "config.json").write_text(json.dumps(unused | {"use_sliding_window": True, "max_window_layers": 2}))
    with pytest.raises(UserError, match="sliding-window"):
        read_hf_config(qwen2)


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(UserError, match="config.json does not exist"):
        read_hf_config(tmp_path / "nowhere")


def test_the_padded_vocabulary_does_not_depend_on_the_tensor_parallel_size():
    assert {padded_vocab_size(151936, tensor) for tensor in (1, 2, 4, 8)} == {151936}
    assert {padded_vocab_size(112, tensor) for tensor in (1, 2, 4, 8)} == {128}
    assert padded_vocab_size(1000, 3) == 1152  # lcm(128, 3) = 384


def test_token_multiple_serves_fp8_and_sequence_parallelism(qwen2):
    def multiple(fp8, tensor, sequence):
        return token_multiple(
            tiny_config(
                qwen2,
                dtype="bf16",
                device="auto",
                num_ranks=tensor,
                model={"fp8": fp8},
                parallel={"tensor": tensor, "sequence": sequence},
            )
        )

    assert [multiple("none", 1, False), multiple("none", 2, False), multiple("none", 2, True)] == [1, 1, 2]
    assert [multiple("hybrid", 1, False), multiple("hybrid", 2, True)] == [16, 32]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_only_the_trainable_model_has_gradients_and_they_are_float32(qwen2, build, dtype):
    frozen = build(tiny_config(qwen2, dtype=dtype))
    assert not frozen.training and not any(parameter.requires_grad for parameter in frozen.parameters())
    trainable = build(tiny_config(qwen2, dtype=dtype), trainable=True)
    trainable(**packed_inputs(random_sequences(LENGTHS))).float().square().sum().backward()
    for name, parameter in trainable.named_parameters():
        assert parameter.main_grad.dtype == torch.float32
        if "output_layer" not in name:  # the head is not part of this forward pass
            assert parameter.main_grad.norm() > 0, name


@pytest.mark.parametrize("recompute", ["selective", "full"])
@pytest.mark.parametrize("family", ["qwen2", "qwen3_moe"])
def test_recomputation_changes_no_gradient(tmp_path, build, recompute, family):
    folder = make_tiny_qwen(tmp_path, family)
    gradients = []
    for setting in ("none", recompute):
        model = build(tiny_config(folder, model={"recompute": setting}), trainable=True)
        model(**packed_inputs(random_sequences(LENGTHS))).square().sum().backward()
        gradients.append([parameter.main_grad.clone() for parameter in model.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        assert torch.equal(plain, recomputed)


def test_the_head_of_a_tied_model_is_its_embedding(tmp_path, build):
    model = build(tiny_config(make_tiny_qwen(tmp_path, tie_word_embeddings=True)))
    assert model.head_weight() is model.embedding.word_embeddings.weight


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_a_config_without_head_dim_means_what_it_means_to_transformers(tmp_path, family):
    folder = make_tiny_qwen(tmp_path, family, **({"head_dim": 16} if family == "qwen3" else {}))
    config = json.loads((folder / "config.json").read_text())
    config.pop("head_dim", None)
    (folder / "config.json").write_text(json.dumps(config))
    theirs = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    assert read_hf_config(folder)["head_dim"] == theirs.model.layers[0].self_attn.head_dim


def test_the_number_of_experts_is_read_as_transformers_4_and_5_write_it(tmp_path):
    folder = make_tiny_qwen(tmp_path, "qwen3_moe")
    document = json.loads((folder / "config.json").read_text())
    experts = document.pop("num_local_experts")
    assert read_hf_config(folder)["num_experts"] == experts == 4
    (folder / "config.json").write_text(json.dumps(document | {"num_experts": experts}))
    assert read_hf_config(folder)["num_experts"] == 4


def test_one_expert_a_token_of_weight_1_is_refused(tmp_path):
    folder = make_tiny_qwen(tmp_path, "qwen3_moe", num_experts_per_tok=1)
    with pytest.raises(UserError, match="norm_topk_prob with num_experts_per_tok 1 is not supported"):
        read_hf_config(folder)
