"""What must be equal on all ranks, how it is compared, and how a difference is named."""

import hashlib
import sys

import chainer
import numpy as np

import vgc_chainer
from vgc_chainer.errors import MismatchError
from vgc_chainer.wire import VERSION


def describe(comm, model):
    """Everything that ranks must agree on, as a list of ``(what, value)`` of plain values.

    Uninitialised parameters appear without a shape.
    """
    compressor = comm.compressor
    facts = [
        ('wire format version', VERSION),
        ('vgc_chainer version', vgc_chainer.__version__),
        ('chainer version', chainer.__version__),
        ('byte order', sys.byteorder),
        ('algorithm', compressor.name),
    ]
    for key, value in sorted(compressor.hyperparameters().items()):
        facts.append((f'hyperparameter {key}', value))
    # Seeds of stochastic compressors are hyperparameters. Options that make a rank take part in a
    # collective, or stay away from it, must agree, too; the watchdog's limit need not.
    for option in ('nonfinite', 'checksum', 'transport', 'check_replicas'):
        facts.append((f'option {option}', comm.options[option]))
    return facts + describe_model(model)


def describe_snapshot(comm, description):
    """What the state of one rank belongs to: :func:`describe`, and whose of how many it is.

    Residuals belong to one rank of a number of ranks: another number is refused, since there is no
    way to deal them out that would repeat the run.
    """
    return [('number of ranks', comm.size), ('rank', comm.rank), *description]


def describe_model(model):
    """The part of :func:`describe` that is about the parameters."""
    facts = []
    params = sorted(model.namedparams())
    facts.append(('names of the parameters', tuple(name for name, _ in params)))
    for name, param in params:
        known = param.array is not None
        facts.append((f'shape of parameter {name}', param.shape if known else None))
        facts.append((f'dtype of parameter {name}', param.dtype.name if known else None))
    return facts


def agreement_digest(description):
    """64-bit hash of a description, as signed integer."""
    digest = hashlib.sha256(repr(description).encode()).digest()
    return int.from_bytes(digest[:8], 'little', signed=True)


def require_agreement(transport, description):
    """Compare descriptions of all ranks; collective.

    Raises:
        MismatchError: On every rank, naming the first thing in which a rank differs from rank 0.
    """
    digests = transport.allgather_records(np.array([agreement_digest(description)], np.int64))
    if (digests == digests[0]).all():
        return
    everybody = transport.allgather_objects(description)
    for rank, theirs in enumerate(everybody):
        difference = first_difference(everybody[0], theirs)
        if difference is not None:
            raise MismatchError(f'rank 0 and rank {rank} disagree: {difference}')


def first_difference(mine, theirs):
    """First difference between two descriptions in words, or None."""
    for (what, value), (other_what, other_value) in zip(mine, theirs):
        if what != other_what:
            return f'{what} ({value!r}) is there where the other has {other_what}'
        if value != other_value:
            if isinstance(value, (tuple, list)) and what.startswith('names'):
                return _first_name(value, other_value)
            return f'{what} is {value!r} on the one and {other_value!r} on the other'
    return None if len(mine) == len(theirs) else 'different numbers of facts'


def _first_name(mine, theirs):
    for name in mine:
        if name not in theirs:
            return f'only the first has a parameter {name}'
    for name in theirs:
        if name not in mine:
            return f'only the second has a parameter {name}'
    return 'the same parameter names in another order'
