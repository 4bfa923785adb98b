"""A small network for 8x8 digits, which a CPU trains in about a minute [C: not the paper's]."""

import chainer
import chainer.functions as F
import chainer.links as L

from vgc_chainer.models.blocks import ConvBNReLU


class DigitsNet(chainer.Chain):
    """Three convolutions with BatchNorm and one fully connected layer, for images of 8x8.

    It has the parts of the paper's network (convolutions without bias, BatchNorm, dropout) at
    less than a hundredth of its size: 94,186 parameters for 10 classes. The mean over positions
    before the last layer is what makes it good at digits of writers whom it has not seen.

    Args:
        n_classes (int): Width of the last layer.
        in_channels (int): Channels of the images.
    """

    def __init__(self, n_classes=10, in_channels=1):
        super().__init__()
        with self.init_scope():
            self.block1 = ConvBNReLU(in_channels, 32)
            self.block2 = ConvBNReLU(32, 64)
            self.block3 = ConvBNReLU(64, 128)
            self.fc = L.Linear(128, n_classes)

    def forward(self, x):
        """Maps images (batch, in_channels, 8, 8) to logits (batch, n_classes)."""
        h = self.block1(x)
        h = F.max_pooling_2d(self.block2(h), ksize=2, stride=2)
        h = F.average(self.block3(h), axis=(2, 3))
        return self.fc(F.dropout(h, ratio=0.25))
