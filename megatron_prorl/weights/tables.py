"""Which Megatron parameter holds which Hugging Face tensors, and how a tensor-parallel rank's shard is cut from them.

One table per family, read both ways: `Layout.shard` cuts a rank's shard out of full tensors, `Layout.full` puts the
shards of all ranks together again, bit for bit. No collectives and no models here, only names and tensors.

Axes: V vocabulary, H hidden, I intermediate, D one head, Q = heads * D, K = key-value heads * D; E experts, M an
expert's intermediate.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from megatron_prorl.config.hf import moe_layers, padded_vocab_size


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSizes:
    """The sizes of a model that names and layouts depend on."""

    num_layers: int
    num_groups: int  # key-value heads
    head_dim: int  # D
    axes: dict[str, int]  # length of V, H, I, D, Q and K; of E and M where there are experts

    @classmethod
    def of(cls, hf: dict[str, Any]) -> ModelSizes:
        """From the config that `config.hf.read_hf_config` gives."""
        head_dim, num_groups = hf["head_dim"], hf["num_key_value_heads"]
        experts = {"E": hf["num_experts"], "M": hf["moe_intermediate_size"]} if any(moe_layers(hf)) else {}
        return cls(
            num_layers=hf["num_hidden_layers"],
            num_groups=num_groups,
            head_dim=head_dim,
            axes={
                "V": hf["vocab_size"],
                "H": hf["hidden_size"],
                "I": hf["intermediate_size"],
                "D": head_dim,
                "Q": hf["num_attention_heads"] * head_dim,
                "K": num_groups * head_dim,
                **experts,
            },
        )


class Sliceable(Protocol):
    """A full tensor that is read in slices: a Tensor, or a tensor in a safetensors file."""

    def __getitem__(self, index: Any, /) -> Tensor: ...


class Layout(Protocol):
    """How one Megatron parameter is made of Hugging Face tensors."""

    def shard(self, full: Sequence[Sliceable], sizes: ModelSizes, rank: int, num_ranks: int) -> Tensor:
        """The parameter of tensor-parallel `rank`."""
        ...

    def full(self, shards: Sequence[Tensor], sizes: ModelSizes) -> list[Tensor]:
        """The full tensors, from the shards of all tensor-parallel ranks in order; contiguous, views where possible."""
        ...


class Replicated:
    """The same tensor on every rank (norms)."""

    def shard(self, full: Sequence[Sliceable], sizes: ModelSizes, rank: int, num_ranks: int) -> Tensor:
        return full[0][:]

    def full(self, shards: Sequence[Tensor], sizes: ModelSizes) -> list[Tensor]:
        return [shards[0]]


@dataclass(frozen=True, slots=True)
class Columns:
    """Row-parallel linear layers: the input features, which are the axis of this name, in equal parts."""

    axis: str

    def shard(self, full: Sequence[Sliceable], sizes: ModelSizes, rank: int, num_ranks: int) -> Tensor:
        num_columns = sizes.axes[self.axis] // num_ranks
        return full[0][:, rank * num_columns : (rank + 1) * num_columns]

    def full(self, shards: Sequence[Tensor], sizes: ModelSizes) -> list[Tensor]:
        return [_cat(shards, dim=1)]


class VocabularyRows:
    """Embedding and head: the padded vocabulary in equal parts; padded rows are zero and do not come back."""

    def shard(self, full: Sequence[Sliceable], sizes: ModelSizes, rank: int, num_ranks: int) -> Tensor:
        num_rows = padded_vocab_size(sizes.axes["V"], num_ranks) // num_ranks
        start, end = (min(i * num_rows, sizes.axes["V"]) for i in (rank, rank + 1))
        rows = full[0][start:end]
        return torch.cat([rows, rows.new_zeros(num_rows - (end - start), *rows.shape[1:])])

    def full(self, shards: Sequence[Tensor], sizes: ModelSizes) -> list[Tensor]:
        return [_cat(shards, dim=0)[: sizes.axes["V"]]]


@dataclass(frozen=True, slots=True)
class GateUp:
    """Megatron's linear_fc1: every rank holds [its rows of gate; its rows of up], rows of the axis of this name."""

    axis: str

    def shard(self, full: Sequence[Sliceable], sizes: ModelSizes, rank: int, num_ranks: int) -> Tensor:
        num_rows = sizes.axes[self.axis] // num_ranks
        return torch.cat([tensor[rank * num_rows : (rank + 1) * num_rows] for tensor in full])

    def full(self, shards: Sequence[Tensor], sizes: ModelSizes) -> list[Tensor]:
        halves = [shard.chunk(2) for shard in shards]
        return [_cat([gate for gate, _ in halves], dim=0), _cat([up for _, up in halves], dim=0)]


