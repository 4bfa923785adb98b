"""Bias, Scale and PReLU, and sums and products written out: y = x + p, y = x * p, p broadcast.

The contribution of sample z to p is gy_z, for a product gy_z * x_z, summed over the axes
along which p was broadcast. PReLU is a product where x < 0.
"""

from chainer.functions.activation.prelu import PReLUFunction
from chainer.functions.math.basic_math import Add, Mul, MultiAdd, Sub

from vgc_chainer.second_moment.registry import register
from vgc_chainer.second_moment.terms import SampleTerm, widened


def _constant_over_samples(function, index, shape):
    """The parameter is the same for all samples, that is, broadcast along axis 0."""
    y = function.outputs[0]()
    if y is None or not y.shape:
        return False
    return len(shape) < len(y.shape) or shape[0] == 1


@register(Add, MultiAdd, Sub, broadcasts=True, applies=_constant_over_samples)
def add(use):
    # The sign of a subtrahend does not matter for squares, but for a sum over several uses.
    sign = -1 if isinstance(use.function, Sub) and use.index == 1 else 1
    return _reduced(use, sign * widened(use.out_grad[0]))


@register(Mul, broadcasts=True, applies=_constant_over_samples)
def multiply(use):
    return _reduced(use, widened(use.out_grad[0]) * widened(use.in_data[1 - use.index]))


def _slope(function, index, shape):
    return index == 1


@register(PReLUFunction, applies=_slope)
def prelu(use):
    x = widened(use.in_data[0])
    c = widened(use.out_grad[0]) * (x * (x < 0))
    axes = tuple(range(1 + len(use.shape), c.ndim))
    return SampleTerm(c.sum(axis=axes) if axes else c)


def _reduced(use, c):
    """Sum each sample's contribution over the axes along which the parameter was broadcast."""
    shape = (1,) * (c.ndim - len(use.shape)) + tuple(use.shape)
    axes = tuple(i for i in range(1, c.ndim) if shape[i] == 1 and c.shape[i] != 1)
    if axes:
        c = c.sum(axis=axes, keepdims=True)
    rows_per_sample = len(c) // use.n_samples
    if rows_per_sample > 1:
        c = c.reshape((use.n_samples, rows_per_sample) + c.shape[1:]).sum(axis=1)
    return SampleTerm(c.reshape((use.n_samples,) + tuple(use.shape)))
