"""Normalisations: y = gamma * x_hat + beta.

The contribution of sample z to beta is the sum of gy_z over positions, that to gamma the sum of
gy_z * x_hat_z. With BatchNorm the samples interact through the batch statistics; these count as
constants (PAPER.md section 12, [C]). The contributions add up to the ordinary gradient exactly.

ChainerMN's MultiNodeBatchNormalization averages the gradients of gamma and beta over its p ranks
inside the backward pass: ``g = sum over ranks of g_k / p``. The second moment that belongs to it
is ``sum over ranks of s_k / p^2``, of which ``s_k / p`` is this rank's unbiased estimate [D].
"""

import chainer
import numpy as np
from chainer.functions.normalization.batch_normalization import (
    BatchNormalization,
    FixedBatchNormalization,
)
from chainer.functions.normalization.group_normalization import GroupNormalization
from chainer.functions.normalization.layer_normalization import LayerNormalization

from vgc_chainer.second_moment.registry import register
from vgc_chainer.second_moment.terms import SampleTerm, widened


def _over_samples(function, index, shape):
    """Statistics are shared by the samples, not kept for each of them."""
    return 0 not in function.key_axis


@register(BatchNormalization, applies=_over_samples)
def batch_normalization(use):
    function = use.function
    mean, inv_std = function.mean, function.inv_std
    if inv_std is None or mean is None:  # some back ends keep them to themselves
        x = widened(use.in_data[0])
        mean = x.mean(axis=function.axis)
        inv_std = 1 / (x.var(axis=function.axis) + function.eps) ** 0.5
    term = _scale_and_shift(use, mean, inv_std)
    comm = getattr(getattr(function, '_impl', None), 'comm', None)
    return term if comm is None else SampleTerm(term.c / np.sqrt(np.float32(comm.size)))


@register(FixedBatchNormalization, applies=_over_samples)
def fixed_batch_normalization(use):
    mean, var = use.in_data[3], use.in_data[4]
    return _scale_and_shift(use, mean, 1 / (widened(var) + use.function.eps) ** 0.5)


def _scale_and_shift(use, mean, inv_std):
    x, gy = use.in_data[0], widened(use.out_grad[0])
    function = use.function
    axes = tuple(i for i in range(1, gy.ndim) if i not in function.key_axis)
    if use.index == 1:
        gy = gy * (widened(x) - mean[function.expander])
    c = gy.sum(axis=axes) if axes else gy
    return SampleTerm(c if use.index == 2 else c * inv_std)


@register(GroupNormalization)
def group_normalization(use):
    x, gy = widened(use.in_data[0]), widened(use.out_grad[0])
    n, channels = x.shape[:2]
    c = gy.reshape(n, channels, -1)
    if use.index == 1:
        groups = use.function.groups
        c = c * _normalized(x.reshape(n * groups, -1), use.function.eps).reshape(c.shape)
    return SampleTerm(c.sum(axis=2))


@register(LayerNormalization)
def layer_normalization(use):
    c = widened(use.out_grad[0])
    if use.index == 1:
        c = c * _normalized(widened(use.in_data[0]), use.function.eps)
    return SampleTerm(c.reshape(use.n_samples, -1, c.shape[1]).sum(axis=1))


def _normalized(rows, eps):
    """Each row with mean 0 and variance 1."""
    xp = chainer.backend.get_array_module(rows)
    rows = rows - rows.mean(axis=1, keepdims=True)
    return rows / xp.sqrt(xp.square(rows).mean(axis=1, keepdims=True) + rows.dtype.type(eps))
