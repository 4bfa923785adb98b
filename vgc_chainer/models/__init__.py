"""The networks that this project's training scripts use; plain Chainer, no compression inside."""

from vgc_chainer.models.digits import DigitsNet
from vgc_chainer.models.vgg import VGG

__all__ = ['DigitsNet', 'VGG']
