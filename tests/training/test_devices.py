import numpy as np
import pytest

from tests.training.common import FakeComm
from vgc_chainer.training import UsageError, check_gpu, devices, select_device


@pytest.mark.parametrize(
    ('gpu', 'communicator'),
    [('-1', 'variance'), ('0', 'variance'), ('7', 'flat'), ('per-rank', 'pure_nccl')],
)
def test_good_combinations(gpu, communicator):
    check_gpu(gpu, communicator)


@pytest.mark.parametrize(
    ('gpu', 'communicator', 'message'),
    [
        ('-2', 'variance', 'must be -1'),
        ('', 'variance', 'must be -1'),
        ('all', 'variance', "not 'all'"),
        ('-1', 'pure_nccl', 'pure_nccl needs a GPU'),
        ('-1', 'flat', 'flat needs a GPU'),
        ('0', 'pure_nccl', 'a GPU of its own'),
    ],
)
def test_bad_combinations(gpu, communicator, message):
    with pytest.raises(ValueError, match=message):
        check_gpu(gpu, communicator)


def test_cpu():
    assert select_device('-1', FakeComm()).xp is np


@pytest.mark.parametrize('gpu', ['0', 'per-rank'])
def test_no_gpu(monkeypatch, gpu):
    monkeypatch.setattr(devices, '_count_devices', lambda: 0)
    with pytest.raises(UsageError, match=f'--gpu {gpu}: rank 0 needs device 0, but finds 0'):
        select_device(gpu, FakeComm())


def test_too_few_gpus_for_another_rank(monkeypatch):
    monkeypatch.setattr(devices, '_count_devices', lambda: 1)
    with pytest.raises(UsageError, match='rank 1 needs device 1, but finds 1'):
        select_device('per-rank', FakeComm(0, [(1, 1)]))
