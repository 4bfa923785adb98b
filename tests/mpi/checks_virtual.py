"""p virtual workers in one process = mpiexec -n p, bit for bit."""

import chainer
import chainer.functions as F
import chainer.links as L
import chainermn
import numpy as np
import pytest
from chainer.training import Trainer
from chainermn.extensions import AllreducePersistent

import vgc_chainer
from tests.mpi.common import SETTINGS, Net, fingerprint, world
from vgc_chainer.extensions import CommunicatorState, CompressionReport

pytestmark = pytest.mark.skipif(world.size > 3, reason='every rank simulates all of them: slow')


class Plain(chainer.Chain):
    """Without BatchNorm and dropout."""

    def __init__(self):
        super().__init__()
        with self.init_scope():
            self.fc1 = L.Linear(72, 8)
            self.fc2 = L.Linear(8, 3)

    def forward(self, x):
        return self.fc2(F.tanh(self.fc1(x)))


class WithDropout(Net):
    def forward(self, x):
        return super().forward(F.dropout(x, 0.3))


NETWORKS = {'plain': Plain, 'batch normalization and dropout': WithDropout}


def data():
    rng = np.random.default_rng(5)
    x = rng.standard_normal((24 * world.size, 2, 6, 6)).astype(np.float32)
    return chainer.datasets.TupleDataset(x, rng.integers(0, 3, len(x)).astype(np.int32))


def setup(comm, network):
    np.random.seed(3)
    model = L.Classifier(NETWORKS[network]())
    optimizer = chainer.optimizers.MomentumSGD(lr=0.05)
    optimizer = chainermn.create_multi_node_optimizer(optimizer, comm).setup(model)
    optimizer.add_hook(chainer.optimizer_hooks.WeightDecay(1e-3))
    return model, optimizer


def iterator_of_this_rank(comm):
    np.random.seed(10 + comm.rank)
    shard = chainermn.scatter_dataset(
        data() if comm.rank == 0 else None, comm, shuffle=True, seed=1
    )
    return chainer.iterators.SerialIterator(shard, 5)


def trained_by_mpi(name, options, network, steps):
    comm = vgc_chainer.create_communicator(name, world, **options)
    model, optimizer = setup(comm, network)
    updater = chainer.training.StandardUpdater(iterator_of_this_rank(comm), optimizer)
    for _ in range(steps):
        updater.update()
    statistics = world.gather([p.copy() for p in persistents(model)])
    comm.hook and comm.hook.detach()
    return model, comm, statistics


def trained_virtually(name, options, network, steps, trainer_of=None):
    comm = vgc_chainer.create_communicator(name, virtual_workers=world.size, **options)
    model, optimizer = setup(comm, network)
    iterators = [iterator_of_this_rank(comm) for _ in comm.turns(model)]
    updater = vgc_chainer.VirtualUpdater(iterators, optimizer, comm)
    if trainer_of is not None:
        return model, comm, trainer_of(updater, comm, optimizer)
    for _ in range(steps):
        updater.update()
    statistics = [[p.copy() for p in persistents(model)] for _ in comm.turns(model)]
    comm.hook and comm.hook.detach()
    return model, comm, statistics


def persistents(model):
    return [
        value
        for _, link in sorted(model.namedlinks())
        for value in (link.__dict__[name] for name in sorted(link._persistent))
        if hasattr(value, 'shape')
    ]


@pytest.mark.parametrize('network', NETWORKS)
@pytest.mark.parametrize(('name', 'options'), SETTINGS)
def test_virtual_workers_equal_ranks(name, options, network):
    real, comm, statistics = trained_by_mpi(name, options, network, 12)
    virtual, virtual_comm, virtual_statistics = trained_virtually(name, options, network, 12)
    assert fingerprint(virtual) == fingerprint(real)
    assert virtual_comm.traffic == comm.traffic and comm.traffic.elements > 0
    mine = virtual_comm.workers[world.rank].compressor.state()
    for key, value in comm.compressor.state().items():
        np.testing.assert_array_equal(mine[key], value)
    if world.rank == 0:
        for a, b in zip(statistics, virtual_statistics):
            for x, y in zip(a, b):
                np.testing.assert_array_equal(x, y)
        assert network == 'plain' or not np.array_equal(statistics[0][0], statistics[1][0])


def test_averaged_statistics():
    model, comm, statistics = trained_virtually(
        'variance', {}, 'batch normalization and dropout', 3
    )
    AllreducePersistent(model, comm)()
    expected = [np.mean([s[i] for s in statistics], axis=0) for i in range(len(statistics[0]))]
    for _ in comm.turns(model):
        for got, mean in zip(persistents(model), expected):
            np.testing.assert_allclose(got, mean, rtol=1e-6)


def test_resumed_equals_uninterrupted(tmp_path):
    def trainer_of(updater, comm, optimizer):
        trainer = Trainer(updater, (12, 'iteration'), out=str(tmp_path))
        trainer.extend(CommunicatorState(comm, optimizer))
        trainer.extend(CompressionReport(comm, trigger=(3, 'iteration')))
        return trainer

    arguments = ('variance', {'alpha': 1.0}, 'batch normalization and dropout', None)
    model, comm, trainer = trained_virtually(*arguments, trainer_of=trainer_of)
    path = str(tmp_path / 'half.npz')

    def save(trainer):
        chainer.serializers.save_npz(path, trainer)

    trainer.extend(save, trigger=(6, 'iteration'), call_before_training=False, priority=-1000)
    trainer.stop_trigger = chainer.training.get_trigger((6, 'iteration'))
    trainer.run()
    comm.hook.detach()
    model, comm, trainer = trained_virtually(*arguments, trainer_of=trainer_of)
    chainer.serializers.load_npz(path, trainer, strict=False)
    trainer.run()
    comm.hook.detach()
    straight, _, _ = trained_virtually('variance', {'alpha': 1.0}, arguments[2], 12)
    assert fingerprint(model) == fingerprint(straight)


def test_a_step_without_every_workers_turn_is_refused():
    comm = vgc_chainer.create_communicator('strom', virtual_workers=2)
    model, optimizer = setup(comm, 'plain')
    comm.bcast_data(model)
    with comm.worker(0, model):
        x, t = chainer.dataset.concat_examples(data()[:4])
        model.cleargrads()
        model(x, t).backward()
        comm.collect(model)
    with pytest.raises(vgc_chainer.errors.VgcError, match='worker 1 has contributed no gradient'):
        comm.multi_node_mean_grad(model)
