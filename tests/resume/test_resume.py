"""Training that stops, in whatever way, and goes on in new processes."""

import json
import re
import signal
import struct
import subprocess
import sys
import time
import zipfile

import numpy as np
import pytest

from tests.mpi_launcher import ROOT, mpi_environment, mpiexec, run
from vgc_chainer.training import snapshots as snapshots_module

pytest.importorskip('mpi4py')
pytestmark = pytest.mark.skipif(mpiexec() is None, reason='there is no mpiexec')

KINDS = ['checkpointer', 'multi_node_snapshot', 'snapshot', 'Snapshots']


def program(n, kinds, out, **options):
    """Output of a run, and the states that its ranks ended with: ``{rank: (all, parameters)}``."""
    argument = json.dumps({'kinds': kinds, 'out': str(out), 'stop': 12, **options})
    result = run(n, ['-m', 'tests.resume.program', argument], timeout=100)
    states = re.findall(r'^STATE (\d+) (\w+) (\w+)$', result.stdout, re.M)
    return result, {int(rank): (everything, params) for rank, everything, params in states}


@pytest.fixture(scope='module')
def crashed(tmp_path_factory):
    """Folder with snapshots of every kind of iteration 5; rank 0 then died in iteration 7."""
    out = tmp_path_factory.mktemp('resume') / 'crashed'
    result, states = program(2, KINDS, out, crash=7)
    assert result.returncode != 0 and not states
    assert len(list(out.iterdir())) == 2 * len(KINDS)
    return out


def copied(folder, to):
    to.mkdir()
    for file in folder.iterdir():
        (to / file.name).write_bytes(file.read_bytes())
    return to


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    _, states = program(2, [], tmp_path_factory.mktemp('whole'))
    assert states[0][1] == states[1][1], 'parameters are the same on all ranks'
    assert states[0][0] != states[1][0], 'residuals and generators are not'
    return states


@pytest.mark.parametrize('kind', KINDS)
def test_killed_and_resumed_is_uninterrupted(kind, crashed, whole, tmp_path):
    """Parameters, Adam's state, r, v, BatchNorm, order of samples, dropout: bit for bit."""
    result, states = program(2, [kind], copied(crashed, tmp_path / 'out'), resume=True)
    assert result.returncode == 0, result.stdout
    assert states == whole


@pytest.mark.parametrize(('n', 'kind'), [(1, 'checkpointer'), (3, 'multi_node_snapshot')])
def test_another_number_of_ranks_is_refused(n, kind, crashed, tmp_path):
    # An iterator that shuffles would complain first, of the number of samples.
    out = copied(crashed, tmp_path / 'out')
    result, states = program(n, [kind], out, resume=True, shuffle=False)
    assert result.returncode != 0 and not states
    assert f'number of ranks is 2 on the one and {n} on the other' in result.stdout


def test_a_rank_without_its_snapshot_is_noticed(crashed, tmp_path):
    out = copied(crashed, tmp_path / 'out')
    (out / 'rank_1_iter_5').unlink()
    result, _ = program(2, ['snapshot'], out, resume=True)
    assert result.returncode != 0
    assert re.search(r'ranks \[1\] are about to broadcast.*have all ranks loaded', result.stdout)


def test_a_damaged_snapshot_is_refused_by_name(crashed, tmp_path):
    out = copied(crashed, tmp_path / 'out')
    good = (out / 'snapshot.1.5').read_bytes()
    (out / 'snapshot.1.5').write_bytes(good[: len(good) // 2])
    result, _ = program(2, ['Snapshots'], out, resume=True)
    assert result.returncode == 2
    assert re.search(r'nothing resumed: \S*snapshot\.1\.5 is damaged', result.stdout)


def test_every_damage_is_found(crashed, tmp_path):
    good = (crashed / 'snapshot.0.5').read_bytes()
    file = tmp_path / 'file'
    file.write_bytes(good)
    assert snapshots_module._damage(file) is None
    with zipfile.ZipFile(file) as archive:
        members = archive.infolist()
    parts = []
    for member in members:
        name, extra = struct.unpack_from('<HH', good, member.header_offset + 26)
        parts.append(member.header_offset + 30 + name + extra + member.compress_size // 2)
    for at in parts:
        file.write_bytes(good[:at] + bytes([good[at] ^ 4]) + good[at + 1 :])
        assert f'{file} is damaged' in snapshots_module._damage(file)
    for length in (0, 1, 100, len(good) - 1):
        file.write_bytes(good[:length])
        assert f'{file} is damaged' in snapshots_module._damage(file)


def test_ctrl_c_leaves_the_last_snapshot_good(tmp_path):
    argument = {'kinds': ['Snapshots'], 'out': str(tmp_path), 'stop': 10**6, 'endless': True}
    process = subprocess.Popen(
        [mpiexec(), '-n', '2', sys.executable, '-m', 'tests.resume.program']
        + [json.dumps({**argument, 'interval': 1})],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        stdin=subprocess.DEVNULL,
        cwd=ROOT,
        env=mpi_environment(),
        start_new_session=True,
    )
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob('snapshot.1.*')) and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    assert process.wait(20) != 0
    files = list(tmp_path.glob('snapshot.[01].[0-9]*'))
    for file in files:
        if not file.name.endswith('.part'):
            assert zipfile.ZipFile(file).testzip() is None
    last = max(int(file.name.split('.')[2]) for file in files)
    result, states = program(2, ['Snapshots'], tmp_path, resume=True, stop=last + 2)
    assert result.returncode == 0 and len(states) == 2, result.stdout
    assert re.search(rf'^START ({last}|{last - 1})$', result.stdout, re.M), result.stdout


def test_a_snapshot_cut_off_half_way_does_not_count(tmp_path, monkeypatch):
    """The process dies while it writes: the name of a snapshot is given to whole files only."""
    import types

    from chainer import serializers

    from tests.training.common import FakeComm
    from vgc_chainer.training import Snapshots

    trainer = types.SimpleNamespace(updater=types.SimpleNamespace(iteration=5))
    trainer.serialize = lambda serializer: serializer('x', np.arange(1000))
    snapshots = Snapshots(FakeComm(), str(tmp_path))
    snapshots(trainer)

    def half(file, obj):
        with open(file, 'wb') as out:
            out.write(b'PK half of it')
        raise KeyboardInterrupt

    monkeypatch.setattr(serializers, 'save_npz', half)
    trainer.updater.iteration = 10
    with pytest.raises(KeyboardInterrupt):
        snapshots(trainer)
    monkeypatch.undo()
    assert snapshots._found() == {(0, 5)}
    assert Snapshots(FakeComm(), str(tmp_path)).resume(trainer) == 10
    assert zipfile.ZipFile(tmp_path / 'snapshot.0.5').testzip() is None
