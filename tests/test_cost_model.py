"""The formulas of PAPER.md section 10, by hand and by simulation of the rings."""

import math

import pytest

from vgc_chainer.cost_model import (
    Step,
    allgatherv_seconds,
    break_even_ratio,
    ring_allreduce_seconds,
)


def test_by_hand():
    """4 workers, 1000 parameters, 1 Mbit/s: 2 * 3 * 32000 / 4 bits; 4 * 32000 / 10 bits."""
    assert ring_allreduce_seconds(4, 1000, 1e6) == pytest.approx(0.048)
    assert allgatherv_seconds(4, 1000, 1e6, 10) == pytest.approx(0.0128)
    assert allgatherv_seconds(4, 1000, 1e6, 10, block=800) == pytest.approx(0.0152)


@pytest.mark.parametrize('workers', [2, 3, 16])
def test_ring_allreduce_counted_step_by_step(workers):
    """p - 1 steps of reduce-scatter and p - 1 of allgather, each moving a p-th of the array."""
    sent = sum(32 * 960 / workers for _ in range(2 * (workers - 1)))
    assert ring_allreduce_seconds(workers, 960, 1e3) == pytest.approx(sent / 1e3)


@pytest.mark.parametrize('workers', [2, 8, 64])
def test_break_even_ratio(workers):
    ratio = break_even_ratio(workers)
    plain = ring_allreduce_seconds(workers, 10**6, 1e9)
    assert allgatherv_seconds(workers, 10**6, 1e9, ratio) == pytest.approx(plain)
    assert ratio == pytest.approx(workers / 2, rel=1.01 / (workers - 1))


def test_one_worker_communicates_nothing():
    assert ring_allreduce_seconds(1, 100, 1) == allgatherv_seconds(1, 100, 1, 2) == 0
    assert break_even_ratio(1) == 0
    assert Step(0.1).speed_up(1, 100, 1) == 1


def test_speed_up_and_break_even_bandwidth():
    step = Step(compute=0.1, extra=0.01)
    bandwidth = step.break_even_bandwidth(16, 10**7, ratio=400)
    plain = step.plain(16, 10**7, bandwidth)
    assert step.compressed(16, 10**7, bandwidth, 400) == pytest.approx(plain)
    slower, faster = bandwidth / 2, bandwidth * 2
    assert step.speed_up(16, 10**7, slower, 400) > step.speed_up(16, 10**7, slower)
    assert step.speed_up(16, 10**7, faster, 400) < step.speed_up(16, 10**7, faster)
    assert step.speed_up(16, 10**7, 1e18) == pytest.approx(16)


def test_compression_that_never_or_always_pays():
    assert Step(0.1, 0.01).break_even_bandwidth(16, 10**7, ratio=2) == 0
    assert math.isinf(Step(0.1, 0.0).break_even_bandwidth(16, 10**7, ratio=400))
