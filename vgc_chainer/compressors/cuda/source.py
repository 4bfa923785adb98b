"""Compile the ``.cu`` files of this package.

``cupy.RawModule`` is of no use here: CuPy compiles everything with ``-ftz=true``, which flushes
float32 denormals to zero, and NumPy does not.
"""

import functools
import hashlib
import os
import tempfile
from pathlib import Path

import cupy
from cupy.cuda import compiler

#: No contraction of a * b + c, no flushing of denormals, IEEE division and square root.
_OPTIONS = (
    '--std=c++14',
    '--fmad=false',
    '--ftz=false',
    '--prec-div=true',
    '--prec-sqrt=true',
)


def kernel(name, files, **defines):
    """One kernel out of ``common.cu`` and `files`, on the current device.

    Args:
        name: Name of the kernel.
        files: Tuple of names of source files without suffix, put together in this order.
        defines: Macros, integers.
    """
    return _kernel(name, files, tuple(sorted(defines.items())), cupy.cuda.Device().id)


@functools.cache
def _kernel(name, files, defines, device):
    return _module(files, defines, device).get_function(name)


@functools.cache
def _module(files, defines, device):
    head = ''.join(f'#define {name} {value}\n' for name, value in defines)
    parts = [Path(__file__).with_name(f'{name}.cu').read_text() for name in ('common', *files)]
    module = cupy.cuda.function.Module()
    module.load(_binary(head + '\n'.join(parts)))
    return module


def _binary(source):
    """Machine code (or PTX) of `source`, kept among the kernels that CuPy keeps."""
    capability = cupy.cuda.Device().compute_capability
    key = repr((source, _OPTIONS, capability, cupy.cuda.nvrtc.getVersion(), cupy.__version__))
    kept = os.environ.get('CUPY_CACHE_DIR') or Path.home() / '.cupy' / 'kernel_cache'
    directory = Path(kept)
    path = directory / f'vgc_{hashlib.sha256(key.encode()).hexdigest()}.bin'
    if path.exists():
        return path.read_bytes()
    binary, _ = compiler.compile_using_nvrtc(source, _OPTIONS, filename='vgc.cu')
    if isinstance(binary, str):
        binary = binary.encode()
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=directory, delete=False) as file:
        file.write(binary)
    os.replace(file.name, path)  # whole or not at all, whatever other ranks do
    return binary
