"""Where Megatron-Core stores each parameter in a checkpoint: keys, shapes and offsets of global tensors. No Megatron.

They are what `sharded_state_dict` of the whole model says, without building it, which takes as long as copying
gigabytes does; a test compares the two. Layers that are all alike lie in one tensor with the layer as its first axis,
experts of a layer likewise; where layers differ each has tensors of its own.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from megatron_prorl.checkpoint.pieces import Blob
from megatron_prorl.config.hf import moe_layers, padded_vocab_size
from megatron_prorl.weights.tables import GateUp, ModelSizes, Row, VocabularyRows, row_groups

_LAYER = re.compile(r"decoder\.layers\.(\d+)\.")
_EXPERT = re.compile(r"local_experts\.(\d+)\.")
_LINEAR = re.compile(r"(linear_\w+\.)weight")

Index = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Part:
    """A box of the global tensor `key` that holds rows of one parameter: all that it has at `lead` on the first axes.

    Of the axes after these the first counts rows; the box begins at row `start` there, which is also its first row in
    the parameter, and has `rows`.
    """

    key: str
    global_shape: Index
    lead: Index
    start: int
    rows: int


@dataclass(frozen=True, slots=True)
class Parameter:
    """A parameter of the whole model, and where it lies."""

    row: Row
    shape: Index
    parts: tuple[Part, ...]

    @property
    def is_padded(self) -> bool:
        """Whether it has rows beyond the vocabulary's, as many as the writer's layout wanted."""
        return isinstance(self.row.layout, VocabularyRows)


def stored_parameters(hf: dict[str, Any]) -> list[Parameter]:
    """Those of the model `hf` (as `read_hf_config` gives it), in the order of `row_groups`."""
    sizes, found = ModelSizes.of(hf), []
    for row in (row for group in row_groups(hf) for row in group if not row.copied):
        shape = _shape(row, sizes)
        key, lead, lengths = _place(row, hf)
        num_parts = 2 if isinstance(row.layout, GateUp) else 1  # Megatron stores the two halves apart
        rows = shape[0] // num_parts
        parts = tuple(Part(key, (*lengths, *shape), lead, i * rows, rows) for i in range(num_parts))
        found.append(Parameter(row, shape, parts))
    return found


def _shape(row: Row, sizes: ModelSizes) -> Index:
    """Of the whole parameter: as `shard_shape` says, which takes torch most of a second when it is first asked."""
    shapes = list(row.shapes(sizes).values())
    is_padded = isinstance(row.layout, VocabularyRows)
    rows = padded_vocab_size(sizes.axes["V"], 1) if is_padded else sum(shape[0] for shape in shapes)
    return rows, *shapes[0][1:]


def extra_states(hf: dict[str, Any]) -> Iterator[Blob]:
    """What else Megatron stores: an empty object for each linear layer, in which Transformer Engine keeps its own."""
    for row in (row for group in row_groups(hf) for row in group):
        key, lead, lengths = _place(row, hf)
        if _LINEAR.search(key):
            place, places = (".".join(map(str, numbers)) for numbers in (lead or (0,), lengths or (1,)))
            name = _LINEAR.sub(r"\1_extra_state", key)
            yield Blob(key=f"{name}/shard_{place}_{places}", value=[None])


def numbered(part: Part) -> Part:
    """The same in a checkpoint whose layers have tensors of their own."""
    layer, *lead = part.lead
    key = part.key.replace("decoder.layers.", f"decoder.layers.{layer}.", 1)
    return Part(key, part.global_shape[1:], tuple(lead), part.start, part.rows)


def _place(row: Row, hf: dict[str, Any]) -> tuple[str, Index, Index]:
    """Key of the row's global tensor, where the row lies on its leading axes, and the lengths of these."""
    key = row.megatron[-1]  # Megatron stores the names of Transformer Engine's layers, where they differ
    lead: list[int] = []
    lengths: list[int] = []
    if (layer := _LAYER.match(key)) and len(set(moe_layers(hf))) == 1:
        lead, lengths = [int(layer[1])], [hf["num_hidden_layers"]]
        key = key.replace(layer[0], "decoder.layers.")
    if expert := _EXPERT.search(row.megatron[0]):
        lead, lengths = [*lead, int(expert[1])], [*lengths, hf["num_experts"]]
        key = re.sub(r"(experts\.)(linear_fc\d\.weight)\d+$", r"\1experts.\2", key)
    return key, tuple(lead), tuple(lengths)
