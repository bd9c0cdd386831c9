"""Weights from disk into this rank's share of a Megatron model, in place."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.utils import unwrap_model
from torch import Tensor

from megatron_prorl import heartbeat
from megatron_prorl.checkpoint.sharded import load_model_state, model_state, read_folder
from megatron_prorl.checkpoint.stream import check_metadata
from megatron_prorl.config.hf import is_megatron_checkpoint
from megatron_prorl.weights.hf import HfTensors, check_tensors
from megatron_prorl.weights.tables import ModelSizes, Row, row_groups

_LAYERS = "decoder.layers."
_EXPERT = re.compile(r"(mlp\.experts\.(?:local_experts\.|linear_fc[12]\.weight))(\d+)")


def load_weights(chunks: Sequence[torch.nn.Module], path: str | Path, hf: dict[str, Any]) -> None:
    """Fill this rank's model chunks from a Hugging Face folder or a Megatron checkpoint. Collective.

    Raises UserError for a folder of another model.
    """
    folder = Path(path)
    if is_megatron_checkpoint(folder):
        check_metadata(folder)  # it may come from anywhere
        load_model_state(list(chunks), read_folder(folder, model_state(list(chunks))))
    else:
        load_hf_weights(chunks, folder, hf)


@torch.no_grad()
def load_hf_weights(chunks: Sequence[torch.nn.Module], hf_dir: str | Path, hf: dict[str, Any]) -> None:
    """Fill every parameter of this rank's model chunks from the folder, converting to the model's dtype.

    Each rank reads only its own rows and columns; no collectives. An optimizer that exists already keeps its own
    float32 copy: load first. Raises UserError for a folder that does not fit `hf`, RuntimeError for a parameter without
    a row in the tables or a row without its parameter.
    """
    sizes = ModelSizes.of(hf)
    rank = parallel_state.get_tensor_model_parallel_rank()
    num_ranks = parallel_state.get_tensor_model_parallel_world_size()
    tensors = HfTensors(hf_dir)
    check_tensors(tensors, hf, rank=rank, num_ranks=num_ranks)
    for row, parameter in heartbeat.beating(pair for group in local_rows(chunks, hf) for pair in group):
        shape = row.shard_shape(sizes, num_ranks)
        if parameter.shape != shape:
            raise RuntimeError(
                f"{row.megatron[0]}: the model has shape {list(parameter.shape)}, but one part of {num_ranks} of "
                f"{', '.join(row.hf)} has {list(shape)}"
            )
        parameter.copy_(row.layout.shard([tensors.slice(name) for name in row.hf], sizes, rank, num_ranks))


@torch.no_grad()
def copy_weights(source: Sequence[torch.nn.Module], target: Sequence[torch.nn.Module]) -> None:
    """Copy every parameter between two models of the same layout, such as policy and reference; no collectives."""
    parameters, others = local_parameters(source), local_parameters(target)
    if parameters.keys() != others.keys():
        raise RuntimeError(f"parameters of one model only: {', '.join(sorted(parameters.keys() ^ others.keys()))}")
    for name, parameter in parameters.items():
        others[name].copy_(parameter)


def local_parameters(chunks: Sequence[torch.nn.Module]) -> dict[str, Tensor]:
    """This rank's parameters under their Megatron names, with layers and experts numbered over the whole model."""
    parameters = {}
    for chunk in unwrap_model(list(chunks)):
        for name, parameter in chunk.named_parameters():
            if name.startswith(_LAYERS):
                local, rest = name.removeprefix(_LAYERS).split(".", 1)
                layer = chunk.decoder.layers[int(local)]
                if expert := _EXPERT.match(rest):
                    rest = f"{expert[1]}{layer.mlp.local_expert_indices[int(expert[2])]}{rest[expert.end() :]}"
                name = f"{_LAYERS}{layer.layer_number - 1}.{rest}"
            parameters[name] = parameter
    return parameters


def local_rows(chunks: Sequence[torch.nn.Module], hf: dict[str, Any]) -> list[list[tuple[Row, Tensor]]]:
    """The groups of `row_groups` with this rank's parameters; empty where a group lies on other ranks.

    Raises RuntimeError unless every parameter belongs to exactly one row and a group is here whole or not at all.
    """
    parameters = local_parameters(chunks)
    groups = []
    for group in row_groups(hf):
        pairs: list[tuple[Row, Tensor]] = []
        absent = []
        for row in group:
            found = [parameters.pop(name) for name in row.megatron if name in parameters]
            if len(found) > 1:
                raise RuntimeError(f"{' and '.join(row.megatron)} are both in the model: one weight twice")
            if found:
                pairs.append((row, found[0]))
            elif not row.copied:
                absent.append(row.megatron[0])
        if pairs and absent:
            raise RuntimeError(f"the model has no {', '.join(absent)}, which {hf['architectures'][0]} needs")
        groups.append(pairs)
    if parameters:
        raise RuntimeError(f"no Hugging Face name is known for {', '.join(parameters)} in {hf['architectures'][0]}")
    return groups
