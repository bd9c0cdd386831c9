"""Rows found by sending their numbers through a layout are those that the layout moves."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from megatron_prorl.weights.rows import Run, cut, full_runs, shard_runs
from megatron_prorl.weights.tables import Columns, GateUp, GroupedQkv, Layout, ModelSizes, Replicated, VocabularyRows

WIDTH = 3


def built(runs: list[Run], tensors: list[Tensor]) -> Tensor:
    return torch.cat(
        [
            tensors[0].new_zeros(run.count, WIDTH)
            if run.source is None
            else tensors[run.source][run.first : run.first + run.count]
            for run in runs
        ]
    )


@given(st.data())
def test_any_layout_is_built_of_its_runs_and_taken_apart_by_them(data: st.DataObject) -> None:
    groups, head_dim, per_group = (data.draw(st.integers(1, 3)) for _ in range(3))
    vocabulary = data.draw(st.sampled_from([1, 127, 128, 129]))
    axes = {"V": vocabulary, "I": data.draw(st.integers(1, 5)), "H": WIDTH, "D": head_dim}
    axes |= {"Q": groups * per_group * head_dim, "K": groups * head_dim}
    sizes = ModelSizes(num_layers=1, num_groups=groups, head_dim=head_dim, axes=axes)
    cases: list[tuple[Layout, list[int]]] = [
        (Replicated(), [4]),
        (Columns("H"), [5]),
        (VocabularyRows(), [axes["V"]]),
        (GateUp("I"), [axes["I"]] * 2),
        (GroupedQkv(), [axes["Q"], axes["K"], axes["K"]]),
    ]
    layout, num_rows = data.draw(st.sampled_from(cases))
    tensors = [torch.randn(rows, WIDTH) for rows in num_rows]
    whole = layout.shard(tensors, sizes, 0, 1)
    runs = shard_runs(lambda full: layout.shard(full, sizes, 0, 1), num_rows)
    assert torch.equal(built(runs, tensors), whole)
    start = data.draw(st.integers(0, len(whole)))
    end = data.draw(st.integers(start, len(whole)))
    if start < end:
        assert torch.equal(built(list(cut(runs, start, end)), tensors), whole[start:end])
    back = full_runs(lambda rows: layout.full([rows], sizes), len(whole))
    assert all(torch.equal(built(of, [whole]), tensor) for of, tensor in zip(back, tensors, strict=True))


def test_runs_are_as_long_as_can_be() -> None:
    """A tensor of one key-value head is three runs, padding one; neighbours of two tensors are not one."""
    sizes = ModelSizes(num_layers=1, num_groups=1, head_dim=4, axes={"V": 5, "Q": 8, "K": 4})
    qkv = shard_runs(lambda full: GroupedQkv().shard(full, sizes, 0, 1), [8, 4, 4])
    assert qkv == [Run(0, 0, 8), Run(1, 0, 4), Run(2, 0, 4)]
    vocabulary = shard_runs(lambda full: VocabularyRows().shard(full, sizes, 0, 1), [5])
    assert vocabulary == [Run(0, 0, 5), Run(None, 0, 123)]
