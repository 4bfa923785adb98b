"""Every layer against a loop over single samples."""

import numpy as np
import pytest

from tests.second_moment.common import SETTINGS, assert_close, by_loop, observed
from vgc_chainer.second_moment import Term, terms

every_setting = pytest.mark.parametrize('setting', SETTINGS.values(), ids=SETTINGS)


@every_setting
@pytest.mark.parametrize(('dtype', 'rtol'), [(np.float32, 1e-5), (np.float64, 1e-10)])
def test_equals_a_loop_over_samples(setting, dtype, rtol):
    link, x, weights = setting.make(dtype)
    moments, _ = observed(link, lambda: setting.loss(link, x, weights, len(x)).backward())
    gradients = {name: param.grad.copy() for name, param in link.namedparams()}
    expected, total = by_loop(setting, link, x, weights)
    for name in expected:
        assert moments[name].dtype == dtype and moments[name].shape == gradients[name].shape
        assert_close(moments[name], expected[name], rtol, name)
        assert_close(gradients[name], total[name], rtol, name)


@every_setting
def test_contributions_add_up_to_the_gradient(setting, monkeypatch):
    seen = {}
    original = terms.total_square_sum

    def spy(parts, memory, what):
        seen[what] = parts
        return original(parts, memory, what)

    monkeypatch.setattr('vgc_chainer.second_moment.hook.total_square_sum', spy)
    link, x, weights = setting.make(np.float64)
    observed(link, lambda: setting.loss(link, x, weights, len(x)).backward())
    for name, param in link.namedparams():
        assert all(isinstance(part, Term) for part in seen[name])
        c = sum(part.per_sample(0, len(x)) for part in seen[name])
        assert c.shape == (len(x), *param.shape)
        assert_close(c.sum(axis=0), param.grad, 1e-10, name)


@every_setting
def test_duplicating_every_sample_halves_the_moment(setting):
    link, x, weights = setting.make(np.float64)
    once, _ = observed(link, lambda: setting.loss(link, x, weights, len(x)).backward())
    x, weights = np.concatenate([x, x]), np.concatenate([weights, weights])
    twice, _ = observed(link, lambda: setting.loss(link, x, weights, len(x)).backward())
    for name in once:
        assert_close(twice[name], once[name] / 2, 1e-10, name)


@every_setting
def test_a_tiny_memory_budget_changes_nothing(setting):
    link, x, weights = setting.make(np.float64)

    def run():
        setting.loss(link, x, weights, len(x)).backward()

    plenty, _ = observed(link, run)
    little, _ = observed(link, run, memory=1)
    for name in plenty:
        assert_close(little[name], plenty[name], 1e-12, name)


@every_setting
@pytest.mark.parametrize('scale', [64.0])
def test_the_loss_scale_is_carried_squared(setting, scale):
    link, x, weights = setting.make(np.float64)
    plain, _ = observed(link, lambda: setting.loss(link, x, weights, len(x)).backward())
    scaled, _ = observed(
        link, lambda: setting.loss(link, x, weights, len(x)).backward(loss_scale=scale)
    )
    for name in plain:
        np.testing.assert_array_equal(scaled[name], plain[name] * scale**2)


@every_setting
def test_half_precision(setting):
    """Moments are float32, close to those in double precision, and do not underflow."""
    link, x, weights = setting.make(np.float16)
    wide, wide_x, wide_weights = setting.make(np.float64)
    for name, param in wide.namedparams():
        param.array[...] = dict(link.namedparams())[name].array
    if x.dtype == np.float16:
        wide_x = x.astype(np.float64)
    half, _ = observed(link, lambda: setting.loss(link, x, weights, len(x)).backward())
    expected, _ = observed(
        wide, lambda: setting.loss(wide, wide_x, weights.astype(np.float64), len(x)).backward()
    )
    for name, moment in half.items():
        assert moment.dtype == np.float32
        assert_close(moment, expected[name], 0.2, name)


@pytest.mark.gpu
@every_setting
def test_the_gpu_gives_the_same(setting):
    import cupy

    link, x, weights = setting.make(np.float32)
    expected, _ = observed(link, lambda: setting.loss(link, x, weights, len(x)).backward())
    link.to_gpu()
    x, weights = cupy.asarray(x), cupy.asarray(weights)
    moments, _ = observed(link, lambda: setting.loss(link, x, weights, len(x)).backward())
    for name in expected:
        assert_close(cupy.asnumpy(moments[name]), expected[name], 1e-5, name)
