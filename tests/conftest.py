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


def pytest_collection_modifyitems(items):
    marked = [item for item in items if item.get_closest_marker('gpu')]
    reason = _why_no_gpu() if marked else None
    if reason:
        for item in marked:
            item.add_marker(pytest.mark.skip(reason=reason))
