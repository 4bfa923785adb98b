"""Whatever goes wrong on one rank is one clear error on all of them."""

import chainer
import chainermn
import numpy as np
import pytest

from tests.mpi.common import Net, assert_replicas_identical, backward, created, world
from vgc_chainer.errors import MismatchError, NonFiniteError, RankFailedError, VgcError

last = world.size - 1


def is_last():
    return world.rank == last


def everyone_raises(error, match, call):
    """`call` raises on every rank, and afterwards all ranks still talk."""
    with pytest.raises(error, match=match):
        call()
    assert world.allreduce(1) == world.size


def test_different_algorithm():
    comm = created('strom' if is_last() else 'variance')
    everyone_raises(
        MismatchError,
        f"rank 0 and rank {last} disagree: algorithm is 'variance' on the one and 'strom'",
        lambda: comm.bcast_data(Net()),
    )


def test_different_hyperparameter():
    comm = created('variance', alpha=2.0 if is_last() else 1.5)
    everyone_raises(
        MismatchError,
        'hyperparameter alpha is 1.5 on the one and 2.0 on the other',
        lambda: comm.bcast_data(Net()),
    )


def test_different_shape():
    comm = created('variance')
    model = Net()
    if is_last():
        model.fc2.W.array = np.zeros((3, 11), np.float32)
    everyone_raises(
        MismatchError, r'shape of parameter /fc2/W is \(3, 10\)', lambda: comm.bcast_data(model)
    )


def test_different_dtype():
    comm = created('variance')
    model = Net()
    if is_last():
        with chainer.using_config('dtype', np.float64):
            model = Net()
    everyone_raises(
        MismatchError,
        "dtype of parameter /bn/beta is 'float32'",
        lambda: comm.bcast_data(model),
    )


def test_different_parameters():
    comm = created('variance')
    model = Net(unused=is_last())
    everyone_raises(
        MismatchError,
        'only the second has a parameter /unused/W',
        lambda: comm.bcast_data(model),
    )


def test_initialised_on_some_ranks_only():
    comm = created('variance')
    model = Net(lazy=is_last())
    everyone_raises(MismatchError, r'shape of parameter /fc1/W', lambda: comm.bcast_data(model))


def test_a_model_that_changed_on_one_rank_only():
    comm = created('strom', tau=0.1)
    model = Net()
    comm.bcast_data(model)
    if is_last():
        with model.init_scope():
            model.extra = chainer.links.Linear(2, 2)
    backward(model, 0)
    everyone_raises(MismatchError, '/extra/W', lambda: comm.multi_node_mean_grad(model))


def test_backward_before_the_communicator_saw_the_model():
    comm = created('variance')
    model = Net()
    backward(model, 0)
    everyone_raises(
        VgcError,
        'parameter /bn/beta has a gradient and no second moment',
        lambda: comm.multi_node_mean_grad(model),
    )


def test_one_rank_that_cannot_take_part():
    comm = created('variance')
    model = Net()
    comm.bcast_data(model)
    backward(model, 0)
    if is_last():
        comm.hook.clear()
    everyone_raises(
        VgcError if is_last() else RankFailedError,
        'no second moment' if is_last() else f'rank {last} could not take part: VgcError: .*beta',
        lambda: comm.multi_node_mean_grad(model),
    )


@pytest.mark.parametrize('bad', [np.nan, np.inf, -np.inf])
def test_nonfinite_gradient(bad):
    comm = created('variance', alpha=3.0)
    model = Net()
    comm.bcast_data(model)
    backward(model, 0)
    comm.multi_node_mean_grad(model)
    r, v = comm.compressor.r.copy(), comm.compressor.v.copy()
    backward(model, 1)
    if is_last():
        model.fc1.b.grad[3] = bad
    everyone_raises(
        NonFiniteError,
        f'parameter /fc1/b on rank {last} at step 2',
        lambda: comm.multi_node_mean_grad(model),
    )
    np.testing.assert_array_equal(comm.compressor.r, r)
    np.testing.assert_array_equal(comm.compressor.v, v)
    backward(model, 2)
    comm.multi_node_mean_grad(model)
    assert np.isfinite(model.fc1.b.grad).all()


def test_nonfinite_gradient_skipped():
    comm = created('strom', tau=1e-3, nonfinite='skip')
    model = Net()
    optimizer = chainermn.create_multi_node_optimizer(
        chainer.optimizers.MomentumSGD(lr=0.1), comm
    ).setup(model)
    for step in range(4):
        backward(model, step)
        before = {name: p.array.copy() for name, p in model.namedparams()}
        if step == 2 and is_last():
            model.conv.W.grad[0] = np.nan
        optimizer.update()
        moved = any((p.array != before[name]).any() for name, p in model.namedparams())
        assert moved == (step in (1, 3)) or (step == 0 and world.rank != 0)
    assert comm.skipped == 1
    assert_replicas_identical(model)


def test_options_are_checked_before_mpi_is_touched():
    with pytest.raises(ValueError, match='alpha'):
        created('variance', alpha=0)
    with pytest.raises(ValueError, match='nonfinite'):
        created('variance', nonfinite='ignore')
    with pytest.raises(TypeError, match='tau'):
        created('variance', tau=1)
    with pytest.raises(ValueError, match="unknown communicator 'varience'; there are variance"):
        created('varience')


def test_double_buffering_is_refused():
    with pytest.raises(ValueError, match='double buffering'):
        chainermn.create_multi_node_optimizer(
            chainer.optimizers.SGD(), created('variance'), double_buffering=True
        )
