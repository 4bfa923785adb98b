#!/usr/bin/env python3
"""Trains an image classifier on several workers that exchange compressed gradients.

The defaults are the network and recipe of the paper's CIFAR-10 experiment (recalled, not
re-checked; the network is a probable one: see vgc_chainer/models/vgg.py). Copy this file and
change it.

A minute on two CPU cores; eight workers on one GPU; eight workers with a GPU each:

    mpiexec -n 2 python train/train_cifar10.py --dataset digits
    mpiexec -n 8 python train/train_cifar10.py --gpu 0 --optimizer momentum
    mpiexec -n 8 python train/train_cifar10.py --gpu per-rank --communicator hybrid --tau 0.1

The same eight workers one after the other in one process, without mpiexec:

    python train/train_cifar10.py --gpu 0 --virtual-workers 8 --optimizer momentum

CIFAR-10 is downloaded by chainer.datasets.get_cifar10(), or found below $CHAINER_DATASET_ROOT.
"""

import vgc_chainer  # before chainer, which it repairs for current Python and NumPy  # isort: skip

import os

import chainer
import chainer.links as L
import chainermn
import numpy as np
from chainer import training
from chainer.training import extensions
from mpi4py import MPI

from vgc_chainer.datasets import get_digits
from vgc_chainer.extensions import CommunicatorState, CompressionReport
from vgc_chainer.models import VGG, DigitsNet
from vgc_chainer.training import (
    CHAINERMN,
    EndOfTraining,
    ExactEvaluator,
    OrAtEnd,
    Parser,
    Snapshots,
    UsageError,
    add_communicator_arguments,
    check_gpu,
    communicator_options,
    leave_on_usage_error,
    parse_args_on_all_ranks,
    plot_log,
    select_device,
)

NETWORKS = {'cifar10': VGG, 'digits': DigitsNet}
LOADERS = {'cifar10': chainer.datasets.get_cifar10, 'digits': get_digits}
DEFAULTS = {
    'cifar10': {'epoch': 300, 'batchsize': 64, 'halve_every': 25},  # the paper's [R]
    'digits': {'epoch': 30, 'batchsize': 32, 'halve_every': 10},
}
COLUMNS = (
    'epoch',
    'iteration',
    'main/loss',
    'validation/main/loss',
    'validation/main/accuracy',
    'compression_ratio',
    'wire_ratio',
    'elapsed_time',
)


def main(argv=None):
    # An error on one rank ends all ranks instead of leaving the others waiting for it.
    chainermn.global_except_hook.add_hook()
    with leave_on_usage_error(MPI.COMM_WORLD):
        result = train(parse_args(argv))
    if MPI.COMM_WORLD.rank == 0:
        print(
            '\naccuracy={accuracy:.4f} compression_ratio={compression_ratio:.1f} '
            'wire_ratio={wire_ratio:.1f} out={out}'.format(**result)
        )


def parse_args(argv=None):
    """Reads the command line; what is wrong there raises `UsageError` on every rank."""
    parser = Parser(description=__doc__.partition('\n')[0])
    add = parser.add_argument
    add('--dataset', choices=LOADERS, default='cifar10', help='default: %(default)s')
    add('--epoch', type=int, metavar='N', help='length of the training (cifar10: 300, digits: 30)')
    add('--iterations', type=int, metavar='N', help='length in iterations, instead of --epoch')
    add('--batchsize', type=int, metavar='N', help='samples a worker (cifar10: 64, digits: 32)')
    add('--optimizer', choices=('adam', 'momentum'), default='adam', help='default: %(default)s')
    add('--lr', type=float, help='step size (adam: 0.001, momentum: 0.05 x workers)')
    add(
        '--halve-every',
        type=float,
        metavar='N',
        help='momentum: epochs between halvings of the step size (cifar10: 25, digits: 10)',
    )
    add('--weight-decay', type=float, default=5e-4, metavar='L', help='default: %(default)s')
    add(
        '--gpu',
        default='-1',
        help='-1: CPU; 0, 1, ...: all workers on this one; per-rank: one each',
    )
    add(
        '--virtual-workers',
        type=int,
        metavar='P',
        help='P workers that take turns in this one process, without mpiexec',
    )
    add('--seed', type=int, default=0, help='default: %(default)s')
    add(
        '--out', default='result', metavar='DIR', help='for log, plots and snapshots (%(default)s)'
    )
    add('--resume', action='store_true', help='continue from the snapshots in --out')
    add(
        '--snapshot-interval',
        type=float,
        default=10,
        metavar='N',
        help='epochs between snapshots; 0: none at all (default: %(default)s)',
    )
    add('--log-interval', type=int, metavar='N', help='iterations a line of the log (one epoch)')
    add('--no-progress-bar', action='store_true', help='print only the lines of the log')
    add_communicator_arguments(parser)
    return parse_args_on_all_ranks(parser, argv, check_args, MPI.COMM_WORLD)


