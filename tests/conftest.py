import numpy as np
import pytest

import vgc_chainer  # noqa: F401  (mends Chainer before any test imports it)


def _why_no_gpu():
    try:
        import cupy
    except ImportError as error:
        return f'no CuPy: {error}'
    try:
        return None if cupy.cuda.runtime.getDeviceCount() else 'no CUDA device'
    except cupy.cuda.runtime.CUDARuntimeError as error:
        return f'no CUDA device: {error}'


def pytest_addoption(parser):
    parser.addoption('--soak', action='store_true', help='run the long tests, and only those')


def pytest_configure(config):
    config.addinivalue_line('markers', 'soak: takes minutes or gigabytes; run by make soak')


def pytest_collection_modifyitems(config, items):
    chosen = [
        bool(item.get_closest_marker('soak')) == config.getoption('--soak') for item in items
    ]
    config.hook.pytest_deselected(items=[i for i, there in zip(items, chosen) if not there])
    items[:] = [item for item, there in zip(items, chosen) if there]
    marked = [item for item in items if item.get_closest_marker('gpu')]
    reason = _why_no_gpu() if marked else None
    if reason:
        for item in marked:
            item.add_marker(pytest.mark.skip(reason=reason))


def pytest_runtest_setup(item):
    # Chainer's initialisers draw from NumPy's global generator: the same in every run and order.
    np.random.seed(0)
