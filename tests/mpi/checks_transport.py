"""The same bytes out of every transport, whatever the lengths."""

import chainer
import numpy as np
import pytest
from mpi4py import MPI

from tests.mpi.common import Net, assert_replicas_identical, backward, created, world
from vgc_chainer import communicator
from vgc_chainer.errors import TransportError
from vgc_chainer.transport import create_transport, mpi
from vgc_chainer.transport.mpi import MPITransport

LENGTHS = {
    'equal': [1000] * world.size,
    'uneven': [37 * rank**2 for rank in range(world.size)],
    'all empty': [0] * world.size,
    'one empty': [rank * 5 for rank in range(world.size)][::-1],
    'one only': [100_000] + [0] * (world.size - 1),
}


def payload_of(rank, length):
    return np.random.default_rng([rank, length]).integers(0, 2**32, length, np.uint32)


@pytest.mark.parametrize('lengths', LENGTHS.values(), ids=LENGTHS)
def test_allgatherv(lengths):
    transport = MPITransport(world)
    for _ in range(2):
        received = transport.allgatherv(payload_of(world.rank, lengths[world.rank]), lengths)
        for rank, length in enumerate(lengths):
            np.testing.assert_array_equal(received[rank], payload_of(rank, length))


def test_records_and_objects():
    transport = MPITransport(world)
    rows = transport.allgather_records(np.array([world.rank, -7], np.int64))
    np.testing.assert_array_equal(rows, [[rank, -7] for rank in range(world.size)])
    assert transport.allgather_objects(str(world.rank)) == [str(r) for r in range(world.size)]


@pytest.mark.parametrize('limit', [1, 997, 50_000])
@pytest.mark.parametrize('lengths', LENGTHS.values(), ids=LENGTHS)
def test_a_gather_beyond_what_mpi_counts_goes_in_parts(lengths, limit, monkeypatch):
    calls = []

    class Spy(MPITransport):
        def _allgatherv(self, send, received, counts):
            calls.append(sum(counts))
            super()._allgatherv(send, received, counts)

    if limit == 1:
        lengths = [min(length, 20) for length in lengths]
    monkeypatch.setattr(mpi, '_MAX_WORDS', limit)
    received = Spy(world).allgatherv(payload_of(world.rank, lengths[world.rank]), lengths)
    for rank, length in enumerate(lengths):
        np.testing.assert_array_equal(received[rank], payload_of(rank, length))
    assert max(calls) <= max(limit, world.size)
    assert len(set(world.allgather(len(calls)))) == 1


def test_a_broadcast_beyond_what_mpi_counts_goes_in_parts(monkeypatch):
    monkeypatch.setattr(communicator, '_BROADCAST_BYTES', 100)
    model = Net(seed=world.rank)
    created('strom').bcast_data(model)
    assert_replicas_identical(model)


def test_nccl_for_a_model_on_the_cpu_is_refused():
    comm = created('strom', transport='nccl')
    model = Net()
    comm.bcast_data(model)
    backward(model, 0)
    with pytest.raises(TransportError, match='the model is on the CPU'):
        comm.multi_node_mean_grad(model)


def test_unknown_transport():
    with pytest.raises(ValueError, match="transport must be one of .* not 'tcp'"):
        created('strom', transport='tcp')


def test_nccl_where_it_cannot_work():
    """Without CuPy or a device, or with two ranks on one: one reason, on every rank."""
    if chainer.backends.cuda.available:
        chainer.backends.cuda.cupy.cuda.Device(0).use()
    with pytest.raises(TransportError, match="'nccl' cannot work: rank") as caught:
        create_transport('nccl', world)
    assert len(set(world.allgather(str(caught.value)))) == 1
    assert create_transport('auto', world).name == 'mpi'


@pytest.mark.gpu
@pytest.mark.parametrize('lengths', LENGTHS.values(), ids=LENGTHS)
def test_allgatherv_from_a_device(lengths):
    import cupy

    transport = MPITransport(world)
    for _ in range(2):
        payload = cupy.asarray(payload_of(world.rank, lengths[world.rank]))
        received = transport.allgatherv(payload, lengths)
        for rank, length in enumerate(lengths):
            assert isinstance(received[rank], cupy.ndarray)
            np.testing.assert_array_equal(received[rank].get(), payload_of(rank, length))


@pytest.mark.gpu
@pytest.mark.parametrize('method', ['auto', 'padded', 'broadcast', 'sendrecv'])
@pytest.mark.parametrize('length', [0, 1, 1000, 1_000_000])
def test_nccl_with_one_rank(method, length):
    import cupy

    from vgc_chainer.transport.nccl import NCCLTransport

    transport = NCCLTransport(MPI.COMM_SELF, method)
    (received,) = transport.allgatherv(cupy.asarray(payload_of(0, length)), [length])
    np.testing.assert_array_equal(received.get(), payload_of(0, length))