class GroupedQkv:
    """Megatron's linear_qkv, weight or bias: for each key-value head a group of rows [its query heads; k; v].

    The rows of all groups are split evenly over the ranks, so with more ranks than groups a rank holds part of a group.
    """

    def shard(self, full: Sequence[Sliceable], sizes: ModelSizes, rank: int, num_ranks: int) -> Tensor:
        heights = self._heights(sizes)
        group_rows = sum(heights)
        num_rows = sizes.num_groups * group_rows // num_ranks
        start, end = rank * num_rows, (rank + 1) * num_rows
        first, last = start // group_rows, math.ceil(end / group_rows)  # the groups that hold these rows
        parts = [
            tensor[first * height : last * height].unflatten(0, (last - first, height))
            for tensor, height in zip(full, heights, strict=True)
        ]
        return torch.cat(parts, dim=1).flatten(0, 1)[start - first * group_rows : end - first * group_rows]

    def full(self, shards: Sequence[Tensor], sizes: ModelSizes) -> list[Tensor]:
        groups = _cat(shards, dim=0).unflatten(0, (sizes.num_groups, -1))
        return [part.flatten(0, 1).contiguous() for part in groups.split(self._heights(sizes), dim=1)]

    @staticmethod
    def _heights(sizes: ModelSizes) -> list[int]:
        """Rows of one group in q, k and v."""
        return [sizes.axes["Q"] // sizes.num_groups, sizes.head_dim, sizes.head_dim]


def _cat(shards: Sequence[Tensor], dim: int) -> Tensor:
    return shards[0] if len(shards) == 1 else torch.cat(list(shards), dim=dim)


@dataclass(frozen=True, slots=True)
class Row:
    """One line of a table. `*` stands for the layer's number, counted over the whole model."""

    layout: Layout
    megatron: tuple[str, ...]  # its name in the local layer spec, and in Transformer Engine's where that differs
    hf: dict[str, str]  # tensor name -> its axes, e.g. "Q H"
    copied: bool = False  # these HF tensors are loaded here too, but belong to another row

    def at(self, layer: int) -> Row:
        number = str(layer)
        return Row(
            self.layout,
            tuple(name.replace("*", number) for name in self.megatron),
            {name.replace("*", number): axes for name, axes in self.hf.items()},
            self.copied,
        )

    def shapes(self, sizes: ModelSizes) -> dict[str, tuple[int, ...]]:
        """Full shape of every HF tensor of this row."""
        return {name: tuple(sizes.axes[axis] for axis in axes.split()) for name, axes in self.hf.items()}

    def shard_shape(self, sizes: ModelSizes, num_ranks: int) -> torch.Size:
        """Shape of the Megatron parameter, the same on every tensor-parallel rank."""
        full = [torch.empty(shape, device="meta") for shape in self.shapes(sizes).values()]
        return self.layout.shard(full, sizes, 0, num_ranks).shape


EMBEDDING = Row(VocabularyRows(), ("embedding.word_embeddings.weight",), {"model.embed_tokens.weight": "V H"})
FINAL_NORM = Row(Replicated(), ("decoder.final_layernorm.weight",), {"model.norm.weight": "H"})
HEAD = Row(VocabularyRows(), ("output_layer.weight",), {"lm_head.weight": "V H"})
# With tied embeddings Megatron has an output layer of its own only where the last pipeline stage is not the first.
TIED_HEAD = Row(VocabularyRows(), ("output_layer.weight",), {"model.embed_tokens.weight": "V H"}, copied=True)

_ATTENTION_NORM = Row(
    Replicated(),
    ("decoder.layers.*.input_layernorm.weight", "decoder.layers.*.self_attention.linear_qkv.layer_norm_weight"),
    {"model.layers.*.input_layernorm.weight": "H"},
)
_QKV_WEIGHT = Row(
    GroupedQkv(),
    ("decoder.layers.*.self_attention.linear_qkv.weight",),
    {
        "model.layers.*.self_attn.q_proj.weight": "Q H",
        "model.layers.*.self_attn.k_proj.weight": "K H",
        "model.layers.*.self_attn.v_proj.weight": "K H",
    },
)
_QKV_BIAS = Row(
    GroupedQkv(),
    ("decoder.layers.*.self_attention.linear_qkv.bias",),
    {
        "model.layers.*.self_attn.q_proj.bias": "Q",
        "model.layers.*.self_attn.k_proj.bias": "K",
        "model.layers.*.self_attn.v_proj.bias": "K",
    },
)
_Q_NORM = Row(
    Replicated(),
    ("decoder.layers.*.self_attention.q_layernorm.weight",),
    {"model.layers.*.self_attn.q_norm.weight": "D"},
)
_K_NORM = Row(
    Replicated(),
    ("decoder.layers.*.self_attention.k_layernorm.weight",),
    {"model.layers.*.self_attn.k_norm.weight": "D"},
)
_ATTENTION_OUTPUT = Row(
    Columns("Q"),
    ("decoder.layers.*.self_attention.linear_proj.weight",),
    {"model.layers.*.self_attn.o_proj.weight": "H Q"},
)
_MLP_NORM = Row(
    Replicated(),
    ("decoder.layers.*.pre_mlp_layernorm.weight", "decoder.layers.*.mlp.linear_fc1.layer_norm_weight"),
    {"model.layers.*.post_attention_layernorm.weight": "H"},
)
_DENSE_MLP = (
    Row(
        GateUp("I"),
        ("decoder.layers.*.mlp.linear_fc1.weight",),
        {"model.layers.*.mlp.gate_proj.weight": "I H", "model.layers.*.mlp.up_proj.weight": "I H"},
    ),
    Row(Columns("I"), ("decoder.layers.*.mlp.linear_fc2.weight",), {"model.layers.*.mlp.down_proj.weight": "H I"}),
)

_MOE_NORM = Row(
    Replicated(),
    ("decoder.layers.*.pre_mlp_layernorm.weight",),
    {"model.layers.*.post_attention_layernorm.weight": "H"},
)
_ROUTER = Row(Replicated(), ("decoder.layers.*.mlp.router.weight",), {"model.layers.*.mlp.gate.weight": "E H"})


def _expert_rows(expert: int) -> tuple[Row, ...]:
    """One expert of a layer, under its number in the whole model; Megatron has modules or one grouped linear layer."""
    ours, theirs = "decoder.layers.*.mlp.experts", f"model.layers.*.mlp.experts.{expert}"
    return (
        Row(
            GateUp("M"),
            (f"{ours}.local_experts.{expert}.linear_fc1.weight", f"{ours}.linear_fc1.weight{expert}"),
            {f"{theirs}.gate_proj.weight": "M H", f"{theirs}.up_proj.weight": "M H"},
        ),
        Row(
            Columns("M"),
            (f"{ours}.local_experts.{expert}.linear_fc2.weight", f"{ours}.linear_fc2.weight{expert}"),
            {f"{theirs}.down_proj.weight": "H M"},
        ),
    )


_ATTENTION: dict[str, tuple[Row, ...]] = {
    "Qwen2ForCausalLM": (_ATTENTION_NORM, _QKV_WEIGHT, _QKV_BIAS, _ATTENTION_OUTPUT),
    "Qwen3ForCausalLM": (_ATTENTION_NORM, _QKV_WEIGHT, _Q_NORM, _K_NORM, _ATTENTION_OUTPUT),
    "Qwen3MoeForCausalLM": (_ATTENTION_NORM, _QKV_WEIGHT, _Q_NORM, _K_NORM, _ATTENTION_OUTPUT),
}


def row_groups(hf: dict[str, Any]) -> list[list[Row]]:
    """The model's rows in order, in groups that lie on one rank (but for tensor parallelism).

    Embedding; of each layer what all tokens pass, then each expert; final norm with head.
    """
    groups = [[EMBEDDING]]
    for layer, is_moe in enumerate(moe_layers(hf)):
        mlp = (_MOE_NORM, _ROUTER) if is_moe else (_MLP_NORM, *_DENSE_MLP)
        groups.append([row.at(layer) for row in (*_ATTENTION[hf["architectures"][0]], *mlp)])
        if is_moe:
            groups += [[row.at(layer) for row in _expert_rows(expert)] for expert in range(hf["num_experts"])]
    return [*groups, [FINAL_NORM, TIED_HEAD if hf["tie_word_embeddings"] else HEAD]]


def hf_shapes(hf: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Name and full shape of every tensor that a Hugging Face folder of this model has, in the order of `row_groups`.

    With tied embeddings there is no lm_head.weight.
    """
    sizes = ModelSizes.of(hf)
    rows = (row for group in row_groups(hf) for row in group if not row.copied)
    return {name: shape for row in rows for name, shape in row.shapes(sizes).items()}
