"""Everything else of ChainerMN works with a compressed communicator."""

import chainer
import chainer.functions as F
import chainermn
import numpy as np
import pytest
from chainermn.extensions import AllreducePersistent
from chainermn.links import MultiNodeBatchNormalization

from tests.mpi.common import (
    Net,
    assert_replicas_identical,
    backward,
    batch,
    created,
    fingerprint,
    world,
)
from vgc_chainer.communicator import CompressedCommunicator
from vgc_chainer.extensions import CommunicatorState


def test_ranks():
    comm = created('variance')
    assert (comm.rank, comm.size) == (world.rank, world.size)
    assert (comm.intra_size, comm.inter_size) == (world.size, 1)


def test_chainermns_own_names_pass_through():
    comm = created('naive')
    assert not isinstance(comm, CompressedCommunicator) and comm.size == world.size


def test_broadcast_gives_everybody_rank_zeros_parameters():
    comm = created('variance')
    model = Net(seed=world.rank)
    model.fc1.W.array = np.asfortranarray(model.fc1.W.array)
    expected = world.bcast(fingerprint(model))
    comm.bcast_data(model)
    assert fingerprint(model) == expected


@pytest.mark.parametrize('dtype', [np.float16, np.float32, np.float64])
def test_broadcast_dtypes(dtype):
    with chainer.using_config('dtype', dtype):
        model = Net(seed=world.rank)
    created('strom').bcast_data(model)
    assert model.fc1.W.dtype == dtype
    assert_replicas_identical(model)


def test_collectives():
    comm = created('variance')
    rank, size = world.rank, world.size
    mine = np.full((2, 3), rank, np.float32)
    for got, expected in zip(comm.allgather(mine), range(size)):
        np.testing.assert_array_equal(got, np.full((2, 3), expected))
    np.testing.assert_array_equal(comm.allreduce(mine), np.full((2, 3), sum(range(size))))
    np.testing.assert_array_equal(comm.bcast(mine.copy(), root=0), np.zeros((2, 3)))
    rows = comm.alltoall(tuple(np.array([rank, k], np.float32) for k in range(size)))
    for k, row in enumerate(rows):
        np.testing.assert_array_equal(row, [k, rank])
    gathered = comm.gather(mine, root=0)
    assert (gathered is None) == (rank != 0)
    column = np.arange(size, dtype=np.float32).reshape(-1, 1)
    np.testing.assert_array_equal(comm.scatter(column if rank == 0 else None), [rank])
    if rank == 0:
        comm.send(np.arange(4, dtype=np.float32), dest=1, tag=3)
    elif rank == 1:
        np.testing.assert_array_equal(comm.recv(source=0, tag=3), np.arange(4))
    assert comm.allreduce_obj(1) == size
    assert comm.bcast_obj('hello' if rank == 0 else None) == 'hello'


def test_split_carries_the_options_over():
    comm = created('variance', alpha=1.75, nonfinite='skip')
    half = comm.split(world.rank % 2, world.rank)
    assert half.size == (world.size + (world.rank % 2 == 0)) // 2
    assert half.compressor.alpha == 1.75 and half.nonfinite == 'skip'
    model = Net()
    half.bcast_data(model)
    backward(model, 0)
    half.multi_node_mean_grad(model)
    mine = fingerprint(model)
    assert half.allreduce_obj(1) == half.size and len(set(half.mpi_comm.allgather(mine))) == 1
    half.finalize()


def test_configurations_are_not_shared_between_communicators():
    first, second = created('variance'), created('variance')
    first.set_config('batched_copy', True)
    assert first.get_config('batched_copy') and not second.get_config('batched_copy')


def test_scatter_dataset_evaluator_and_persistents():
    comm = created('variance', alpha=1.0)
    data = None
    if world.rank == 0:
        x, t = batch(0, rank=0, n=40)
        data = chainer.datasets.TupleDataset(x, t)
    data = chainermn.scatter_dataset(data, comm, shuffle=True, seed=1)
    assert comm.allreduce_obj(len(data)) >= 40
    model = chainer.links.Classifier(Net())
    optimizer = chainermn.create_multi_node_optimizer(chainer.optimizers.Adam(), comm).setup(model)
    iterator = chainer.iterators.SerialIterator(data, 4)
    updater = chainer.training.StandardUpdater(iterator, optimizer)
    for _ in range(4):
        updater.update()
    assert_replicas_identical(model)
    AllreducePersistent(model, comm)()
    means = world.allgather(model.predictor.bn.avg_mean)
    for mean in means:
        np.testing.assert_array_equal(mean, means[0])
    evaluator = chainermn.create_multi_node_evaluator(
        chainer.training.extensions.Evaluator(
            chainer.iterators.SerialIterator(data, 4, repeat=False, shuffle=False), model
        ),
        comm,
    )
    result = evaluator()
    assert 0 <= result['main/accuracy'] <= 1
    assert len(set(world.allgather(float(result['main/loss'])))) == 1


