"""Convolutions and transposed convolutions of any dimension, grouped, dilated, strided.

With the windows of x as columns (im2col), column p of sample z meets output position p:

    c_z[o, i, k] = sum_p gy_z[o, p] * x_z[i, window k of p]

a sum of outer products over positions. A transposed convolution is the same with x and gy in
each other's place: ``c_z[i, o, k] = sum_p x_z[i, p] * gy_z[o, window k of p]``. Depthwise
convolutions are grouped ones in Chainer. A bias receives the sum of gy over positions.
"""

import chainer
import numpy as np
from chainer.functions.connection.convolution_2d import Convolution2DFunction
from chainer.functions.connection.convolution_nd import ConvolutionND
from chainer.functions.connection.deconvolution_2d import Deconvolution2DFunction
from chainer.functions.connection.deconvolution_nd import DeconvolutionND

from vgc_chainer.second_moment.registry import register
from vgc_chainer.second_moment.terms import OuterTerm, SampleTerm


@register(Convolution2DFunction, ConvolutionND)
def convolution(use):
    gy = use.out_grad[0]
    if use.index == 2:
        return _bias(gy)
    return _weight(use, image=use.in_data[0], positions=gy)


@register(Deconvolution2DFunction, DeconvolutionND)
def deconvolution(use):
    gy = use.out_grad[0]
    if use.index == 2:
        return _bias(gy)
    return _weight(use, image=gy, positions=use.in_data[0])


def _bias(gy):
    return SampleTerm(_sum_positions(gy))


def _sum_positions(gy):
    if gy.dtype == np.float16:
        gy = gy.astype(np.float32)
    return gy.reshape(gy.shape[0], gy.shape[1], -1).sum(axis=2)


def _weight(use, image, positions):
    """Term of a weight: `positions` holds one value a window, `image` is cut into windows."""
    function, shape = use.function, use.shape
    stride, pad, dilate = _geometry(function)
    groups, kernel = function.groups, shape[2:]
    n, rows = len(image), positions.shape[1] // groups
    columns = image.shape[1] // groups * int(np.prod(kernel))
    count = int(np.prod(positions.shape[2:]))
    xp = chainer.backend.get_array_module(image)

    def factors(start, stop):
        a = positions[start:stop].reshape(stop - start, groups, rows, count)
        b = windows(image[start:stop], positions.shape[2:], kernel, stride, pad, dilate, xp)
        return a, b.reshape(stop - start, groups, columns, count)

    return OuterTerm(factors, n, groups, rows, columns, count, shape, image.dtype, xp)


def windows(image, out, kernel, stride, pad, dilate, xp):
    """Windows of a padded image.

    Args:
        image: (n, channels, *size).
        out: Number of windows along each spatial axis. What lies beyond the padded image, with
            cover_all or an outsize, counts as zeros.
        kernel, stride, pad, dilate: One number a spatial axis.

    Returns:
        (n, channels, *kernel, *out), a view where the image needed no padding.
    """
    n, channels, size = image.shape[0], image.shape[1], image.shape[2:]
    needed = [(o - 1) * s + (k - 1) * d + 1 for o, s, k, d in zip(out, stride, kernel, dilate)]
    after = [max(0, need - p - length) for need, p, length in zip(needed, pad, size)]
    if any(pad) or any(after):
        padded = xp.zeros(
            (n, channels) + tuple(p + s + a for p, s, a in zip(pad, size, after)), image.dtype
        )
        inside = tuple(slice(p, p + s) for p, s in zip(pad, size))
        padded[(slice(None), slice(None)) + inside] = image
        image = padded
    steps = image.strides[2:]
    return xp.lib.stride_tricks.as_strided(
        image,
        (n, channels) + tuple(kernel) + tuple(out),
        image.strides[:2]
        + tuple(step * d for step, d in zip(steps, dilate))
        + tuple(step * s for step, s in zip(steps, stride)),
    )


def _geometry(function):
    if hasattr(function, 'stride'):
        return function.stride, function.pad, function.dilate
    return (
        (function.sy, function.sx),
        (function.ph, function.pw),
        (function.dy, function.dx),
    )
