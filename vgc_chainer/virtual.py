"""Virtual workers: p data-parallel workers that take turns in one process on one device.

Each has its own shard of the data, BatchNorm statistics, random streams and residuals; the real
compressor, words and decode are used; only the transport is in-process. With the same seeds the
parameters are bit-identical to those of ``mpiexec -n p``::

    comm = vgc_chainer.create_communicator('variance', alpha=1.5, virtual_workers=8)
    optimizer = chainermn.create_multi_node_optimizer(optimizer, comm)
    iterators = []
    for turn in comm.turns(model):              # every worker's turn, in rank order
        np.random.seed(seed + comm.rank)        # its own stream
        shard = chainermn.scatter_dataset(data, comm, shuffle=True, seed=seed)
        iterators.append(chainer.iterators.SerialIterator(shard, 64))
    updater = vgc_chainer.VirtualUpdater(iterators, optimizer, comm)
"""

import contextlib
import copy

import chainer
import numpy as np
from chainer import reporter
from chainer.training.updaters import StandardUpdater

from vgc_chainer import wire
from vgc_chainer.communicator import CompressedCommunicator, initialised_parameters
from vgc_chainer.errors import VgcError
from vgc_chainer.layout import Layout
from vgc_chainer.transport.in_process import InProcessTransport


class VirtualWorker:
    """What belongs to one virtual worker alone.

    Attributes:
        compressor: With the worker's residuals.
        persistents: The model's persistent values (BatchNorm statistics) by path, or None as
            long as they are the model's.
        numpy_state, cupy_state: Its random streams.
        part: Its contribution to the step under way, or None.
    """

    def __init__(self, compressor, number):
        self.compressor = compressor
        self.persistents = None
        self.numpy_state = np.random.RandomState(number).get_state()
        self.cupy_state = None
        self.part = None


