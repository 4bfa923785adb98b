"""Where the time of a step goes, without slowing the step down."""

import contextlib
import time

import numpy as np

PHASES = ('second_moment', 'compress', 'communicate', 'decode')


class Timings:
    """Adds up the seconds spent in each phase.

    On the CPU the host clock is read. On the GPU a pair of CUDA events is recorded around the
    phase and read when asked for, so that measuring never synchronises.
    """

    def __init__(self):
        self._seconds = dict.fromkeys(PHASES, 0.0)
        self._events = []

    @contextlib.contextmanager
    def measure(self, phase, xp=np):
        """Time a ``with`` block as part of `phase`."""
        if xp is np:
            start = time.perf_counter()
            try:
                yield
            finally:
                self._seconds[phase] += time.perf_counter() - start
            return
        begin, end = xp.cuda.Event(), xp.cuda.Event()
        begin.record()
        try:
            yield
        finally:
            end.record()
            self._events.append((phase, begin, end))
            if len(self._events) >= 4096:
                self._fold()

    def collect(self):
        """Seconds a phase since the last call, as dict; starts over."""
        self._fold()
        seconds, self._seconds = self._seconds, dict.fromkeys(PHASES, 0.0)
        return seconds

    def _fold(self):
        if not self._events:
            return
        import cupy

        for phase, begin, end in self._events:
            end.synchronize()
            self._seconds[phase] += cupy.cuda.get_elapsed_time(begin, end) / 1000
        self._events = []
