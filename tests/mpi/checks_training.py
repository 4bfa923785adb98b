"""Training with a compressed communicator, step by step."""

import math

import chainer
import chainermn
import numpy as np
import pytest

from tests.mpi.common import (
    SETTINGS,
    Net,
    assert_replicas_identical,
    backward,
    batch,
    created,
    fingerprint,
    grads,
    world,
)


def quantised(values):
    """PAPER.md section 5, written down once more, element by element."""
    sent = [abs(float(x)) for x in values if x != 0]
    result = np.zeros(len(values), np.float32)
    if not sent:
        return result
    e = math.floor(math.log2(max(sent)))
    for i, x in enumerate(values):
        if x == 0:
            continue
        low = 2.0 ** math.floor(math.log2(abs(float(x))))
        power = min(low if abs(float(x)) < 1.5 * low else 2 * low, 2.0**e)
        if e - math.log2(power) <= 7:
            result[i] = math.copysign(power, x)
    return result


def test_sending_everything_is_momentum_sgd_on_quantised_gradients():
    """alpha so small that every element goes: three steps equal a NumPy replay, bit for bit."""
    comm = created('variance', alpha=1e-30)
    model = Net()
    optimizer = chainermn.create_multi_node_optimizer(
        chainer.optimizers.MomentumSGD(lr=0.1, momentum=0.9), comm
    ).setup(model)
    optimizer.update(lambda: chainer.functions.sum(model(batch(0)[0])))  # broadcasts only
    replay = {name: param.array.copy() for name, param in model.namedparams()}
    velocity = {name: np.zeros_like(array) for name, array in replay.items()}
    for step in range(3):
        backward(model, step)
        everybody = world.allgather(grads(model))
        optimizer.update()
        for name, array in replay.items():
            total = np.zeros(array.size, np.float32)
            for theirs in everybody:
                total += quantised(theirs[name].reshape(-1))
            mean = (total / np.float32(world.size)).reshape(array.shape)
            velocity[name] *= np.float32(0.9)
            velocity[name] -= np.float32(0.1) * mean
            array += velocity[name]
            np.testing.assert_array_equal(dict(model.namedparams())[name].array, array)
    assert_replicas_identical(model)


