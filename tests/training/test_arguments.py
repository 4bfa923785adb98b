import argparse

import pytest

from tests.training.common import FakeComm
from vgc_chainer import factory
from vgc_chainer.compressors import COMPRESSORS
from vgc_chainer.training import (
    CHAINERMN,
    Parser,
    UsageError,
    add_communicator_arguments,
    communicator_options,
    leave_on_usage_error,
    parse_args_on_all_ranks,
)

DEFAULT = {
    **dict.fromkeys(['alpha', 'zeta', 'tau', 'bits', 'bucket_size', 'norm', 'clip']),
    **dict.fromkeys(['unrepresentable', 'error_feedback']),
    **dict.fromkeys(['watchdog', 'check_replicas', 'checksum']),
    'communicator': 'variance',
}


def parse(*argv, comm=None, check=communicator_options):
    parser = Parser(prog='train.py')
    parser.add_argument('--seed', type=int, default=3)
    add_communicator_arguments(parser)
    return parse_args_on_all_ranks(parser, list(argv), check, comm or FakeComm())


@pytest.mark.parametrize(
    ('argv', 'options'),
    [
        ([], {}),
        (['--alpha', '2', '--zeta', '0.9'], {'alpha': 2.0, 'zeta': 0.9}),
        (
            ['--unrepresentable', 'hold', '--error-feedback'],
            {'unrepresentable': 'hold', 'error_feedback': True},
        ),
        (
            ['--communicator', 'hybrid', '--tau', '0.1', '--alpha', '2'],
            {'tau': 0.1, 'alpha': 2.0},
        ),
        (['--communicator', 'strom', '--tau', '0.1'], {'tau': 0.1}),
        (
            ['--communicator', 'qsgd', '--bits', '3', '--bucket-size', '512', '--norm', 'max'],
            {'bits': 3, 'bucket_size': 512, 'norm': 'max', 'seed': 3},
        ),
        (['--communicator', 'terngrad', '--clip', '2'], {'clip': 2.0, 'seed': 3}),
        (['--communicator', 'none'], {}),
        (
            ['--communicator', 'none', '--watchdog', '9', '--check-replicas', '5', '--checksum'],
            {'watchdog': 9.0, 'check_replicas': 5, 'checksum': True},
        ),
        (['--communicator', 'naive'], {}),
    ],
)
def test_options_are_what_was_given(argv, options):
    assert communicator_options(parse(*argv)) == options


@pytest.mark.parametrize('name', COMPRESSORS)
def test_every_hyperparameter_is_on_the_command_line(name):
    args = vars(parse('--communicator', name))
    options = COMPRESSORS[name]().hyperparameters()
    assert set(options) <= set(args) | {'seed'}


@pytest.mark.parametrize(
    ('argv', 'message'),
    [
        (['--alpha', '0'], 'alpha must be a finite number > 0'),
        (['--alpha', 'nan'], 'alpha must be a finite number > 0'),
        (['--alpha', 'x'], "argument --alpha: invalid float value: 'x'"),
        (['--zeta', '1.5'], r'zeta must be in \(0, 1\]'),
        (['--tau', '0.1'], 'variance has no --tau .its options: --alpha, --zeta, --unrepr'),
        (['--communicator', 'strom', '--tau', '-1'], 'tau must be a finite number > 0'),
        (['--communicator', 'qsgd', '--bits', '9'], r'bits must be an integer in 2\.\.8'),
        (['--communicator', 'hybrid', '--error-feedback'], 'hybrid has no --error-feedback'),
        (['--communicator', 'naive', '--alpha', '1'], r'no --alpha \(its options: none\)'),
        (['--communicator', 'naive', '--checksum'], 'naive has no --checksum'),
        (['--watchdog', '0'], '--watchdog must be at least 0.001, not 0'),
        (['--check-replicas', '-1'], '--check-replicas must be at least 0, not -1'),
        (['--communicator', 'dgc'], "invalid choice: 'dgc'"),
        (['--unrepresentable', 'lose'], "invalid choice: 'lose'"),
        (['--nonsense'], 'unrecognized arguments: --nonsense'),
    ],
)
def test_wrong_values_are_named(argv, message):
    with pytest.raises(UsageError, match=message):
        parse(*argv)


def test_an_error_on_another_rank_stops_this_one():
    comm = FakeComm(rank=0, others=[('alpha must be positive', None)])
    with pytest.raises(UsageError, match='alpha must be positive'):
        parse(comm=comm)


def test_a_difference_between_ranks_is_named():
    other = {**DEFAULT, 'seed': 3, 'alpha': 2.0}
    with pytest.raises(UsageError, match='--alpha is 1.5 on rank 0, but 2.0 on rank 1'):
        parse('--alpha', '1.5', comm=FakeComm(rank=0, others=[(None, other)]))
    assert parse('--alpha', '2', comm=FakeComm(rank=0, others=[(None, other)])).alpha == 2


def test_check_sees_and_changes_the_arguments():
    def check(args):
        args.extra = args.seed + 1

    assert parse(check=check) == argparse.Namespace(**DEFAULT, seed=3, extra=4)


@pytest.mark.parametrize('rank', [0, 1])
def test_leaving_prints_once_and_waits_for_the_others(rank, capsys):
    comm = FakeComm(rank=rank, others=[None])
    with pytest.raises(SystemExit) as error, leave_on_usage_error(comm):
        raise UsageError('no such thing')
    assert error.value.code == 2
    assert comm.barriers == 1
    printed = capsys.readouterr().err
    assert ('error: no such thing' in printed) == (rank == 0)


def test_other_errors_pass():
    comm = FakeComm()
    with pytest.raises(KeyError), leave_on_usage_error(comm):
        raise KeyError('x')
    assert comm.barriers == 0


def test_chainermn_names_are_those_of_the_factory():
    assert set(CHAINERMN) <= set(factory._CHAINERMN)
