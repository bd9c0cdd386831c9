from megatron_prorl.algo.reset import reset_due
from megatron_prorl.config.schema import ResetConfig
from megatron_prorl.types import Progress


def due(step: int, last: int, every_steps: int) -> bool:
    return reset_due(Progress(step=step, last_reset_step=last), ResetConfig(every_steps=every_steps))


def steps_with_reset(every_steps: int, num_steps: int) -> list[int]:
    last, found = 0, []
    for step in range(1, num_steps + 1):
        if due(step, last, every_steps):
            last = step
            found.append(step)
    return found


def test_a_reset_comes_every_so_many_steps():
    assert steps_with_reset(every_steps=200, num_steps=650) == [200, 400, 600]


def test_zero_never_resets():
    assert steps_with_reset(every_steps=0, num_steps=50) == []


def test_the_interval_counts_from_the_last_reset():
    assert not due(400, last=390, every_steps=200)
    assert due(590, last=390, every_steps=200)


def test_an_interval_shortened_by_a_new_config_takes_effect_at_once():
    assert due(150, last=0, every_steps=100)
