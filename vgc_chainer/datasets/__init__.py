"""Data sets as Chainer reads them: a training and a validation set of (image, label)."""

from vgc_chainer.datasets.digits import get_digits

__all__ = ['get_digits']
