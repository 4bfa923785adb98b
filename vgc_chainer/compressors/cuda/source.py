"""Compile the ``.cu`` files of this package."""

import functools
from pathlib import Path

import cupy

#: No contraction of a * b + c: NumPy rounds twice, and so must we.
_OPTIONS = ('--std=c++14', '--fmad=false')


@functools.cache
def module(files, **defines):
    """``cupy.RawModule`` of ``common.cu`` and `files` (a tuple of names without suffix).

    Args:
        files: Names of source files, put together in this order.
        defines: Macros, integers.
    """
    head = ''.join(f'#define {name} {value}\n' for name, value in sorted(defines.items()))
    parts = [Path(__file__).with_name(f'{name}.cu').read_text() for name in ('common', *files)]
    return cupy.RawModule(code=head + '\n'.join(parts), options=_OPTIONS)


@functools.cache
def kernel(name, files, **defines):
    """One kernel of :func:`module`."""
    return module(files, **defines).get_function(name)
