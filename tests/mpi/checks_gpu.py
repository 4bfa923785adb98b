"""Several ranks on one GPU, all of them over an MPI that knows no CUDA."""

import chainer
import chainermn
import numpy as np
import pytest
from chainermn.extensions import AllreducePersistent
from chainermn.links import MultiNodeBatchNormalization

from tests.mpi.common import (
    SETTINGS,
    Net,
    assert_replicas_identical,
    backward,
    batch,
    created,
    world,
)

pytestmark = pytest.mark.gpu


def on_device(model):
    import cupy

    cupy.cuda.Device(0).use()
    model.to_gpu()
    return model


def copied(array):
    """Host copy; received messages live in a buffer that the next step overwrites."""
    return np.array(array.get() if hasattr(array, 'get') else array)


def device_backward(model, step):
    import cupy

    x, t = batch(step)
    loss = chainer.functions.softmax_cross_entropy(model(cupy.asarray(x)), cupy.asarray(t))
    model.cleargrads()
    loss.backward()
    return float(loss.array)


def assert_replicas_identical_on_host(model):
    model.to_cpu()
    assert_replicas_identical(model)


@pytest.mark.parametrize(('name', 'options'), SETTINGS)
def test_training(name, options):
    comm = created(name, **options)
    model = on_device(Net(seed=world.rank))
    optimizer = chainermn.create_multi_node_optimizer(
        chainer.optimizers.Adam(alpha=0.01), comm
    ).setup(model)
    losses = []
    for _ in range(25):
        losses.append(device_backward(model, 0))
        optimizer.update()
    mean = np.mean(world.allgather(losses), axis=0)
    assert mean[-3:].mean() < mean[:3].mean()
    seconds = comm.timings.collect()
    assert seconds['compress'] > 0 and seconds['decode'] > 0
    assert_replicas_identical_on_host(model)


@pytest.mark.parametrize(('name', 'options'), SETTINGS)
def test_ranks_on_the_gpu_give_the_words_of_ranks_on_the_cpu(name, options):
    """The same gradients and moments, compressed, exchanged and decoded on both."""
    import cupy

    results = []
    for device in (False, True):
        comm = created(name, **options)
        model = Net()
        comm.bcast_data(model)
        rows = []
        for step in range(4):
            backward(model, step)
            gradients = {n: p.grad.copy() for n, p in model.namedparams()}
            rng = np.random.default_rng([step, world.rank])
            moments = [
                (g * g * rng.random(g.shape, np.float32)) for _, g in sorted(gradients.items())
            ]
            gradients = [g for _, g in sorted(gradients.items())]
            xp = cupy if device else np
            comm.compressor.prepare(comm.compressor.layout, xp, world.rank)
            message = comm.compressor.compress(
                [xp.asarray(g) for g in gradients], [xp.asarray(s) for s in moments]
            )
            messages = comm._gather(message, xp)
            out = [xp.zeros_like(xp.asarray(g)) for g in gradients]
            comm.compressor.decode(messages, out)
            rows.append([copied(m.words) for m in messages])
            rows.append([copied(m.table) for m in messages])
            rows.append([copied(g) for g in out])
            for array in comm.compressor.state().values():
                rows.append([copied(array)])
        results.append(rows)
    for ours, theirs in zip(*results):
        for a, b in zip(ours, theirs):
            np.testing.assert_array_equal(a, b)


def test_collectives_of_device_arrays():
    import cupy

    comm = created('variance')
    cupy.cuda.Device(0).use()
    rank, size = world.rank, world.size
    mine = cupy.full((2, 3), rank, np.float32)
    for got, expected in zip(comm.allgather(mine), range(size)):
        assert isinstance(got, cupy.ndarray) and (got == expected).all()
    assert (comm.allreduce(mine) == sum(range(size))).all()
    assert (comm.bcast(mine.copy() if rank == 0 else None) == 0).all()
    rows = comm.alltoall(tuple(cupy.array([rank, k], np.float32) for k in range(size)))
    for k, row in enumerate(rows):
        assert row.get().tolist() == [k, rank]
    gathered = comm.gather(mine, root=0)
    assert (gathered is None) == (rank != 0)
    column = cupy.arange(size, dtype=np.float32).reshape(-1, 1)
    scattered = comm.scatter(column if rank == 0 else None)
    assert isinstance(scattered, cupy.ndarray) and scattered.get().tolist() == [rank]
    if rank == 0:
        comm.send(cupy.arange(4, dtype=np.float32), dest=1, tag=3)
    elif rank == 1:
        received = comm.recv(source=0, tag=3)
        assert isinstance(received, cupy.ndarray) and received.get().tolist() == [0, 1, 2, 3]


def test_persistents_and_multi_node_batch_normalization():
    comm = created('variance', alpha=1.0)
    model = Net()
    del model.bn
    with model.init_scope():
        model.bn = MultiNodeBatchNormalization(4, comm)
    on_device(model)
    comm.bcast_data(model)
    device_backward(model, 0)
    comm.multi_node_mean_grad(model)
    AllreducePersistent(model, comm)()
    means = world.allgather(model.bn.avg_mean.get())
    np.testing.assert_array_equal(means[0], means[-1])
    assert np.abs(model.bn.gamma.grad.get()).max() > 0
