"""QSGD (Alistarh et al. 2017), a baseline of the paper (PAPER.md section 8, [V]; bits [R, D]).

Buckets of d consecutive elements of one parameter array, the last one of an array shorter [C].
With s = 2^(b-1) - 1 levels and u uniform in [0, 1)::

    norm  = ||bucket||_2                            # or max |.|, an option [C]
    level = floor(|g_i| / norm * s + u)             # unbiased
    value = sign(g_i) * norm * level / s

Elements of level 0 are not sent; no residual is kept. The norm of every bucket travels as one
float32.
"""

import numpy as np

from vgc_chainer.compressors import options
from vgc_chainer.compressors.base import Compressor, concatenate
from vgc_chainer.compressors.norms import norms_problem, to_float32
from vgc_chainer.compressors.philox import Uniforms
from vgc_chainer.compressors.reduction import fold, pad_to


class QSGDCompressor(Compressor):
    """Unbiased stochastic rounding to a few levels of each bucket's norm.

    Args:
        bits: Bits of a value in two's complement, 2..8; more bits, more levels, less noise.
        bucket_size: Elements that share a norm, 1..2^20; larger sends less and is noisier.
        norm: ``'l2'`` or ``'max'`` [C].
        seed: Seed of the rounding; each rank has its own stream.

    Raises:
        ValueError: A hyperparameter is out of range.
    """

    name = 'qsgd'

    def __init__(self, bits=2, bucket_size=128, norm='l2', seed=0):
        self.bits = options.integer('bits', bits, 2, 8)
        self.bucket_size = options.integer('bucket_size', bucket_size, 1, 1 << 20)
        self.norm = options.choice('norm', norm, 'l2', 'max')
        self.seed = options.integer('seed', seed, 0, 2**32 - 1)
        self.levels = 2 ** (self.bits - 1) - 1
        self.code_bits = self.bits - 1
        super().__init__()

    def hyperparameters(self):
        return {
            'bits': self.bits,
            'bucket_size': self.bucket_size,
            'norm': self.norm,
            'seed': self.seed,
        }

    def prepare(self, layout, xp=np, rank=0):
        super().prepare(layout, xp, rank)
        buckets = [-(-size // self.bucket_size) for size in layout.sizes]
        self._first_bucket = np.concatenate([[0], np.cumsum(buckets, dtype=np.int64)])
        self._device_first_bucket = xp.asarray(self._first_bucket)

    def _table_words(self):
        return int(self._first_bucket[-1])

    def _table_problem(self, table):
        return norms_problem(table)

    def _encode(self, gradients, moments, scale):
        xp = self.xp
        norms = xp.zeros(self._table_words(), np.float32)
        uniforms = Uniforms(xp, self.seed, self.rank, self.step, self.layout.total)
        parts = [
            self._encode_group(group, self._unscaled(gradient, scale), norms, uniforms)
            for group, gradient in enumerate(gradients)
            if gradient is not None and gradient.size
        ]
        columns = zip(*parts) if parts else ((), (), ())
        dtypes = (np.int64, bool, np.int32)
        indices, negative, codes = (concatenate(xp, list(c), t) for c, t in zip(columns, dtypes))
        return norms.view(np.uint32), indices, negative, codes

    def _encode_group(self, group, gradient, norms, uniforms):
        xp = self.xp
        where = self.layout.slice(group)
        gradient = to_float32(xp, gradient)
        norm = self._norms(gradient)
        norms[self._first_bucket[group] : self._first_bucket[group + 1]] = norm
        per_element = xp.repeat(norm, self.bucket_size)[: gradient.size]
        # A bucket of zeros has norm 0 and nothing to send: any divisor will do.
        per_element[per_element == 0] = 1
        numbers = uniforms(where.start, where.stop)
        level = xp.floor(xp.abs(gradient) / per_element * np.float32(self.levels) + numbers)
        # Rounding of the sum may reach s + 1 for an element as large as its norm.
        level = xp.minimum(level, self.levels).astype(np.int32)
        chosen = xp.flatnonzero(level)
        return chosen + where.start, gradient[chosen] < 0, level[chosen]

    def _norms(self, gradient):
        xp = self.xp
        width = 1 << (self.bucket_size - 1).bit_length()
        rows = pad_to(xp, gradient, self.bucket_size).reshape(-1, self.bucket_size)
        wide = xp.zeros((rows.shape[0], width), np.float64)
        wide[:, : self.bucket_size] = rows
        if self.norm == 'max':
            norms = fold(xp.abs(wide), xp.maximum)
        else:
            norms = xp.sqrt(fold(wide * wide, xp.add))
        return to_float32(xp, norms, room=2 * self.levels)  # the decoder multiplies by the level

    def _decode(self, table, indices, negative, codes, rank):
        xp = self.xp
        groups = self._groups_of(indices)
        inside = indices - self._offsets[groups]
        norm = table.view(np.float32)[
            self._device_first_bucket[groups] + inside // self.bucket_size
        ]
        value = norm * codes.astype(np.float32) / np.float32(self.levels)
        return xp.where(negative, -value, value).astype(self.layout.state_dtype)
