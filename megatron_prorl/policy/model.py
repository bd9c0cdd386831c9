"""A Megatron-Core model from a Hugging Face config: Qwen2, Qwen2.5 (and distillations into them), Qwen3 and Qwen3-MoE.

The model gives hidden states; the head is applied where log-probs are taken, a few tokens at a time (see `logprob.py`).
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn.functional import rms_norm, silu

from megatron_prorl.config.hf import moe_layers, padded_vocab_size
from megatron_prorl.config.schema import Config
from megatron_prorl.policy.attention import PackedAttention
from megatron_prorl.policy.device import Device, layer_implementation

_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
if not hasattr(moe_utils, "te_general_gemm"):
    moe_utils.te_general_gemm = None  # Megatron-Core 0.16.1 asks whether it is None, but has it only with the engine
_FP8_TOKEN_MULTIPLE = 16  # tokens are the inner dimension of the weight gradient, which FP8 products want in sixteens


def token_multiple(cfg: Config) -> int:
    """What the number of tokens in a packed microbatch must be a multiple of."""
    per_rank = _FP8_TOKEN_MULTIPLE if cfg.model.fp8 != "none" else 1
    return per_rank * (cfg.parallel.tensor if cfg.parallel.sequence else 1)


def transformer_config(hf: dict[str, Any], cfg: Config, device_kind: str) -> TransformerConfig:
    """Megatron's config for the model `hf` describes (as `read_hf_config` gives it) under the layout of `cfg`."""
    dtype = _DTYPES[cfg.model.dtype]
    layers = layer_implementation(cfg, device_kind)
    fused = layers == "transformer_engine"
    is_qwen3 = hf["architectures"][0].startswith("Qwen3")
    parallel = cfg.parallel
    return TransformerConfig(
        num_layers=hf["num_hidden_layers"],
        hidden_size=hf["hidden_size"],
        ffn_hidden_size=hf["intermediate_size"],
        num_attention_heads=hf["num_attention_heads"],
        num_query_groups=hf["num_key_value_heads"],
        kv_channels=hf["head_dim"],
        normalization="RMSNorm",
        layernorm_epsilon=hf["rms_norm_eps"],
        gated_linear_unit=True,
        activation_func=silu,
        add_bias_linear=False,
        add_qkv_bias=not is_qwen3,
        qk_layernorm=is_qwen3,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        use_cpu_initialization=device_kind == "cpu",
        perform_initialization=False,  # the weights come from the model folder
        # Layout
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        context_parallel_size=parallel.context,
        sequence_parallel=parallel.sequence,
        pipeline_dtype=dtype,
        variable_seq_lengths=True,  # packed microbatches differ in length
        deallocate_pipeline_outputs=parallel.pipeline > 1,
        calculate_per_token_loss=True,  # gradients are summed over ranks: the loss is divided by the tokens of all
        # Precision and kernels
        fp8=None if cfg.model.fp8 == "none" else cfg.model.fp8,
        fp8_recipe="tensorwise",  # scales from the tensor at hand: no history, so the reference computes alike
        transformer_impl=layers,
        persist_layer_norm=fused,
        bias_activation_fusion=fused,
        bias_dropout_fusion=fused,
        apply_rope_fusion=fused,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,  # needs Apex
        # Memory: attention keeps no score matrices, so the widest activations are the MLP's
        recompute_granularity=None if cfg.model.recompute == "none" else cfg.model.recompute,
        recompute_modules=["mlp", "moe"] if cfg.model.recompute == "selective" else None,
        recompute_method="uniform" if cfg.model.recompute == "full" else None,
        recompute_num_layers=1 if cfg.model.recompute == "full" else None,
        # Of no use without CUDA graphs, or to a dense model, but their defaults clash with the above or warn
        cuda_graph_scope=[],
        moe_token_dispatcher_type="alltoall",
        **_moe_settings(hf, cfg, grouped=fused),
    )


def _moe_settings(hf: dict[str, Any], cfg: Config, *, grouped: bool) -> dict[str, Any]:
    """What TransformerConfig has of a mixture of experts; empty for a dense model.

    Router logits have the model's dtype and the softmax is float32, as in transformers and vLLM. There is no
    load-balancing loss.
    """
    layers = moe_layers(hf)
    if not any(layers):
        return {}
    return {
        "num_moe_experts": hf["num_experts"],
        "moe_ffn_hidden_size": hf["moe_intermediate_size"],
        # A list means a checkpoint with a tensor for each layer, a number one with layers stacked.
        "moe_layer_freq": 1 if all(layers) else [int(is_moe) for is_moe in layers],
        "moe_router_topk": hf["num_experts_per_tok"],
        "moe_router_pre_softmax": not hf.get("norm_topk_prob", False),  # softmax over all experts, or the chosen ones
        "moe_router_load_balancing_type": "none",
        "moe_grouped_gemm": grouped,
        "expert_model_parallel_size": cfg.parallel.expert,
    }


