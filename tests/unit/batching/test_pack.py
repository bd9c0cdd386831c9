import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_prorl.batching.pack import pack, split_minibatches
from megatron_prorl.types import PackedBatch, Sample


def sample(first_token: int, prompt: int, response: int, advantage: float = 1.0) -> Sample:
    """Tokens count up from `first_token`, so that all of a test can be told apart; log-probs are -token / 1000."""
    length = prompt + response
    tokens = list(range(first_token, first_token + length))
    return Sample(
        token_ids=tokens,
        trained=[False] * prompt + [True] * response,
        sampler_logprobs=[0.0] * prompt + [-t / 1000 for t in tokens[prompt:]],
        advantage=advantage,
        weight_version=0,
    )


def samples_of(shapes: list[tuple[int, int]]) -> list[Sample]:
    return [sample(1000 * (i + 1), prompt, response, i + 0.5) for i, (prompt, response) in enumerate(shapes)]


def test_one_microbatch_by_hand():
    (batch,) = pack(
        [sample(10, 2, 2, 0.5), sample(20, 1, 1, -2.0)], tokens_per_microbatch=100, num_data_ranks=1, pad_multiple=8
    )[0]
    assert batch.token_ids_T.tolist() == [10, 11, 12, 13, 20, 21, 0, 0]
    assert batch.position_ids_T.tolist() == [0, 1, 2, 3, 0, 1, 0, 1]
    assert batch.targets_T.tolist() == [11, 12, 13, 0, 21, 0, 0, 0]
    assert batch.mask_T.tolist() == [False, True, True, False, True, False, False, False]
    assert batch.advantages_T.tolist() == [0.0, 0.5, 0.5, 0.0, -2.0, 0.0, 0.0, 0.0]
    torch.testing.assert_close(
        batch.sampler_logprobs_T, torch.tensor([0.0, -0.012, -0.013, 0.0, -0.021, 0.0, 0.0, 0.0])
    )
    assert batch.cu_seqlens.tolist() == [0, 4, 6, 8]
    assert batch.max_seqlen == 4
    assert batch.sample_indices == [0, 1]
    assert batch.num_trained == 3


def test_tensors_have_the_dtypes_that_the_type_states():
    (batch,) = pack([sample(10, 2, 2)], tokens_per_microbatch=100, num_data_ranks=1)[0]
    assert {
        name: getattr(batch, name).dtype
        for name in PackedBatch.__dataclass_fields__
        if isinstance(getattr(batch, name), torch.Tensor)
    } == {
        "token_ids_T": torch.int64,
        "position_ids_T": torch.int64,
        "targets_T": torch.int64,
        "mask_T": torch.bool,
        "advantages_T": torch.float32,
        "sampler_logprobs_T": torch.float32,
        "cu_seqlens": torch.int32,
    }


def test_a_rank_without_samples_gets_a_microbatch_with_nothing_to_train():
    plan = pack([sample(10, 1, 4)], tokens_per_microbatch=8, num_data_ranks=2, pad_multiple=4)
    empty = plan[1][0]
    assert empty.token_ids_T.tolist() == empty.position_ids_T.tolist()[:1] * 4
    assert empty.cu_seqlens.tolist() == [0, 4]
    assert (empty.num_trained, empty.max_seqlen, empty.sample_indices) == (0, 4, [])
    assert pack([], tokens_per_microbatch=8, num_data_ranks=1)[0][0].cu_seqlens.tolist() == [0, 1]


def test_a_sample_longer_than_the_budget_has_a_microbatch_to_itself():
    plan = pack(samples_of([(5, 5), (1, 1), (50, 50), (1, 1)]), tokens_per_microbatch=16, num_data_ranks=1)
    assert sorted(batch.sample_indices for batch in plan[0]) == [[0, 1, 3], [2]]


SHAPES = st.lists(st.tuples(st.integers(1, 20), st.integers(1, 80)), max_size=40)
SPLIT = {"budget": st.integers(1, 200), "ranks": st.integers(1, 5), "multiple": st.sampled_from([1, 2, 8])}


