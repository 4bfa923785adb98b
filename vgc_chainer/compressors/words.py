"""The 32-bit word: sign, magnitude code, element index (PAPER.md section 5, [R]).

::

    bit  31      30 ... index_bits      index_bits-1 ... 0
         sign    magnitude code         flat element index within its shard

Variance words hold a 3-bit code and 28 index bits, as in the paper. Strom and hybrid need
no code (the bits stay zero). QSGD with b bits has a (b - 1)-bit code; above 4 bits that
leaves fewer index bits, 32 - b [C]. A model with more than 2^index_bits elements is cut into
shards of that many consecutive elements, each with its own index base [C]: words are in index
order, so it suffices to send how many words each shard has.
"""

import numpy as np

PAPER_INDEX_BITS = 28


class WordFormat:
    """Packs and unpacks arrays of words, on NumPy and CuPy alike.

    Args:
        code_bits: Width of the magnitude code, 0 to 7.
        index_bits: Width of the index; by default 28, or what the code leaves.
    """

    def __init__(self, code_bits, index_bits=None):
        self.code_bits = code_bits
        self.index_bits = index_bits or min(PAPER_INDEX_BITS, 31 - code_bits)
        if not (0 <= code_bits <= 7 and 1 <= self.index_bits <= 31 - code_bits):
            raise ValueError(f'no room for {code_bits} + {self.index_bits} bits beside the sign')
        self._index_mask = np.uint32((1 << self.index_bits) - 1)
        self._code_mask = np.uint32((1 << code_bits) - 1)

    def n_shards(self, total):
        """Number of shards of a model with `total` elements; at least one."""
        return max(1, -(-total // (1 << self.index_bits)))

    def shard_counts(self, indices, total, xp):
        """How many of the ascending flat `indices` (int64) fall into each shard: int64 array.

        The array lives on the host; for more than one shard on CuPy this synchronises.
        """
        n = self.n_shards(total)
        if n == 1:
            return np.array([indices.size], np.int64)
        bounds = xp.arange(n + 1, dtype=np.int64) << self.index_bits
        cuts = xp.searchsorted(indices, bounds)
        return np.diff(cuts.get() if hasattr(cuts, 'get') else cuts).astype(np.int64)

    def pack(self, indices, negative, codes=None):
        """Words of flat `indices` (int64), `negative` (bool) and `codes` (integers); uint32."""
        words = indices.astype(np.uint32) & self._index_mask
        words |= negative.astype(np.uint32) << np.uint32(31)
        if codes is not None:
            words |= codes.astype(np.uint32) << np.uint32(self.index_bits)
        return words

    def unpack(self, words, shard_counts, xp):
        """Inverse of :meth:`pack`: ``(indices int64, negative bool, codes int32)``."""
        indices = (words & self._index_mask).astype(np.int64)
        start = 0
        for shard, count in enumerate(shard_counts):
            if shard and count:
                indices[start : start + int(count)] += shard << self.index_bits
            start += int(count)
        negative = (words >> np.uint32(31)).astype(bool)
        codes = ((words >> np.uint32(self.index_bits)) & self._code_mask).astype(np.int32)
        return indices, negative, codes
