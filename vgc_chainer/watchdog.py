"""Ends a job that would otherwise hang, and says which rank kept the others waiting.

MPI itself notices a process that was killed, but not one that stalls, and often not one that left
early. In each process one thread watches how long the process has been waiting in a collective,
and another answers, over TCP, the question where it is: MPI cannot be asked while it waits. What
is asked is not read; the sockets are closed to other hosts if all ranks are on one.
"""

import atexit
import contextlib
import json
import os
import select
import socket
import sys
import threading
import time
import traceback
from concurrent.futures import ThreadPoolExecutor

#: After so many seconds of waiting (or the limit, if that is less) ranks whose process has ended
#: are looked for: no rank has to wait for those.
PATIENCE = 10.0
#: Seconds that another rank has to answer.
ANSWER_WITHIN = 2.0


class Watchdog:
    """Watches the collectives of one communicator.

    Args:
        mpi_comm: mpi4py intracommunicator; construction is collective.
        limit: Seconds that a rank may wait for others, > 0; None does not watch.

    Raises:
        ValueError: The limit is not a positive number.
    """

    def __init__(self, mpi_comm, limit):
        if limit is not None and not limit > 0:
            raise ValueError(f'watchdog must be a number of seconds > 0 or None, not {limit!r}')
        self.limit = limit
        self.rank, self.size = mpi_comm.rank, mpi_comm.size
        self._process = None  # not watched
        if mpi_comm.allreduce(int(limit is not None)) < mpi_comm.size or mpi_comm.size == 1:
            return
        self._process = _process()
        self._addresses = mpi_comm.allgather(self._process.listen(_hosts(mpi_comm)))
        neighbour = _ask(self._addresses[(self.rank + 1) % self.size])
        # A firewall may refuse connections just as a host does on which nobody listens.
        self._reachable = mpi_comm.allreduce(int(isinstance(neighbour, dict))) == self.size

    @contextlib.contextmanager
    def waiting(self, phase, step=None):
        """A ``with`` block around a collective: `phase` and `step` say which one."""
        if self._process is None:
            yield
            return
        wait = _Wait(self, phase if step is None else f'{phase} of step {step}')
        self._process.begin(wait)
        try:
            yield
        finally:
            self._process.end(wait)

    def others(self):
        """What every other rank says: ``{rank: answer}``; see :func:`_ask`."""
        ranks = [rank for rank in range(self.size) if rank != self.rank]
        with ThreadPoolExecutor(min(32, len(ranks))) as pool:
            return dict(zip(ranks, pool.map(_ask, (self._addresses[rank] for rank in ranks))))

    def gone(self):
        """Ranks whose process has ended; none where that cannot be told."""
        if not self._reachable:
            return []
        return [rank for rank, answer in self.others().items() if answer == GONE]


class _Wait:
    """One collective under way."""

    def __init__(self, watchdog, what):
        self.watchdog, self.what = watchdog, what
        self.since = time.monotonic()
        # The lowest rank that waits speaks for all, unless it is the one that is missing.
        self.limit = watchdog.limit + min(0.5 * watchdog.rank, 5.0)
        self.next_look = self.since + min(PATIENCE, watchdog.limit)
        self.gone = []

    def overdue(self, now):
        """Why the job should end, or None. May take seconds, where others do not answer."""
        waited = now - self.since
        if waited >= self.limit:
            return self.report(f'longer than the limit of {self.watchdog.limit:g} s')
        if now >= self.next_look:
            self.next_look = now + 1.0
            gone = self.watchdog.gone()
            if gone and gone == self.gone:  # twice in a row
                return self.report(f'for ranks that have ended: {gone}')
            self.gone = gone
        return None

    def report(self, why):
        """Who waits where, in words."""
        waited = time.monotonic() - self.since
        lines = [
            f'vgc_chainer watchdog: rank {self.watchdog.rank} has waited {waited:.1f} s '
            f'in {self.what}, {why}'
        ]
        for rank, answer in self.watchdog.others().items():
            lines.append(f'  rank {rank}: {_in_words(answer, self.watchdog._reachable)}')
        return '\n'.join([*lines, 'vgc_chainer watchdog: aborting all ranks', ''])


