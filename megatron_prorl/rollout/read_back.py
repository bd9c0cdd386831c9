"""What a model on the CPU really computes with, read back and compared with what was sent.

vLLM prepacks the weights of linear layers and frees the originals: `layer.weight` is empty, and only the function
`layer.cpu_linear` knows the values. They are read by multiplying with columns of the identity, which is exact: every
product is the weight or zero. Reading costs as much as a forward pass over READ_BACK_COLUMNS tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

READ_BACK_COLUMNS = 64

TIED = {"lm_head.weight": "model.embed_tokens.weight"}

# What reads a live value, and the part of the sent tensor to compare it with.
Reading = tuple[Callable[[], Tensor], Callable[[Tensor], Tensor]]


def first_wrong_parameter(model: nn.Module, sent: Mapping[str, Tensor], *, seed: int) -> str | None:
    """Name of the first parameter that the model does not compute with as it was sent, in Hugging Face terms; or None.

    Equality is of bits. Packed weights are read by multiplying with columns of the identity: all columns of a weight
    with up to READ_BACK_COLUMNS of them, else so many, others with every seed.
    """
    packed_names: dict[str, list[str]] = getattr(model, "packed_modules_mapping", {})
    generator = torch.Generator().manual_seed(seed)
    for module_name, module in model.named_modules():
        for leaf, parameter in module.named_parameters(recurse=False):
            prefix, _, last = module_name.rpartition(".")
            parts = [f"{prefix}.{part}.{leaf}".lstrip(".") for part in packed_names.get(last, [last])]
            parts = [part if part in sent else TIED.get(part, part) for part in parts]
            missing = [part for part in parts if part not in sent]
            if missing:
                return missing[0]
            for read, expect in _readings(module, leaf, parameter, generator):
                live, start = read(), 0
                for part in parts:
                    expected = expect(sent[part])
                    if not torch.equal(live[start : start + len(expected)].to(expected.dtype), expected):
                        return part
                    start += len(expected)
    return None


def _readings(module: Any, leaf: str, parameter: Tensor, generator: torch.Generator) -> Iterator[Reading]:
    """Pairs of what reads the live value and what to compare it with, given the tensor that was sent."""
    if parameter.numel():
        yield lambda: parameter.detach(), lambda tensor: tensor
    if leaf == "weight" and hasattr(module, "cpu_linear"):
        num_columns = _num_inputs(module)
        columns = torch.randperm(num_columns, generator=generator)[:READ_BACK_COLUMNS]

        def multiply() -> Tensor:
            one_hot = torch.zeros(len(columns), num_columns, dtype=parameter.dtype)
            one_hot[torch.arange(len(columns)), columns] = 1
            return module.cpu_linear(one_hot, module.weight, None).t()

        yield multiply, lambda tensor: tensor[:, columns]


def _num_inputs(module: Any) -> int:
    """Columns of a linear layer's weight, or of an LM head's, on this rank."""
    for name in ("input_size_per_partition", "input_size", "embedding_dim"):
        if hasattr(module, name):
            return getattr(module, name)
    raise AttributeError(f"{type(module).__name__} has a packed weight of unknown width")
