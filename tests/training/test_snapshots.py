import types

import numpy as np
import pytest

from tests.training.common import FakeComm
from vgc_chainer.training import Snapshots, UsageError


class Trainer:
    """As much of a trainer as a snapshot needs: an iteration and something to save."""

    def __init__(self, iteration=0):
        self.updater = types.SimpleNamespace(iteration=iteration)

    def serialize(self, serializer):
        saved = serializer('iteration', np.array(self.updater.iteration))
        self.updater.iteration = int(saved)


def names(path):
    return sorted(file.name for file in path.iterdir())


def test_newest_set_stays_and_is_resumed(tmp_path):
    snapshots = Snapshots(FakeComm(), str(tmp_path))
    assert not snapshots.exist()
    for iteration in (3, 10):
        snapshots(Trainer(iteration))
    assert names(tmp_path) == ['snapshot.0.10']
    assert snapshots.exist()
    trainer = Trainer()
    assert Snapshots(FakeComm(), str(tmp_path)).resume(trainer) == 10
    assert trainer.updater.iteration == 10


def test_files_of_other_ranks_and_programs_are_left_alone(tmp_path):
    for name in ('snapshot.1.3', 'snapshot.0.3', 'snapshot.0.3.part', 'log', 'snapshot.0.x'):
        (tmp_path / name).touch()
    Snapshots(FakeComm(0, [None]), str(tmp_path))(Trainer(5))
    expected = ['log', 'snapshot.0.3.part', 'snapshot.0.5', 'snapshot.0.x', 'snapshot.1.3']
    assert names(tmp_path) == expected


def test_the_newest_set_that_all_ranks_have_is_resumed(tmp_path):
    for name in ('snapshot.1.3', 'snapshot.1.5', 'snapshot.0.3'):
        (tmp_path / name).touch()
    for iteration in (5, 8):  # rank 1 was stopped before it could write number 8
        with open(tmp_path / f'snapshot.0.{iteration}', 'wb') as file:
            np.savez(file, iteration=np.array(iteration))
    snapshots = Snapshots(FakeComm(0, [set()]), str(tmp_path))
    assert snapshots.resume(Trainer()) == 5


@pytest.mark.parametrize('files', [[], ['snapshot.0.3'], ['snapshot.0.3', 'snapshot.1.4']])
def test_no_complete_set(tmp_path, files):
    for name in files:
        (tmp_path / name).touch()
    with pytest.raises(UsageError, match='no complete set of snapshots for 2 ranks'):
        Snapshots(FakeComm(0, [set()]), str(tmp_path)).resume(Trainer())


def test_a_set_of_more_ranks_is_not_resumed(tmp_path):
    for name in ('snapshot.0.3', 'snapshot.1.3', 'snapshot.2.3'):
        (tmp_path / name).touch()
    with pytest.raises(UsageError, match='for 2 ranks'):
        Snapshots(FakeComm(0, [set()]), str(tmp_path)).resume(Trainer())


def test_a_file_that_only_another_rank_sees_counts(tmp_path):
    assert Snapshots(FakeComm(0, [True]), str(tmp_path / 'none')).exist()
    assert not Snapshots(FakeComm(0, [False]), str(tmp_path / 'none')).exist()
