"""A small model and helpers for the MPI checks."""

import hashlib

import chainer
import chainer.functions as F
import chainer.links as L
import numpy as np
from mpi4py import MPI

import vgc_chainer

world = MPI.COMM_WORLD

#: One setting of every compressor.
SETTINGS = [
    ('variance', {'alpha': 1.0}),
    ('hybrid', {'tau': 0.01, 'alpha': 1.0}),
    ('strom', {'tau': 0.01}),
    ('qsgd', {'bits': 3, 'bucket_size': 16}),
    ('terngrad', {}),
    ('none', {}),
]


class Net(chainer.Chain):
    """Convolution, BatchNorm, two dense layers; 6x6 images of two channels, three classes."""

    def __init__(self, seed=0, lazy=False, unused=False):
        super().__init__()
        np.random.seed(seed)
        with self.init_scope():
            self.conv = L.Convolution2D(2, 4, 3)
            self.bn = L.BatchNormalization(4)
            self.fc1 = L.Linear(None if lazy else 64, 10)
            self.fc2 = L.Linear(10, 3)
            if unused:
                self.unused = L.Linear(5, 5)

    def forward(self, x):
        h = F.relu(self.bn(self.conv(x)))
        return self.fc2(F.relu(self.fc1(h)))


def batch(step, rank=None, n=6, dtype=np.float32):
    rng = np.random.default_rng([step, world.rank if rank is None else rank])
    x = rng.standard_normal((n, 2, 6, 6)).astype(dtype)
    return x, rng.integers(0, 3, n).astype(np.int32)


def backward(model, step, loss_scale=None):
    x, t = batch(step)
    loss = F.softmax_cross_entropy(model(x), t)
    model.cleargrads()
    loss.backward(loss_scale=loss_scale)
    return float(loss.array)


def created(name, **options):
    return vgc_chainer.create_communicator(name, world, **options)


def fingerprint(model):
    """Hash of all parameters."""
    digest = hashlib.sha256()
    for name, param in sorted(model.namedparams()):
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(param.array).tobytes())
    return digest.hexdigest()


def assert_replicas_identical(model):
    assert len(set(world.allgather(fingerprint(model)))) == 1


def grads(model):
    return {name: param.grad.copy() for name, param in model.namedparams()}
