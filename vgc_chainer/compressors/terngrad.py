"""TernGrad (Wen et al. 2017), discussed in the paper (PAPER.md section 8, [V]).

Per parameter array, with sigma the standard deviation of its elements and u uniform in [0, 1)::

    g   = clamp(g, -clip * sigma, clip * sigma)
    top = max |g|
    value = top * sign(g) * [u < |g| / top]

Elements that come out 0 are not sent; no residual is kept. `top` of every array travels as one
float32.
"""

import numpy as np

from vgc_chainer.compressors import options
from vgc_chainer.compressors.base import Compressor, concatenate
from vgc_chainer.compressors.norms import norms_problem, to_float32
from vgc_chainer.compressors.philox import Uniforms
from vgc_chainer.compressors.reduction import tree_sum


class TernGradCompressor(Compressor):
    """Unbiased ternary values per parameter array, after clipping.

    Args:
        clip: Clipping bound in standard deviations, > 0; 2.5 in TernGrad. Larger clips less (less
            bias) and sends fewer, larger values.
        seed: Seed of the rounding; each rank has its own stream.

    Raises:
        ValueError: A hyperparameter is out of range.
    """

    name = 'terngrad'

    def __init__(self, clip=2.5, seed=0):
        super().__init__()
        self.clip = options.positive('clip', clip)
        self.seed = options.integer('seed', seed, 0, 2**32 - 1)

    def hyperparameters(self):
        return {'clip': self.clip, 'seed': self.seed}

    def _table_words(self):
        return len(self.layout)

    def _table_problem(self, table):
        return norms_problem(table)

    def _encode(self, gradients, moments, scale):
        xp = self.xp
        tops = xp.zeros(self._table_words(), np.float32)
        uniforms = Uniforms(xp, self.seed, self.rank, self.step, self.layout.total)
        parts = [
            self._encode_group(group, self._unscaled(gradient, scale), tops, uniforms)
            for group, gradient in enumerate(gradients)
            if gradient is not None and gradient.size
        ]
        columns = zip(*parts) if parts else ((), ())
        indices, negative = (
            concatenate(xp, list(c), t) for c, t in zip(columns, (np.int64, bool))
        )
        return tops.view(np.uint32), indices, negative, None

    def _encode_group(self, group, gradient, tops, uniforms):
        xp = self.xp
        where = self.layout.slice(group)
        gradient = to_float32(xp, gradient)
        bound = self._bound(gradient)
        magnitude = xp.minimum(xp.abs(gradient), bound)
        top = magnitude.max()
        tops[group] = top
        numbers = uniforms(where.start, where.stop)
        # u < |g| / top without the division, which a zero array would not survive.
        chosen = xp.flatnonzero(numbers * top < magnitude)
        return chosen + where.start, gradient[chosen] < 0

    def _bound(self, gradient):
        wide = gradient.astype(np.float64)
        mean = tree_sum(self.xp, wide) / gradient.size
        wide -= mean
        wide *= wide
        sigma = self.xp.sqrt(tree_sum(self.xp, wide) / gradient.size)
        return to_float32(self.xp, sigma * self.clip)

    def _decode(self, table, indices, negative, codes, rank):
        top = table.view(np.float32)[self._groups_of(indices)]
        return self.xp.where(negative, -top, top).astype(self.layout.state_dtype)
