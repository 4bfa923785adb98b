"""Makes compression visible to LogReport, PrintReport and PlotReport."""

import dataclasses

import numpy as np
from chainer import reporter
from chainer.training import extension


class CompressionReport(extension.Extension):
    """Reports once per interval what was sent in it and where the time went.

    Entries: ``compression_ratio`` (PAPER.md section 9: parameters / average number sent per step
    and worker), ``wire_ratio`` (float32 bytes of the gradient / real bytes on the wire, headers
    included), ``elements_sent`` (average per step and worker) and, in seconds over the interval
    on this rank, ``time/second_moment``, ``time/compress``, ``time/communicate`` and
    ``time/decode``. Communication includes the wait for the slowest rank.

    A ratio is formed from sums over the whole interval, not averaged over steps. Let LogReport
    have the same trigger: averaging several of these values would not give the ratio of the
    longer interval.

    Args:
        comm: Communicator. With one of ChainerMN's own nothing is reported.
        trigger: Interval, as for any extension.
    """

    priority = extension.PRIORITY_WRITER

    def __init__(self, comm, trigger=(1, 'epoch')):
        self.trigger = trigger
        self._comm = comm if hasattr(comm, 'traffic') else None
        self._last = None

    def initialize(self, trainer):
        # After a resume the interval of the snapshot goes on. (chainer's snapshot may load later
        # than this is called.)
        if self._comm is not None and self._last is None:
            self._last = self._comm.traffic.copy()

    def serialize(self, serializer):
        if self._comm is None:
            return
        last = self._last or self._comm.traffic.copy()
        for field in dataclasses.fields(last):
            value = serializer(field.name, np.array(getattr(last, field.name)))
            setattr(last, field.name, int(value))
        self._last = last

    def __call__(self, trainer):
        if self._comm is None:
            return
        now = self._comm.traffic.copy()
        interval, self._last = now - self._last, now
        values = {
            'compression_ratio': interval.compression_ratio,
            'wire_ratio': interval.wire_ratio,
            'elements_sent': interval.elements_sent,
        }
        for phase, seconds in self._comm.timings.collect().items():
            values[f'time/{phase}'] = seconds
        reporter.report(values)
