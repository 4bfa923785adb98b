"""A ChainerMN communicator whose gradient exchange is compressed.

The only module that knows second moments, compressors and transport at once::

    backward ends -> multi_node_mean_grad(model)
        status of every rank      nothing is touched unless all can take part
        compressor.compress       residuals in, words out
        header of every rank      lengths
        transport.allgatherv      words
        compressor.decode         rank by rank, sum / p -> param.grad
"""

import dataclasses
import json

import chainer
import numpy as np
from chainermn.communicators.mpi_communicator_base import MpiCommunicatorBase

from vgc_chainer import wire
from vgc_chainer.agreement import (
    agreement_digest,
    describe,
    describe_snapshot,
    first_difference,
    require_agreement,
)
from vgc_chainer.compressors.finite import first_nonfinite
from vgc_chainer.errors import (
    MismatchError,
    NonFiniteError,
    RankFailedError,
    StateError,
    TransportError,
    VgcError,
)
from vgc_chainer.layout import Layout
from vgc_chainer.replicas import ReplicaCheck
from vgc_chainer.second_moment import SecondMomentHook
from vgc_chainer.stats import Traffic
from vgc_chainer.timing import Timings
from vgc_chainer.transport import TRANSPORTS, create_transport
from vgc_chainer.transport.mpi import MPITransport
from vgc_chainer.transport.staging import HostStaging
from vgc_chainer.transport.watched import WatchedCollectives
from vgc_chainer.watchdog import Watchdog

#: Bytes in one MPI broadcast: some MPIs count in 32-bit integers.
_BROADCAST_BYTES = 2**30


def initialised_parameters(model):
    """``(name, parameter)`` of a link in wire order, uninitialised ones left out."""
    return [(n, p) for n, p in sorted(model.namedparams()) if p.array is not None]


def _require_same_phase(statuses):
    """Either all ranks broadcast the model, or none does; raises MismatchError otherwise."""
    starting = [rank for rank, status in enumerate(statuses) if status.code == wire.BROADCAST]
    if 0 < len(starting) < len(statuses):
        steps = {status.step for status in statuses if status.code != wire.BROADCAST}
        raise MismatchError(
            f'ranks {starting} are about to broadcast the model, the others to exchange the '
            f'gradients of step {sorted(steps)}: have all ranks loaded the same snapshot?'
        )


@dataclasses.dataclass
class Contribution:
    """What one rank brings into one step.

    Attributes:
        status: :class:`~vgc_chainer.wire.Status`.
        gradients, moments: One array a group or None, as the compressor takes them.
        scale: Loss scale that they carry.
        failure: Exception that kept this rank from taking part.
    """

    status: wire.Status
    gradients: list = None
    moments: list = None
    scale: float = 1.0
    failure: Exception = None