@settings(max_examples=100, deadline=None)
@given(shapes=SHAPES, **SPLIT)
def test_every_trained_token_is_packed_once_with_its_own_context_and_numbers(shapes, budget, ranks, multiple):
    samples = samples_of(shapes)
    plan = pack(samples, tokens_per_microbatch=budget, num_data_ranks=ranks, pad_multiple=multiple)
    seen = []
    for batch in (batch for rank in plan for batch in rank):
        starts = batch.cu_seqlens.tolist()
        assert starts[-1] == len(batch.token_ids_T) and starts[-1] % multiple == 0
        assert len(starts) - 1 - len(batch.sample_indices) in (0, 1)  # at most one run of padding
        for index, a, b in zip(batch.sample_indices, starts, starts[1:], strict=False):
            packed = samples[index]
            assert batch.token_ids_T[a:b].tolist() == packed.token_ids
            assert batch.position_ids_T[a:b].tolist() == list(range(b - a))
            assert batch.targets_T[a:b].tolist() == [*packed.token_ids[1:], 0]
            assert batch.mask_T[a:b].tolist() == [*packed.trained[1:], False]
            advantages = [packed.advantage * trained for trained in batch.mask_T[a:b].tolist()]
            assert batch.advantages_T[a:b].tolist() == advantages
            shifted = torch.tensor([*packed.sampler_logprobs[1:], 0.0])
            assert torch.equal(batch.sampler_logprobs_T[a:b], shifted)
            seen.append(index)
        assert not batch.mask_T[starts[len(batch.sample_indices)] :].any()
    assert sorted(seen) == list(range(len(samples)))


@settings(max_examples=100, deadline=None)
@given(shapes=SHAPES, **SPLIT)
def test_ranks_get_the_same_number_of_microbatches_within_budget_and_balanced(shapes, budget, ranks, multiple):
    plan = pack(samples_of(shapes), tokens_per_microbatch=budget, num_data_ranks=ranks, pad_multiple=multiple)
    lengths = [sum(shape) for shape in shapes]
    assert len({len(rank) for rank in plan}) == 1
    for batch in (batch for rank in plan for batch in rank):
        assert len(batch.sample_indices) <= 1 or sum(lengths[i] for i in batch.sample_indices) <= budget
    loads = [sum(lengths[i] for batch in rank for i in batch.sample_indices) for rank in plan]
    assert max(loads) <= sum(lengths) / ranks + max(lengths, default=0)


@settings(max_examples=30, deadline=None)
@given(shapes=SHAPES, **SPLIT)
def test_the_split_is_the_same_on_every_rank_that_computes_it(shapes, budget, ranks, multiple):
    plans = [
        pack(samples_of(shapes), tokens_per_microbatch=budget, num_data_ranks=ranks, pad_multiple=multiple)
        for _ in range(2)
    ]
    first, second = ([[batch.sample_indices for batch in rank] for rank in plan] for plan in plans)
    assert first == second


def test_256_samples_are_packed_in_20_ms():
    samples = samples_of([(50, 50 + i % 100) for i in range(256)])
    times = []
    for _ in range(5):
        start = time.process_time()
        pack(samples, tokens_per_microbatch=16384, num_data_ranks=1)
        times.append(time.process_time() - start)
    assert min(times) < 0.020  # measured: 4 ms


@pytest.mark.parametrize(
    "num_groups, updates, sizes",
    [(8, 4, [2, 2, 2, 2]), (6, 4, [1, 2, 1, 2]), (3, 4, [1, 1, 1]), (7, 1, [7]), (0, 4, [])],
)
def test_minibatches_are_whole_consecutive_groups(num_groups, updates, sizes):
    groups = [samples_of([(1, g + 1), (1, g + 1)]) for g in range(num_groups)]
    minibatches = split_minibatches(groups, updates)
    assert [len(minibatch) // 2 for minibatch in minibatches] == sizes
    assert [s for minibatch in minibatches for s in minibatch] == [s for group in groups for s in group]
