"""The network of the paper's CIFAR-10 experiment, as far as it is known.

The paper says "VGG-like" [R: recalled, not re-checked]. Its recipe (batch 64, learning rate 0.05
halved every 25 epochs, 300 epochs, weight decay 5e-4, pixels in [0, 1]) is the one of Chainer's
own CIFAR example times eight workers, so that example's network is the probable one [V,
circumstantial: the example was read, that the paper used it was not]:

    convolutions, each 3x3 without bias and followed by BatchNorm and ReLU, "d" for dropout:
    64  d.3  64        pool
    128 d.4  128       pool
    256 d.4  256 d.4  256   pool
    512 d.4  512 d.4  512   pool
    512 d.4  512 d.4  512   pool
    d.5  fc 512 without bias, BatchNorm, ReLU  d.5  fc 10 without bias

14,987,200 parameters in 43 arrays for 10 classes and images of 3 x 32 x 32.
"""

import chainer
import chainer.functions as F
import chainer.links as L

from vgc_chainer.models.blocks import ConvBNReLU

# One row a stage; the stage ends with 2x2 max pooling. The dropout ratio stands between two
# convolutions.
STAGES = (
    (0.3, (64, 64)),
    (0.4, (128, 128)),
    (0.4, (256, 256, 256)),
    (0.4, (512, 512, 512)),
    (0.4, (512, 512, 512)),
)


class VGG(chainer.Chain):
    """VGG-like network for images of 32x32: 13 convolutions and 2 fully connected layers.

    Args:
        n_classes (int): Width of the last layer.
        in_channels (int): Channels of the images.
    """

    def __init__(self, n_classes=10, in_channels=3):
        super().__init__()
        self._stages = []  # [(dropout ratio, [names of the blocks]), ...], in order
        with self.init_scope():
            for i, (dropout, widths) in enumerate(STAGES, start=1):
                names = [f'block{i}_{j}' for j in range(1, len(widths) + 1)]
                for name, width in zip(names, widths):
                    setattr(self, name, ConvBNReLU(in_channels, width))
                    in_channels = width
                self._stages.append((dropout, names))
            self.fc1 = L.Linear(in_channels, 512, nobias=True)
            self.bn_fc1 = L.BatchNormalization(512)
            self.fc2 = L.Linear(512, n_classes, nobias=True)

    def forward(self, x):
        """Maps images (batch, in_channels, 32, 32) to logits (batch, n_classes)."""
        h = x
        for dropout, names in self._stages:
            for j, name in enumerate(names):
                if j > 0:
                    h = F.dropout(h, ratio=dropout)
                h = self[name](h)
            h = F.max_pooling_2d(h, ksize=2, stride=2)
        h = F.dropout(h, ratio=0.5)
        h = F.relu(self.bn_fc1(self.fc1(h)))
        h = F.dropout(h, ratio=0.5)
        return self.fc2(h)