class _Process:
    """The thread and the socket of this process, common to its communicators."""

    def __init__(self):
        self._waits = []
        self._last = 'has not exchanged anything yet'
        self._idle_since = time.monotonic()
        self._listeners = {}
        self._main = threading.main_thread().ident
        self._closed = False
        # Two threads: who asks others, and waits for them, must still answer others.
        for task in (self._watch, self._answer):
            threading.Thread(target=task, name=f'vgc{task.__name__}', daemon=True).start()

    def listen(self, hosts):
        """Address for :func:`_ask`, or None if there can be none."""
        interface = '127.0.0.1' if len(hosts) == 1 else ''
        try:
            if interface not in self._listeners:
                self._listeners[interface] = socket.create_server((interface, 0), backlog=128)
            port = self._listeners[interface].getsockname()[1]
            return interface or socket.gethostname(), port
        except OSError:
            return None

    def begin(self, wait):
        self._waits.append(wait)

    def end(self, wait):
        self._waits.remove(wait)
        self._last, self._idle_since = f'last in {wait.what}', time.monotonic()

    def close(self):
        """From now on nobody answers: the process is about to end."""
        self._closed = True
        for listener in self._listeners.values():
            listener.close()

    def _watch(self):
        while not self._closed:
            time.sleep(min([1.0, *(wait.limit / 10 for wait in self._waits[:1])]))
            for wait in self._waits[:1]:
                reason = wait.overdue(time.monotonic())
                if reason is not None and wait in self._waits and not self._closed:
                    _abort(reason)

    def _answer(self):
        while not self._closed:
            listeners = list(self._listeners.values())
            if not listeners:
                time.sleep(0.05)
                continue
            with contextlib.suppress(OSError, ValueError):  # closed, here or on the other side
                for listener in select.select(listeners, [], [], 1.0)[0]:
                    connection, _ = listener.accept()
                    with connection:
                        connection.sendall(json.dumps(self._where()).encode())

    def _where(self):
        now = time.monotonic()
        for wait in self._waits[:1]:
            return {'waits': wait.what, 'seconds': now - wait.since}
        frames = sys._current_frames().get(self._main)
        calls = traceback.extract_stack(frames)[-3:] if frames else []
        return {
            'last': self._last,
            'seconds': now - self._idle_since,
            'calls': [f'{call.filename}:{call.lineno} {call.name}' for call in calls],
        }


_the_process = None


def _process():
    global _the_process
    if _the_process is None:
        _the_process = _Process()
        # Before MPI_Finalize, in which a rank that leaves early waits for the others.
        atexit.register(_the_process.close)
        if hasattr(os, 'register_at_fork'):
            os.register_at_fork(after_in_child=_the_process.close)
    return _the_process


def _hosts(mpi_comm):
    return set(mpi_comm.allgather(socket.gethostname()))


#: Answer of :func:`_ask`: nobody listens there any more; nobody answers in time.
GONE, SILENT = 'gone', 'silent'


def _ask(address):
    """What the process at `address` says of itself, as dict; or `GONE` or `SILENT`."""
    if address is None:
        return SILENT
    try:
        with socket.create_connection(tuple(address), timeout=ANSWER_WITHIN) as connection:
            connection.settimeout(ANSWER_WITHIN)
            parts = []
            while part := connection.recv(4096):
                parts.append(part)
            return json.loads(b''.join(parts))
    except (ConnectionRefusedError, ConnectionResetError):
        return GONE
    except (OSError, ValueError):
        return SILENT


def _in_words(answer, reachable):
    if answer == GONE and reachable:
        return 'its process has ended'
    if not isinstance(answer, dict):
        return (
            'does not answer: stopped, on a host that is lost, or in code that blocks all threads'
        )
    seconds = f'{answer["seconds"]:.1f} s'
    if 'waits' in answer:
        return f'waits as well, for {seconds} in {answer["waits"]}'
    calls = ''.join(f'\n    at {call}' for call in answer['calls'])
    return f'has not arrived; {answer["last"]}, {seconds} ago; now{calls or " unknown"}'


def _abort(reason):
    sys.stderr.write('\n' + reason)
    sys.stderr.flush()
    from mpi4py import MPI

    if MPI.Query_thread() == MPI.THREAD_MULTIPLE:
        MPI.COMM_WORLD.Abort(1)
    os._exit(1)  # mpiexec ends the other ranks when one fails
