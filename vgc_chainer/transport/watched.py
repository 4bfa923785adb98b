"""ChainerMN's collectives under the eye of the watchdog."""

_COLLECTIVES = (
    'allgather',
    'allreduce',
    'allreduce_obj',
    'alltoall',
    'bcast',
    'bcast_obj',
    'gather',
    'gather_obj',
    'scatter',
)


class WatchedCollectives:
    """Mix-in before a communicator that has an attribute `watchdog`.

    Point-to-point messages are left out: a rank may rightly wait for work for a long time.
    """


def _watched(name):
    def method(self, *args, **kwargs):
        with self.watchdog.waiting(f'{name}()'):
            return getattr(super(WatchedCollectives, self), name)(*args, **kwargs)

    method.__name__ = name
    return method


for _name in _COLLECTIVES:
    setattr(WatchedCollectives, _name, _watched(_name))
