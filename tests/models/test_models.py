import chainer
import chainer.functions as F
import numpy as np
import pytest

from vgc_chainer.models import VGG, DigitsNet


@pytest.mark.parametrize(
    ('network', 'parameters', 'arrays'), [(VGG, 14_987_200, 43), (DigitsNet, 94_186, 11)]
)
def test_number_of_parameters(network, parameters, arrays):
    model = network()
    assert model.count_params() == parameters
    assert len(list(model.params())) == arrays
    # All are there before the first forward pass: the first broadcast sees every weight.
    assert all(param.is_initialized for param in model.params())


def test_vgg_layers():
    model = VGG()
    shapes = {name: param.shape for name, param in model.namedparams()}
    widths = [shape[0] for name, shape in sorted(shapes.items()) if name.endswith('conv/W')]
    assert widths == [64] * 2 + [128] * 2 + [256] * 3 + [512] * 6
    assert all(s[2:] == (3, 3) for name, s in shapes.items() if name.endswith('conv/W'))
    assert shapes['/fc1/W'] == (512, 512)
    assert shapes['/fc2/W'] == (10, 512)
    # BatchNorm's beta is the only thing like a bias.
    assert not [name for name in shapes if name.endswith('/b')]


@pytest.mark.parametrize(('network', 'shape'), [(VGG, (3, 32, 32)), (DigitsNet, (1, 8, 8))])
@pytest.mark.parametrize('n_classes', [10, 7])
def test_forward_and_backward(network, shape, n_classes):
    np.random.seed(0)
    model = network(n_classes=n_classes)
    x = np.random.rand(4, *shape).astype(np.float32)
    model.cleargrads()
    y = model(x)
    assert y.shape == (4, n_classes)
    assert y.dtype == np.float32
    F.softmax_cross_entropy(y, np.arange(4, dtype=np.int32)).backward()
    for name, param in model.namedparams():
        assert param.grad.shape == param.shape, name
        assert np.isfinite(param.grad).all(), name
        assert np.abs(param.grad).max() > 0, name


@pytest.mark.parametrize(('network', 'shape'), [(VGG, (3, 32, 32)), (DigitsNet, (1, 8, 8))])
def test_dropout_and_batch_statistics_are_for_training_only(network, shape):
    np.random.seed(0)
    model = network()
    x = np.random.rand(4, *shape).astype(np.float32)
    assert not np.array_equal(model(x).array, model(x).array)
    with chainer.using_config('train', False):
        together = model(x).array
        np.testing.assert_array_equal(together, model(x).array)
        np.testing.assert_allclose(together[:2], model(x[:2]).array, rtol=1e-4, atol=1e-5)
