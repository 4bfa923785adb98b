"""Variance criterion and Strom's threshold together: Algorithm 2 (PAPER.md section 7, [R]).

Per worker and element, r = v = 0 at the start. In every step::

    r += g ;  v += s
    if |r| > tau and r^2 > alpha * v:
        S = sign(r) * tau ;  send S
        v = max(v - 2 * S * r + S^2, 0)        # r before the subtraction
        r = r - S
    else:  v *= zeta

The correction of v turns a square a^2 that it holds into (a - S)^2. It is evaluated in float64 and
rounded once.
"""

import numpy as np

from vgc_chainer.compressors import options
from vgc_chainer.compressors.strom import StromCompressor
from vgc_chainer.compressors.variance import is_unambiguous


class HybridCompressor(StromCompressor):
    """Sends one quantum of an element that is large and unambiguous.

    Args:
        tau: Threshold and quantum, in units of the gradient, > 0 (paper: 0.01 and 0.1 [R]).
        alpha: As for the variance compressor, > 0 (paper: 2 [R]).
        zeta: Decay of v of an element that is not sent, in (0, 1] (paper: 0.999 [R]).

    Raises:
        ValueError: A hyperparameter is out of range.
    """

    name = 'hybrid'
    uses_second_moment = True
    state_names = ('r', 'v')

    def __init__(self, tau=0.1, alpha=2.0, zeta=0.999):
        super().__init__(tau)
        self.alpha = options.positive('alpha', alpha)
        self.zeta = options.fraction('zeta', zeta)

    def hyperparameters(self):
        return {'tau': self.tau, 'alpha': self.alpha, 'zeta': self.zeta}

    def _due(self, r, v):
        return super()._due(r, v) & is_unambiguous(r, v, self.alpha)

    def _rule(self, r, v):
        due = self._due(r, v)
        chosen = self.xp.flatnonzero(due)
        values = self._saturated(r[chosen])
        quanta = self.xp.copysign(self._quantum(), values)
        corrected = corrected_moment(v[chosen], values, quanta, self.xp)
        v *= v.dtype.type(self.zeta)
        v[chosen] = corrected
        r[chosen] = values - quanta
        return chosen, values


def corrected_moment(v, r, quanta, xp):
    """``max(v - 2 S r + S^2, 0)`` in float64, rounded to the dtype of `v`."""
    wide = quanta.astype(np.float64)
    square = wide * wide
    wide *= r
    wide *= 2
    return xp.maximum(v - wide + square, 0).astype(v.dtype)
