"""After a sync every engine samples from the trainer's weights; whatever goes wrong on the way is noticed and named."""

from __future__ import annotations

import json
import os
import random
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from serving import VOCAB_SIZE, Serving, descendants
from torch import Tensor

from megatron_prorl.weights.sync import SyncMismatch

TOKENS = [random.Random(3).randrange(VOCAB_SIZE) for _ in range(60)]
TOLERANCE_NATS = 1e-4  # fp32, sums in another order: 1e-5 seen


@pytest.mark.parametrize("model", ["untied", "tied"])
def test_after_a_sync_engine_logprobs_are_the_changed_models(servings: dict[str, Serving], model: str) -> None:
    serving = servings[model]
    before = serving.trainer.logprobs(TOKENS)
    serving.trainer.change()
    version = serving.next_version()
    metrics = serving.sync.push(version)
    after = serving.trainer.logprobs(TOKENS)
    assert after != pytest.approx(before, abs=0.1)
    for client in serving.clients:
        assert client.score(TOKENS) == pytest.approx(after, abs=TOLERANCE_NATS)
        assert client.weight_version() == version
    assert metrics["sync/engine_restarts"] == 0


def test_nothing_of_a_sync_stays_mapped_in_the_engine(untied: Serving) -> None:
    untied.sync.push(untied.next_version())
    for index in range(2):
        server = json.loads((Path(untied.cfg.run_dir) / "engines" / f"engine-{index}.json").read_text())["pid"]
        for pid in (server, *descendants(server)):
            assert "memfd:megatron-prorl-weights" not in Path(f"/proc/{pid}/maps").read_text()


def test_a_skipped_sync_is_noticed_by_its_version(untied: Serving) -> None:
    with pytest.raises(SyncMismatch, match=f"has weight version {untied.version}, the trainer {untied.version + 1}"):
        untied.sync.verify(untied.version + 1)


def test_a_skipped_sync_is_noticed_by_its_logprobs_though_the_version_is_right(untied: Serving) -> None:
    untied.trainer.change()
    version = untied.next_version()
    for client in untied.clients:
        client.set_weight_version(version)
    with pytest.raises(SyncMismatch, match=r"log-probs differ from the trainer's by \S+ nats"):
        untied.sync.verify(version)
    untied.sync.push(version)


def test_one_flipped_bit_on_the_way_is_named_and_the_next_sync_mends_it(untied: Serving) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    untied.trainer.change()
    sync = untied.make_sync()
    transfer = sync._transfer
    gather = transfer.gather

    def gather_and_corrupt() -> None:
        gather()
        offset = next(row[3] for row in transfer._tensors if row[0] == name)
        transfer._memory[offset + 1] ^= 1

    transfer.gather = gather_and_corrupt  # type: ignore[method-assign]
    with pytest.raises(SyncMismatch, match=f"weights differ: '{name}' changed on its way"):
        sync.push(untied.version + 1)
    sync.close()

    assert [client.weight_version() for client in untied.clients] == [untied.version] * 2
    untied.sync.push(untied.next_version())
    for client in untied.clients:
        assert client.score(TOKENS) == pytest.approx(untied.trainer.logprobs(TOKENS), abs=TOLERANCE_NATS)


def test_an_engine_that_dies_in_a_sync_comes_back_with_the_new_weights_and_the_other_is_served_once(
    untied: Serving,
) -> None:
    announcements = [Path(untied.cfg.run_dir) / "engines" / f"engine-{i}.json" for i in range(2)]
    servers = [json.loads(path.read_text())["pid"] for path in announcements]
    untied.trainer.change()

    def tensors_and_murder() -> Iterator[tuple[str, Tensor]]:
        yield from untied.trainer.named_tensors()
        os.kill(servers[1], signal.SIGKILL)

    sync = untied.make_sync(tensors_and_murder)
    version = untied.next_version()
    sent: list[list[int]] = []
    send = sync._transfer.send
    sync._transfer.send = lambda indices, version: sent.append(list(indices)) or send(indices, version)  # type: ignore
    metrics = sync.push(version)
    sync.close()

    assert sent == [[0, 1], [1]]
    assert metrics["sync/engine_restarts"] == 1
    assert json.loads(announcements[0].read_text())["pid"] == servers[0]
    assert json.loads(announcements[1].read_text())["pid"] != servers[1]
    for client in untied.clients:
        assert client.weight_version() == version
        assert client.score(TOKENS) == pytest.approx(untied.trainer.logprobs(TOKENS), abs=TOLERANCE_NATS)
    untied.sync.push(version)  # what the fixture's sync has in memory is what engines have
