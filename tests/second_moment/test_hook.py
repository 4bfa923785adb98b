"""When the hook observes, what it forgets, what it refuses."""

import threading

import chainer
import chainer.functions as F
import chainer.links as L
import numpy as np
import pytest
from chainer import _backprop

from tests.second_moment.common import assert_close, observed
from vgc_chainer.second_moment import (
    SampleTerm,
    SecondMomentHook,
    UnsupportedFunctionError,
    format_coverage,
    register,
)

ORIGINAL = _backprop._backprop_to_all


@pytest.fixture(autouse=True)
def nothing_is_left_behind():
    yield
    assert _backprop._backprop_to_all is ORIGINAL
    assert not chainer.get_function_hooks()


def net():
    np.random.seed(0)
    with chainer.using_config('dtype', np.float64):
        return chainer.Sequential(L.Linear(4, 5), F.tanh, L.Linear(5, 3))


def batch(seed=0, n=6):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((n, 4)), rng.integers(0, 3, n).astype(np.int32)


def loss_of(model, seed=0, n=6):
    x, t = batch(seed, n)
    return F.softmax_cross_entropy(model(x), t)


def moments_of(model, seed=0):
    return observed(model, lambda: loss_of(model, seed).backward())[0]


def test_a_net_under_a_mean_loss():
    model = net()
    moments = moments_of(model)
    x, t = batch()
    expected = {name: 0 for name in moments}
    for z in range(len(x)):
        model.cleargrads()
        (F.softmax_cross_entropy(model(x[z : z + 1]), t[z : z + 1]) / len(x)).backward()
        for name, param in model.namedparams():
            expected[name] = expected[name] + param.grad**2
    for name in moments:
        assert_close(moments[name], expected[name], 1e-10)


def test_equivalence_of_the_criterion():
    """PAPER.md section 3: alpha s < g^2 iff (alpha' / b) V < g^2, alpha' = alpha (b-1)/(b-alpha).

    V is the unbiased sample variance of the per-sample gradients of f_z.
    """
    model, b = net(), 6
    moments = moments_of(model)
    x, t = batch()
    per_sample = {name: [] for name in moments}
    for z in range(b):
        model.cleargrads()
        F.softmax_cross_entropy(model(x[z : z + 1]), t[z : z + 1]).backward()
        for name, param in model.namedparams():
            per_sample[name].append(param.grad.copy())
    decisions = set()
    for name, gradients in per_sample.items():
        g = np.mean(gradients, axis=0)
        variance = np.var(gradients, axis=0, ddof=1)
        for alpha in (0.7, 1, 1.5, 2, 5.5):
            prime = alpha * (b - 1) / (b - alpha)
            ours = alpha * moments[name] < g**2
            np.testing.assert_array_equal(ours, prime / b * variance < g**2)
            decisions |= set(ours.ravel().tolist())
    assert decisions == {True, False}


def test_accumulates_like_the_gradient():
    model = net()
    first, second = moments_of(model, 1), moments_of(model, 2)

    def both():
        loss_of(model, 1).backward()
        loss_of(model, 2).backward()

    for name, moment in observed(model, both)[0].items():
        assert_close(moment, first[name] + second[name], 1e-12)


def test_a_gradient_that_was_thrown_away_takes_its_moment_along():
    """A generator's loss runs back through the discriminator, whose gradient is then cleared."""
    model = net()
    expected = moments_of(model, 2)

    def run():
        loss_of(model, 1).backward()
        model.cleargrads()
        loss_of(model, 2).backward()

    for name, moment in observed(model, run)[0].items():
        np.testing.assert_array_equal(moment, expected[name])


def test_a_gradient_that_was_zeroed_takes_its_moment_along():
    model = net()
    expected = moments_of(model, 2)

    def run():
        loss_of(model, 1).backward()
        for param in model.params():
            param.grad[...] = 0
        loss_of(model, 2).backward()

    for name, moment in observed(model, run)[0].items():
        np.testing.assert_array_equal(moment, expected[name])


