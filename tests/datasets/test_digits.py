import sys

import numpy as np
import pytest
from chainer.dataset import concat_examples

from vgc_chainer.datasets import get_digits


def test_digits_are_the_1797_real_images():
    train, validation = get_digits()
    assert (len(train), len(validation)) == (1437, 360)
    for part in (train, validation):
        images, labels = concat_examples(part)
        assert images.shape[1:] == (1, 8, 8)
        assert images.dtype == np.float32
        assert labels.dtype == np.int32
        # 17 grey levels from 0 to 1, with the blank and the full one among them.
        np.testing.assert_array_equal(np.unique(images), np.arange(17, dtype=np.float32) / 16)


def test_the_parts_have_every_digit_and_make_up_the_whole():
    raw = pytest.importorskip('sklearn.datasets').load_digits()
    train, validation = (concat_examples(part) for part in get_digits())
    np.testing.assert_array_equal(np.bincount(validation[1]), [36] * 10)
    np.testing.assert_array_equal(
        np.bincount(train[1]) + np.bincount(validation[1]), np.bincount(raw.target)
    )
    images = np.concatenate([train[0], validation[0]]).reshape(-1, 64) * 16
    labels = np.concatenate([train[1], validation[1]])
    assert sorted(map(tuple, np.c_[labels, images])) == sorted(
        map(tuple, np.c_[raw.target, raw.data])
    )


def test_the_split_never_changes():
    first, second = get_digits(), get_digits()
    for a, b in zip(first, second):
        for x, y in zip(concat_examples(a), concat_examples(b)):
            np.testing.assert_array_equal(x, y)


def test_missing_scikit_learn_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, 'sklearn.datasets', None)
    with pytest.raises(ImportError, match='pip install scikit-learn'):
        get_digits()
