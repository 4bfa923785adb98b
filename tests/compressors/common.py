"""Settings and small helpers shared by the compressor tests."""

import numpy as np

from vgc_chainer.compressors import COMPRESSORS
from vgc_chainer.layout import Layout

#: Name and options of one setting of every compressor, and of the options worth a test.
SETTINGS = [
    ('variance', {'alpha': 1.0}),
    ('variance', {'alpha': 2.0, 'zeta': 0.9}),
    ('variance', {'alpha': 1.0, 'unrepresentable': 'hold'}),
    ('variance', {'alpha': 1.0, 'error_feedback': True}),
    ('variance', {'alpha': 1.0, 'unrepresentable': 'hold', 'error_feedback': True}),
    ('hybrid', {'tau': 0.05, 'alpha': 1.0}),
    ('strom', {'tau': 0.05}),
    ('qsgd', {'bits': 2, 'bucket_size': 128}),
    ('qsgd', {'bits': 4, 'bucket_size': 500, 'norm': 'max'}),
    ('qsgd', {'bits': 8, 'bucket_size': 7}),
    ('terngrad', {}),
    ('none', {}),
]

SHAPES = [(30, 70), (0,), (1,), (500,), (3, 3, 3)]


def layout_of(shapes=SHAPES, dtype=np.float32):
    return Layout((f'/p{k}', shape, dtype) for k, shape in enumerate(shapes))


def prepared(name, options, layout, rank=0):
    compressor = COMPRESSORS[name](**options)
    compressor.prepare(layout, np, rank)
    return compressor


def random_step(layout, rng, scale=0.1, noise=1.0):
    """Gradients and second moments with s >= g^2 / b as Cauchy-Schwarz demands (b = 8)."""
    gradients = [
        (rng.standard_normal(shape) * scale).astype(dtype)
        for shape, dtype in zip(layout.shapes, layout.dtypes)
    ]
    moments = [
        (g.astype(layout.state_dtype) ** 2 / 8)
        * (1 + noise * rng.random(g.shape)).astype(layout.state_dtype)
        for g in gradients
    ]
    return gradients, moments


def flat(arrays, layout):
    return np.concatenate([np.asarray(a, layout.state_dtype).reshape(-1) for a in arrays])


def decoded(compressor, message):
    """What a receiver adds for this message, as flat array."""
    out = np.zeros(compressor.layout.total, compressor.layout.state_dtype)
    compressor.accumulate(message, out)
    return out