def test_a_parameter_that_got_no_gradient_this_time_keeps_nothing_new():
    model = net()

    def run():
        loss_of(model, 1).backward()
        model.cleargrads()
        F.sum(model[2](np.ones((6, 5)))).backward()

    moments, hook = observed(model, run)
    assert model[0].W.grad is None
    assert hook.moment(model[2].b) is not None
    assert_close(moments['/1/b'], np.full(3, 6.0), 1e-12)


def test_forgotten_layers_that_are_used_elsewhere_are_refused():
    """F.forget runs a backward pass within the backward pass: two graphs, one parameter."""
    with chainer.using_config('dtype', np.float64):
        link = L.Linear(4, 4)

    def forgotten(h):
        return F.forget(lambda h: F.tanh(link(h)), chainer.as_variable(h))

    x = chainer.Variable(batch()[0])
    for run in (lambda: link(forgotten(x)), lambda: forgotten(forgotten(x))):
        with pytest.raises(UnsupportedFunctionError, match='forget'):
            observed(link, lambda run=run: F.sum(run()).backward())


def test_mixed_precision():
    """Parameters of BatchNorm and of the rest in float32 or float16, data in float16."""
    rng = np.random.default_rng(0)
    x, t = rng.random((8, 2, 5, 5)).astype(np.float16), rng.integers(0, 3, 8).astype(np.int32)
    with chainer.using_config('dtype', chainer.mixed16):
        model = chainer.Sequential(
            L.Convolution2D(2, 4, 3, nobias=True),
            L.BatchNormalization(4),
            F.relu,
            L.Linear(36, 3),
        )
    with chainer.using_config('dtype', np.float64):
        wide = chainer.Sequential(
            L.Convolution2D(2, 4, 3, nobias=True),
            L.BatchNormalization(4),
            F.relu,
            L.Linear(36, 3),
        )
    for param, source in zip(wide.params(), model.params()):
        param.array[...] = source.array
    scale = 128.0

    def run():
        with chainer.using_config('dtype', chainer.mixed16):
            F.softmax_cross_entropy(model(x), t).backward(loss_scale=scale)

    moments, _ = observed(model, run)
    expected, _ = observed(
        wide, lambda: F.softmax_cross_entropy(wide(x.astype(np.float64)), t).backward()
    )
    for name, moment in moments.items():
        assert moment.dtype == np.float32
        assert_close(moment / scale**2, expected[name], 0.05, name)


def test_a_convolutional_net_against_single_samples():
    """Pooling, dropout out of training, softmax cross entropy: the paper's layers in small."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((6, 2, 8, 8)).astype(np.float32)
    t = rng.integers(0, 3, 6).astype(np.int32)
    model = chainer.Sequential(
        L.Convolution2D(2, 4, 3, pad=1),
        L.BatchNormalization(4),
        F.relu,
        lambda h: F.max_pooling_2d(h, 2),
        L.Convolution2D(4, 6, 3),
        F.relu,
        F.dropout,
        L.Linear(24, 3),
    )
    model[1].avg_mean[...], model[1].avg_var[...] = 0.1, 0.7
    with chainer.using_config('train', False):
        moments, _ = observed(model, lambda: F.softmax_cross_entropy(model(x), t).backward())
        expected = dict.fromkeys(moments, 0)
        for z in range(6):
            model.cleargrads()
            (F.softmax_cross_entropy(model(x[z : z + 1]), t[z : z + 1]) / 6).backward()
            for name, param in model.namedparams():
                expected[name] = expected[name] + param.grad.astype(np.float64) ** 2
    for name, moment in moments.items():
        assert_close(moment, expected[name], 1e-5, name)


@pytest.mark.parametrize('nobias', [False, True])
def test_bilinear(nobias):
    """Chainer's bilinear function is float32 only."""
    rng = np.random.default_rng(0)
    a, b, w = (rng.standard_normal((5, k)).astype(np.float32) for k in (3, 2, 4))
    link = L.Bilinear(3, 2, 4, nobias=nobias)
    for param in link.params():
        param.array[...] = rng.standard_normal(param.shape)
    moments, hook = observed(link, lambda: F.sum(F.sin(link(a, b)) * w).backward())
    gradients = {name: param.grad.copy() for name, param in link.namedparams()}
    expected = dict.fromkeys(moments, 0)
    for z in range(5):
        link.cleargrads()
        one = slice(z, z + 1)
        F.sum(F.sin(link(a[one], b[one])) * w[one]).backward()
        for name, param in link.namedparams():
            expected[name] = expected[name] + param.grad.astype(np.float64) ** 2
    for name, moment in moments.items():
        assert_close(moment, expected[name], 1e-5, name)
        assert moment.shape == gradients[name].shape
    assert {c.rule for c in hook.coverage()} == {'bilinear'}


