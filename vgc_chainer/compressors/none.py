"""No compression: every element as a float, through the same wire. The baseline."""

import numpy as np

from vgc_chainer.compressors.base import Compressor


class NoneCompressor(Compressor):
    """Sends all gradients dense, in the state dtype (float32 unless the model is float64).

    It moves p times the bytes of an allreduce and is meant for comparison and tests.
    """

    name = 'none'

    def hyperparameters(self):
        return {}

    def _dense_groups(self, gradients, moments):
        return [k for k, g in enumerate(gradients) if g is not None]

    def _encode(self, gradients, moments, scale):
        xp = self.xp
        return xp.empty(0, np.uint32), xp.empty(0, np.int64), xp.empty(0, bool), None