def check_args(args):
    """Fills in the defaults of the data set; raises ValueError for values that make no sense."""
    for name, default in DEFAULTS[args.dataset].items():
        if getattr(args, name) is None:
            setattr(args, name, default)
    positive = ('epoch', 'iterations', 'batchsize', 'lr', 'halve_every', 'log_interval')
    for name in (*positive, 'virtual_workers'):
        value = getattr(args, name)
        if value is not None and not 0 < value < float('inf'):
            raise ValueError(f'--{name.replace("_", "-")} must be greater than 0, not {value}')
    for name in ('weight_decay', 'snapshot_interval'):
        value = getattr(args, name)
        if not 0 <= value < float('inf'):
            raise ValueError(f'--{name.replace("_", "-")} must be 0 or greater, not {value}')
    if not 0 <= args.seed < 2**32:
        raise ValueError(f'--seed must be in 0..2^32 - 1, not {args.seed}')
    if os.path.exists(args.out) and not os.path.isdir(args.out):
        raise ValueError(f'--out {args.out} is not a folder')
    if args.virtual_workers and args.communicator in CHAINERMN:
        raise ValueError(f'--communicator {args.communicator} has no --virtual-workers; see none')
    if args.virtual_workers and MPI.COMM_WORLD.size > 1:
        raise ValueError('--virtual-workers run in one process, without mpiexec')
    communicator_options(args)
    check_gpu(args.gpu, args.communicator)