def test_only_the_observed_model():
    mine, other = net(), net()
    moments, hook = observed(mine, lambda: F.sum(mine(batch()[0]) * other(batch()[0])).backward())
    assert all(moment is not None for moment in moments.values())
    assert all(hook.moment(param) is None for param in other.params())


def test_chainer_grad_is_not_a_backward_pass():
    model = net()

    def run():
        chainer.grad([loss_of(model)], list(model.params()))

    moments, _ = observed(model, run)
    assert all(moment is None for moment in moments.values())


def test_several_roots():
    model = net()
    x, _ = batch()
    expected, _ = observed(
        model, lambda: F.sum(model(x) + model[2](F.tanh(model[0](x)))).backward()
    )

    def run():
        y, z = model(x), model[2](F.tanh(model[0](x)))
        y.grad = z.grad = np.ones_like(y.array)
        chainer.backward([y, z])

    for name, moment in observed(model, run)[0].items():
        assert_close(moment, expected[name], 1e-12)


@pytest.mark.parametrize('options', [{'retain_grad': True}, {'enable_double_backprop': True}])
def test_options_of_backward(options):
    model = net()
    expected = moments_of(model)
    moments, _ = observed(model, lambda: loss_of(model).backward(**options))
    for name, moment in moments.items():
        np.testing.assert_array_equal(moment, expected[name])


def test_unchained_graph():
    model = net()

    def run():
        h = F.tanh(model[0](batch()[0]))
        h.unchain_backward()
        F.sum(model[2](h)).backward()

    moments, _ = observed(model, run)
    assert moments['/0/W'] is None and moments['/1/W'] is not None


def test_functions_that_receive_no_gradient():
    """A use below a function that passes nothing back does not keep the others waiting."""
    model = net()
    x, _ = batch()

    class Stop(chainer.FunctionNode):
        def forward(self, inputs):
            return (inputs[0].copy(),)

        def backward(self, indexes, gradients):
            return (None,)

    def run():
        dead = Stop().apply((model[0](x),))[0]
        F.sum(model[2](F.tanh(model[0](x)) + dead)).backward()

    with_dead_end, _ = observed(model, run)
    alive, _ = observed(model, lambda: F.sum(model[2](F.tanh(model[0](x)))).backward())
    np.testing.assert_array_equal(with_dead_end['/0/W'], alive['/0/W'])


def test_an_exception_in_backward_leaves_nothing_behind():
    model = net()

    class Broken(chainer.FunctionNode):
        def forward(self, inputs):
            return (inputs[0].copy(),)

        def backward(self, indexes, gradients):
            raise ZeroDivisionError

    hook = SecondMomentHook()
    hook.observe(model)
    with hook:
        model.cleargrads()
        with pytest.raises(ZeroDivisionError):
            F.sum(model[2](Broken().apply((model[0](batch()[0]),))[0])).backward()
        hook.clear()
        loss_of(model).backward()
        moment = hook.moment(model[2].W).copy()
    assert _backprop._backprop_to_all is ORIGINAL
    np.testing.assert_array_equal(moment, moments_of(model)['/1/W'])


def test_several_hooks_at_once():
    model = net()
    expected = moments_of(model)
    hooks = [SecondMomentHook(), SecondMomentHook()]
    for hook in hooks:
        hook.observe(model)
        hook.attach()
    model.cleargrads()
    loss_of(model).backward()
    hooks[0].detach()
    hooks[0].detach()
    for hook in hooks:
        np.testing.assert_array_equal(hook.moment(model[0].W), expected['/0/W'])
    model.cleargrads()
    loss_of(model, 2).backward()
    assert not np.array_equal(hooks[1].moment(model[0].W), hooks[0].moment(model[0].W))
    hooks[1].detach()


