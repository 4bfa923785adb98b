"""What the training scripts share: command line, exact evaluation, snapshots, plots."""

from vgc_chainer.training.arguments import (
    CHAINERMN,
    Parser,
    add_communicator_arguments,
    communicator_options,
    parse_args_on_all_ranks,
)
from vgc_chainer.training.devices import check_gpu, select_device
from vgc_chainer.training.errors import UsageError, leave_on_usage_error
from vgc_chainer.training.evaluator import ExactEvaluator
from vgc_chainer.training.plots import plot_log
from vgc_chainer.training.snapshots import Snapshots
from vgc_chainer.training.triggers import EndOfTraining, OrAtEnd

__all__ = [
    'CHAINERMN',
    'EndOfTraining',
    'ExactEvaluator',
    'OrAtEnd',
    'Parser',
    'Snapshots',
    'UsageError',
    'add_communicator_arguments',
    'check_gpu',
    'communicator_options',
    'leave_on_usage_error',
    'parse_args_on_all_ranks',
    'plot_log',
    'select_device',
]
