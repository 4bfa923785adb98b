"""Threshold compression of Strom (2015), a baseline of the paper (PAPER.md section 8, [V]).

Per worker and element, r = 0 at the start. In every step::

    r += g
    if |r| > tau:  send sign(r) * tau ; r -= sign(r) * tau

One quantum an element and step; the rest stays in r.
"""

from vgc_chainer.compressors import options
from vgc_chainer.compressors.residual import ResidualCompressor


class StromCompressor(ResidualCompressor):
    """Sends the sign of every residual above a fixed threshold.

    Args:
        tau: Threshold and quantum, in units of the gradient, > 0. The paper uses 0.001, 0.01
            and 0.1 [R].

    Raises:
        ValueError: `tau` is out of range.
    """

    name = 'strom'

    def __init__(self, tau=0.01):
        super().__init__()
        self.tau = options.positive('tau', tau)

    def hyperparameters(self):
        return {'tau': self.tau}

    def _quantum(self):
        return self.layout.state_dtype.type(self.tau)

    def _due(self, r, v):
        return self.xp.abs(r) > self._quantum()

    def _rule(self, r, v):
        xp = self.xp
        chosen = xp.flatnonzero(self._due(r, v))
        values = self._saturated(r[chosen])
        r[chosen] = values - xp.copysign(self._quantum(), values)
        return chosen, values

    def _encode(self, gradients, moments, scale):
        indices, values = self._select(gradients, moments, scale)
        return self.xp.empty(0, 'uint32'), indices, values < 0, None

    def _decode(self, table, indices, negative, codes, rank):
        return self.xp.where(negative, -self._quantum(), self._quantum())