def test_other_threads_are_not_observed():
    model = net()

    def run():
        thread = threading.Thread(target=lambda: loss_of(model).backward())
        thread.start()
        thread.join()

    moments, _ = observed(model, run)
    assert model[0].W.grad is not None and all(m is None for m in moments.values())


def test_evaluation_leaves_moments_alone():
    model = net()
    expected = moments_of(model)

    def run():
        loss_of(model).backward()
        with chainer.no_backprop_mode(), chainer.using_config('train', False):
            loss_of(model, 3)

    for name, moment in observed(model, run)[0].items():
        np.testing.assert_array_equal(moment, expected[name])


def test_a_changed_model():
    model = net()
    hook = SecondMomentHook()
    hook.observe(model)
    with hook:
        model.cleargrads()
        loss_of(model).backward()
        kept = hook.moment(model[0].W)
        with chainer.using_config('dtype', np.float64):
            model.append(L.Linear(3, 3))
        hook.observe(model)
        assert hook.moment(model[0].W) is kept
        model.cleargrads()
        loss_of(model).backward()
        assert hook.moment(model[3].W).shape == (3, 3)
        hook.clear()
        assert hook.moment(model[0].W) is None


def test_an_embedding_tied_to_the_output_layer():
    """Two kinds of term for one parameter are added sample by sample before squaring."""
    tied = chainer.Chain()
    with chainer.using_config('dtype', np.float64), tied.init_scope():
        tied.embed = L.EmbedID(7, 4)
        tied.bias = chainer.Parameter(np.zeros(7))
    ids = np.random.default_rng(0).integers(0, 7, (6, 3)).astype(np.int32)

    def loss(ids, n):
        h = F.sum(F.tanh(tied.embed(ids)), axis=1)
        return F.sum(F.sin(F.linear(h, tied.embed.W, tied.bias))) / n

    moments, hook = observed(tied, lambda: loss(ids, 6).backward())
    expected = 0
    for z in range(6):
        tied.cleargrads()
        loss(ids[z : z + 1], 6).backward()
        expected = expected + tied.embed.W.grad**2
    assert_close(moments['/embed/W'], expected, 1e-10)
    assert hook.coverage()[1].rule == 'embed_id+linear'


def test_uses_with_different_numbers_of_samples_are_refused():
    model = net()
    x, _ = batch()
    with pytest.raises(UnsupportedFunctionError, match=r'/0/W .*numbers of samples \(\[3, 6\]\)'):
        observed(model, lambda: (F.sum(model[0](x)) + F.sum(model[0](x[:3]))).backward())


class Penalised(chainer.Chain):
    """A linear layer whose weights enter the loss directly, too."""

    def __init__(self):
        super().__init__()
        with chainer.using_config('dtype', np.float64), self.init_scope():
            self.inner = L.Linear(4, 3)

    def loss(self):
        return F.sum(self.inner(batch()[0])) + 0.5 * F.sum(self.inner.W**2)


def test_policy_error_names_parameter_layer_and_function():
    model = Penalised()
    with pytest.raises(UnsupportedFunctionError) as caught:
        observed(model, lambda: model.loss().backward())
    message = str(caught.value)
    assert '/inner/W of layer /inner' in message and '_ ** 2' in message
    assert model.inner.W.grad is None and model.inner.b.grad is None


def test_policy_batch():
    model = Penalised()
    moments, hook = observed(model, lambda: model.loss().backward(), unsupported='batch')
    np.testing.assert_array_equal(moments['/inner/W'], model.inner.W.grad**2)
    g = model.inner.W.grad.copy()

    def twice():
        model.loss().backward()
        model.loss().backward()

    moments, _ = observed(model, twice, unsupported='batch')
    assert_close(moments['/inner/W'], 2 * g**2, 1e-12)


def test_policy_dense():
    model = Penalised()
    moments, hook = observed(model, lambda: model.loss().backward(), unsupported='dense')
    assert moments['/inner/W'] is None and hook.is_dense(model.inner.W)
    assert moments['/inner/b'] is not None and not hook.is_dense(model.inner.b)
    assert model.inner.W.grad is not None
    hook.clear()
    assert not hook.is_dense(model.inner.W)


