"""What the networks of this package are built from."""

import chainer
import chainer.functions as F
import chainer.links as L


class ConvBNReLU(chainer.Chain):
    """3x3 convolution without bias, padded to keep the image size, then BatchNorm and ReLU.

    The bias is left out because BatchNorm's own beta makes it redundant.

    Args:
        in_channels (int): Channels of the input.
        out_channels (int): Channels of the output.
    """

    def __init__(self, in_channels, out_channels):
        super().__init__()
        with self.init_scope():
            self.conv = L.Convolution2D(in_channels, out_channels, ksize=3, pad=1, nobias=True)
            self.bn = L.BatchNormalization(out_channels)

    def forward(self, x):
        """Maps (batch, in_channels, h, w) to (batch, out_channels, h, w)."""
        return F.relu(self.bn(self.conv(x)))
