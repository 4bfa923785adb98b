"""Second moments of the per-sample gradient contributions, during an ordinary backward pass.

For a parameter and a mini-batch whose loss is the mean over samples, c_z is the contribution of
sample z to the gradient, ``g = sum c_z`` and ``s = sum c_z^2`` (PAPER.md section 2). One file a
family of layers; its docstring derives the formula.

Rules of users' own functions::

    from vgc_chainer.second_moment import SampleTerm, register

    @register(MyScaleFunction)                      # y = x * w, w of shape (n,)
    def my_scale(use):
        x, gy = use.in_data[0], use.out_grad[0]
        return SampleTerm(x * gy)                   # (samples, n): c_z, sample axis first
"""

from vgc_chainer.second_moment import (  # noqa: F401  (each registers its rules)
    bilinear,
    convolution,
    elementwise,
    embed_id,
    linear,
    normalization,
)
from vgc_chainer.second_moment.hook import Coverage, SecondMomentHook, format_coverage
from vgc_chainer.second_moment.registry import UnsupportedFunctionError, register
from vgc_chainer.second_moment.terms import EmbedTerm, OuterTerm, SampleTerm, Term

__all__ = [
    'Coverage',
    'EmbedTerm',
    'OuterTerm',
    'SampleTerm',
    'SecondMomentHook',
    'Term',
    'UnsupportedFunctionError',
    'format_coverage',
    'register',
]