def test_policies_by_parameter():
    model = chainer.Sequential(Penalised(), Penalised())

    def run():
        (model[0].loss() + model[1].loss()).backward()

    policies = {'': 'error', '/0': 'batch', '/1/inner/W': 'dense'}
    moments, hook = observed(model, run, unsupported=policies)
    rules = {c.name: c.rule for c in hook.coverage()}
    assert rules == {
        '/0/inner/W': 'batch',
        '/0/inner/b': 'linear',
        '/1/inner/W': 'dense',
        '/1/inner/b': 'linear',
    }
    with pytest.raises(UnsupportedFunctionError, match='/1/inner/W'):
        observed(model, run, unsupported={'/0': 'batch'})


def test_unknown_policy():
    with pytest.raises(ValueError, match="'ignore'"):
        SecondMomentHook(unsupported='ignore')


def test_parameters_combined_without_data_are_refused():
    """In W * scale axis 0 counts outputs, not samples."""
    model = chainer.Link()
    with model.init_scope():
        model.W = chainer.Parameter(np.ones((3, 4)))
        model.scale = chainer.Parameter(np.ones((1, 4)))
    with pytest.raises(UnsupportedFunctionError, match='do not depend on data'):
        observed(model, lambda: F.sum(F.linear(batch()[0], model.W * model.scale)).backward())


@pytest.mark.parametrize(
    'make',
    [
        lambda: (L.LocalConvolution2D(2, 3, 4, 3), (6, 2, 4, 4)),
        lambda: (L.Swish((4,)), (6, 4)),
    ],
)
def test_layers_without_rule_fail_loudly(make):
    link, shape = make()
    x = np.ones(shape, np.float32)
    arguments = (x, x) if isinstance(link, L.Bilinear) else (x,)
    with pytest.raises(UnsupportedFunctionError, match='has no rule for second moments'):
        observed(link, lambda: F.sum(link(*arguments)).backward())


def test_a_rule_of_the_users():
    class Shrink(chainer.FunctionNode):
        """y = x / w, w one number a column."""

        def forward(self, inputs):
            self.retain_inputs((0, 1))
            return (inputs[0] / inputs[1],)

        def backward(self, indexes, gradients):
            x, w = self.get_retained_inputs()
            return gradients[0] / F.broadcast_to(w, x.shape), F.sum(
                -gradients[0] * x / F.broadcast_to(w, x.shape) ** 2, axis=0
            )

    model = chainer.Link()
    with model.init_scope():
        model.w = chainer.Parameter(np.array([1.0, 2, 3, 4]))
    x, _ = batch()

    def run():
        F.sum(F.sin(Shrink().apply((x, model.w))[0])).backward()

    with pytest.raises(UnsupportedFunctionError, match='/w of layer / is used by function Shrink'):
        observed(model, run)

    @register(Shrink)
    def shrink(use):
        x, w = use.in_data
        return SampleTerm(-use.out_grad[0] * x / w**2)

    moments, hook = observed(model, run)
    gy = np.cos(x / model.w.array)
    assert_close(moments['/w'], ((gy * x / model.w.array**2) ** 2).sum(axis=0), 1e-12)
    assert hook.coverage()[0].rule == 'shrink'


def test_coverage_as_a_table():
    model = net()
    _, hook = observed(model, lambda: loss_of(model).backward())
    rows = format_coverage(hook.coverage()).splitlines()
    assert rows[0].split() == ['parameter', 'rule', 'functions']
    assert rows[1].split() == ['/0/W', 'linear', 'LinearFunction']
    unused = SecondMomentHook()
    unused.observe(model)
    assert {c.rule for c in unused.coverage()} == {'unused'}


def test_the_memory_budget_bounds_the_working_memory():
    """All contributions of this layer together would take 37 MB."""
    import tracemalloc

    link = L.Convolution2D(64, 64, 3, pad=1)
    x = np.random.default_rng(0).standard_normal((256, 64, 8, 8)).astype(np.float32)
    peaks = []
    for hooked in (False, True):
        hook = SecondMomentHook()
        hook.observe(link)
        if hooked:
            hook.attach()
        loss = F.sum(F.sin(link(x)))
        link.cleargrads()
        tracemalloc.start()
        loss.backward()
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        hook.detach()
    assert peaks[1] - peaks[0] < 4 * 2**20