class CompressedCommunicator(WatchedCollectives, HostStaging, MpiCommunicatorBase):
    """ChainerMN communicator that compresses gradients; everything else is inherited.

    Usually made by :func:`vgc_chainer.create_communicator`.

    Args:
        mpi_comm: mpi4py intracommunicator.
        make_compressor: Called without arguments; returns a fresh
            :class:`~vgc_chainer.compressors.Compressor`.
        unsupported: What to do with parameters of functions that have no rule for second moments:
            see :class:`~vgc_chainer.second_moment.SecondMomentHook`.
        nonfinite: What a NaN or Inf in a gradient or second moment does, when no loss scale is
            in use: ``'raise'`` (:class:`~vgc_chainer.errors.NonFiniteError` on every rank) or
            ``'skip'`` (no rank updates its parameters in this step; residuals are untouched).
        second_moment_memory: Bytes that the second moments may use for per-sample terms.
        checksum: Send a CRC-32 with every payload and check it.
        transport: How payloads of GPU ranks travel: ``'mpi'``, ``'nccl'`` or ``'auto'``; see
            :mod:`vgc_chainer.transport`. Chosen at the first exchange, when devices are known.
        watchdog: Seconds that a rank may wait for the others before the job is ended, with a
            list of who is where; None waits for ever. A rank whose process has ended is not
            waited for that long: see :mod:`vgc_chainer.watchdog`.
        check_replicas: Compare the parameters of all ranks every so many steps; None or 0 never
            does. See :mod:`vgc_chainer.replicas`.

    Attributes:
        compressor: This rank's compressor with its residuals.
        hook: This rank's :class:`~vgc_chainer.second_moment.SecondMomentHook`, or None if the
            compressor needs no second moments.
        traffic: :class:`~vgc_chainer.stats.Traffic` since construction.
        timings: :class:`~vgc_chainer.timing.Timings` of this rank.
        skipped: Number of steps skipped for NaN or Inf.
    """

    def __init__(
        self,
        mpi_comm,
        make_compressor,
        unsupported='error',
        nonfinite='raise',
        second_moment_memory=2**28,
        checksum=False,
        transport='auto',
        watchdog=1800.0,
        check_replicas=None,
    ):
        if nonfinite not in ('raise', 'skip'):
            raise ValueError(f"nonfinite must be 'raise' or 'skip', not {nonfinite!r}")
        if transport not in TRANSPORTS:
            raise ValueError(f'transport must be one of {TRANSPORTS}, not {transport!r}')
        self.watchdog = Watchdog(mpi_comm, watchdog)
        # ChainerMN keeps configurations in a dict of the class, common to all communicators.
        object.__setattr__(self, '_configs', {})
        super().__init__(mpi_comm)
        self.options = {
            'make_compressor': make_compressor,
            'unsupported': unsupported,
            'nonfinite': nonfinite,
            'second_moment_memory': second_moment_memory,
            'checksum': checksum,
            'transport': transport,
            'watchdog': watchdog,
            'check_replicas': check_replicas,
        }
        self.nonfinite = nonfinite
        self.checksum = bool(checksum)
        self.replicas = ReplicaCheck(check_replicas)
        self.compressor = make_compressor()
        self.transport = MPITransport(mpi_comm)
        self._wanted_transport = transport
        self.traffic = Traffic()
        self.timings = Timings()
        self.skipped = 0
        self.hook = None
        if self.compressor.uses_second_moment:
            self.hook = SecondMomentHook(
                unsupported=unsupported, memory=second_moment_memory, timings=self.timings
            )
        self._layout = None
        self._layout_of = None
        self._description = None
        self._agreement = 0
        self._disabled_rules = []

    # -- ChainerMN's interface

    def split(self, color, key):
        """As ``MPI_Comm_split``; algorithm, hyperparameters and policies carry over.

        The new communicator has residuals of its own, all zero.
        """
        return type(self)(self.mpi_comm.Split(color, key), **self.options)

    def finalize(self):
        """Detach the second-moment hook and release MPI as ChainerMN does."""
        if self.hook is not None:
            self.hook.detach()
        super().finalize()

    def bcast_data(self, model):
        """Give every rank the parameters of rank 0, and get ready for compressed exchange.

        Checks that all ranks hold the same model and use the same algorithm, hyperparameters
        and versions; attaches the second-moment hook; discards second moments of a backward
        pass that ended before, because ChainerMN discards that gradient, too.

        Raises:
            MismatchError: On every rank, naming the first difference.
        """
        with self.watchdog.waiting('the comparison of models'):
            self._require_all_broadcast()
            require_agreement(self.transport, describe(self, model))
        self._observe(model)
        with self.watchdog.waiting('the broadcast of the model'):
            for _, param in sorted(model.namedparams()):
                if param.array is not None:
                    self._bcast_array(param.array)

    def multi_node_mean_grad(self, model, zero_fill=False):
        """Replace every ``param.grad`` by the mean over ranks of what was sent.

        Args:
            model: Link. Gradients come from an ordinary ``loss.backward()``.
            zero_fill: Treat a gradient that is None as zeros. If False, such a parameter takes
                no part on this rank: its residual stays, and its gradient remains None unless
                another rank has something for it.

        Raises:
            NonFiniteError: NaN or Inf on any rank and policy ``'raise'``; on every rank.
            MismatchError: Ranks differ in model or hyperparameters; on every rank.
            RankFailedError: Another rank could not take part and has raised its own error.
        """
        params = initialised_parameters(model)
        xp = chainer.backend.get_array_module(*[param.array for _, param in params])
        self._enable_rules()
        part = self._contribution(model, params, xp, zero_fill)
        with self.timings.measure('communicate'):
            with self._waiting('status', part.status.step):
                statuses = self._exchange(part.status)
        if not self._all_ready(statuses, part.failure, params, part.scale):
            return
        with self._waiting('hashes of parameters', part.status.step):
            self.replicas.check(self.transport, params, part.status.step)
        self._choose_transport(xp)
        with self.timings.measure('compress', xp):
            message = self.compressor.compress(part.gradients, part.moments, part.scale)
        self._write_mean(params, self._gather(message, xp), part.scale, xp)

    # -- snapshots

    def state(self):
        """This rank's state as dict of arrays and plain values: residuals, step, traffic.

        Residuals differ from rank to rank, so every rank has to save its own. Empty before the
        communicator has seen a model.
        """
        if self._layout is None:
            return {}
        state = {f'compressor/{key}': value for key, value in self.compressor.state().items()}
        state['description'] = json.dumps(describe_snapshot(self, self._description))
        for field in dataclasses.fields(self.traffic):
            state[f'traffic/{field.name}'] = getattr(self.traffic, field.name)
        return state

    def load_state(self, model, state):
        """Continue from what :meth:`state` returned on this rank; not collective.

        Raises:
            StateError: The state belongs to another model, algorithm, hyperparameter or version;
                the first difference is named.
        """
        self._observe(model)
        saved = json.loads(state['description'])
        mine = json.loads(json.dumps(describe_snapshot(self, self._description)))
        difference = first_difference(saved, mine)
        if difference is not None:
            raise StateError(f'the snapshot (first) does not fit this run (second): {difference}')
        prefix = 'compressor/'
        self.compressor.load_state(
            {k[len(prefix) :]: v for k, v in state.items() if k.startswith(prefix)}
        )
        for field in dataclasses.fields(self.traffic):
            setattr(self.traffic, field.name, int(state[f'traffic/{field.name}']))

    # -- a step, part by part

    def _require_all_broadcast(self):
        """A rank that resumes from a snapshot does not broadcast; who starts anew does."""
        step = self.compressor.step
        _require_same_phase(self._exchange(wire.Status(wire.BROADCAST, step=step)))

    def _contribution(self, model, params, xp, zero_fill):
        """What this rank brings into the step. An error is kept, to be told to all ranks first."""
        part = Contribution(wire.Status(step=self.compressor.step + 1))
        try:
            self._require_layout(params, model, xp)
            part.status.agreement = self._agreement
            part.gradients, part.moments, part.scale = self._inputs(params, zero_fill)
            part.status.detail = self._first_nonfinite(part.gradients, part.moments, xp)
            if part.status.detail >= 0:
                part.status.code = wire.NONFINITE
        except Exception as error:
            part.failure, part.status.code = error, wire.FAILED
        finally:
            if self.hook is not None:
                self.hook.clear()
        return part

    def _inputs(self, params, zero_fill):
        """This rank's gradients, second moments and loss scale."""
        gradients, moments, scales = [], [], set()
        for name, param in params:
            gradient = param.grad
            if gradient is None:
                zeros = param.xp.zeros_like(param.array) if zero_fill else None
                gradients.append(zeros)
                moments.append(zeros)
                continue
            gradients.append(gradient)
            moments.append(self._moment(name, param))
            scales.add(param._loss_scale)
        if len(scales) > 1:
            raise VgcError(f'gradients carry different loss scales: {sorted(map(str, scales))}')
        scale = scales.pop() if scales else None
        return gradients, moments, 1.0 if scale is None else float(scale)

    def _moment(self, name, param):
        if self.hook is None or self.hook.is_dense(param):
            return None
        moment = self.hook.moment(param)
        if moment is None:
            raise VgcError(
                f'parameter {name} has a gradient and no second moment: was backward() run '
                'before the communicator saw the model? create_multi_node_optimizer and '
                'comm.bcast_data(model) announce it'
            )
        return moment

    def _first_nonfinite(self, gradients, moments, xp):
        bad = first_nonfinite(gradients, xp)
        return bad if bad >= 0 or self.hook is None else first_nonfinite(moments, xp)

    def _exchange(self, record):
        gathered = self.transport.allgather_records(record.pack())
        return [type(record).unpack(row, rank) for rank, row in enumerate(gathered)]

    def _waiting(self, what, step):
        """Scope of a collective, for the watchdog."""
        return self.watchdog.waiting(f'the exchange of {what}', step)

    def _all_ready(self, statuses, failure, params, scale):
        """Whether to go on; raises the same kind of error on every rank if it cannot."""
        _require_same_phase(statuses)
        if any(status.code == wire.FAILED for status in statuses):
            with self._waiting('reasons', statuses[self.rank].step):
                reasons = self.transport.allgather_objects(
                    f'{type(failure).__name__}: {failure}' if failure is not None else None
                )
            if failure is not None:
                raise failure
            rank = next(rank for rank, reason in enumerate(reasons) if reason is not None)
            raise RankFailedError(f'rank {rank} could not take part: {reasons[rank]}')
        mine = statuses[self.rank]
        if any(status.agreement != mine.agreement for status in statuses):
            require_agreement(self.transport, self._description)
            raise MismatchError('ranks disagree, but their descriptions are equal')
        for rank, status in enumerate(statuses):
            if status.step != mine.step:
                raise MismatchError(
                    f'rank {rank} is at step {status.step}, rank {self.rank} at {mine.step}'
                )
        bad = [rank for rank, status in enumerate(statuses) if status.code == wire.NONFINITE]
        if not bad:
            return True
        rank = bad[0]
        name = params[statuses[rank].detail][0]
        if scale == 1.0 and self.nonfinite == 'raise':
            raise NonFiniteError(
                f'NaN or Inf in the gradient or second moment of parameter {name} on rank '
                f'{rank} at step {mine.step}'
            )
        self._skip(params)
        return False

    def _skip(self, params):
        """No update on any rank in this step; r and v keep what they hold.

        NaN gradients let Chainer's dynamic loss scaling see the overflow on every rank; disabled
        update rules protect the parameters where scaling is static or absent.
        """
        self.skipped += 1
        for _, param in params:
            param.grad = param.xp.full_like(param.array, np.nan)
            rule = param.update_rule
            if rule is not None and rule.enabled:
                rule.enabled = False
                self._disabled_rules.append(rule)

    def _enable_rules(self):
        for rule in self._disabled_rules:
            rule.enabled = True
        self._disabled_rules = []

    def _choose_transport(self, xp):
        """At the first exchange: collective, and before any residual is touched."""
        wanted, self._wanted_transport = self._wanted_transport, None
        if wanted == 'nccl' and xp is np:
            raise TransportError("transport 'nccl' carries GPU arrays; the model is on the CPU")
        if wanted is not None and xp is not np:
            self.transport = create_transport(wanted, self.mpi_comm)

    def _gather(self, message, xp):
        """Everybody's messages, in rank order."""
        payload = message.pack(xp)
        header = message.header()
        if self.checksum:
            header.checksum = wire.checksum(payload)
        with self.timings.measure('communicate'):
            with self._waiting('headers', self.compressor.step):
                headers = self._exchange(header)
            for rank, theirs in enumerate(headers):
                wire.require_plausible(theirs, self._layout, rank)
            with self._waiting('words', self.compressor.step):
                payloads = self.transport.allgatherv(payload, [h.payload_words for h in headers])
        fixed = wire.Status.nbytes() + wire.Header.nbytes()
        self.traffic.add(
            self._layout.total,
            [h.elements for h in headers],
            [fixed + 4 * h.payload_words for h in headers],
        )
        return [
            wire.unpack(payload, header, self._layout, rank)
            for rank, (payload, header) in enumerate(zip(payloads, headers))
        ]

    def _write_mean(self, params, messages, scale, xp):
        with self.timings.measure('decode', xp):
            self.compressor.decode(messages, self._targets(params, messages), scale)

    def _targets(self, params, messages):
        """Gradient arrays to write; None where no rank has anything for a parameter."""
        everywhere = set(range(len(params)))
        for message in messages:
            everywhere &= {int(group) for group in message.absent}
        targets = []
        for group, (_, param) in enumerate(params):
            if group in everywhere:
                targets.append(None)
                continue
            if param.grad is None:
                param.grad = param.xp.empty_like(param.array)
            targets.append(param.grad)
        return targets

    # -- the model

    def _require_layout(self, params, model, xp):
        layout_of = tuple((name, param.shape, param.dtype) for name, param in params)
        if self._layout is not None and layout_of == self._layout_of and xp is self.compressor.xp:
            return
        self._observe(model)

    def _observe(self, model):
        params = initialised_parameters(model)
        xp = chainer.backend.get_array_module(*[param.array for _, param in params])
        self._layout_of = tuple((name, param.shape, param.dtype) for name, param in params)
        self._layout = Layout(self._layout_of)
        self._prepare_compressor(xp)
        self._description = describe(self, model)
        self._agreement = agreement_digest(self._description)
        if self.hook is not None:
            self.hook.observe(model)
            self.hook.clear()
            self.hook.attach()

    def _prepare_compressor(self, xp):
        self.compressor.prepare(self._layout, xp, self.rank)

    def _bcast_array(self, array):
        host = np.ascontiguousarray(chainer.backends.cuda.to_cpu(array))
        data = host.reshape(-1).view(np.uint8)
        for start in range(0, data.size, _BROADCAST_BYTES):
            self.mpi_comm.Bcast(data[start : start + _BROADCAST_BYTES])
        array[...] = chainer.backend.get_array_module(array).asarray(host)
