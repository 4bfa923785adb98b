"""CompressionReport in a real Trainer of one rank."""

import json

import chainer
import chainermn
import numpy as np
import pytest
from chainer import training
from chainer.training import extensions as chainer_extensions

import vgc_chainer

pytest.importorskip('mpi4py')


def trained(comm, out, epochs=2):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((40, 5)).astype(np.float32)
    data = chainer.datasets.TupleDataset(x, (x[:, 0] > 0).astype(np.int32))
    model = chainer.links.Classifier(chainer.links.Linear(5, 2))
    optimizer = chainermn.create_multi_node_optimizer(chainer.optimizers.SGD(), comm)
    optimizer.setup(model)
    iterator = chainer.iterators.SerialIterator(data, 8)
    trainer = training.Trainer(
        training.StandardUpdater(iterator, optimizer), (epochs, 'epoch'), out=str(out)
    )
    trainer.extend(vgc_chainer.extensions.CompressionReport(comm))
    trainer.extend(chainer_extensions.LogReport(filename='log'))
    try:
        trainer.run()
    finally:
        if getattr(comm, 'hook', None) is not None:
            comm.hook.detach()
    return json.loads((out / 'log').read_text())


def self_communicator(name, **options):
    from mpi4py import MPI

    return vgc_chainer.create_communicator(name, MPI.COMM_SELF, **options)


def test_entries_of_an_interval(tmp_path):
    comm = self_communicator('variance', alpha=1.0)
    log = trained(comm, tmp_path)
    assert len(log) == 2
    for entry in log:
        assert entry['compression_ratio'] == pytest.approx(12 / entry['elements_sent'])
        assert 0 < entry['wire_ratio'] < entry['compression_ratio']
        for phase in ('second_moment', 'compress', 'communicate', 'decode'):
            assert entry[f'time/{phase}'] > 0
    # The first of ten updates only broadcasts.
    sent = 4 * log[0]['elements_sent'] + 5 * log[1]['elements_sent']
    assert comm.traffic.steps == 9 and comm.traffic.elements == pytest.approx(sent)


def test_wire_ratio_counts_the_bytes_of_the_buffers(tmp_path, monkeypatch):
    comm = self_communicator('strom', tau=1e-4)
    real, sent = comm.transport.mpi_comm, []

    class Spy:
        rank, size = real.rank, real.size

        def Allgather(self, send, receive):
            sent.append(send.nbytes)
            real.Allgather(send, receive)

        def Allgatherv(self, send, receive):
            sent.append(send.nbytes)
            real.Allgatherv(send, receive)

        def allgather(self, obj):
            return real.allgather(obj)

    monkeypatch.setattr(comm.transport, 'mpi_comm', Spy())
    trained(comm, tmp_path, epochs=1)
    sent = sent[2:]  # the broadcast's checks: who broadcasts, and which model
    assert sum(sent) == comm.traffic.wire_bytes > 0


def test_chainermns_own_communicator_reports_nothing(tmp_path):
    log = trained(self_communicator('naive'), tmp_path)
    assert 'compression_ratio' not in log[0] and 'main/loss' in log[0]
