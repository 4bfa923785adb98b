"""Both ratios against numbers counted by hand."""

import math

import pytest

from vgc_chainer.stats import Traffic


def test_ratios_by_hand():
    """Two steps of two ranks, 1000 parameters; 10, 30, 0 and 40 elements sent."""
    traffic = Traffic()
    traffic.add(1000, [10, 30], [140, 220])
    traffic.add(1000, [0, 40], [100, 260])
    assert traffic.elements_sent == 20
    assert traffic.compression_ratio == 1000 / 20
    assert traffic.wire_ratio == pytest.approx(4000 / 180)


def test_the_ratio_is_not_a_mean_of_ratios():
    traffic = Traffic()
    traffic.add(100, [1], [4])
    traffic.add(100, [99], [396])
    assert traffic.compression_ratio == 2


def test_nothing_sent_and_no_steps():
    traffic = Traffic()
    assert math.isnan(traffic.compression_ratio) and math.isnan(traffic.elements_sent)
    traffic.add(100, [0, 0], [8, 8])
    assert traffic.compression_ratio == math.inf and traffic.wire_ratio == 50


def test_intervals_are_differences():
    traffic = Traffic()
    traffic.add(100, [5, 5], [50, 50])
    before = traffic.copy()
    traffic.add(100, [2, 0], [20, 10])
    interval = traffic - before
    assert interval.steps == 1 and interval.compression_ratio == 100