def test_float_words_equal_naive():
    """The same training with the quantiser bypassed and with ChainerMN's own communicator."""
    results = []
    for name in ('none', 'naive'):
        comm = created(name)
        model = Net()
        optimizer = chainermn.create_multi_node_optimizer(
            chainer.optimizers.MomentumSGD(lr=0.1), comm
        ).setup(model)
        for step in range(6):
            x, t = batch(step)
            optimizer.update(chainer.links.Classifier(model), x, t)
        results.append({name: param.array for name, param in model.namedparams()})
    ours, theirs = results
    for name in ours:
        np.testing.assert_allclose(ours[name], theirs[name], rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize(('name', 'options'), SETTINGS)
def test_replicas_stay_identical_and_learn(name, options):
    comm = created(name, **options)
    model = Net(seed=world.rank)
    optimizer = chainermn.create_multi_node_optimizer(
        chainer.optimizers.Adam(alpha=0.01), comm
    ).setup(model)
    losses = []
    for _ in range(25):
        # The same few samples again and again: they can be learnt by heart.
        losses.append(backward(model, 0))
        optimizer.update()
    assert_replicas_identical(model)
    mean = np.mean(world.allgather(losses), axis=0)
    assert mean[-3:].mean() < mean[:3].mean()
    assert comm.traffic.steps == 24
    ratio = comm.traffic.compression_ratio
    assert ratio == 1 if name == 'none' else ratio > 1
    assert 0 < comm.traffic.wire_ratio < ratio


@pytest.mark.parametrize(('name', 'options'), SETTINGS)
def test_the_same_seeds_give_the_same_run(name, options):
    def trained():
        comm = created(name, **options)
        model = Net()
        optimizer = chainermn.create_multi_node_optimizer(
            chainer.optimizers.MomentumSGD(lr=0.1), comm
        ).setup(model)
        for step in range(4):
            backward(model, step)
            optimizer.update()
        return fingerprint(model)

    assert trained() == trained()


@pytest.mark.parametrize('zero_fill', [True, False])
def test_gradient_none_on_some_ranks(zero_fill):
    comm = created('variance', alpha=1e-30)
    model = Net(unused=True)
    comm.bcast_data(model)
    for step in range(3):
        backward(model, step)
        assert model.unused.W.grad is None
        if world.rank == 0:
            model.fc2.cleargrads()
        expected = [None if world.rank == 0 else model.fc2.b.grad.copy()]
        everybody = world.allgather(expected)
        comm.multi_node_mean_grad(model, zero_fill)
        total = sum(quantised(g[0]) for g in everybody[1:]) / np.float32(world.size)
        np.testing.assert_array_equal(model.fc2.b.grad, total)
        if zero_fill:
            np.testing.assert_array_equal(model.unused.W.grad, 0)
        else:
            assert model.unused.W.grad is None


def test_uninitialised_parameters_are_skipped_until_they_are_there():
    comm = created('variance', alpha=1.0)
    model = Net(lazy=True)
    optimizer = chainermn.create_multi_node_optimizer(chainer.optimizers.SGD(lr=0.1), comm).setup(
        model
    )
    comm.bcast_data(model)
    assert comm.compressor.layout.total == sum(
        p.size for p in model.params() if p.array is not None
    )
    for step in range(3):
        x, t = batch(step)
        optimizer.update(chainer.links.Classifier(model), x, t)
    assert comm.compressor.layout.total == sum(p.size for p in model.params())
    assert_replicas_identical(model)


def test_a_model_that_changes_between_steps():
    comm = created('variance', alpha=4.0)
    model = Net(lazy=False)
    optimizer = chainermn.create_multi_node_optimizer(chainer.optimizers.SGD(lr=0.1), comm).setup(
        model
    )
    for step in range(3):
        backward(model, step)
        optimizer.update()
    held = comm.compressor.r[comm.compressor.layout.slice(0)].copy()
    assert np.abs(held).max() > 0
    with model.init_scope():
        model.extra = chainer.links.Linear(3, 3)
    model.extra.W.update_rule = chainer.optimizers.SGD(lr=0.1).create_update_rule()
    model.extra.b.update_rule = chainer.optimizers.SGD(lr=0.1).create_update_rule()
    backward(model, 4)
    optimizer.update()  # ChainerMN notices and broadcasts
    np.testing.assert_array_equal(comm.compressor.r[comm.compressor.layout.slice(0)], held)
    backward(model, 5)
    optimizer.update()
    assert_replicas_identical(model)


@pytest.mark.parametrize('silent', ['one', 'all'])
def test_ranks_that_have_nothing_to_send(silent):
    comm = created('variance', alpha=1.0)
    model = Net()
    comm.bcast_data(model)
    backward(model, 0)
    if silent == 'all' or world.rank == world.size - 1:
        for param in model.params():
            param.grad[...] = 0
    comm.multi_node_mean_grad(model)
    assert (max(np.abs(p.grad).max() for p in model.params()) == 0) == (silent == 'all')


def test_loss_scale():
    """The same words with and without a loss scale; gradients carry it before and after."""
    sent = []
    for scale in (None, 256.0):
        comm = created('variance', alpha=1.0)
        model = Net()
        comm.bcast_data(model)
        for step in range(3):
            backward(model, step, loss_scale=scale)
            comm.multi_node_mean_grad(model)
        sent.append((grads(model), comm.compressor.r.copy(), comm.compressor.v.copy()))
    for name, plain in sent[0][0].items():
        np.testing.assert_array_equal(sent[1][0][name], plain * 256)
    np.testing.assert_array_equal(sent[0][1], sent[1][1])
    np.testing.assert_array_equal(sent[0][2], sent[1][2])


def test_overflow_under_dynamic_loss_scaling_leaves_residuals_alone():
    comm = created('variance', alpha=2.0)
    model = Net()
    optimizer = chainermn.create_multi_node_optimizer(chainer.optimizers.SGD(lr=0.1), comm).setup(
        model
    )
    optimizer.loss_scaling(interval=10)
    optimizer.actual_optimizer._loss_scale = 64.0
    for step in range(2):
        backward(model, step, loss_scale=64.0)
        optimizer.update()
    before = fingerprint(model), comm.compressor.r.copy(), comm.compressor.v.copy()
    scale = optimizer.actual_optimizer._loss_scale
    backward(model, 3, loss_scale=scale)
    if world.rank == 0:
        model.fc1.W.grad[0, 0] = np.inf
    with pytest.warns(UserWarning, match='Non finite'):
        optimizer.update()
    assert fingerprint(model) == before[0]
    np.testing.assert_array_equal(comm.compressor.r, before[1])
    np.testing.assert_array_equal(comm.compressor.v, before[2])
    assert optimizer.actual_optimizer._loss_scale < scale and comm.skipped == 1
    backward(model, 4, loss_scale=32.0)
    optimizer.update()
    assert fingerprint(model) != before[0]
    assert_replicas_identical(model)


def test_mixed16():
    with chainer.using_config('dtype', chainer.mixed16):
        comm = created('variance', alpha=1.0)
        model = Net()
        actual = chainer.optimizers.MomentumSGD(lr=0.05)
        actual.use_fp32_update()
        optimizer = chainermn.create_multi_node_optimizer(actual, comm).setup(model)
        for step in range(4):
            x, t = batch(step, dtype=np.float16)
            loss = chainer.functions.softmax_cross_entropy(model(x), t)
            model.cleargrads()
            loss.backward(loss_scale=128.0)
            optimizer.update()
        dtypes = {p.dtype.name for p in model.params()}
        assert dtypes == {'float16', 'float32'}  # weights; BatchNorm
        assert comm.compressor.r.dtype == np.float32
        assert_replicas_identical(model)
        assert comm.traffic.elements > 0


def test_gradients_accumulated_over_two_backward_passes():
    comm = created('variance', alpha=1.0)
    model = Net()
    comm.bcast_data(model)
    moments = []
    for step in (0, 1):
        backward(model, step)
        moments.append(comm.hook.moment(model.fc1.W).copy())
    model.cleargrads()
    for step in (0, 1):
        x, t = batch(step)
        chainer.functions.softmax_cross_entropy(model(x), t).backward()
    np.testing.assert_allclose(
        comm.hook.moment(model.fc1.W), moments[0] + moments[1], rtol=1e-6, atol=0
    )