class VirtualCommunicator(CompressedCommunicator):
    """Compressed communicator of p workers in one process.

    ``rank`` is the worker whose turn it is, 0 outside of turns.

    Args:
        virtual_workers: Number of workers, >= 1.
        make_compressor, options: As for
            :class:`~vgc_chainer.communicator.CompressedCommunicator`.
    """

    def __init__(self, virtual_workers, make_compressor, **options):
        if int(virtual_workers) != virtual_workers or virtual_workers < 1:
            raise ValueError(f'virtual_workers must be an integer >= 1, not {virtual_workers}')
        from mpi4py import MPI

        self._turn = 0
        self._size = int(virtual_workers)
        super().__init__(MPI.COMM_SELF, make_compressor, **options)
        self.transport = InProcessTransport(self._size)
        self.workers = [VirtualWorker(make_compressor(), w) for w in range(self._size)]
        self.compressor = self.workers[0].compressor

    #: Number of processes, each of which has a snapshot of its own.
    processes = 1

    @property
    def rank(self):
        return self._turn

    @property
    def size(self):
        return self._size

    intra_rank = rank
    intra_size = size

    # -- turns

    def turns(self, model):
        """Iterate over the workers' turns, in rank order. See :meth:`worker`."""
        for number in range(self.size):
            with self.worker(number, model):
                yield number

    @contextlib.contextmanager
    def worker(self, number, model):
        """A ``with`` block in which everything belongs to worker `number`.

        The model shows its BatchNorm statistics, random numbers come from its streams.
        """
        worker = self.workers[number]
        outer = self._swap_generators(worker)
        self._show_persistents(model, worker)
        self._turn, self.compressor = number, worker.compressor
        try:
            yield worker
        finally:
            self._turn, self.compressor = 0, self.workers[0].compressor
            self._show_persistents(model, self.workers[0], leaving=worker)
            self._restore_generators(worker, outer)

    def collect(self, model):
        """Take the gradient that the worker whose turn it is has formed; clears it.

        Before the first broadcast, and after a change of the model, there is nothing to take:
        ChainerMN's optimizer is going to broadcast and to discard this gradient.
        """
        params = initialised_parameters(model)
        if self._layout is None or Layout.of((n, p.array) for n, p in params) != self._layout:
            return
        xp = chainer.backend.get_array_module(*[param.array for _, param in params])
        part = self._contribution(model, params, xp, zero_fill=False)
        if part.failure is not None:
            raise part.failure
        self.workers[self._turn].part = part
        model.cleargrads()

    # -- the exchange

    def bcast_data(self, model):
        super().bcast_data(model)
        for worker in self.workers:
            worker.part = None

    def multi_node_mean_grad(self, model, zero_fill=False):
        """As in the base class, from what :meth:`collect` has taken in the workers' turns.

        Raises:
            VgcError: A worker has contributed nothing.
        """
        params = initialised_parameters(model)
        xp = chainer.backend.get_array_module(*[param.array for _, param in params])
        self._enable_rules()
        parts = [worker.part for worker in self.workers]
        for number, worker in enumerate(self.workers):
            if worker.part is None:
                raise VgcError(f'virtual worker {number} has contributed no gradient to this step')
            worker.part = None
        scale = parts[0].scale
        if not self._all_ready([part.status for part in parts], None, params, scale):
            return
        messages = []
        for worker, part in zip(self.workers, parts):
            if zero_fill:
                self._fill_with_zeros(params, part)
            with self.timings.measure('compress', xp):
                message = worker.compressor.compress(part.gradients, part.moments, part.scale)
            messages.append(message)
        self._write_mean(params, self._gather_all(messages, xp), scale, xp)

    def _gather_all(self, messages, xp):
        """Pack, count and unpack every worker's message, as if they had travelled."""
        headers = [message.header() for message in messages]
        fixed = wire.Status.nbytes() + wire.Header.nbytes()
        self.traffic.add(
            self._layout.total,
            [header.elements for header in headers],
            [fixed + 4 * header.payload_words for header in headers],
        )
        return [
            wire.unpack(message.pack(xp), header, self._layout, rank)
            for rank, (message, header) in enumerate(zip(messages, headers))
        ]

    def _fill_with_zeros(self, params, part):
        for group, (_, param) in enumerate(params):
            if part.gradients[group] is None:
                zeros = param.xp.zeros_like(param.array)
                part.gradients[group] = part.moments[group] = zeros

    def _prepare_compressor(self, xp):
        for rank, worker in enumerate(self.workers):
            worker.compressor.prepare(self._layout, xp, rank)

    # -- other communication

    def bcast_obj(self, obj, max_buf_len=None, root=0):
        return self.transport.broadcast(obj, self.rank, root)

    def send_obj(self, obj, dest, tag=0):
        self.transport.send(obj, self.rank, dest)

    def recv_obj(self, source, status=None, tag=None):
        return self.transport.receive(source, self.rank)

    def gather_obj(self, obj, root=0):
        return self.transport.allgather_objects(obj)

    def allreduce_obj(self, obj):
        return self.transport.allreduce_object(obj)

    def split(self, color, key):
        raise NotImplementedError('virtual workers cannot be split')

    def _multi_node_mean(self, sendbuf, recvbuf):
        """Mean over the workers of a persistent array of the model; others are equal anyway."""
        source = recvbuf if sendbuf is None else sendbuf
        first = self.workers[0].persistents or {}
        key = next((key for key, value in first.items() if value is source), None)
        if key is None:
            recvbuf[...] = source
            return
        arrays = [worker.persistents[key] for worker in self.workers]
        total = arrays[0].copy()
        for array in arrays[1:]:
            total += array
        total *= 1.0 / self.size
        for array in arrays if sendbuf is None else [recvbuf]:
            array[...] = total

    # -- what belongs to one worker

    def _show_persistents(self, model, worker, leaving=None):
        places = _persistents(model)
        shown = {key: link.__dict__[name] for key, (link, name) in places.items()}
        if self.workers[0].persistents is None:
            self.workers[0].persistents = shown
        if leaving is not None:
            leaving.persistents = shown  # integers are replaced, not changed in place
        if worker.persistents is None:
            worker.persistents = {}
        for key, (link, name) in places.items():
            if key not in worker.persistents:
                worker.persistents[key] = copy.deepcopy(self.workers[0].persistents[key])
            link.__dict__[name] = worker.persistents[key]

    def _swap_generators(self, worker):
        outer = (np.random.get_state(), None)
        np.random.set_state(worker.numpy_state)
        if self._has_device():
            random = chainer.backends.cuda.cupy.random
            outer = (outer[0], random.get_random_state())
            if worker.cupy_state is None:
                worker.cupy_state = random.RandomState(int(np.random.randint(2**31 - 1)))
            random.set_random_state(worker.cupy_state)
        return outer

    def _restore_generators(self, worker, outer):
        worker.numpy_state = np.random.get_state()
        np.random.set_state(outer[0])
        if outer[1] is not None:
            random = chainer.backends.cuda.cupy.random
            worker.cupy_state = random.get_random_state()
            random.set_random_state(outer[1])

    def _has_device(self):
        return self.compressor.xp is not np

    # -- snapshots

    def state(self):
        """State of all workers: residuals, statistics, streams. Empty before the first model."""
        state = super().state()
        if not state:
            return state
        for number, worker in enumerate(self.workers):
            prefix = f'worker-{number}/'
            for key, value in worker.compressor.state().items():
                state[f'{prefix}compressor/{key}'] = value
            for key, value in (worker.persistents or {}).items():
                state[f'{prefix}persistent{key}'] = value
            _, keys, place, has_gauss, gauss = worker.numpy_state
            state[f'{prefix}generator/keys'] = keys
            state[f'{prefix}generator/rest'] = np.array([place, has_gauss, gauss], np.float64)
        return state

    def load_state(self, model, state):
        super().load_state(model, state)
        for number, worker in enumerate(self.workers):
            mine = _below(state, f'worker-{number}/')
            worker.compressor.load_state(_below(mine, 'compressor/'))
            keys, rest = mine['generator/keys'], mine['generator/rest']
            worker.numpy_state = ('MT19937', keys, int(rest[0]), int(rest[1]), float(rest[2]))
            with self.worker(number, model):
                for key, value in _below(mine, 'persistent').items():
                    link, name = _persistents(model)[key]
                    array = hasattr(link.__dict__[name], 'shape')
                    link.__dict__[name] = self.compressor.xp.array(value) if array else value