class RMSNorm(torch.nn.Module):
    """Root mean square norm (arXiv:1910.07467, eq. 4) for the local layers; Megatron's refuses sequence parallelism."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        # Each rank sees its own part of the sequence: Megatron sums this weight's gradient over the group.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight.shape, self.weight, self.eps)


class PolicyModel(GPTModel):
    """Megatron's GPTModel without logits.

    `forward(input_ids, position_ids, attention_mask=None, packed_seq_params=...)` takes `[1, T]` ids and positions and
    gives `[T, 1, H]`: on the last pipeline stage hidden states after the final norm, on the others what the next stage
    takes. With sequence parallelism it is this rank's `[T / tensor, 1, H]`.
    """

    def _postprocess(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return hidden_states

    def head_weight(self) -> Tensor:
        """This rank's rows of the output weight, `[padded V / tensor, H]`; on the last pipeline stage."""
        if self.share_embeddings_and_output_weights:
            return self.shared_embedding_or_output_weight()
        return self.output_layer.weight


def _layer_specs(config: TransformerConfig) -> TransformerBlockSubmodules:
    """The layers of this pipeline stage, each dense or a mixture of experts."""
    if config.transformer_impl == "transformer_engine":
        return get_gpt_decoder_block_spec(config, use_transformer_engine=True)
    block = get_gpt_decoder_block_spec(config, use_transformer_engine=False, normalization="RMSNorm")
    block.layer_norm = RMSNorm
    for layer in block.layer_specs:
        layer.submodules.input_layernorm = RMSNorm
        layer.submodules.pre_mlp_layernorm = RMSNorm
        attention = layer.submodules.self_attention.submodules
        attention.core_attention = PackedAttention
        if config.qk_layernorm:
            attention.q_layernorm = RMSNorm
            attention.k_layernorm = RMSNorm
        if layer.submodules.mlp.module is MoELayer:
            # In checkpoints the norm keeps its name, as in Transformer Engine's layers: no linear layer holds it.
            layer.submodules.sharded_state_dict_keys_map.pop("pre_mlp_layernorm.", None)
    return block


def _mark_tensor_parallel(model: torch.nn.Module) -> None:
    """Say of each split weight that it is split: Megatron does so in initialising, which a loaded model leaves out.

    The gradient's norm counts a weight without the mark on the first tensor-parallel rank only.
    """
    for module in model.modules():
        if not isinstance(module, VocabParallelEmbedding | ColumnParallelLinear | RowParallelLinear):
            continue
        if module.weight is not None and not hasattr(module.weight, "tensor_model_parallel"):
            dim = 1 if isinstance(module, RowParallelLinear) else 0
            set_tensor_model_parallel_attributes(module.weight, is_parallel=True, dim=dim, stride=1)


def build_model(hf: dict[str, Any], cfg: Config, device: Device, *, trainable: bool) -> list[torch.nn.Module]:
    """The model chunks of this pipeline rank (one), to be filled with `load_hf_weights`; `init_device` comes first.

    Trainable chunks are wrapped in Megatron's DistributedDataParallel with float32 gradients; others are frozen.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Using a large number of experts")  # and no float32 logits: see _moe_settings
        config = transformer_config(hf, cfg, device.kind)
    model = PolicyModel(
        config,
        _layer_specs(config),
        vocab_size=padded_vocab_size(hf["vocab_size"], cfg.parallel.tensor),
        max_sequence_length=hf["max_position_embeddings"],
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        share_embeddings_and_output_weights=hf["tie_word_embeddings"],
        position_embedding_type="rope",
        rotary_base=hf["rope_theta"],
    ).to(device.torch_device)
    _mark_tensor_parallel(model)
    if not trainable:
        return [model.requires_grad_(False).eval()]
    settings = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=cfg.optimizer.distributed,
        overlap_grad_reduce=False,  # reduced once a minibatch, after many microbatches: hiding it would gain little
    )
    return [DistributedDataParallel(config, settings, model)]
