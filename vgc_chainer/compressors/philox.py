"""Counter-based random numbers: Philox4x32-10 (Salmon et al. 2011), the same on NumPy and CuPy.

NumPy and CuPy both ship Philox generators, but of different widths and stream layouts; words
must not depend on the device, so the ten rounds are spelled out here. The stream is a pure
function of (seed, rank, step, element): a run repeats, whatever the order of evaluation.
"""

import functools

import numpy as np

#: Elements for which numbers are made at a time, at least: the temporaries stay in a cache.
_AHEAD = 1 << 16

_M0, _M1 = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_W0, _W1 = 0x9E3779B9, 0xBB67AE85
_LOW = np.uint64(0xFFFFFFFF)
_SHIFT = np.uint64(32)


def philox4x32(counter, key):
    """Ten rounds of Philox4x32.

    Args:
        counter: Four uint64 arrays (or scalars that broadcast) holding 32-bit values.
        key: Two Python integers below 2^32.

    Returns:
        Four uint64 arrays holding 32-bit values.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = c0 * _M0, c2 * _M1
        c0, c1, c2, c3 = (
            (p1 >> _SHIFT) ^ c1 ^ np.uint64(k0),
            p1 & _LOW,
            (p0 >> _SHIFT) ^ c3 ^ np.uint64(k1),
            p0 & _LOW,
        )
        k0, k1 = (k0 + _W0) & 0xFFFFFFFF, (k1 + _W1) & 0xFFFFFFFF
    return c0, c1, c2, c3


def uniform(xp, seed, rank, step, start, stop):
    """float32 numbers in [0, 1), multiples of 2^-24, for elements `start` to `stop`.

    Element i takes lane ``i % 4`` of counter ``(i // 4, step)`` under key ``(seed, rank)``.
    """
    first = start // 4
    blocks = xp.arange(first, -(-stop // 4), dtype=np.uint64)
    zero = xp.zeros_like(blocks)
    lanes = philox4x32(
        (blocks & _LOW, blocks >> _SHIFT, zero + (step & 0xFFFFFFFF), zero + (step >> 32)),
        (seed & 0xFFFFFFFF, rank & 0xFFFFFFFF),
    )
    numbers = xp.empty((blocks.size, 4), np.float32)
    for lane, bits in enumerate(lanes):
        numbers[:, lane] = (bits >> np.uint64(8)).astype(np.float32) * np.float32(2.0**-24)
    return numbers.reshape(-1)[start - 4 * first : stop - 4 * first]


class Uniforms:
    """The numbers of :func:`uniform` for ascending ranges, made ahead for many small ones.

    Args:
        xp, seed, rank, step: As for :func:`uniform`.
        total: Number of elements there are.
    """

    def __init__(self, xp, seed, rank, step, total):
        self._make = functools.partial(uniform, xp, seed, rank, step)
        self._total = total
        self._start, self._numbers = 0, xp.empty(0, np.float32)

    def __call__(self, start, stop):
        """Numbers of elements `start` to `stop`."""
        if not self._start <= start <= stop <= self._start + self._numbers.size:
            ahead = min(max(stop, start + _AHEAD), self._total)
            self._start, self._numbers = start, self._make(start, ahead)
        return self._numbers[start - self._start : stop - self._start]
