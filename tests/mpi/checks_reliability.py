"""Replicas that drift apart, ranks that lost each other, messages damaged on the way."""

import chainer
import chainermn
import numpy as np
import pytest
from chainer import optimizers

from tests.mpi.common import SETTINGS, Net, backward, created, world
from vgc_chainer.errors import MismatchError, NonFiniteError, WireError
from vgc_chainer.transport.mpi import MPITransport

last = world.size - 1


def trainer_of(comm, seed=0):
    model = Net(seed)
    optimizer = chainermn.create_multi_node_optimizer(optimizers.Adam(), comm).setup(model)

    def step(number):
        backward(model, number)
        optimizer.update()

    return model, step


@pytest.mark.parametrize('interval', [1, 3])
def test_check_replicas_names_the_parameter_and_the_ranks(interval):
    comm = created('variance', alpha=1.0, check_replicas=interval)
    model, step = trainer_of(comm)
    for number in range(4):
        step(number)
    if world.rank == last:
        flat = model.fc2.W.array.reshape(-1).view(np.uint32)
        flat[7] ^= 1  # one bit
        model.fc1.b.array[2] += 1
    with pytest.raises(MismatchError, match='ranks') as caught:
        for number in range(4, 9):
            step(number)
    # Gradients of step n are exchanged in iteration n, the first one of which only broadcasts.
    expected = 4 if interval == 1 else 6
    changed = 2 if interval == 1 else r'\d+'
    caught.match(
        rf'parameter /fc1/b is not the same on all ranks before step {expected}: '
        rf'ranks \[{last}\] differ from rank 0; {changed} of 8 parameters'
    )
    assert world.allreduce(1) == world.size


def test_check_replicas_is_content_with_replicas():
    comm = created('qsgd', check_replicas=1)
    _, step = trainer_of(comm)
    for number in range(4):
        step(number)


def test_check_replicas_must_agree():
    comm = created('strom', check_replicas=5 if world.rank == last else None)
    with pytest.raises(MismatchError, match='option check_replicas is None on the one and 5'):
        comm.bcast_data(Net())


@pytest.mark.parametrize('interval', [-1, 1.5, True])
def test_illegal_interval(interval):
    with pytest.raises(ValueError, match='check_replicas must be an integer'):
        created('strom', check_replicas=interval)


def test_one_rank_broadcasts_while_the_others_exchange():
    """As where one rank has found no snapshot, or has changed its model alone."""
    comm = created('variance', alpha=1.0)
    model, step = trainer_of(comm)
    step(0)
    step(1)
    backward(model, 2)
    with pytest.raises(
        MismatchError, match=rf'ranks \[{last}\] are about to broadcast .* of step \[2\]'
    ):
        if world.rank == last:
            comm.bcast_data(model)
        else:
            comm.multi_node_mean_grad(model)
    assert world.allreduce(1) == world.size


def test_ranks_at_different_steps():
    comm = created('strom')
    model, step = trainer_of(comm)
    step(0)
    comm.compressor.step = 7 if world.rank == last else 5
    backward(model, 1)
    with pytest.raises(MismatchError, match=r'is at step [68], rank \d+ at [68]'):
        comm.multi_node_mean_grad(model)
    assert world.allreduce(1) == world.size


def exchanged(model, comm, steps=3):
    """Random gradients by hand, exchanged; whether all ranks got the same."""
    rng = np.random.default_rng(world.rank)
    for _ in range(steps):
        for param in model.params():
            param.grad = rng.standard_normal(param.shape).astype(param.dtype)
        comm.multi_node_mean_grad(model)
    gathered = world.allgather([param.grad.tobytes() for param in model.params()])
    return all(theirs == gathered[0] for theirs in gathered)


@pytest.mark.parametrize(('name', 'options'), SETTINGS)
def test_a_model_of_one_parameter(name, options):
    comm = created(name, unsupported='batch', **options)
    model = chainer.Link()
    with model.init_scope():
        model.scalar = chainer.Parameter(np.array(1, np.float32))
    comm.bcast_data(model)
    if comm.hook is None:
        assert exchanged(model, comm)
        return
    for number in range(3):
        model.cleargrads()
        loss = chainer.functions.sum(model.scalar * np.float32(number + world.rank + 1))
        loss.backward()
        comm.multi_node_mean_grad(model)
    assert len(set(world.allgather(float(model.scalar.grad)))) == 1


def test_a_model_of_many_small_arrays():
    """2,000 of them; make soak takes 10,000 with every compressor."""
    model = chainer.ChainList(*[chainer.links.Bias(shape=(1 + k % 7,)) for k in range(2000)])
    comm = created('strom', tau=0.5)
    comm.bcast_data(model)
    assert exchanged(model, comm)


@pytest.mark.parametrize('bad', [np.nan, np.inf])
def test_nonfinite_second_moment(bad, monkeypatch):
    comm = created('variance', alpha=1.0)
    model, step = trainer_of(comm)
    step(0)
    step(1)
    r, v = comm.compressor.r.copy(), comm.compressor.v.copy()
    backward(model, 2)
    if world.rank == last:
        comm.hook.moment(model.fc1.W)[1, 2] = bad
    with pytest.raises(NonFiniteError, match=f'/fc1/W on rank {last} at step 2'):
        comm.multi_node_mean_grad(model)
    np.testing.assert_array_equal(comm.compressor.r, r)
    np.testing.assert_array_equal(comm.compressor.v, v)
    assert world.allreduce(1) == world.size


class Damaging(MPITransport):
    """Flips one bit of what rank 1 has sent, on every rank, from step 3 on."""

    gathers = 0

    def allgatherv(self, payload, counts):
        received = super().allgatherv(payload, counts)
        self.gathers += 1
        if self.gathers >= 3:
            received[1][received[1].size // 2] ^= np.uint32(1 << 30)
        return received


@pytest.mark.parametrize(('name', 'options'), SETTINGS)
def test_checksum_finds_a_message_damaged_on_the_way(name, options):
    comm = created(name, checksum=True, **options)
    comm.transport = Damaging(world)
    model, step = trainer_of(comm)
    for number in range(3):
        step(number)
    before = [param.array.copy() for param in model.params()]
    with pytest.raises(WireError, match='payload of rank 1 fails its checksum'):
        step(3)
    for param, array in zip(model.params(), before):
        np.testing.assert_array_equal(param.array, array)
    assert world.allreduce(1) == world.size


def test_a_header_that_announces_too_much():
    comm = created('strom')
    model, step = trainer_of(comm)
    step(0)

    class Boasting(MPITransport):
        def allgather_records(self, record):
            rows = super().allgather_records(record)
            if record.size > 6:  # a header
                rows[1, 5] = 2**40
            return rows

    comm.transport = Boasting(world)
    with pytest.raises(WireError, match='rank 1 announced 1099511627776 words of words'):
        step(1)
    assert world.allreduce(1) == world.size