def test_multi_node_batch_normalization():
    comm = created('variance', alpha=1.0)
    model = Net()
    del model.bn
    with model.init_scope():
        model.bn = MultiNodeBatchNormalization(4, comm)
    comm.bcast_data(model)
    x, t = batch(0)
    h = model.conv(x)
    y = model.bn(h)
    loss = F.softmax_cross_entropy(model.fc2(F.relu(model.fc1(F.relu(y)))), t)
    model.cleargrads()
    loss.backward(retain_grad=True)
    # The link averages its gradient over the ranks; this rank's samples stand for a p-th of it.
    c_beta = y.grad.sum(axis=(2, 3))
    mean = comm.allreduce(c_beta.sum(axis=0)) / world.size
    np.testing.assert_allclose(model.bn.beta.grad, mean, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(
        comm.hook.moment(model.bn.beta), (c_beta**2).sum(axis=0) / world.size, rtol=1e-4
    )
    comm.multi_node_mean_grad(model)
    assert np.abs(model.bn.gamma.grad).max() > 0


def test_functions_between_ranks_do_not_disturb_the_hook():
    """A backward pass that runs through chainermn.functions.send and recv."""
    comm = created('variance', alpha=1.0)
    model = chainer.links.Linear(3, 3)
    comm.bcast_data(model)
    model.cleargrads()
    x = np.ones((2, 3), np.float32)
    if world.rank == 0:
        handle = chainermn.functions.send(model(x), comm, rank=1)
        handle.backward()
    elif world.rank == 1:
        F.sum(model(chainermn.functions.recv(comm, rank=0))).backward()
    else:
        F.sum(model(x)).backward()
    comm.multi_node_mean_grad(model)
    gathered = world.allgather(model.W.grad)
    np.testing.assert_array_equal(gathered[0], gathered[-1])


def test_finalize_detaches_the_hook():
    comm = created('variance')
    comm.bcast_data(Net())
    assert any(hook is comm.hook for hook in chainer.get_function_hooks().values())
    comm.finalize()
    assert not any(hook is comm.hook for hook in chainer.get_function_hooks().values())


def trained(comm, optimizer, model, steps):
    for step in steps:
        x, t = batch(step)
        # Dropout draws from the global generator, which must continue, too.
        loss = F.softmax_cross_entropy(model(F.dropout(x, 0.2)), t)
        model.cleargrads()
        loss.backward()
        optimizer.update()


@pytest.mark.parametrize('name', ['variance', 'hybrid', 'qsgd', 'naive'])
def test_resumed_equals_uninterrupted(name, tmp_path):
    """k steps + save + load + k steps = 2k steps, bit for bit, residuals included."""

    def fresh(seed):
        comm = created(name)
        model = Net(seed=seed)
        optimizer = chainermn.create_multi_node_optimizer(chainer.optimizers.Adam(), comm).setup(
            model
        )
        np.random.seed(seed)
        return comm, model, optimizer, CommunicatorState(comm, optimizer)

    comm, model, optimizer, state = fresh(world.rank)
    trained(comm, optimizer, model, range(5))
    path = str(tmp_path / 'snapshot.npz')
    box = chainer.serializers.DictionarySerializer()
    for key, item in (('model', model), ('optimizer', optimizer), ('state', state)):
        item.serialize(box[key])
    np.savez(path, **box.target)
    trained(comm, optimizer, model, range(5, 10))
    expected = fingerprint(model)
    expected_state = comm.state() if name != 'naive' else {}

    comm, model, optimizer, state = fresh(100 + world.rank)
    with np.load(path) as npz:
        reader = chainer.serializers.NpzDeserializer(npz)
        for key, item in (('model', model), ('optimizer', optimizer), ('state', state)):
            item.serialize(reader[key])
    trained(comm, optimizer, model, range(5, 10))
    assert fingerprint(model) == expected
    for key, value in expected_state.items():
        np.testing.assert_array_equal(comm.state()[key], value, err_msg=key)


def test_snapshot_of_another_run_is_refused():
    from vgc_chainer.errors import StateError

    comm = created('variance', alpha=1.5)
    model = Net()
    comm.bcast_data(model)
    state = comm.state()
    other = created('variance', alpha=2.0)
    with pytest.raises(StateError, match='hyperparameter alpha is 1.5 on the one and 2.0'):
        other.load_state(model, state)
