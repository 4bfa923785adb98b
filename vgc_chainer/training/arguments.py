"""The part of the command line that every training script has, checked alike on all ranks."""

import argparse
import inspect

from vgc_chainer.compressors import COMPRESSORS
from vgc_chainer.training.errors import UsageError

#: Options of compressed communicators that guard a run, and the least value each may have.
GUARDS = {'watchdog': 1e-3, 'check_replicas': 0, 'checksum': None}

# chainermn's own communicators, which exchange the gradients uncompressed and have no
# hyperparameters.
CHAINERMN = ('naive', 'flat', 'pure_nccl', 'non_cuda_aware')


class Parser(argparse.ArgumentParser):
    """ArgumentParser for programs that run under mpiexec: use with `parse_args_on_all_ranks`."""

    def error(self, message):
        """Raises instead of leaving: a rank that leaves alone would let the others wait for it."""
        raise ValueError(message)


def add_communicator_arguments(parser):
    """Adds the choice of communicator and its hyperparameters.

    The hyperparameters have no defaults here; those not given are left to ``create_communicator``.
    """
    group = parser.add_argument_group('communicator')
    group.add_argument(
        '--communicator',
        choices=[*COMPRESSORS, *CHAINERMN],
        default='variance',
        help='default: %(default)s',
    )
    group.add_argument(
        '--alpha',
        type=float,
        metavar='A',
        help='variance, hybrid: send an element when A * v < r^2; larger sends less (1, 1.5, 2)',
    )
    group.add_argument(
        '--zeta',
        type=float,
        metavar='Z',
        help='variance, hybrid: decay of v a step; smaller sends more (0.999)',
    )
    group.add_argument(
        '--tau',
        type=float,
        metavar='T',
        help='hybrid, strom: threshold and size of what is sent; larger sends less (0.001 to 0.1)',
    )
    group.add_argument('--bits', type=int, metavar='B', help='qsgd: bits a value, 2 to 8')
    group.add_argument(
        '--bucket-size', type=int, metavar='D', help='qsgd: consecutive elements that share a norm'
    )
    group.add_argument('--norm', choices=('l2', 'max'), help='qsgd: norm of a bucket')
    group.add_argument(
        '--clip',
        type=float,
        metavar='C',
        help='terngrad: clip gradients at this many standard deviations (2.5)',
    )
    group.add_argument(
        '--unrepresentable',
        choices=('drop', 'hold'),
        help='variance: what becomes of a selected element too small for the word format (drop)',
    )
    group.add_argument(
        '--error-feedback',
        action='store_true',
        default=None,
        help='variance: keep the quantisation error of sent elements instead of discarding it',
    )
    group.add_argument(
        '--watchdog',
        type=float,
        metavar='SECONDS',
        help='end the job when a rank has waited so long for the others (1800)',
    )
    group.add_argument(
        '--check-replicas',
        type=int,
        metavar='N',
        help='compare the parameters of all ranks every N steps (never)',
    )
    group.add_argument(
        '--checksum', action='store_true', default=None, help='check a CRC-32 of every message'
    )


def hyperparameters(communicator):
    """Names of the hyperparameters that a communicator has, those of its compressor.

    The seed is not among them: it is the training's.
    """
    if communicator in CHAINERMN:
        return ()
    names = inspect.signature(COMPRESSORS[communicator]).parameters
    return tuple(name for name in names if name != 'seed')


def communicator_options(args):
    """Keywords for ``create_communicator``: what the command line gives, and the seed.

    Raises:
        ValueError: One is out of range, or the chosen communicator does not have it.
    """
    chosen = hyperparameters(args.communicator)
    names = sorted(
        {name for communicator in COMPRESSORS for name in hyperparameters(communicator)}
    )
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    for name in given:
        if name not in chosen:
            has = ', '.join(_flag(option) for option in chosen) or 'none'
            raise ValueError(
                f'--communicator {args.communicator} has no {_flag(name)} (its options: {has})'
            )
    if args.communicator in COMPRESSORS:
        compressor = COMPRESSORS[args.communicator]
        if 'seed' in inspect.signature(compressor).parameters:
            given['seed'] = args.seed
        compressor(**given)  # checks the values
    return {**given, **_guards(args)}


def _guards(args):
    """The options of :data:`GUARDS` that were given."""
    given = {name: getattr(args, name) for name in GUARDS if getattr(args, name) is not None}
    for name, value in given.items():
        if args.communicator in CHAINERMN:
            raise ValueError(f'--communicator {args.communicator} has no {_flag(name)}')
        least = GUARDS[name]
        if least is not None and not least <= value < float('inf'):
            raise ValueError(f'{_flag(name)} must be at least {least}, not {value}')
    return given


def parse_args_on_all_ranks(parser, argv, check, mpi_comm):
    """Parses the command line so that all ranks go on together, or stop together with one message.

    Args:
        parser (Parser): The parser.
        argv (list of str or None): Arguments; None for those of the process.
        check: Function of the parsed arguments that raises ValueError if they make no sense.
        mpi_comm: MPI communicator, here the mpi4py one: no other exists yet.

    Returns:
        argparse.Namespace: The arguments, which are equal on all ranks.

    Raises:
        UsageError: Some rank's arguments are wrong, or they differ. Raised on every rank.
    """
    args, problem = None, None
    try:
        args = parser.parse_args(argv)
        check(args)
    except ValueError as error:
        problem = str(error)
    answers = mpi_comm.allgather((problem, args and vars(args)))
    message = next((problem for problem, _ in answers if problem), None)
    message = message or _first_difference([values for _, values in answers])
    if message is not None:
        raise UsageError(message)
    return args


def _first_difference(values):
    for rank, others in enumerate(values):
        for name, value in others.items():
            if value != values[0][name]:
                first = values[0][name]
                return f'{_flag(name)} is {first!r} on rank 0, but {value!r} on rank {rank}'
    return None


def _flag(name):
    return '--' + name.replace('_', '-')
