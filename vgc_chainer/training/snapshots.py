"""Snapshots of every rank, from which a training continues as if it had never stopped."""

import os
import re
import zipfile
import zlib

from chainer import serializers
from chainer.training import extension

from vgc_chainer.training.collective import allgather_obj
from vgc_chainer.training.errors import UsageError


class Snapshots:
    """Trainer extension that saves one file a rank and keeps the newest complete set.

    Each rank has residuals of its own, so one replica's snapshot would lose those of all others
    (``chainermn.extensions.multi_node_snapshot``). The files are named as those of
    ``chainermn.create_multi_node_checkpointer``, ``snapshot.<rank>.<iteration>``, but that
    checkpointer removes them when the trainer ends, after an exception or Ctrl-C, too. Here they
    stay, so that a stopped run can continue and a finished one can be lengthened.

    Args:
        comm: ChainerMN communicator.
        path (str): Folder of the files, seen by every rank (or one a rank of the same name).
    """

    name = 'Snapshots'
    priority = extension.PRIORITY_READER - 1000  # last: the file holds the whole iteration

    def __init__(self, comm, path):
        self._comm = comm
        self._path = path

    def __call__(self, trainer):
        iteration = trainer.updater.iteration
        file = self._file(iteration)
        serializers.save_npz(file + '.part', trainer)
        os.replace(file + '.part', file)  # a file of the final name is complete
        allgather_obj(self._comm, iteration)  # the older set goes when all ranks have the new one
        for rank, old in self._found():
            if rank == self._comm.rank and old != iteration:
                os.remove(self._file(old))

    def exist(self):
        """Whether any rank sees a file of an earlier run. All ranks must call it."""
        return any(allgather_obj(self._comm, bool(self._found())))

    def resume(self, trainer):
        """Loads the newest complete set; all ranks must call it, with all extensions in place.

        Returns:
            int: The iteration after which the training continues.

        Raises:
            UsageError: There is no set of exactly this number of ranks, or a file of the newest
                one is damaged. Raised on every rank.
        """
        found = set().union(*allgather_obj(self._comm, self._found()))
        # Virtual workers live in one process and share its file.
        ranks = set(range(getattr(self._comm, 'processes', self._comm.size)))
        iterations = {iteration for _, iteration in found}
        complete = [i for i in iterations if {rank for rank, j in found if i == j} == ranks]
        if not complete:
            raise UsageError(
                f'nothing to resume: {self._path} holds no complete set of snapshots for '
                f'{len(ranks)} ranks; (rank, iteration) of those there: {sorted(found)}'
            )
        file = self._file(max(complete))
        problems = allgather_obj(self._comm, _damage(file))
        if any(problems):
            # Files are complete when they get their name: a disk or a copy has failed. Whether an
            # older state will do instead is for the user to say.
            raise UsageError(
                f'nothing resumed: {next(filter(None, problems))}; without the set of iteration '
                f'{max(complete)} the next older one would be taken, if there is one'
            )
        serializers.load_npz(file, trainer)
        return trainer.updater.iteration

    def _file(self, iteration):
        return os.path.join(self._path, f'snapshot.{self._comm.rank}.{iteration}')

    def _found(self):
        names = os.listdir(self._path) if os.path.isdir(self._path) else []
        matches = (re.fullmatch(r'snapshot\.(\d+)\.(\d+)', name) for name in names)
        return {(int(match[1]), int(match[2])) for match in matches if match}


def _damage(file):
    """What is wrong with a snapshot file, in words, or None: all of it is read and checked."""
    try:
        with zipfile.ZipFile(file) as archive:
            broken = archive.testzip()
    except (OSError, zipfile.BadZipFile, zlib.error) as error:
        return f'{file} is damaged: {error}'
    return f'{file} is damaged: {broken} fails its checksum' if broken else None