def _persistents(model):
    """Where the model keeps persistent values: ``{path: (link, attribute)}``."""
    return {
        f'{path}/{name}': (link, name)
        for path, link in sorted(model.namedlinks())
        for name in sorted(link._persistent)
    }


def _below(state, prefix):
    return {key[len(prefix) :]: v for key, v in state.items() if key.startswith(prefix)}


class VirtualUpdater(StandardUpdater):
    """Updater for virtual workers: one iteration is one turn of every worker and one update.

    Args:
        iterators: One a worker, in rank order; the first one counts epochs.
        optimizer: Multi-node optimizer over a :class:`VirtualCommunicator`.
        comm: That communicator.
        options: As for ``chainer.training.StandardUpdater``.
    """

    def __init__(self, iterators, optimizer, comm, **options):
        if len(iterators) != comm.size:
            raise ValueError(f'{len(iterators)} iterators for {comm.size} virtual workers')
        names = ['main'] + [f'worker-{number}' for number in range(1, comm.size)]
        super().__init__(dict(zip(names, iterators)), optimizer, **options)
        self._comm = comm
        self._names = names

    def update_core(self):
        optimizer = self.get_optimizer('main')
        model = optimizer.target
        loss_function = self.loss_func or model
        observations = []
        for number in self._comm.turns(model):
            batch = self.get_iterator(self._names[number]).next()
            arrays = chainer.dataset.convert._call_converter(
                self.converter, batch, self.input_device
            )
            observation = {}
            with _reporting_to(observation):
                loss = (
                    loss_function(*arrays)
                    if isinstance(arrays, tuple)
                    else loss_function(**arrays)
                    if isinstance(arrays, dict)
                    else loss_function(arrays)
                )
            model.cleargrads()
            loss.backward(loss_scale=optimizer.actual_optimizer._loss_scale)
            del loss
            self._comm.collect(model)
            observations.append(observation)
        optimizer.update()
        reporter.report(_means(observations))


def _reporting_to(observation):
    """Scope that collects what is reported, if there is a reporter (a Trainer has one)."""
    try:
        reporter.get_current_reporter()
    except IndexError:
        return contextlib.nullcontext()
    return reporter.report_scope(observation)


def _means(observations):
    """Mean over the workers of every value that they reported."""
    return {
        name: sum(getattr(o[name], 'array', o[name]) for o in observations) / len(observations)
        for name in observations[0]
    }
