"""Linear layers: y = x W^T + b.

The contribution of sample z to W is ``gy_z^T x_z``, an outer product, so
``s_W = (gy^2)^T (x^2)``: one more matrix product of the size of the gradient's (PAPER.md
section 10). The contribution to b is ``gy_z``.

Where several rows belong to one sample (``n_batch_axes`` > 1, or a user's own (b, t, d) ->
(b * t, d)) they are positions of it: ``c_z = sum_t gy_zt^T x_zt``.
"""

import chainer
from chainer.functions.connection.linear import LinearFunction, LinearGradData

from vgc_chainer.second_moment.registry import register
from vgc_chainer.second_moment.terms import OuterTerm, SampleTerm, widened


@register(LinearFunction)
def linear(use):
    gy = use.out_grad[0]
    if use.index == 2:
        return SampleTerm(widened(gy).reshape(use.n_samples, -1, gy.shape[1]).sum(axis=1))
    return _outer(gy, use.in_data[0], use.n_samples)


@register(LinearGradData)
def gradient_of_linear(use):
    """y = x W, of which double backpropagation consists (gradient penalties)."""
    return _outer(use.in_data[1], use.out_grad[0], use.n_samples)


def _outer(gy, x, n):
    """Contributions ``sum over rows of gy^T x`` of n samples."""
    positions = len(gy) // n
    x = x.reshape(len(gy), -1)

    def factors(start, stop):
        rows = slice(start * positions, stop * positions)
        return tuple(
            f[rows].reshape(stop - start, 1, positions, -1).swapaxes(2, 3) for f in (gy, x)
        )

    return OuterTerm(
        factors, n, 1, gy.shape[1], x.shape[1], positions, (gy.shape[1], x.shape[1]),
        gy.dtype, chainer.backend.get_array_module(gy),
    )  # fmt: skip
