"""The training script on real digits, run by mpiexec with two ranks."""

import json
import re
from pathlib import Path

import pytest

from tests.mpi_launcher import mpiexec, run
from vgc_chainer.compressors import COMPRESSORS

pytest.importorskip('mpi4py')
pytest.importorskip('sklearn')
pytestmark = pytest.mark.skipif(mpiexec() is None, reason='there is no mpiexec')

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / 'train' / 'train_cifar10.py'
DIGITS = ['--dataset', 'digits', '--no-progress-bar']


def trainings(*command_lines, n=2, timeout=240):
    """Trains with each command line in one launch; returns what rank 0 says of each."""
    program = Path(__file__).parent / 'run_train.py'
    result = run(n, [program, json.dumps(command_lines)], timeout=timeout)
    assert result.returncode == 0, result.stdout
    answers = [json.loads(found) for found in re.findall(r'^ANSWER (.*)$', result.stdout, re.M)]
    assert len(answers) == len(command_lines), result.stdout
    assert all(answer['same_answer'] for answer in answers)
    return answers


def test_every_communicator_trains(tmp_path):
    names = ['naive', *COMPRESSORS]
    command_lines = [
        [*DIGITS, '--communicator', name, '--epoch', '2', '--out', str(tmp_path / name)]
        for name in names
    ]
    for name, answer in zip(names, trainings(*command_lines)):
        losses = [entry['main/loss'] for entry in answer['log']]
        assert losses[1] < losses[0] < 2.4, name
        assert answer['same_parameters'], name
        assert answer['hooks'] == 0, f'{name} left its hook behind'
        if name in ('naive', 'none'):
            assert answer['compression_ratio'] == 1, name
        else:
            assert answer['compression_ratio'] > 1.5, name
        assert answer['wire_ratio'] <= answer['compression_ratio'], name
        plots = ['accuracy', 'loss'] + ['ratio'] * (name != 'naive')
        files = sorted(path.name for path in (tmp_path / name).glob('*.png'))
        assert files == [f'{plot}.png' for plot in plots]


def test_resumed_training_is_the_uninterrupted_one_bit_for_bit(tmp_path):
    cases = {
        'variance': ['--optimizer', 'momentum', '--halve-every', '0.5'],
        'hybrid': ['--tau', '0.01', '--optimizer', 'adam'],
        'qsgd': [],
        'naive': [],
    }

    def command_line(name, out, epochs, *more):
        options = ['--communicator', name, *cases[name], '--out', str(tmp_path / name / out)]
        length = ['--epoch', str(epochs), '--batchsize', '64', '--snapshot-interval', '1']
        return [*DIGITS, *options, *length, *more]

    wholes = trainings(*[command_line(name, 'whole', 2) for name in cases])
    parts = trainings(*[command_line(name, 'parts', 1) for name in cases])
    rests = trainings(*[command_line(name, 'parts', 2, '--resume') for name in cases])
    for name, whole, part, rest in zip(cases, wholes, parts, rests):
        assert rest['state'] == whole['state'] != part['state'], name
        assert rest['state'][0] != rest['state'][1], "residuals and streams are a rank's own"
        for key in ('accuracy', 'compression_ratio', 'wire_ratio'):
            assert rest[key] == whole[key], (name, key)
        losses = [[entry['main/loss'] for entry in run['log']] for run in (whole, rest)]
        assert losses[0] == losses[1] and len(losses[0]) == 2, name


def test_seed_decides_everything(tmp_path):
    def command_line(out, seed):
        return [*DIGITS, '--iterations', '4', '--seed', str(seed), '--out', str(tmp_path / out)]

    first, second, other = trainings(
        command_line('a', 1), command_line('b', 1), command_line('c', 2)
    )
    assert first['state'] == second['state'] != other['state']


def test_what_cannot_be_is_said_on_every_rank(tmp_path):
    (tmp_path / 'file').touch()
    (tmp_path / 'old').mkdir()
    (tmp_path / 'old' / 'snapshot.1.3').touch()
    cases = {
        '--epoch must be greater than 0, not 0': ['--epoch', '0'],
        '--iterations must be greater than 0': ['--iterations', '-5'],
        '--batchsize must be greater than 0': ['--batchsize', '0'],
        '--lr must be greater than 0, not nan': ['--lr', 'nan'],
        '--weight-decay must be 0 or greater': ['--weight-decay', '-1'],
        '--snapshot-interval must be 0 or greater': ['--snapshot-interval', '-1'],
        '--seed must be in 0..': ['--seed', '-1'],
        'is not a folder': ['--out', str(tmp_path / 'file')],
        'alpha must be a finite number > 0': ['--alpha', '0'],
        'variance has no --tau': ['--tau', '0.1'],
        "invalid choice: 'mnist'": ['--dataset', 'mnist'],
        '--gpu must be -1': ['--gpu', 'one'],
        'pure_nccl needs a GPU': ['--communicator', 'pure_nccl'],
        'rank 0 needs device 99': ['--gpu', '99'],
        'no complete set of snapshots for 2 ranks': ['--resume', '--out', str(tmp_path / 'new')],
        'add --resume': ['--out', str(tmp_path / 'old')],
    }
    answers = trainings(*[[*DIGITS, *argv] for argv in cases.values()])
    for message, answer in zip(cases, answers):
        assert message in answer.get('error', ''), (message, answer)


def test_command_line(tmp_path):
    options = ['--iterations', '5', '--log-interval', '2', '--out', tmp_path / 'out']
    result = run(2, [SCRIPT, '--dataset', 'digits', *options])
    assert result.returncode == 0, result.stdout
    last = result.stdout.strip().splitlines()[-1]
    number = r'(\d+\.\d+)'
    match = re.fullmatch(
        f'accuracy={number} compression_ratio={number} wire_ratio={number} out=(.+)', last
    )
    assert match, result.stdout
    assert 0 <= float(match[1]) <= 1
    assert match[4] == str(tmp_path / 'out')
    assert result.stdout.count('validation/main/accuracy') == 1, 'rank 0 alone prints the log'
    log = json.loads((tmp_path / 'out' / 'log').read_text())
    assert [entry['iteration'] for entry in log] == [2, 4, 5]
    assert 'validation/main/accuracy' in log[-1]


def test_wrong_command_line_ends_with_one_message_and_code_2():
    result = run(2, [SCRIPT, '--dataset', 'digits', '--alpha', '-1'], timeout=60)
    assert result.returncode == 2, result.stdout
    assert result.stdout.count('alpha must be a finite number > 0') == 1
    assert 'train_cifar10.py: error: ' in result.stdout
    assert 'Traceback' not in result.stdout
