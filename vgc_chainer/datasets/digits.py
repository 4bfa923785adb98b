"""The 8x8 handwritten digits that scikit-learn ships: real images that need no download."""

import numpy as np
from chainer.datasets import TupleDataset

N_VALIDATION = 360  # a fifth of the 1,797 images, 36 of each digit


def get_digits():
    """The 1,797 digits, split into a training and a validation set that never change.

    The validation set has the last 36 images of each digit. scikit-learn keeps the images in the
    order in which they were collected, writer after writer, so these come mostly from writers
    whom the training set does not have: a random split would be easier, and would make
    accuracies look better than they are.

    Returns:
        tuple: Training set (1,437 images) and validation set (360), each a ``TupleDataset`` of
            images
        (1, 8, 8), float32 in [0, 1], and labels, int32 in 0..9.

    Raises:
        ImportError: scikit-learn, which holds the images, is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError(
            'the 8x8 digits come with scikit-learn: pip install scikit-learn'
        ) from error
    raw = load_digits()
    images = (raw.images / 16).astype(np.float32)[:, np.newaxis]  # 17 grey levels, 0 to 16
    labels = raw.target.astype(np.int32)
    is_validation = np.zeros(len(labels), bool)
    for digit in range(10):
        is_validation[np.flatnonzero(labels == digit)[-N_VALIDATION // 10 :]] = True
    return (
        TupleDataset(images[~is_validation], labels[~is_validation]),
        TupleDataset(images[is_validation], labels[is_validation]),
    )
