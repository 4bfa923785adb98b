"""Tables of pointers that a kernel reads instead of a packed copy of all arrays."""

import cupy
import numpy as np

#: Codes of dtypes in the tables (common.cu); 0 is an array that is not there.
CODES = {'e': 1, 'f': 2, 'd': 3}


class Upload:
    """Host tables that travel to the device in one asynchronous copy.

    Reuse is safe because every pass that uploads also reads something back before it returns.
    """

    def __init__(self):
        self._host = self._device = np.empty(0, np.int64)

    def send(self, **tables):
        """Copy int64 tables; returns their device addresses as dict."""
        total = sum(len(table) for table in tables.values())
        if total > self._host.size:
            size = max(256, 2 * total)
            memory = cupy.cuda.alloc_pinned_memory(8 * size)
            self._host = np.frombuffer(memory, np.int64, size)
            self._device = cupy.empty(size, np.int64)
        base, at, addresses = self._device.data.ptr, 0, {}
        for name, table in tables.items():
            self._host[at : at + len(table)] = table
            addresses[name] = base + 8 * at
            at += len(table)
        cupy.cuda.runtime.memcpyAsync(
            base,
            self._host.ctypes.data,
            8 * total,
            cupy.cuda.runtime.memcpyHostToDevice,
            cupy.cuda.get_current_stream().ptr,
        )
        return addresses


class ReadBack:
    """A few device words, read into pinned memory with one synchronisation."""

    def __init__(self):
        self._host = np.empty(0, np.uint8)

    def read(self, address, count, dtype):
        """NumPy copy of `count` items at a device address."""
        size = count * np.dtype(dtype).itemsize
        if size > self._host.size:
            memory = cupy.cuda.alloc_pinned_memory(2 * size)
            self._host = np.frombuffer(memory, np.uint8, 2 * size)
        stream = cupy.cuda.get_current_stream()
        cupy.cuda.runtime.memcpyAsync(
            self._host.ctypes.data,
            address,
            size,
            cupy.cuda.runtime.memcpyDeviceToHost,
            stream.ptr,
        )
        stream.synchronize()
        return self._host[:size].view(dtype).copy()


def contiguous(arrays):
    """The arrays, those that are not C-contiguous replaced by copies; None stays None."""
    return [a if a is None or a.flags.c_contiguous else cupy.ascontiguousarray(a) for a in arrays]


def pointers(arrays):
    """Device addresses; 0 for None."""
    return [0 if a is None else a.data.ptr for a in arrays]


def codes(arrays):
    """Codes of dtypes; 0 for None. KeyError for a dtype without one."""
    return [0 if a is None else CODES[a.dtype.char] for a in arrays]
