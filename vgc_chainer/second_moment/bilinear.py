"""Bilinear layers: y_l = sum_jk e1_j W_jkl e2_k + e1 V1 + e2 V2 + b.

The contribution of sample z to W is ``e1_z (x) e2_z (x) gy_z``, an outer product of e1_z and
``e2_z (x) gy_z``; to V1 and V2 it is ``e_z^T gy_z``; to b, gy_z. The squares factorise as they do
for linear layers.
"""

import chainer
from chainer.functions.connection.bilinear import BilinearFunction

from vgc_chainer.second_moment.registry import register
from vgc_chainer.second_moment.terms import OuterTerm, SampleTerm


def _shared_by_all_samples(function, index, shape):
    return index >= 2


@register(BilinearFunction, applies=_shared_by_all_samples)
def bilinear(use):
    gy = use.out_grad[0]
    n = len(gy)
    if use.index == 5:
        return SampleTerm(gy)
    e1, e2 = (e.reshape(n, -1) for e in use.in_data[:2])
    left, right = {2: (e1, _flat_outer(e2, gy)), 3: (e1, gy), 4: (e2, gy)}[use.index]

    def factors(start, stop):
        return tuple(f[start:stop, None, :, None] for f in (left, right))

    return OuterTerm(
        factors, n, 1, left.shape[1], right.shape[1], 1, use.shape, gy.dtype,
        chainer.backend.get_array_module(gy),
    )  # fmt: skip


def _flat_outer(a, b):
    return (a[:, :, None] * b[:, None, :]).reshape(len(a), -1)