def train(args, comm=None):
    """Trains and validates.

    Args:
        args (argparse.Namespace): What `parse_args` returns.
        comm: ChainerMN communicator to use instead of a new one as `args` say.

    Returns:
        dict: On every rank: ``accuracy`` (validation, after the last iteration),
            ``compression_ratio`` and
        ``wire_ratio`` (over the whole run), ``out``, and ``log`` (the entries of the LogReport).

    Raises:
        UsageError: A device or snapshot asked for is not there. Raised on every rank.
    """
    own_comm = comm is None
    if own_comm:
        comm = vgc_chainer.create_communicator(
            args.communicator, **communicator_options(args), **virtual_workers(args)
        )
    device = select_device(args.gpu, comm)

    # The same weights on every rank, but streams of its own for dropout and order of samples.
    seed_random_numbers(args.seed, device)
    model = L.Classifier(NETWORKS[args.dataset]())
    model.to_device(device)

    # Rank 0 loads the data; every rank gets a shard of the training and of the validation set.
    # SerialIterator, since the processes that a MultiprocessIterator forks do not go with MPI.
    train_set, validation_set = LOADERS[args.dataset]() if comm.rank == 0 else (None, None)
    train_iterators = []
    for _ in turns(comm, model):
        seed_random_numbers([args.seed, comm.rank], device)
        shard = chainermn.scatter_dataset(train_set, comm, shuffle=True, seed=args.seed)
        train_iterators.append(chainer.iterators.SerialIterator(shard, args.batchsize))
    if not args.virtual_workers:  # which all validate together
        validation_set = chainermn.scatter_dataset(validation_set, comm, force_equal_length=False)
    validation_iterator = chainer.iterators.SerialIterator(
        validation_set, args.batchsize, repeat=False, shuffle=False
    )

    # The gradients are exchanged first; weight decay and update then are the same on every rank.
    if args.optimizer == 'adam':
        optimizer = chainer.optimizers.Adam(args.lr or 0.001)
    else:
        optimizer = chainer.optimizers.MomentumSGD(args.lr or 0.05 * comm.size)
    optimizer.setup(model)
    optimizer.add_hook(chainer.optimizer_hooks.WeightDecay(args.weight_decay))
    optimizer = chainermn.create_multi_node_optimizer(optimizer, comm)

    if args.virtual_workers:
        updater = vgc_chainer.VirtualUpdater(train_iterators, optimizer, comm, device=device)
    else:
        updater = training.updaters.StandardUpdater(train_iterators[0], optimizer, device=device)
    end = EndOfTraining(*training_length(args))
    trainer = training.Trainer(updater, end, out=args.out)
    if args.optimizer == 'momentum':
        halve = extensions.ExponentialShift('lr', 0.5, init=optimizer.lr)
        trainer.extend(halve, trigger=(args.halve_every, 'epoch'))

    # Validation takes BatchNorm's running statistics averaged over the ranks, which differ
    # otherwise.
    average = chainermn.extensions.AllreducePersistent(model, comm)
    evaluator = ExactEvaluator(validation_iterator, model, comm, device)
    evaluator = chainermn.create_multi_node_evaluator(evaluator, comm)
    for extension in (average, evaluator):
        trainer.extend(extension, trigger=OrAtEnd((1, 'epoch'), end))

    log_interval = (args.log_interval, 'iteration') if args.log_interval else (1, 'epoch')
    log = extensions.LogReport(trigger=OrAtEnd(log_interval, end))
    trainer.extend(CompressionReport(comm), trigger=OrAtEnd(log_interval, end))
    if comm.rank == 0:
        trainer.extend(log)
        trainer.extend(extensions.PrintReport(COLUMNS), trigger=OrAtEnd(log_interval, end))
        if not args.no_progress_bar:
            trainer.extend(extensions.ProgressBar(update_interval=10))

    # A snapshot a rank, with its residuals and random streams.
    trainer.extend(CommunicatorState(comm, optimizer))
    snapshots = Snapshots(comm, args.out)
    if args.snapshot_interval:
        trainer.extend(snapshots, trigger=OrAtEnd((args.snapshot_interval, 'epoch'), end))
    if args.resume:
        snapshots.resume(trainer)
    elif snapshots.exist():
        raise UsageError(
            f'{args.out} holds snapshots of an earlier run: add --resume or change --out'
        )

    trainer.run()

    entries = comm.bcast_obj(log.log if comm.rank == 0 else None)
    if comm.rank == 0:
        plot_log(entries, args.out, f'{args.dataset}, {args.communicator}, {comm.size} workers')
    traffic = getattr(comm, 'traffic', None)  # chainermn's own communicators have none
    result = {
        'accuracy': entries[-1]['validation/main/accuracy'],
        'compression_ratio': traffic.compression_ratio if traffic else 1.0,
        'wire_ratio': traffic.wire_ratio if traffic else 1.0,
        'out': args.out,
        'log': entries,
    }
    if own_comm:
        comm.finalize()  # detaches the hook: another training in this process has its own
    return result


def training_length(args):
    """(number, unit) of the training's length."""
    return (args.iterations, 'iteration') if args.iterations else (args.epoch, 'epoch')


def virtual_workers(args):
    """Keyword for ``create_communicator`` that makes the workers take turns in this process."""
    return {'virtual_workers': args.virtual_workers} if args.virtual_workers else {}


def turns(comm, model):
    """The turns of the workers of this process: one, unless they are virtual."""
    return comm.turns(model) if hasattr(comm, 'turns') else [comm.rank]


def seed_random_numbers(seed, device):
    """Seeds what initialises weights, orders samples and drops units with one or more numbers."""
    seed = int(np.random.SeedSequence(seed).generate_state(1)[0])
    np.random.seed(seed)
    if device.xp is not np:
        device.xp.random.seed(seed)


if __name__ == '__main__':
    main()
