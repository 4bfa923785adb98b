"""Variance-based sparsification: Algorithm 1 of the paper (PAPER.md section 4, [R]).

Per worker and element, r = v = 0 at the start. In every step::

    r += g ;  v += s
    if r^2 > alpha * v:  encode(r) ; r = 0 ; v = 0
    else:                v *= zeta

g is the gradient of the mean loss over the worker's mini-batch and s the second moment of the
per-sample contributions to it. r is not decayed. What is sent is r rounded to a power of two with
a 3-bit code and an exponent shared by the group (:mod:`.quantizer`).

The test is evaluated in float64, so that neither r^2 nor alpha * v overflows or vanishes for
any float32 residual.
"""

import numpy as np

from vgc_chainer.compressors import options
from vgc_chainer.compressors.quantizer import MAX_CODE, NO_EXPONENT, dequantize, quantize
from vgc_chainer.compressors.residual import ResidualCompressor
from vgc_chainer.errors import WireError


def is_unambiguous(r, v, alpha):
    """The criterion alpha * v < r^2 (PAPER.md section 3, [R]) as bool array, in float64."""
    square = r.astype(np.float64)
    square *= square
    return square > v.astype(np.float64) * alpha


class VarianceCompressor(ResidualCompressor):
    """Sends an element once its accumulated gradient is unambiguous.

    Args:
        alpha: Number of standard errors squared that r must exceed, > 0; larger sends less. The
            paper uses 1, 1.5 and 2 [R].
        zeta: Decay of v of an element that is not sent, in (0, 1]; smaller forgets old variance
            sooner and sends more. 0.999 in every experiment of the paper [R].
        unrepresentable: What happens to a selected element that is more than 2^7 times smaller
            than the largest of its group: ``'drop'``, r = v = 0, the literal reading of the
            paper; ``'hold'``, r and v stay [C].
        error_feedback: Keep the quantisation error of a sent element in r instead of
            discarding it, as the paper does [C].

    Raises:
        ValueError: A hyperparameter is out of range.
    """

    name = 'variance'
    uses_second_moment = True
    state_names = ('r', 'v')
    code_bits = 3

    def __init__(self, alpha=1.5, zeta=0.999, unrepresentable='drop', error_feedback=False):
        super().__init__()
        self.alpha = options.positive('alpha', alpha)
        self.zeta = options.fraction('zeta', zeta)
        self.unrepresentable = options.choice('unrepresentable', unrepresentable, 'drop', 'hold')
        self.error_feedback = bool(error_feedback)

    def hyperparameters(self):
        return {
            'alpha': self.alpha,
            'zeta': self.zeta,
            'unrepresentable': self.unrepresentable,
            'error_feedback': self.error_feedback,
        }

    def _rule(self, r, v):
        chosen = self.xp.flatnonzero(is_unambiguous(r, v, self.alpha))
        values, variances = self._saturated(r[chosen]), v[chosen]
        v *= v.dtype.type(self.zeta)
        r[chosen] = 0
        v[chosen] = 0
        return chosen, values, variances

    def _encode(self, gradients, moments, scale):
        xp = self.xp
        indices, values, variances = self._select(gradients, moments, scale)
        groups = self._groups_of(indices)
        exponents, d = quantize(values, groups, len(self.layout), xp)
        fits = d <= MAX_CODE
        if self.unrepresentable == 'hold':
            held = ~fits
            self.r[indices[held]] = values[held]
            self.v[indices[held]] = variances[held]
        elif self.error_feedback:
            self.r[indices[~fits]] = values[~fits]
        indices, values, d, groups = indices[fits], values[fits], d[fits], groups[fits]
        if self.error_feedback:
            sent = dequantize(values < 0, d, exponents, groups, values.dtype, xp)
            self.r[indices] = values - sent
        return self._pack_table(exponents), indices, values < 0, d

    def _decode(self, table, indices, negative, codes, rank):
        exponents = table.view(np.int16)
        groups = self._groups_of(indices)
        if bool((exponents[groups] == NO_EXPONENT).any()):
            raise WireError(f'rank {rank} sent elements of a group without exponent')
        return dequantize(negative, codes, exponents, groups, self.layout.state_dtype, self.xp)

    def _table_words(self):
        return (len(self.layout) + 1) // 2

    def _table_problem(self, table):
        exponents = table.view(np.int16)[: len(self.layout)]
        info = np.finfo(self.layout.state_dtype)
        # finfo counts from the bit before the point: the smallest denormal is 2^(minexp - nmant).
        possible = (exponents >= info.minexp - info.nmant) & (exponents < info.maxexp)
        if not bool((possible | (exponents == NO_EXPONENT)).all()):
            return f'an exponent that no {self.layout.state_dtype} has'
        return None

    def _pack_table(self, exponents):
        padded = self.xp.full(2 * self._table_words(), int(NO_EXPONENT), np.int16)
        padded[: exponents.size] = exponents
        return padded.view(np.uint32)
