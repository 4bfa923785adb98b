import time

import numpy as np
import pytest

from vgc_chainer.timing import PHASES, Timings


def test_phases_add_up_and_start_over():
    timings = Timings()
    for _ in range(2):
        with timings.measure('compress'):
            time.sleep(0.01)
    seconds = timings.collect()
    assert seconds['compress'] >= 0.02
    assert seconds['decode'] == 0 and set(seconds) == set(PHASES)
    assert timings.collect()['compress'] == 0


def test_a_phase_that_raises_is_counted():
    timings = Timings()
    with pytest.raises(KeyError), timings.measure('decode'):
        raise KeyError
    assert timings.collect()['decode'] > 0


@pytest.mark.gpu
def test_device_time_is_measured_without_synchronising():
    import cupy

    timings = Timings()
    x = cupy.random.random((4096, 4096), dtype=np.float32)
    for _ in range(3):
        with timings.measure('compress', cupy):
            x = x @ x / 4096
    seconds = timings.collect()
    assert seconds['compress'] > 1e-5
