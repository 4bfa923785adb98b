"""The frame that variance, hybrid and Strom share: residuals in, selected elements out.

Each of them adds the gradient to a residual r (and the second moment to v), asks a rule which
elements are due, and changes r and v of these and of the others. They differ in the rule alone.
"""

import numpy as np

from vgc_chainer.compressors.base import Compressor


class ResidualCompressor(Compressor):
    """Compressor with a residual `r` and, for some rules, an accumulated second moment `v`.

    A subclass defines ``_rule(r, v)`` over one block.
    """

    state_names = ('r',)

    @property
    def r(self):
        """Residual: what was not sent yet. Flat, state dtype."""
        return self._state['r']

    @property
    def v(self):
        """Accumulated second moment belonging to `r`; None where the rule has none."""
        return self._state.get('v')

    def _rule(self, r, v):
        """Select within a block and update it in place.

        Args:
            r, v: Views of the state, this step's gradient already added.

        Returns:
            Tuple of arrays, the first the selected positions (int64, ascending), the others
            whatever the encoder needs of each of them.
        """
        raise NotImplementedError

    def _select(self, gradients, moments, scale):
        """Accumulate and apply the rule, block by block; positions become flat indices."""
        blocks = list(self._blocks()) or [(0, 0, [])]
        parts = [self._select_block(*block, gradients, moments, scale) for block in blocks]
        columns = zip(*parts)
        return [self.xp.concatenate(list(column)) for column in columns]

    def _select_block(self, start, stop, pieces, gradients, moments, scale):
        r, v = self.r[start:stop], self.v
        v = None if v is None else v[start:stop]
        untouched, at = [], 0
        for group, first, last in pieces:
            here = slice(at, at + last - first)
            at = here.stop
            gradient = gradients[group]
            if gradient is None:
                untouched.append((here, r[here].copy(), None if v is None else v[here].copy()))
                # A zero residual is never selected, whatever the rule.
                r[here] = 0
                continue
            r[here] += self._unscaled(gradient[first:last], scale)
            if v is not None:
                v[here] += self._unscaled(moments[group][first:last], scale * scale)
        if v is not None:
            # An infinite v would silence its element for ever: inf < inf never holds.
            self.xp.minimum(v, np.finfo(v.dtype).max, out=v)
        selected = self._rule(r, v)
        for here, old_r, old_v in untouched:
            r[here] = old_r
            if v is not None:
                v[here] = old_v
        return (selected[0] + start, *selected[1:])

    def _saturated(self, values):
        """Residuals that overflowed to infinity are sent as the largest finite number."""
        largest = np.finfo(values.dtype).max
        return self.xp.clip(values, -largest, largest)
